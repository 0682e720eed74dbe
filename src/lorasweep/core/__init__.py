"""Records, protocols and errors that every other room shares; standard library only."""
