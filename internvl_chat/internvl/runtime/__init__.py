"""Processes of a run: signals, shutdown, watchdog, output folder."""
