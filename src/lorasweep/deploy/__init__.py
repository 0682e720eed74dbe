"""The winner put to work: exported as a folder, and predicting."""
