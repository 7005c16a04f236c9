"""The facts about a model that are stored with its results: size, context window, and RoPE scaling."""

import hashlib
from typing import Any

import jax
import numpy as np

from lcx.checkpoint.fingerprint import fingerprint
from lcx.extend import rotaries
from lcx.model import Decoder, num_params


def identity(model: Decoder, params: Any) -> str:
    """A name of a model with its weights: equal for equal models, and on any mesh."""
    leaves = [int(fingerprint(leaf)) for leaf in jax.tree.leaves(params)]
    return hashlib.sha256(f"{model!r} {leaves}".encode()).hexdigest()[:16]


def facts(model: Decoder) -> dict[str, Any]:
    """Facts about a model as JSON.

    `window` is the model's context window and `original_window` that of its pretraining, in tokens; they are equal if
    the context was not extended. `rope_type` and `rope` are the scaling, such as "yarn" and "yarn x4".
    """
    ropes = [rope for rope, _ in rotaries(model)]
    scaled = [rope for rope in ropes if rope.rope_type != "default"] or ropes
    originals = [
        rope.original_max_position_embeddings for rope in scaled if rope.original_max_position_embeddings
    ]
    rope_type = _name(scaled[0].rope_type) if scaled else "none"
    factor = scaled[0].factor if scaled else None
    return {
        "num_params": num_params(model),
        "window": model.max_position_embeddings,
        "original_window": min(originals, default=model.max_position_embeddings),
        "rope_type": rope_type,
        "rope": f"{rope_type} x{factor:g}" if factor else rope_type,
        "dtype": model.dtype,
        "model_type": model.model_type,
    }


def varies(model: Decoder) -> bool:
    """Whether rotary frequencies depend on the length of the row, as those of dynamic NTK and LongRoPE do."""
    window = model.max_position_embeddings
    return any(
        not np.array_equal(rope.frequencies(dim, window)[0], rope.frequencies(dim, 4 * window)[0])
        for rope, dim in rotaries(model)
        if dim is not None  # the size of its heads is known
    )


def _name(rope_type: Any) -> str:
    return getattr(rope_type, "__name__", str(rope_type))
