"""Sample images, scores and verdicts."""
