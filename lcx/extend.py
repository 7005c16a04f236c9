"""Applies a RoPE scaling to a pretrained model, and rejects one that would not do what was asked.

A frequent mistake in context extension is a scaling that has no effect: a key that nothing reads, a factor of 1, or a
window that was already enlarged. Here nothing is silently ignored, and the resulting frequencies are compared with
the unscaled ones before anything runs.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lcx import mixers
from lcx import model as model_lib
from lcx.errors import UserError, naming_flags
from lcx.mixers import Rotary
from lcx.mixers.attention import Attention
from lcx.model import Decoder
from lcx.rope import ROPE_TYPES, Rope, extended_window
from lcx.rope_fields import FIELDS, MOST_TOKENS, close, is_number, known_type, shown, token_count

log = logging.getLogger(__name__)

_ADVICE = '{"rope_type": "yarn", "factor": 4.0}'
_ORIGINAL = "original_max_position_embeddings"
#: Settings of a rope_type that belong to the model and not to its factor.
_OF_MODEL = {"llama3": ("low_freq_factor", "high_freq_factor"), "yarn": ("mscale", "mscale_all_dim")}
FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"


def extend(
    rope: Rope,
    *,
    max_position_embeddings: int,
    rope_scaling: Mapping[str, Any] | None = None,
    context_length: int | float | None = None,
    head_dim: int | None = None,
) -> tuple[Rope, int]:
    """(the scaled Rope, the new max_position_embeddings) for a context of `context_length` tokens.

    A rope_type in `rope_scaling` replaces the model's scaling, but rope_theta and partial_rotary_factor are kept unless
    given, as are mscale and mscale_all_dim from YaRN to YaRN. {"rope_theta": B} without a type changes the base and
    keeps the model's scaling, if it has one.

    The factor is always relative to the original window L: original_max_position_embeddings of `rope_scaling`, else of
    the model's rope, else max_position_embeddings. So extending by 4 and then by 16 gives 16, not 64. If the factor is
    missing, it is context_length / L; if context_length is missing, it is factor * L. llama3 is an exception: its
    factor is not a ratio of windows (Llama 3.1 has the factor 8, but 16 times its original window). A given llama3
    factor is therefore kept for any context_length, and a llama3 model can be used at any context_length unchanged.

    A larger context without scaling must be requested explicitly: {"rope_type": "default"}, possibly with a rope_theta.

    Args:
      rope: of the model.
      max_position_embeddings: the model's present context window, in tokens.
      rope_scaling: in Hugging Face's format ("type" is accepted for "rope_type"); None: keep the model's scaling.
      context_length: the new context window in tokens; None: what rope_scaling implies.
      head_dim: size of a head, for the check that the frequencies change. If None, the check assumes 128.

    Raises:
      UserError: an unknown or unused key, factor * L differs from context_length, the factor is 1, the scaling does
        not change the frequencies, L is not known, or a larger context is requested without a scaling.
    """
    target = None if context_length is None else token_count("context_length", context_length)
    if rope_scaling is None:
        return _as_it_is(rope, max_position_embeddings, target)
    values = _values(rope, rope_scaling)
    if "rope_type" not in values:
        return _on_another_base(rope, max_position_embeddings, values, target, head_dim)
    name = values["rope_type"]
    spread = rope.rope_type == "proportional" and rope.partial_rotary_factor != 1
    if spread and name in ROPE_TYPES and name != "proportional":
        raise UserError(
            f"rope_type {name!r} would rotate other dimensions of a head than the model's, 'proportional': set"
            " rope_type = 'proportional' in rope_scaling"
        )
    original = _original(rope, max_position_embeddings, values)
    if callable(name) or "factor" in sum(FIELDS[name], ()):
        values, target = _factor_and_target(values, original, target)
    values[_ORIGINAL] = original
    with _of_rope_scaling():
        new = Rope(**(_kept(rope, values) | values))
    window = max_position_embeddings if target is None else target
    inferred = context_length is None and _ORIGINAL not in rope_scaling
    if name == "default" or (name == "llama3" and context_length is None):
        _refuse_shorter(max_position_embeddings, target)
        window = max(window, max_position_embeddings)
    if window < max_position_embeddings and inferred:
        raise UserError(
            f"factor {new.factor:g} times the original window {original} is {window}, below the present"
            f" {max_position_embeddings}: change factor in rope_scaling (relative to {original}) or set context_length"
        )
    if window > MOST_TOKENS:
        raise UserError(
            f"the window would be {window} tokens, expected at most {MOST_TOKENS}: lower factor in rope_scaling"
        )
    kept = name == rope.rope_type and window > max_position_embeddings
    # {"rope_type": "default"} with a context_length explicitly asks for no scaling, so it needs no effect.
    if name != "default" or context_length is None:
        _assert_effect(rope, new, window, head_dim, but_the_window=kept)
    if _is_scaled(rope) and name != rope.rope_type:
        fate = "removed" if name == "default" else f"replaced by {getattr(name, '__name__', name)!r}"
        log.warning("the model's RoPE scaling (%s) is %s, as rope_scaling asks", _title(rope), fate)
    return new, window


def rotaries(model: Decoder, kind: str | None = None) -> list[Rotary]:
    """The different rotary embeddings of a model, in depth order, each with the size of the heads that it rotates.

    Args:
      kind: of layers, as in `kind_of`; None: all.
    """
    found = (
        mixers.rotary(block.mixer)
        for stage in model.stages
        for block in stage.pattern
        if kind is None or kind_of(block.mixer) == kind
    )
    return list(dict.fromkeys(one for one in found if one is not None))


@naming_flags("rope_scaling", "context_length")
def extend_model(
    model: Decoder, rope_scaling: Mapping[str, Any] | None, context_length: int | None
) -> Decoder:
    """The model with its context extended; unchanged if both arguments are None.

    `extend` is applied to the rotary embeddings that Decoder.scaled_layers names: all, or those of the layers without
    a window. Layers without positions stay as they are. `rope_scaling` may instead hold one scaling for each kind of
    layer, {"full_attention": {...}, "sliding_attention": {...}}; a kind that it leaves out stays as it is.

    Raises:
      UserError: as in `extend`, or the model has no rotary embedding that would be scaled.
    """
    if rope_scaling is None and context_length is None:
        return model
    if not rotaries(model):
        raise UserError(
            "rope_scaling and context_length need a model with rotary position embeddings: leave out both"
        )
    if _sees_far_without_positions(model, rope_scaling):
        window = token_count("context_length", context_length)
        _refuse_shorter(model.max_position_embeddings, window)
        return model.clone(max_position_embeddings=window, parent=None)
    by_kind = _by_kind(model, rope_scaling)
    scaled = {kind: rotaries(model, kind) for kind in by_kind}
    if not any(scaled.values()):
        raise UserError(
            f"the layers to scale ({' and '.join(by_kind)}) have no rotary embedding: name the others in rope_scaling"
        )
    for kind, own in scaled.items():
        _warn_of_listed(model, own, by_kind[kind])
    new = {
        (kind, old): extend(
            old.rope,
            max_position_embeddings=model.max_position_embeddings,
            rope_scaling=by_kind[kind],
            # Layers with a window have no reach to extend; their own scaling says its factor.
            context_length=context_length if kind == FULL or not _names_kinds(rope_scaling) else None,
            head_dim=old.head_dim,
        )
        for kind, ropes in scaled.items()
        for old in ropes
    }

    def replaced(mixer):
        place = (kind_of(mixer), mixers.rotary(mixer))
        return mixers.with_rope(mixer, new[place][0]) if place in new else mixer

    far = [window for (kind, _), (_, window) in new.items() if kind == FULL] or [x for _, x in new.values()]
    if len(set(far)) > 1:
        raise UserError(
            f"the layers' rotary embeddings extend to different windows {sorted(set(far))}: set context_length"
        )
    return model_lib.map_mixers(model, replaced).clone(max_position_embeddings=far[0], parent=None)


def kind_of(mixer: Any) -> str:
    """The kind of a layer, as Hugging Face's layer_types name it: a layer with a window slides, or has chunks."""
    if not isinstance(mixer, Attention) or mixer.window is None:
        return FULL
    return CHUNKED if mixer.chunked else SLIDING


def _sees_far_without_positions(model: Decoder, rope_scaling: Mapping[str, Any] | None) -> bool:
    """Whether only layers with a window rotate (Cohere 2) and no kind is named, so that there is nothing to scale.

    Raises:
      UserError: it is so, and there is a scaling.
    """
    if rotaries(model, FULL) or _names_kinds(rope_scaling):
        return False
    kinds = [kind_of(layer.block.mixer) for layer in model_lib.layers(model)]
    if FULL not in kinds:
        return False
    if rope_scaling is not None:
        other = next(kind for kind in kinds if kind != FULL)
        raise UserError(
            "the layers that see the whole text have no positions, and a scaling of the others would change what they"
            f" do inside their windows: set context_length alone (or rope_scaling = {{'{other}': ...}} for them)"
        )
    return True


def _names_kinds(rope_scaling: Mapping[str, Any] | None) -> bool:
    return isinstance(rope_scaling, Mapping) and any(key in (FULL, SLIDING, CHUNKED) for key in rope_scaling)


def _by_kind(model: Decoder, rope_scaling: Mapping[str, Any] | None) -> dict[str, Mapping[str, Any] | None]:
    """The scaling of each kind of layer that is scaled. Raises UserError for a kind that the model does not have."""
    there = {kind_of(layer.block.mixer) for layer in model_lib.layers(model)}
    if rope_scaling is not None and _names_kinds(rope_scaling):
        for kind, value in rope_scaling.items():
            if kind not in there or not isinstance(value, Mapping):
                raise UserError(
                    f"rope_scaling has {shown(kind)} {shown(value)}, expected a scaling for each of "
                    f"{' and '.join(sorted(there))}: change rope_scaling"
                )
        return dict(rope_scaling)
    kinds = [kind for kind in (FULL, SLIDING, CHUNKED) if kind in there]
    if model.scaled_layers == "full" and FULL in kinds:
        kinds = [FULL]
    return {kind: rope_scaling for kind in kinds}


def _warn_of_listed(model: Decoder, ropes: list[Rotary], rope_scaling: Mapping[str, Any] | None) -> None:
    """Warns where a rope_theta replaces frequencies that Evo 2's checkpoints list, which savanna would keep."""
    configured = rope_scaling.get("rope_theta") if isinstance(rope_scaling, Mapping) else None
    for rope, _ in ropes:
        if model.model_type == "striped_hyena" and configured not in (None, rope.rope_theta):
            log.warning(
                "inv_freq of the checkpoint is that of rope_theta %g, and the configured rope_theta %g replaces it",
                rope.rope_theta,
                configured,
            )


def table(model: Decoder) -> list[str]:
    """Lines that list the kinds of layers: number, window, rope_theta, scaling, and how far back a query sees.

    Empty for a model whose layers are all alike, without a window.
    """
    rows: dict[tuple, int] = {}
    for layer in model_lib.layers(model):
        mixer = layer.block.mixer
        if not mixers.can_rotate(mixer):
            continue
        rotary = mixers.rotary(mixer)
        key = (kind_of(mixer), None if kind_of(mixer) == FULL else mixer.window, rotary and rotary.rope)
        rows[key] = rows.get(key, 0) + 1
    if len(rows) < 2 and all(kind == FULL for kind, _, _ in rows):
        return []
    lines = ["kind of layer      layers  window  rope_theta  scaling               sees tokens back"]
    for (kind, window, rope), count in rows.items():
        reach = model.max_position_embeddings if window is None else min(window, model.max_position_embeddings)
        theta = "no rope" if rope is None else f"{rope.rope_theta:g}"
        scaling = "-" if rope is None else _title(rope) if _is_scaled(rope) else "none"
        lines.append(f"{kind:<17}  {count:>6}  {window or '-':>6}  {theta:>10}  {scaling:<20}  {reach:>16}")
    return lines


def scalings(model: Decoder) -> str:
    """ " (RoPE: yarn, factor 4)", with every scaling of the model's layers; "" if there is none."""
    mixers_ = [layer.block.mixer for layer in model_lib.layers(model)]
    rotaries = [mixers.rotary(mixer) for mixer in mixers_ if mixers.can_rotate(mixer)]
    ropes = [rotary.rope for rotary in rotaries if rotary is not None]
    found = dict.fromkeys(_title(rope) for rope in ropes if _is_scaled(rope))
    return f" (RoPE: {'; '.join(found)})" if found else ""


def _is_scaled(rope: Rope) -> bool:
    return rope.rope_type != "default"


def _title(rope: Rope) -> str:
    """The scaling in short form for a message: 'yarn, factor 4'."""
    name = str(getattr(rope.rope_type, "__name__", rope.rope_type))
    return name if rope.factor is None else f"{name}, factor {rope.factor:g}"


def _kept(rope: Rope, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the model's rope that are kept when rope_scaling sets a rope_type."""
    kept: dict[str, Any] = {
        "rope_theta": rope.rope_theta,
        "partial_rotary_factor": rope.partial_rotary_factor,
    }
    if values["rope_type"] == rope.rope_type:
        kept |= {name: getattr(rope, name) for name in _OF_MODEL.get(str(rope.rope_type), ())}
    return kept | _kept_frequencies(rope, values)


def _kept_frequencies(rope: Rope, values: Mapping[str, Any]) -> dict[str, Any]:
    """{"inv_freq": ...} if the model lists explicit frequencies that are kept, else {}; a rope_theta replaces them."""
    name = values["rope_type"]
    if rope.inv_freq is None or "rope_theta" in values or "inv_freq" in values or callable(name):
        return {}
    if "inv_freq" not in FIELDS[name][1]:
        raise UserError(
            f"the model lists its own inv_freq, but rope_type {name!r} computes them from rope_theta: add rope_theta"
            f" (that of inv_freq is close to {rope.rope_theta:g}) to rope_scaling, or use 'linear'"
        )
    return {"inv_freq": rope.inv_freq}


def _as_it_is(rope: Rope, max_position_embeddings: int, target: int | None) -> tuple[Rope, int]:
    """(rope, window) of the model with its present scaling. Raises UserError if that does not reach the target."""
    _refuse_shorter(max_position_embeddings, target)
    if target is None or target == max_position_embeddings:
        return rope, max_position_embeddings
    _check_reach(rope, max_position_embeddings, target)
    return rope, target


def _on_another_base(
    rope: Rope,
    max_position_embeddings: int,
    values: Mapping[str, Any],
    target: int | None,
    head_dim: int | None,
) -> tuple[Rope, int]:
    """(rope, window) of the model with its present scaling and another rope_theta."""
    with _of_rope_scaling():
        new = dataclasses.replace(rope, **{"inv_freq": None, **values})
    _refuse_shorter(max_position_embeddings, target)
    window = max(extended_window(new, max_position_embeddings), target or 0)
    if target is not None and target > max_position_embeddings:
        _check_reach(new, max_position_embeddings, target)
        window = target
    _assert_effect(rope, new, window, head_dim, but_the_window=window > max_position_embeddings)
    return new, window


def _refuse_shorter(max_position_embeddings: int, target: int | None) -> None:
    """Raises UserError for a shorter window than the present one, which only another scaling can give."""
    if target is not None and target < max_position_embeddings:
        raise UserError(
            f"context_length is {target}, below the model's window of {max_position_embeddings}, which stays as it is:"
            " leave out context_length"
        )


def _check_reach(rope: Rope, max_position_embeddings: int, target: int) -> None:
    """Raises UserError if `target` tokens are beyond the window of the scaling. llama3 has no such limit."""
    window = extended_window(rope, max_position_embeddings)
    # If the model does not state its original window, max_position_embeddings may be the original one.
    if rope.factor and rope.original_max_position_embeddings is None:
        window = max(window, round(rope.factor * max_position_embeddings))
    if target <= window:
        return
    found = f"context_length {target} is beyond the model's window of {window}"
    if not _is_scaled(rope):
        raise UserError(
            f"{found} and there is no rope_scaling: set rope_scaling, as {_ADVICE} (or"
            ' {"rope_type": "default"} to leave it unscaled)'
        )
    if rope.rope_type != "llama3":
        raise UserError(
            f"{found}, which is the limit of its scaling ({_title(rope)}): set another rope_scaling, such as"
            f" {_same_type_advice(rope)} (relative to the original window; the factor follows from context_length)"
        )
    log.warning(
        "context_length %d is beyond the window of %d; the model's llama3 scaling (factor %g) is kept",
        target,
        max_position_embeddings,
        rope.factor,
    )


def _same_type_advice(rope: Rope) -> str:
    name = getattr(rope.rope_type, "__name__", rope.rope_type)
    lists = ', "short_factor": [...], "long_factor": [...]' if name == "longrope" else ""
    original = rope.original_max_position_embeddings
    return f'{{"rope_type": "{name}"{lists}' + (f', "{_ORIGINAL}": ...}}' if original is None else "}")


def _values(rope: Rope, rope_scaling: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_scaling` as fields of Rope, without nulls. Raises UserError for anything that Rope would not use.

    The result has no "rope_type" if rope_scaling only changes the base and the model's scaling is kept.
    """
    advice = _same_type_advice(rope) if _is_scaled(rope) else _ADVICE
    if not isinstance(rope_scaling, Mapping):
        raise UserError(f"rope_scaling is {shown(rope_scaling)}, expected a dict such as {advice}")
    known = [field.name for field in dataclasses.fields(Rope)]
    for key in rope_scaling:
        if key not in known and key != "type":
            hint = close(str(key), known)
            raise UserError(
                f"unknown key {shown(key)} in rope_scaling: {hint}known keys are {', '.join(known)}"
            )
    if "rope_theta" in rope_scaling and rope_scaling["rope_theta"] is None:
        raise UserError("rope_theta is null in rope_scaling, expected a number: give one, or leave out the key")
    values = {key: value for key, value in rope_scaling.items() if value is not None and key != "type"}
    names = [rope_scaling[key] for key in ("rope_type", "type") if rope_scaling.get(key) is not None]
    names = ["longrope" if isinstance(name, str) and name == "su" else name for name in names]
    if len(names) == 2 and names[0] != names[1]:
        raise UserError(
            f"rope_scaling has rope_type {shown(names[0])} and type {shown(names[1])}: remove one of them"
        )
    if not names and ("factor" in values or "rope_theta" not in values):
        raise UserError(f"rope_scaling {shown(dict(rope_scaling))} has no rope_type: add one, as {advice}")
    if not names and _is_scaled(rope):
        return values
    name = names[0] if names else "default"
    with _of_rope_scaling():
        values["rope_type"] = name if callable(name) else known_type(name)
    return values


@contextlib.contextmanager
def _of_rope_scaling() -> Iterator[None]:
    """A UserError about a field of Rope says where it is set."""
    try:
        yield
    except UserError as error:
        raise UserError(f"rope_scaling: {error}") from None


def _original(rope: Rope, max_position_embeddings: int, values: dict[str, Any]) -> int:
    """The context window of pretraining, in tokens. Raises UserError if a scaled model does not state it."""
    given = values.get(_ORIGINAL, rope.original_max_position_embeddings)
    if given is not None:
        return token_count(_ORIGINAL, given)
    if rope.factor is not None and rope.factor > 1:
        raise UserError(
            f"the model is already scaled ({rope.rope_type!r}, factor {rope.factor:g}) and does not say from"
            " which window: set original_max_position_embeddings in rope_scaling"
        )
    return max_position_embeddings


def _factor_and_target(
    values: dict[str, Any], original: int, target: int | None
) -> tuple[dict[str, Any], int | None]:
    """(values with a factor, context length in tokens); whichever is missing is computed from the other."""
    name, factor = values["rope_type"], values.get("factor")
    optional = callable(name) or name == "proportional"  # these types need no factor
    if factor is None and optional and (target is None or target <= original):
        return values, target
    if factor is None and target is None:
        raise UserError(
            f"rope_type {name!r} has neither factor nor context_length: set a factor in rope_scaling, or context_length"
        )
    enlarged = "if max_position_embeddings is enlarged already, set original_max_position_embeddings in rope_scaling"
    if factor is None and target is not None:
        factor = values["factor"] = target / original
    if not is_number(factor):
        raise UserError(f"factor of rope_type {name!r} is {shown(factor)}, expected a number: change rope_scaling")
    if factor <= 1:
        asked = f"original window {original}" + ("" if target is None else f", context_length {target}")
        raise UserError(
            f"factor {shown(factor)} of rope_type {name!r} ({asked}) has no effect unless it is more than 1: change"
            f" rope_scaling or context_length ({enlarged})"
        )
    if target is None:
        return values, round(factor * original)
    if name != "llama3" and abs(factor * original - target) >= 1:
        raise UserError(
            f"factor {factor:g} x the original window {original} is {factor * original:g}, not context_length"
            f" {target}: change one of the two ({enlarged}: {target / factor:g} would fit)"
        )
    return values, target


def _assert_effect(
    old: Rope, new: Rope, window: int, head_dim: int | None, *, but_the_window: bool = False
) -> None:
    """Raises UserError if the new frequencies at `window` tokens equal those of the model or of an unscaled model.

    With `but_the_window` they may equal those of the model, because the change is a larger window.
    """
    befores = {} if but_the_window else {"the model has already": old}
    if new.rope_type != "default":
        plain = Rope(rope_theta=old.rope_theta, partial_rotary_factor=old.partial_rotary_factor)
        befores["an unscaled model has"] = plain
    for what, before in befores.items():
        if _same(before, new, window, head_dim):
            name = getattr(new.rope_type, "__name__", new.rope_type)
            raise UserError(
                f"rope_scaling ({name}) has no effect, its frequencies at {window} tokens are those {what}:"
                " change its values"
            )


def _same(a: Rope, b: Rope, length: int, head_dim: int | None) -> bool:
    """Whether two ropes have the same frequencies and attention scaling at this length."""
    if head_dim is None:  # longrope's lists have one entry per pair of rotated dimensions
        head_dim = next((2 * len(r.long_factor) for r in (b, a) if r.long_factor is not None), 128)
        if "proportional" not in (a.rope_type, b.rope_type):
            a, b = (dataclasses.replace(r, partial_rotary_factor=1.0) for r in (a, b))
    (inv_a, scale_a), (inv_b, scale_b) = a.frequencies(head_dim, length), b.frequencies(head_dim, length)
    inv_a, inv_b = np.asarray(inv_a), np.asarray(inv_b)
    return inv_a.shape == inv_b.shape and np.allclose(inv_a, inv_b, rtol=1e-6, atol=0) and scale_a == scale_b
