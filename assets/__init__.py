"""One module per stage of the graph: read, one call into training, commit, metadata."""

import warnings

import dagster as dg

# Every command imports assets; what Dagster thinks of its own parameters is not the user's
# business.
warnings.filterwarnings("ignore", category=dg.BetaWarning)
warnings.filterwarnings("ignore", category=dg.PreviewWarning)
