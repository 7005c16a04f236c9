"""Families whose published folders hold a text model and encoders of images or sounds; ../text_part.py reads them."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Whole:
    """A model_type whose folders hold a text model and more.

    Attributes:
      architecture: its value in config.json.
      text: the model_type of the text model, where text_config does not name it.
      tied: whether the output head is the embedding, where config.json does not say.
      defaults: (key, value) of settings that text_config may leave out, and a folder of text alone may not.
    """

    architecture: str
    text: str
    tied: bool
    defaults: tuple[tuple[str, Any], ...] = ()


#: The published files of Gemma 3 state what their model does not have in common with the one of 4B.
_GEMMA3 = (("vocab_size", 262_208), ("num_attention_heads", 8), ("max_position_embeddings", 131_072))
WHOLES = {
    "gemma3": Whole("Gemma3ForConditionalGeneration", "gemma3_text", tied=True, defaults=_GEMMA3),
    "gemma4": Whole("Gemma4ForConditionalGeneration", "gemma4_text", tied=True),
    "llama4": Whole("Llama4ForConditionalGeneration", "llama4_text", tied=False),
    "mistral3": Whole("Mistral3ForConditionalGeneration", "mistral", tied=False),
}
