"""Which candidates a source holds, and what the files beside them say."""
