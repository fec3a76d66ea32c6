"""Memory, operations, time and cost of a run, from configurations alone."""
