"""Rotary position embeddings and every way to stretch them: one function a type.

RoPE turns the pair (x_j, x_{j+d/2}) of a query or key at position p by the angle p * inv_freq_j. Context
extension is a choice of `inv_freq` and of A, the attention scaling (cos and sin times A, so logits times
A^2). H is the head size, r partial_rotary_factor, d = int(H*r) the rotated dimensions, j = 0 .. d/2-1,
b rope_theta, w_j = b^(-2j/d), L the window of pre-training, s = factor = new window / L, n the text's length.

    default       w_j, A = 1. A larger rope_theta alone is "ABF" (adjusted base frequency).
    linear        w_j / s, A = 1. Position interpolation: every position m becomes m/s [1].
    ntk           the base b s^(d/(d-2)), A = 1. Keeps the highest frequency, divides the lowest by s [2].
    dynamic       the base b (s n/L - (s-1))^(d/(d-2)) for n > L, else b; A = 1. NTK that grows with n [2].
    yarn          w_j (1-g_j) + w_j/s g_j, A = 0.1 ln s + 1. The ramp g_j rises from 0 at the pair that turns
                  beta_fast (32) times inside L to 1 at the one that turns beta_slow (1) times [2].
    llama3        w_j (g_j + (1-g_j)/s), A = 1, g_j = clip((L w_j/2pi - low) / (high - low), 0, 1) [3].
    longrope      w_j / long_factor_j for n > L, else w_j / short_factor_j; A = sqrt(1 + ln s / ln L) [4].
    proportional  b^(-2j/H) / s for the first int(r*H/2) pairs of the head, 0 for the others; A = 1.

    [1] Chen et al. 2023, arXiv 2306.15595           [2] Peng et al. 2023 (YaRN), arXiv 2309.00071, section 3
    [3] Llama team 2024 (Llama 3), arXiv 2407.21783  [4] Ding et al. 2024 (LongRoPE), arXiv 2402.13753

YaRN follows the released code (the ramp is linear in j), not the text of the paper (linear in rotations). Its
`attention_factor` replaces A, as does the quotient of a pair (mscale, mscale_all_dim). All types equal those
of transformers, where "ntk" is a default with a larger rope_theta.

**The n of dynamic and longrope.** The exact rule, the default everywhere: one n for a whole generation (the
length of the cache), so cached keys and new queries share one rotation, and a cached decode equals the full
forward pass at that n. transformers changes its frequencies while it decodes and leaves cached keys as they
were: its cached decode is not its own full forward. To reproduce that ("hf"), take n = `hf_trace_length` for
dynamic and n = last position + 1 for longrope at every forward pass.

**Your own type** is a function of the same signature, from any package, given where a type is named:

    def halved(rope, head_dim, length):
        inv_freq, attention_scaling = default(rope, head_dim, length)
        return inv_freq / 2, attention_scaling

    Rope(rope_type=halved)        # in a .gin file: Rope.rope_type = @my_package.halved

`extend.py` applies a scaling to a pretrained model, with all the checks.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lcx import rope_fields
from lcx.errors import UserError
from lcx.rope_fields import FIELDS, is_number, known_type, shown, token_count
from lcx.rope_fields import needed as _needed

Number = float | int
Length = int | np.integer | Int[np.ndarray, ""] | Int[Array, ""]
InvFreq = Float[np.ndarray, " pairs"] | Float[Array, " pairs"]
Frequencies = tuple[InvFreq, Any]  # and the attention scaling A
_ORIGINAL = "original_max_position_embeddings"
_NO_EFFECT = "finetuned"  # a remark in the files of YaRN's authors
_PHI3_WINDOW = 4096  # the default of transformers' Phi3Config


@dataclasses.dataclass(frozen=True)
class Rope:
    """One rotary embedding. The fields have the names and meanings of Hugging Face's `rope_parameters`.

    `original_max_position_embeddings` is the window of pre-training in tokens; any type may carry it, so that
    a second extension starts from there. `inv_freq` lists w_j as a checkpoint stores them, where they are not
    those of rope_theta to the bit. Raises UserError on an unknown type, on a field that the type needs and
    does not have, or has and would ignore, and on numbers out of range.
    """

    rope_type: str | Callable[..., Any] = "default"
    rope_theta: Number = 10000.0
    factor: Number | None = None
    original_max_position_embeddings: int | None = None
    partial_rotary_factor: Number = 1.0
    attention_factor: Number | None = None
    beta_fast: Number | None = None
    beta_slow: Number | None = None
    mscale: Number | None = None
    mscale_all_dim: Number | None = None
    truncate: bool = True
    low_freq_factor: Number | None = None
    high_freq_factor: Number | None = None
    short_factor: Sequence[Number] | None = None
    long_factor: Sequence[Number] | None = None
    inv_freq: Sequence[Number] | None = None

    __no_type_check__ = True  # by jaxtyping: the checks below say what to change

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = rope_fields.canonical(field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)  # frozen, and hashable: lists become tuples
        rope_fields.check(self)

    def frequencies(self, head_dim: int, length: Length) -> Frequencies:
        """(inv_freq float32 [d/2], A). `length` is n, perhaps traced: dynamic and longrope depend on it."""
        function = self.rope_type if callable(self.rope_type) else ROPE_TYPES[self.rope_type]
        return function(self, head_dim, length)


def rotary_dim(rope: Rope, head_dim: int) -> int:
    """d, the number of rotated dimensions of a head; UserError unless it is even and positive."""
    dim = int(head_dim * rope.partial_rotary_factor)
    if dim < 2 or dim % 2:
        raise UserError(
            f"head_dim {head_dim} x partial_rotary_factor {rope.partial_rotary_factor:g} is {dim},"
            " expected an even number of at least 2 rotary dimensions: change one of them"
        )
    return dim


def _powers(theta: float, dim: int) -> np.ndarray:
    """1 / w_j = theta^(2j/d) in float32, rounded where transformers rounds it (as all types below are).

    One bit less or more would turn position 131072 by up to 0.005 rad from where the weights were trained.
    """
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return (np.float64(np.float32(theta)) ** exponent.astype(np.float64)).astype(np.float32)


def default(rope: Rope, head_dim: int, length: Length) -> Frequencies:
    del length
    dim = rotary_dim(rope, head_dim)
    if rope.inv_freq is None:
        return 1 / _powers(rope.rope_theta, dim), 1.0
    return _listed("inv_freq", rope.inv_freq, dim), 1.0


def _listed(name: str, values: Sequence[Number], dim: int) -> np.ndarray:
    if len(values) != dim // 2:
        expected = f"{dim // 2} (half of the {dim} rotary dimensions)"
        raise UserError(f"{name} has {len(values)} numbers, expected {expected}: change {name}")
    return np.asarray(values, np.float32)


def linear(rope: Rope, head_dim: int, length: Length) -> Frequencies:
    (s,) = _needed(rope, "factor")
    return default(rope, head_dim, length)[0] / s, 1.0


def ntk_theta(rope: Rope, head_dim: int) -> float:
    """b s^(d/(d-2)). transformers has no type "ntk", and knows it only as this larger rope_theta."""
    (s,), dim = _needed(rope, "factor"), rotary_dim(rope, head_dim)
    if dim == 2:
        raise UserError("NTK scaling found 2 rotary dimensions, expected at least 4: change rope_type")
    return rope.rope_theta * s ** (dim / (dim - 2))


def ntk(rope: Rope, head_dim: int, length: Length) -> Frequencies:
    del length
    return 1 / _powers(ntk_theta(rope, head_dim), rotary_dim(rope, head_dim)), 1.0


def dynamic(rope: Rope, head_dim: int, length: Length) -> Frequencies:
    ntk_theta(rope, head_dim)  # two rotary dimensions have no solution here either
    s, window = _needed(rope, "factor", "original_max_position_embeddings")
    dim = rotary_dim(rope, head_dim)
    # With x = s n/L - (s-1) the frequencies (b x^(d/(d-2)))^(-2j/d) are w_j x^(-2j/(d-2)); x = 1 + s (n-L)/L.
    # So the large base keeps its precision and nothing cancels, even where n is traced.
    w, power = 1 / _powers(rope.rope_theta, dim), (-np.arange(0, dim, 2) / (dim - 2)).astype(np.float32)
    if isinstance(length, jax.Array):
        return w * (1 + s * jnp.maximum(length - window, 0).astype(jnp.float32) / window) ** power, 1.0
    return w * np.float32(1 + s * max(int(length) - window, 0) / window) ** power, 1.0


def yarn(rope: Rope, head_dim: int, length: Length) -> Frequencies:
    del length
    s, window = _needed(rope, "factor", "original_max_position_embeddings")
    dim = rotary_dim(rope, head_dim)

    def pair(turns: float) -> float:  # the fractional j of the pair that turns so often inside the window
        return dim * math.log(window / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = pair(rope.beta_fast or 32.0), pair(rope.beta_slow or 1.0)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)  # d - 1 and not d/2 - 1, as in the released code
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low or 0.001), 0, 1)
    w_inverse, keep = _powers(rope.rope_theta, dim), 1 - ramp

    def mscale(k: float) -> float:
        return 0.1 * k * math.log(s) + 1.0

    scaling = mscale(1.0) if rope.attention_factor is None else rope.attention_factor
    if rope.attention_factor is None and rope.mscale and rope.mscale_all_dim:
        scaling = mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return 1 / (s * w_inverse) * (1 - keep) + 1 / w_inverse * keep, scaling


def llama3(rope: Rope, head_dim: int, length: Length) -> Frequencies:
    s, window, low, high = _needed(rope, *FIELDS["llama3"][0])
    w, _ = default(rope, head_dim, length)
    keep = np.clip((window / (2 * math.pi / w) - low) / (high - low), 0, 1)
    return (1 - keep) * w / s + keep * w, 1.0


def longrope(rope: Rope, head_dim: int, length: Length) -> Frequencies:
    short, long, window = _needed(rope, *FIELDS["longrope"][0])
    dim, s, scaling = rotary_dim(rope, head_dim), rope.factor or 1.0, rope.attention_factor
    if scaling is None:
        scaling = math.sqrt(1 + math.log(s) / math.log(window)) if s > 1 else 1.0
    w_inverse = _powers(rope.rope_theta, dim)
    short = 1 / (_listed("short_factor", short, dim) * w_inverse)
    long = 1 / (_listed("long_factor", long, dim) * w_inverse)
    if isinstance(length, jax.Array):
        return jnp.where(length > window, long, short), scaling
    return (long if int(length) > window else short), scaling


def proportional(rope: Rope, head_dim: int, length: Length) -> Frequencies:
    del length
    if head_dim % 2:
        raise UserError(f"head_dim is {head_dim}, expected an even number: change head_dim")
    w = 1 / _powers(rope.rope_theta, head_dim) / (rope.factor or 1.0)
    rotated = np.arange(head_dim // 2) < int(rope.partial_rotary_factor * head_dim // 2)
    return np.where(rotated, w, np.float32(0)), 1.0


ROPE_TYPES: dict[str, Callable[[Rope, int, Length], Frequencies]] = {
    function.__name__: function
    for function in (default, linear, ntk, dynamic, yarn, longrope, llama3, proportional)
}


def rotate(
    x: Float[Array, "B T N H"],
    positions: Int[Array, "#B T"] | Int[np.ndarray, "#B T"],
    inv_freq: InvFreq,
    attention_scaling: Any = 1.0,
) -> Float[Array, "B T N H"]:
    """Turns queries or keys to their positions, in Hugging Face's rotate-half layout (pairs j and j + d/2).

    Positions stay integers until float32 multiplies them (exact below 2^24; bfloat16 would collapse above
    256), and all is float32 until the result takes the dtype of x. Dimensions beyond 2 * pairs pass through.
    `positions` of shape [1, T] cost one row of cosines instead of B.
    """
    pairs = inv_freq.shape[0]
    angle = positions[:, :, None, None].astype(jnp.float32) * inv_freq  # [B or 1, T, 1, pairs]
    cos, sin = jnp.cos(angle) * attention_scaling, jnp.sin(angle) * attention_scaling
    y = x[..., : 2 * pairs].astype(jnp.float32)
    # Swapping halves, rather than computing each, lets XLA fuse the backward pass: 3 times faster on CPU.
    swapped = jnp.concatenate([y[..., pairs:], y[..., :pairs]], axis=-1)
    y = y * jnp.concatenate([cos, cos], axis=-1) + swapped * jnp.concatenate([-sin, sin], axis=-1)
    return jnp.concatenate([y.astype(x.dtype), x[..., 2 * pairs :]], axis=-1)


def hf_trace_length(cached_length: Length, n: Length, original: int) -> Length:
    """The length that transformers' dynamic type uses in a forward pass whose last position is n - 1.

    It is the `cached_length` of the next pass; the first starts from `original`. So the base only grows,
    until a text shorter than the original window resets it (one of exactly `original` tokens does not).
    """
    if any(isinstance(v, jax.Array) for v in (cached_length, n)):
        return jnp.where(n < original, original, jnp.maximum(cached_length, n))
    return original if n < original else max(cached_length, n)


def from_hf(config: Mapping[str, Any], *, layer_type: str | None = None) -> Rope:
    """The Rope of a Hugging Face config.json, as transformers 5.23 builds it, with every default written out.

    Reads `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5; where it holds one dict for each layer
    type, `layer_type` chooses) and what stands beside them at the top level. Where both are there, or a setting stands
    in two places, they must agree. On purpose different: what transformers would ignore in silence raises UserError
    (a factor without rope_type, a lost rope_theta, an unknown key); a dynamic scaling disabled by an enlarged
    max_position_embeddings is corrected with a warning; and `truncate` counts inside a layer type too.
    """
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(key), Mapping | None):
            found = f"{key} is {shown(config[key])}"
            raise UserError(f"{found}, expected an object with rope_type: change it in config.json")
    sources = [key for key in ("rope_scaling", "rope_parameters") if config.get(key)]
    ropes = [_from_source(config, source, layer_type) for source in sources or ("rope_parameters",)]
    for field in dataclasses.fields(Rope):
        values = [getattr(rope, field.name) for rope in ropes]
        one_is_silent = field.name == _ORIGINAL and None in values
        if len(ropes) == 2 and values[0] != values[1] and not one_is_silent:
            raise UserError(
                f"rope_scaling and rope_parameters disagree: {field.name} is {shown(values[0])} by the one and"
                f" {shown(values[1])} by the other: remove one of them from config.json"
            )
    return ropes[0]


def _from_source(config: Mapping[str, Any], source: str, layer_type: str | None) -> Rope:
    source, given = _hf_parameters(config, source, layer_type)
    nested, phi3 = "." in source, str(config.get("model_type", "")).startswith("phi3")
    rope_fields.check_keys([key for key in given if key != _NO_EFFECT], source)
    name = _hf_type(source, given, phi3)
    values = {k: v for k, v in given.items() if v is not None and k not in ("type", _NO_EFFECT)}
    values |= {"rope_type": name, "rope_theta": _hf_theta(config, source, given, name)}
    if values.get("factor") == 1 and "factor" not in sum(FIELDS[name], ()):
        del values["factor"]  # spelled out, and without effect
    if name == "yarn" and "truncate" in given:
        values["truncate"] = given["truncate"] or False  # null means false in transformers
    partial = _hf_stated(config, source, given, "partial_rotary_factor")
    if partial is not None:
        values["partial_rotary_factor"] = partial
    if name == "dynamic":
        values[_ORIGINAL] = _hf_dynamic_window(config, given)
    elif name in ("yarn", "llama3", "longrope"):
        values |= _hf_window(config, source, given, name, nested=nested, phi3=phi3)
    elif not nested:
        values[_ORIGINAL] = _hf_stated(config, source, given, _ORIGINAL)
    return Rope(**values)


def _hf_parameters(
    config: Mapping[str, Any], source: str, layer_type: str | None
) -> tuple[str, Mapping[str, Any]]:
    """(where it stands in config.json, the parameters of one layer type)."""
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


def _hf_stated(config: Mapping[str, Any], source: str, given: Mapping[str, Any], key: str) -> Any:
    """What the dict, or the top level beside it, says; UserError where both do and differ.

    For the dict of one layer type the top level is the default of all of them.
    """
    inner, outer = given.get(key), config.get(key)
    if None not in (inner, outer) and inner != outer and "." not in source:
        raise UserError(
            f"{key} is {shown(inner)} in {source} and {shown(outer)} at the top level: remove one of them from"
            " config.json"
        )
    return outer if inner is None else inner


def _hf_type(source: str, given: Mapping[str, Any], phi3: bool) -> str:
    names = [given[key] for key in ("rope_type", "type") if given.get(key) is not None]
    if not names and given.get("factor") is not None:
        found = f"{source} has factor {shown(given['factor'])} and no rope_type"
        raise UserError(f"{found}, which would scale nothing: add rope_type in config.json")
    early = {"su": "longrope"} | ({"yarn": "longrope"} if phi3 and given.get("long_factor") else {})
    types = [known_type(early.get(name, name) if isinstance(name, str) else name) for name in names]
    if len(set(types)) > 1:
        found = f"{source} has rope_type {names[0]!r} and type {names[1]!r}"
        raise UserError(f"{found}: remove one of them from config.json")
    return types[0] if types else "default"


def _hf_theta(config: Mapping[str, Any], source: str, given: Mapping[str, Any], name: str) -> Any:
    for place in (given, config):
        if "rope_theta" in place and place["rope_theta"] is None:
            raise UserError(f"rope_theta is null in or beside {source}, expected a number: set it")
    theta = _hf_stated(config, source, given, "rope_theta")
    if theta is not None:
        return theta
    v5 = source.startswith("rope_parameters")
    shadowed = not v5 and "rope_theta" in (config.get("rope_parameters") or {})
    if shadowed or (v5 and name != "default"):
        raise UserError(f"rope_theta is missing in and beside {source} ({name}): add the model's base")
    return 10000.0  # what files older than the key mean


def _hf_window(
    config: Mapping[str, Any], source: str, given: Mapping[str, Any], name: str, *, nested: bool, phi3: bool
) -> dict[str, Any]:
    """The original window of yarn, llama3 and longrope, and the factor where the two windows imply it."""
    enlarged = config.get("max_position_embeddings")
    # A dict of one layer type stands alone. Phi-3 of transformers reads the key at the top level only.
    original = given.get(_ORIGINAL) if nested else _hf_stated(config, source, given, _ORIGINAL)
    if phi3 and name == "longrope" and not nested and config.get(_ORIGINAL) is None:
        if original not in (None, _PHI3_WINDOW):
            raise UserError(
                f"{_ORIGINAL} is {shown(original)} in {source} and missing at the top level, where Phi-3 has it (and"
                f" transformers takes {_PHI3_WINDOW}): set it there too"
            )
        original = _PHI3_WINDOW
    original = token_count(_ORIGINAL, enlarged if original is None else original)
    values: dict[str, Any] = {_ORIGINAL: original}
    implied = name == "longrope" or (name == "yarn" and "factor" in given)  # yarn: null, but not absent
    if implied and given.get("factor") is None and enlarged:
        values["factor"] = max(1.0, token_count("max_position_embeddings", enlarged) / original)
    return values


def _hf_dynamic_window(config: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
    """max_position_embeddings is the original window here, unless the file shows that it was enlarged."""
    window, factor = config.get("max_position_embeddings"), given.get("factor")
    original = _hf_stated(config, "rope_scaling", given, _ORIGINAL)
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


def extended_window(rope: Rope, max_position_embeddings: int) -> int:
    """The window in tokens of a model whose config.json has this max_position_embeddings.

    It is factor times the original window where the file keeps the original one, as model cards advise for YaRN. The
    factors of llama3 and longrope are no ratio of windows, so an enlarged max_position_embeddings holds.
    """
    original, factor = rope.original_max_position_embeddings, rope.factor
    if original is None or factor is None:
        return max_position_embeddings
    if rope.rope_type in ("llama3", "longrope") and max_position_embeddings > original:
        return max_position_embeddings
    return max(max_position_embeddings, round(factor * original))


def to_hf(rope: Rope, *, max_position_embeddings: int, head_dim: int | None = None) -> dict[str, Any]:
    """`rope_parameters` that transformers reads back to the same frequencies.

    `max_position_embeddings` is what config.json will hold: take it from `hf_max_position_embeddings`.
    `head_dim` is needed for "ntk" alone, written as the default type with an enlarged rope_theta. UserError
    for what the format cannot say: a function of one's own, dynamic with an enlarged max_position_embeddings.
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
    if name == "dynamic":  # transformers has no such key here: it scales from max_position_embeddings
        original = out.pop("original_max_position_embeddings")
        if original != max_position_embeddings:
            found = f"transformers would scale dynamic RoPE from {max_position_embeddings} tokens on"
            raise UserError(f"{found}: write max_position_embeddings {original}, its original window")
    return out


def hf_max_position_embeddings(rope: Rope, max_position_embeddings: int) -> int:
    """What config.json must hold as max_position_embeddings: the window, but for dynamic the original one."""
    original = rope.original_max_position_embeddings
    return original if rope.rope_type == "dynamic" and original else max_position_embeddings
