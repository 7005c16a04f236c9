"""The rotary settings of config.json <-> Rope, in both spellings.

transformers 4 uses `rope_theta` and `rope_scaling` at the top level, transformers 5 `rope_parameters`. An export adds
what these cannot express, so that a later extension starts from the right original window:
`original_max_position_embeddings` at the top level, if the rope type has no such key, and the whole Rope under
`lcx_rope`, if it was written as another type (an "ntk" becomes a larger rope_theta). transformers accepts both keys
without a warning and keeps them.
"""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from lcx.convert.hf import rope_parameters
from lcx.convert.hf.rope_parameters import ORIGINAL, RopeDialect, to_hf
from lcx.errors import UserError
from lcx.rope import Rope, extended_window
from lcx.rope_fields import MOST_TOKENS, shown

log = logging.getLogger(__name__)

REMEMBERED = "lcx_rope"


def read(config: Mapping[str, Any], dialect: RopeDialect, head_dim: int) -> Rope:
    """The Rope of config.json, checked against the model_type and the head size.

    Raises:
      UserError: settings that contradict each other, have no effect, or are not supported by the model_type.
    """
    settings = [config.get(key) for key in ("rope_scaling", "rope_parameters")]
    nested = [list(value.values()) for value in settings if isinstance(value, Mapping)]
    if any(isinstance(value, Mapping) and value != values[0] for values in nested for value in values):
        raise UserError(
            "config.json has rotary settings that differ by layer type, supported is one for all layers"
        )
    rope = rope_parameters.read(config, dialect)
    if rope.partial_rotary_factor != 1 and not dialect.partial and rope.rope_type != "proportional":
        raise UserError(
            f"config.json has partial_rotary_factor {rope.partial_rotary_factor:g}, which model_type "
            f"{config['model_type']!r} does not support; remove the key"
        )
    if dialect.types is not None and rope.rope_type not in dialect.types:
        raise UserError(
            f"config.json has rope_type {rope.rope_type!r}, model_type {config['model_type']!r} supports "
            f"{' and '.join(dialect.types)}"
        )
    rope.frequencies(head_dim, 1)  # raises UserError if the settings do not fit the head size
    if rope.rope_type == "default" and config.get(ORIGINAL) == config.get("max_position_embeddings"):
        rope = dataclasses.replace(rope, original_max_position_embeddings=None)  # some files always state one
    return _remembered(config, rope, head_dim)


def _remembered(config: Mapping[str, Any], rope: Rope, head_dim: int) -> Rope:
    """The Rope that was exported, if it still has the frequencies of config.json's settings; else `rope`."""
    given = config.get(REMEMBERED)
    if given is None:
        return rope
    fields = {field.name for field in dataclasses.fields(Rope)}
    if not isinstance(given, Mapping) or not given.keys() <= fields:
        raise UserError(
            f"config.json has {REMEMBERED} {shown(given)}, expected fields of Rope: remove the key"
        )
    found = Rope(**given)
    for length in (1, MOST_TOKENS):  # a length in each regime of the types whose frequencies depend on it
        ours, theirs = found.frequencies(head_dim, length), rope.frequencies(head_dim, length)
        if not np.allclose(ours[0], theirs[0], rtol=1e-5, atol=0) or abs(ours[1] - theirs[1]) > 1e-5:
            log.warning("config.json: %s no longer matches its rotary settings, and is ignored", REMEMBERED)
            return rope
    return found


def window(rope: Rope, max_position_embeddings: int) -> int:
    """The window in tokens of a model with these settings. Raises UserError if it exceeds `MOST_TOKENS`.

    With a linear scaling that states no original window, max_position_embeddings may mean the window before or after
    scaling. It is taken as the window after scaling; `extend` allows a context_length of up to factor times it.
    """
    found = extended_window(rope, max_position_embeddings)
    if found > MOST_TOKENS:
        raise UserError(
            f"config.json has a RoPE factor {rope.factor:g}, which makes a window of {found} tokens, expected at most"
            f" {MOST_TOKENS}: change factor"
        )
    return found


def keys(dialect: RopeDialect, rope: Rope, window: int, head_dim: int) -> dict[str, Any]:
    """The keys of config.json for a Rope; `window` is the max_position_embeddings of the same file.

    Raises:
      UserError: the family, or the format, cannot express the Rope.
    """
    written = dialect.written(rope, head_dim)
    found = dialect.spelled(_spelled(written, window, head_dim), written, window)
    original = rope.original_max_position_embeddings
    if original not in (None, window) and written.rope_type in ("default", "linear", "ntk", "proportional"):
        found[ORIGINAL] = original
    again = rope_parameters.read(found | {"max_position_embeddings": window}, dialect)
    if again.rope_type != rope.rope_type:
        fields = {
            field.name: (getattr(rope, field.name), field.default) for field in dataclasses.fields(Rope)
        }
        found[REMEMBERED] = {name: value for name, (value, default) in fields.items() if value != default}
    return found


def _spelled(rope: Rope, window: int, head_dim: int) -> dict[str, Any]:
    new = to_hf(rope, max_position_embeddings=window, head_dim=head_dim)
    old = {key: value for key, value in new.items() if key != "rope_theta"}
    found: dict[str, Any] = {"rope_theta": new["rope_theta"], "rope_scaling": old, "rope_parameters": new}
    partial = new.get("partial_rotary_factor")
    if partial is not None:
        found["partial_rotary_factor"] = partial
    if new["rope_type"] == "default":
        found["rope_scaling"] = None
    if new["rope_type"] == "longrope":
        found[ORIGINAL] = new[ORIGINAL]
    return found
