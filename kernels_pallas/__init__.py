"""Pallas kernels for GPU and TPU: one file per operator, with the same name and arguments as in `lcx.ops`."""
