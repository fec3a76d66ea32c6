"""The library: everything that is computed. Never imports Dagster or MLflow."""
