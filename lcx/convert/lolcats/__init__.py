"""The published LoLCATS files: feature maps and LoRA pairs that extend the model of a Hugging Face folder."""

from lcx import moved

__getattr__ = moved.names_of(__name__)
