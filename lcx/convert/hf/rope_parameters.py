"""Transformers' rotary settings, `rope_scaling` and `rope_parameters`, <-> Rope.

`hf/rope.py` adds the limits of each family and the extra keys of an export.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

from lcx import moved, rope_fields
from lcx.errors import UserError
from lcx.rope import Rope, ntk_theta
from lcx.rope_fields import FIELDS, is_number, known_type, shown, token_count

ORIGINAL = "original_max_position_embeddings"
_NO_EFFECT = "finetuned"  # an informational key in the files of YaRN's authors


@dataclasses.dataclass(frozen=True)
class RopeDialect:
    """The peculiarities of a family's rotary settings.

    Attributes:
      types: the supported rope types; None: all.
      partial: whether partial_rotary_factor is supported.
      original_window: longrope's original window if the top level of config.json states none; a value in rope_scaling
        is then not read. None: it may be in either place.
    """

    types: tuple[str, ...] | None = None
    partial: bool = False
    original_window: int | None = None

    def type_of(self, name: str, given: Mapping[str, Any]) -> str:
        """The current name of a rope type; `given` is its dict. Old files use other names."""
        return "longrope" if name == "su" else name

    def written(self, rope: Rope, head_dim: int) -> Rope:
        """The same rotation expressed in a supported type. Raises UserError if there is none."""
        return rope

    def spelled(self, keys: dict[str, Any], rope: Rope, window: int) -> dict[str, Any]:
        """Adapts the config.json keys for `rope` and max_position_embeddings = `window` to the family's conventions."""
        return keys


def read(
    config: Mapping[str, Any],
    dialect: RopeDialect = RopeDialect(),
    *,
    layer_type: str | None = None,
) -> Rope:
    """The Rope of a Hugging Face config.json, as transformers 5.23 builds it, with all defaults filled in.

    Reads `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5), and the related keys at the top level.
    If `rope_parameters` holds one dict per layer type, `layer_type` selects one. If both spellings are present, or a
    setting is stated in two places, they must agree. Deliberate differences from transformers: what it silently ignores
    raises UserError (a factor without rope_type, a missing rope_theta, an unknown key); a dynamic scaling that an
    enlarged max_position_embeddings disables is corrected with a warning; and `truncate` also applies within a dict of
    one layer type.
    """
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(key), Mapping | None):
            found = f"{key} is {shown(config[key])}"
            raise UserError(f"{found}, expected an object with rope_type: change it in config.json")
    sources = [key for key in ("rope_scaling", "rope_parameters") if config.get(key)]
    ropes = [_from_source(config, source, layer_type, dialect) for source in sources or ("rope_parameters",)]
    for field in dataclasses.fields(Rope):
        values = [getattr(rope, field.name) for rope in ropes]
        one_is_silent = field.name == ORIGINAL and None in values
        if len(ropes) == 2 and values[0] != values[1] and not one_is_silent:
            raise UserError(
                f"rope_scaling and rope_parameters disagree: {field.name} is {shown(values[0])} by the one and"
                f" {shown(values[1])} by the other: remove one of them from config.json"
            )
    return ropes[0]


def _from_source(
    config: Mapping[str, Any], source: str, layer_type: str | None, dialect: RopeDialect
) -> Rope:
    source, given = _parameters(config, source, layer_type)
    nested = "." in source
    rope_fields.check_keys([key for key in given if key != _NO_EFFECT], source)
    name = _type(source, given, dialect)
    values = {k: v for k, v in given.items() if v is not None and k not in ("type", _NO_EFFECT)}
    values |= {"rope_type": name, "rope_theta": _theta(config, source, given, name)}
    if values.get("factor") == 1 and "factor" not in sum(FIELDS[name], ()):
        del values["factor"]  # redundant, so without effect
    if name == "yarn" and "truncate" in given:
        values["truncate"] = given["truncate"] or False  # null means false in transformers
    partial = _stated(config, source, given, "partial_rotary_factor")
    if partial is not None:
        values["partial_rotary_factor"] = partial
    if name == "dynamic":
        values[ORIGINAL] = _dynamic_window(config, given)
    elif name in ("yarn", "llama3", "longrope"):
        values |= _window(config, source, given, name, nested=nested, dialect=dialect)
    elif not nested:
        values[ORIGINAL] = _stated(config, source, given, ORIGINAL)
    return Rope(**values)


def _parameters(
    config: Mapping[str, Any], source: str, layer_type: str | None
) -> tuple[str, Mapping[str, Any]]:
    """(key in config.json, for error messages; the rotary parameters of one layer type)."""
    given = config.get(source) or {}
    nested = {k: v for k, v in given.items() if isinstance(v, Mapping)}
    if not nested:
        return source, given
    same = all(v == next(iter(nested.values())) for v in nested.values())
    chosen = next(iter(nested)) if layer_type is None and same else layer_type
    if chosen not in nested:
        expected = f"{source} has one for each of {', '.join(shown(key)[1:-1] for key in nested)}"
        raise UserError(f"no RoPE for layer type {chosen!r}, {expected}: change layer_types")
    return f"{source}.{chosen}", nested[chosen]


def _stated(config: Mapping[str, Any], source: str, given: Mapping[str, Any], key: str) -> Any:
    """A setting from the dict or from the top level; UserError if both state it and differ.

    For dicts per layer type, the top level gives the default for all of them.
    """
    inner, outer = given.get(key), config.get(key)
    if None not in (inner, outer) and inner != outer and "." not in source:
        raise UserError(
            f"{key} is {shown(inner)} in {source} and {shown(outer)} at the top level: remove one of them from"
            " config.json"
        )
    return outer if inner is None else inner


def _type(source: str, given: Mapping[str, Any], dialect: RopeDialect) -> str:
    names = [given[key] for key in ("rope_type", "type") if given.get(key) is not None]
    if not names and given.get("factor") is not None:
        found = f"{source} has factor {shown(given['factor'])} and no rope_type"
        raise UserError(f"{found}, which would scale nothing: add rope_type in config.json")
    types = [known_type(dialect.type_of(name, given) if isinstance(name, str) else name) for name in names]
    if len(set(types)) > 1:
        found = f"{source} has rope_type {names[0]!r} and type {names[1]!r}"
        raise UserError(f"{found}: remove one of them from config.json")
    return types[0] if types else "default"


def _theta(config: Mapping[str, Any], source: str, given: Mapping[str, Any], name: str) -> Any:
    for place in (given, config):
        if "rope_theta" in place and place["rope_theta"] is None:
            raise UserError(f"rope_theta is null in or next to {source}, expected a number: set it")
    theta = _stated(config, source, given, "rope_theta")
    if theta is not None:
        return theta
    v5 = source.startswith("rope_parameters")
    if not v5 and "rope_theta" in (config.get("rope_parameters") or {}):
        found = f"rope_theta is in rope_parameters, but missing in and next to {source} ({name})"
        raise UserError(f"{found}: keep one of the two in config.json, with rope_theta")
    if v5 and name != "default":
        raise UserError(f"rope_theta is missing in and next to {source} ({name}): add the model's base")
    return 10000.0  # the meaning of files that predate the key


def _window(
    config: Mapping[str, Any],
    source: str,
    given: Mapping[str, Any],
    name: str,
    *,
    nested: bool,
    dialect: RopeDialect,
) -> dict[str, Any]:
    """The original window of yarn, llama3 and longrope, and the factor if it is implied by the two windows."""
    enlarged = config.get("max_position_embeddings")
    # A dict of one layer type states its own original window; the top level is not used for it.
    original = given.get(ORIGINAL) if nested else _stated(config, source, given, ORIGINAL)
    default = dialect.original_window
    if default is not None and name == "longrope" and not nested and config.get(ORIGINAL) is None:
        if original not in (None, default):
            raise UserError(
                f"{ORIGINAL} is {shown(original)} in {source} and missing at the top level, where model_type"
                f" {config.get('model_type')!r} has it (and transformers takes {default}): set it there too"
            )
        original = default
    original = token_count(ORIGINAL, enlarged if original is None else original)
    values: dict[str, Any] = {ORIGINAL: original}
    # longrope implies the factor if it is null or absent, yarn only if it is null.
    implied = name == "longrope" or (name == "yarn" and "factor" in given)
    if implied and given.get("factor") is None and enlarged:
        values["factor"] = max(1.0, token_count("max_position_embeddings", enlarged) / original)
    return values


def _dynamic_window(config: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
    """The original window of a dynamic scaling: max_position_embeddings, unless the file shows that it was enlarged."""
    window, factor = config.get("max_position_embeddings"), given.get("factor")
    original = _stated(config, "rope_scaling", given, ORIGINAL)
    if not (is_number(window) and is_number(factor) and is_number(original)) or original == window:
        return window
    if abs(original * factor - window) >= 1:
        return window
    warnings.warn(
        f"dynamic RoPE: max_position_embeddings {window} is already {factor:g} x the original {original}, so"
        f" transformers scales nothing below {window} tokens; here it scales from {original} (for the same"
        f" there, set max_position_embeddings to {original} in config.json)",
        stacklevel=4,
    )
    return original


def to_hf(rope: Rope, *, max_position_embeddings: int, head_dim: int | None = None) -> dict[str, Any]:
    """`rope_parameters` from which transformers computes the same frequencies.

    Args:
      max_position_embeddings: the value in config.json; take it from `written_max_position_embeddings`.
      head_dim: needed only for "ntk", which is written as the default type with an enlarged rope_theta.

    Raises:
      UserError: the format cannot express the Rope (a custom function, a list of inv_freq, or dynamic with an enlarged
        max_position_embeddings).
    """
    if callable(rope.rope_type):
        found = f"rope_type is the function {getattr(rope.rope_type, '__name__', rope.rope_type)}"
        raise UserError(f"{found}, unknown to transformers: save with format='lcx' or change rope_type")
    if rope.inv_freq is not None:
        raise UserError("transformers has no list of inv_freq in its configs: save with format='lcx'")
    if rope.rope_type == "ntk":
        if head_dim is None:
            raise UserError("rope_type 'ntk' becomes a rope_theta that depends on head_dim: pass head_dim")
        theta = ntk_theta(rope, head_dim)
        rope = dataclasses.replace(rope, rope_type="default", factor=None, rope_theta=theta)
    name = known_type(rope.rope_type)
    out: dict[str, Any] = {"rope_type": name, "rope_theta": rope.rope_theta}
    if rope.partial_rotary_factor != 1 or name == "proportional":
        out["partial_rotary_factor"] = rope.partial_rotary_factor
    for field in dataclasses.fields(rope):
        value = getattr(rope, field.name)
        if field.name in FIELDS[name][0] + FIELDS[name][1] and value != field.default:
            out[field.name] = list(value) if isinstance(value, tuple) else value
    if name == "dynamic":  # transformers has no key for it here: it scales from max_position_embeddings
        original = out.pop("original_max_position_embeddings")
        if original != max_position_embeddings:
            found = f"transformers would scale dynamic RoPE from {max_position_embeddings} tokens on"
            raise UserError(f"{found}: write max_position_embeddings {original}, its original window")
    return out


def written_max_position_embeddings(rope: Rope, max_position_embeddings: int) -> int:
    """The max_position_embeddings to write to config.json: the window, except for dynamic, the original window."""
    original = rope.original_max_position_embeddings
    return original if rope.rope_type == "dynamic" and original else max_position_embeddings


__getattr__ = moved.names_of(__name__)
