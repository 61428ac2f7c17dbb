"""Serving by NVIDIA Triton Inference Server: the model repository, and the model in it that answers text with text."""
