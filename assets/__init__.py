"""One module per stage of the graph: read, one call into training, commit, metadata."""
