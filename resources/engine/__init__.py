"""Maps a worker over batches: in this process, or in a process per device."""
