"""From a finished sweep to documents that people and programs read."""
