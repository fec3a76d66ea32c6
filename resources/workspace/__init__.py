"""A workspace: its paths, tables, staleness and set-up."""
