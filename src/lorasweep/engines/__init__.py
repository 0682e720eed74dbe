"""How trials train: alone in a Trainer, or many on one frozen base."""
