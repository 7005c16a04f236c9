"""Tensor files, independent of the model: readers that validate everything, and atomic writers."""
