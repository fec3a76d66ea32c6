"""Borrowed networks behind small adapters."""
