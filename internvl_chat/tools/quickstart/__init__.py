"""Data and model of shell/quickstart.sh."""
