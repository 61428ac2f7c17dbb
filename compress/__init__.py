"""Compression of causal language models: calibrate, rotate, fit structured matrices, write a checkpoint."""
