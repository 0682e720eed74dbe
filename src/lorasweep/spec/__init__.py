"""The YAML file: its schema, its loader and its resolution into plans."""
