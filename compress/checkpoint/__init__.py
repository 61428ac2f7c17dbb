"""OUT/checkpoint: written, read, loaded as a model, and written again as a plain one."""
