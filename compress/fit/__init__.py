"""Layer by layer: targets, fits, what becomes of a fit that fails, embeddings and head."""
