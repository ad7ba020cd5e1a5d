"""Phi-3 at upstream's paths."""
