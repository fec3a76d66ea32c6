"""What no single stage owns."""
