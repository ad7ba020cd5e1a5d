"""Checkpoints of a run: write, verify, rotate, resume."""
