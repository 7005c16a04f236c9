"""The version of lcx, which checkpoints and results record."""

__version__ = "0.1.0"
