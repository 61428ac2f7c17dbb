"""Checkpoint to ONNX, and from ONNX to an engine."""

__distribution__ = "procrustes-llm"
