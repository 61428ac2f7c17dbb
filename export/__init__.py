"""Checkpoint to ONNX, and from ONNX to an engine."""
