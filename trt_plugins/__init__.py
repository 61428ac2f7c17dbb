"""The place of the TensorRT plugins for the operators of domain `procrustes`; see README.md beside this file."""
