"""The frozen base, its adapter, its checkpoint and its logits."""
