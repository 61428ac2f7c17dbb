"""Engines of TensorRT and TensorRT-RTX, and the plugins that they load."""
