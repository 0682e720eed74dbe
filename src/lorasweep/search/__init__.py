"""The study: which point is next, and which trial is given up. The only importer of Optuna."""
