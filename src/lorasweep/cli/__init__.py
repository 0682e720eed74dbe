"""The command line: parse, call down, print."""
