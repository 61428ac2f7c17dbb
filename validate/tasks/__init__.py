"""Zero-shot tasks by log-likelihood."""
