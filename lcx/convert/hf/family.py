"""The contract of a Hugging Face family: config.json <-> model, and tensors <-> parameters, of one model_type.

A family is a frozen subclass in a file of its own in `families/`, and an entry of `families.FAMILIES`. One that differs
from Llama in switches or in a few tensors starts from `llama_like.LlamaLike`.
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
      model_type, architecture: of config.json; the architecture is the class that transformers builds.
      keys: of config.json that `model` reads. A file with another key that sounds like a change of the function is
        refused, whatever the family.
      embedding, head: the tensors of the embedding and of the output head, of which a tied model may store either.
      body: what stands before the names of all tensors but the head.
      anchor: below `body`, a tensor that every model has once: wrappers are recognised by what stands before it.
      layer: regular expression of what the tensors of a layer start with, its number a group.
      buffers: regular expressions of stored tensors that follow from config.json.
      rope: what its rotary settings have of their own.
      rereads: whether `generate` of transformers reads the whole text again once it exceeds longrope's original window.
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

    def model(self, config: Mapping[str, Any], *, dtype: str) -> Decoder:
        """The model that config.json describes, with the defaults of transformers where it is silent.

        Raises:
          UserError: a missing or malformed value, a setting that is not supported. Values are read with `values`.
        """
        raise NotImplementedError

    def config(self, model: Decoder, *, dtype: str) -> dict[str, Any]:
        """config.json of the model, but for `config.CARRIED`.

        Args:
          dtype: of the weights beside it.

        Raises:
          UserError: the model has something that this model_type cannot express.
        """
        raise NotImplementedError

    def rules(self, model: Decoder) -> list[Rule]:
        """Which tensors are which parameters, in the order in which transformers writes them.

        Raises:
          UserError: the model has parts that this model_type has no tensors for.
        """
        raise NotImplementedError
