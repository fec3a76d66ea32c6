"""The training loop and all that it does at each step."""
