"""What a sample's prompt says: draws, spelling, tokens, statistics."""
