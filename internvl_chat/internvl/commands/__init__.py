"""The command `internvl`: a table of commands, and the one that starts a training."""
