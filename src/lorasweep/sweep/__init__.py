"""The only room where all stages meet."""
