"""Hugging Face folders: config.json and tensors of a family <-> model and parameters."""
