"""Borrowed networks that look at images."""
