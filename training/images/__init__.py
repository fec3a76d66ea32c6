"""From bytes to pixels, in worker processes, and small images for the pages."""
