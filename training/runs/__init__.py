"""A run as files: its folder, training set, events, checkpoints that stay, bundle, release."""
