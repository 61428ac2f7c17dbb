"""Speed of the compressed model over the dense one, measured in pairs."""
