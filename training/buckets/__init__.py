"""Where an image goes: geometry, bucket plans, assignment, crops."""
