"""Command-line tools; see README.md."""
