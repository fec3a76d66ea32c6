"""Which images go on, with which tags, captions and scores."""
