"""From a checkpoint to ONNX: operators with bodies, the decoder around them, and its external weights."""
