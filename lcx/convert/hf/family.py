"""The contract of a Hugging Face family: config.json <-> model, and tensors <-> parameters, of one model_type.

A family is a frozen subclass in its own file in `families/`, with an entry in `families.FAMILIES`. A family that
differs from Llama only in a few switches or tensors derives from `llama_like.LlamaLike`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lcx.convert.core.rules import Rule
from lcx.convert.hf.rope_parameters import RopeDialect
from lcx.model import Decoder


@dataclasses.dataclass(frozen=True)
class Family:
    """One model_type.

    Attributes:
      model_type, architecture: their values in config.json; the architecture is the class that transformers builds.
      keys: the keys of config.json that `model` reads. Unknown keys whose names suggest a change of the computation are
        rejected for every family (`config`).
      embedding, head: names of the embedding and output head tensors; a tied model may store either.
      body: prefix of all tensor names except the head's.
      anchor: name, below `body`, of a tensor that every model has exactly once. The prefixes that wrappers add are
        recognised by what precedes it.
      layer: regular expression of the prefix of a layer's tensors, with the layer number as a group.
      buffers: regular expressions of stored tensors that follow from config.json.
      rope: the peculiarities of its rotary settings.
      rereads: whether transformers' `generate` recomputes the whole text once it exceeds longrope's original window.
      unpacks: quantization methods (quant_method in config.json) whose tensors are read as bfloat16.
    """

    model_type: str
    architecture: str
    keys: frozenset[str] = frozenset()
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    body: str = "model."
    anchor: str = "layers.0.input_layernorm.weight"
    layer: str = r"model\.layers\.(\d+)\."
    buffers: tuple[str, ...] = (r".*rotary_emb\.inv_freq",)
    rope: RopeDialect = RopeDialect()
    rereads: bool = False
    unpacks: frozenset[str] = frozenset()

    def model(self, config: Mapping[str, Any], *, dtype: str) -> Decoder:
        """The model that config.json describes, with transformers' defaults for missing keys.

        Raises:
          UserError: a missing or malformed value (read them with `values`), or an unsupported setting.
        """
        raise NotImplementedError

    def unread(self, config: Mapping[str, Any]) -> dict[str, str]:
        """Stored tensors that are no part of the model: regular expressions of their names -> what they are."""
        return {}

    def config(self, model: Decoder, *, dtype: str) -> dict[str, Any]:
        """config.json of the model, without the keys in `config.CARRIED`.

        Args:
          dtype: dtype of the weights next to it.

        Raises:
          UserError: the model has a property that this model_type cannot express.
        """
        raise NotImplementedError

    def rules(self, model: Decoder) -> list[Rule]:
        """The mapping between tensors and parameters, in the order in which transformers writes the tensors.

        Raises:
          UserError: the model has parts that this model_type has no tensors for.
        """
        raise NotImplementedError
