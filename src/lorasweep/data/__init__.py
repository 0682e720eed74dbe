"""Sources, cleaning, splits, leakage and tokens: from what the spec names to a Corpus."""
