"""Pallas kernels for GPU and TPU: a file per operator, with the name and the arguments that it has in `lcx.ops`."""
