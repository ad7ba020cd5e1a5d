"""Checks of gpu_check.py."""
