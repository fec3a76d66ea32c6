"""The schemas of all tables."""
