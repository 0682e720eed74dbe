"""Runs, metrics, models and environments. The only importer of MLflow."""

import os

# MLflow starts its telemetry client while it is imported, and a package's __init__ is the one
# place that surely runs before any module of this room imports it. Whoever set it is obeyed.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
