"""Exact rewrites: what changes the weights and leaves the function as it is."""
