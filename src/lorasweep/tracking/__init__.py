"""Runs, metrics, models and environments. The only importer of MLflow."""
