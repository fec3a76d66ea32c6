"""The event log's way into MLflow, and MLflow's page."""
