"""Gradients, optimizer and averaged weights, on one rank or many."""
