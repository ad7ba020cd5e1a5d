"""Sample lengths to an epoch plan, and a plan to packed sequences."""
