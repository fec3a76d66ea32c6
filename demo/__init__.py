"""The embedded default: drawn images with ground truth and tiny models of the real classes."""
