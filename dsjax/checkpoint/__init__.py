"""Weights on disk: released files read and written, and the checkpoints of a run."""
