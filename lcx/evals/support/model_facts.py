"""What results say about the model that they belong to: size, window, and how its positions are scaled."""

from typing import Any

from lcx.extend import rotaries
from lcx.model import Decoder, num_params


def facts(model: Decoder) -> dict[str, Any]:
    """JSON-ready facts.

    `window` is the context that the model is meant for, `original_window` the one of its pretraining (equal where
    nothing was extended), `rope_type` and `rope` name the scaling, as in "yarn" and "yarn x4".
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


def _name(rope_type: Any) -> str:
    return getattr(rope_type, "__name__", str(rope_type))
