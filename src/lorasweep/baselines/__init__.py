"""References to beat, each of which learns from the training split at most."""
