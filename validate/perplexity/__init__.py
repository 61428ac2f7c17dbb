"""Perplexity of the dense and the compressed model on the same windows."""
