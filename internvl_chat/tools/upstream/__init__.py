"""The data tools that upstream has, too."""
