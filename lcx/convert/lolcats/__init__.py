"""The published LoLCATS files: feature maps and LoRA pairs that sit on a Hugging Face folder."""

from lcx import moved

__getattr__ = moved.names_of(__name__)
