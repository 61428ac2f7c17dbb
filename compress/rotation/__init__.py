"""Which rotation the residual stream gets."""
