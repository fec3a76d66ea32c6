"""Handles on the outside world: the workspace, the warehouse, devices, the trainer, MLflow."""
