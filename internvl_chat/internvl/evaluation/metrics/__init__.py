"""Scores of answers, one module per kind of answer."""
