"""Step time, FLOPs and MFU of a run."""
