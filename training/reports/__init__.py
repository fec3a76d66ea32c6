"""Pages, charts, contact sheets and model cards."""
