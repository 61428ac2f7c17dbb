"""The place of the TensorRT plugins for the operators of domain `procrustes`; README.md says what comes."""

__distribution__ = "procrustes-llm"
