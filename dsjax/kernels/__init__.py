"""One file per kernel: its plain meaning, the version for each backend, and the choice."""
