"""Sections of the page that report.py writes."""
