"""Hyperparameter sweeps and honest comparisons for text classifiers fine-tuned with LoRA."""
