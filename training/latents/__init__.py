"""Latents: encoding, files, and the exchange with other trainers."""
