"""Facts about images and how they become samples. Never imports torch."""
