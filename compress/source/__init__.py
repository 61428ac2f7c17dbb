"""From a model's name to its files, its config and its tensors."""
