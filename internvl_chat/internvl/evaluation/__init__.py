"""Answers of a model to evaluation sets, and their scores."""
