"""One annotation line to one sample, samples to one batch."""
