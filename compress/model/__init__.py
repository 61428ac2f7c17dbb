"""The decoder in PyTorch over structured linears: blocks, skips, masks, config."""
