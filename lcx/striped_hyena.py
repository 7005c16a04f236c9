"""StripedHyena 2, the architecture of Evo 2: short, medium and long convolutions interleaved with attention.

(Ku et al. 2025, "Systems and Algorithms for Convolutional Multi-Hybrid Language Models at Scale"; Brixi et al. 2025,
"Genome modeling and design across all domains of life with Evo 2".)
"""

import logging
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from lcx.errors import UserError, naming_flags
from lcx.mixers.attention import Attention
from lcx.mixers.hyena import HyenaLI, HyenaMR, HyenaSE
from lcx.mlps.gated import GatedMlp
from lcx.model import Block, Decoder, map_mixers, stages_of
from lcx.rope import Rope

log = logging.getLogger(__name__)

LETTERS = {"S": "Hyena-SE", "D": "Hyena-MR", "H": "Hyena-LI", "*": "attention"}


def striped_hyena(
    *,
    pattern: str,
    hidden_size: int,
    intermediate_size: int,
    num_heads: int,
    max_position_embeddings: int,
    se_groups: int,
    mr_groups: int,
    vocab_size: int = 512,
    se_length: int = 7,
    mr_length: int = 128,
    num_modes: int = 16,
    featurizer_length: int = 3,
    init_length: int = 8192,
    rope: Rope = Rope(),  # noqa: B008 (frozen)
    activation: str = "gelu",
    activated_layers: int | None = 1,
    norm_eps: float = 1e-6,
    tie_word_embeddings: bool = True,
    dtype: str = "float32",
    remat: str = "none",
    implementation: str | None = None,
    fp8: bool = False,
) -> Decoder:
    """A StripedHyena 2 model.

    Args:
      pattern: one letter per layer: S, D and H for Hyena-SE, -MR and -LI, * for attention, as in Evo 2's configurations
        ("SDH*SDHSDH*...").
      num_heads: attention heads, each of size hidden_size / num_heads.
      se_groups, mr_groups: number of filters in a layer; hidden_size / groups channels share one filter.
      init_length: the sequence length, in tokens, that the filters are initialised for.
      activation: activation of the MLPs in the first `activated_layers` layers (None: in all layers). The other layers
        multiply gate and up without an activation. Evo 2 was trained this way: only layer 0 has its gelu.
      fp8: whether the input projections of the Hyena layers run in FP8, as published for Evo 2 1B, 20B and 40B.
      implementation: of convolutions and attention, see ops; None picks the fastest valid one.

    Raises:
      UserError: an unknown letter, or a hidden_size that is not a multiple of num_heads or a number of groups.
    """
    unknown = sorted(set(pattern) - set(LETTERS))
    if unknown or not pattern:
        expected = ", ".join(f"{letter} ({name})" for letter, name in LETTERS.items())
        raise UserError(f"pattern {pattern!r}: found {''.join(unknown)!r}, expected letters {expected}")
    for name, parts in (("num_heads", num_heads), ("se_groups", se_groups), ("mr_groups", mr_groups)):
        if hidden_size % parts:
            raise UserError(f"hidden_size {hidden_size} is not a multiple of {name} {parts}; change {name}")
    shared: dict[str, Any] = {
        "num_channels": hidden_size,
        "featurizer_length": featurizer_length,
        "implementation": implementation,
        "fp8": fp8,
        "parent": None,
    }
    head_dim = hidden_size // num_heads
    mixers = {
        "S": HyenaSE(num_groups=se_groups, filter_length=se_length, **shared),
        "D": HyenaMR(num_groups=mr_groups, filter_length=mr_length, init_length=init_length, **shared),
        "H": HyenaLI(num_modes=num_modes, init_length=init_length, **shared),
        "*": Attention(
            num_heads, num_heads, head_dim, rope, o_bias=True, implementation=implementation, parent=None
        ),
    }
    first = len(pattern) if activated_layers is None else activated_layers

    def block(i: int, letter: str) -> Block:
        mlp = GatedMlp(intermediate_size, activation=activation if i < first else "identity", parent=None)
        return Block(mixer=mixers[letter], mlp=mlp, norm_eps=norm_eps, parent=None)

    return Decoder(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        stages=stages_of(tuple(block(i, letter) for i, letter in enumerate(pattern))),
        max_position_embeddings=max_position_embeddings,
        norm_eps=norm_eps,
        tie_word_embeddings=tie_word_embeddings,
        model_type="striped_hyena",
        dtype=dtype,
        remat=remat,
        parent=None,
    )


PROJECTIONS = ("fp8", "plain")
_HYENA = (HyenaSE, HyenaMR, HyenaLI)


@naming_flags("input_projections")
def with_input_projections(
    model: Decoder, params: Mapping[str, Any], kind: str
) -> tuple[Decoder, dict[str, Any]]:
    """The model with its Hyena layers' input projections computed in FP8 ("fp8") or not ("plain"), and its parameters.

    FP8 scales that are there are kept; where there are none, the scaling is current (ops.fp8). Leaving FP8 out is
    warned about: a model trained with it computes other numbers.

    Raises:
      UserError: another kind, or a model without Hyena layers.
    """
    if kind not in PROJECTIONS:
        raise UserError(f"input_projections is {kind!r}, expected one of {', '.join(PROJECTIONS)}")
    paths = {
        f"stages_{s}/block_{b}/mixer/in_proj/fp8_scales": (stage.repeat, block.mixer.fp8)
        for s, stage in enumerate(model.stages)
        for b, block in enumerate(stage.pattern)
        if isinstance(block.mixer, _HYENA)
    }
    if not paths:
        found = f"input_projections is {kind!r}, and the model has no Hyena layers"
        raise UserError(f"{found}, which it is for: leave out input_projections")
    flat = flatten_dict(dict(params), sep="/")
    for path, (repeat, has) in paths.items():
        if kind == "plain" and has:
            flat.pop(path)
        elif kind == "fp8" and not has:
            flat[path] = jnp.zeros((repeat, 2), jnp.float32)
    if kind == "plain" and any(has for _, has in paths.values()):
        log.warning(
            "the input projections are computed without FP8, with which the checkpoint was trained: its numbers will "
            "differ from the published ones (Evo 2 1B, 20B and 40B lose most of their accuracy)"
        )

    def changed(mixer):
        return mixer.clone(fp8=kind == "fp8", parent=None) if isinstance(mixer, _HYENA) else mixer

    return map_mixers(model, changed), unflatten_dict(flat, sep="/")
