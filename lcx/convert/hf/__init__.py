"""Hugging Face folders: config.json and tensors of a family <-> model and parameters."""

from lcx import moved

__getattr__ = moved.names_of(__name__)
