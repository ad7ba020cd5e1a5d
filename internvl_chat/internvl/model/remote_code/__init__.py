"""Code files that are written into a checkpoint; nothing here imports them."""
