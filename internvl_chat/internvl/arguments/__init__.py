"""Dataclasses of flags, their validation, and DeepSpeed's configuration file."""
