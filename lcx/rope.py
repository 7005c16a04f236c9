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
import difflib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lcx.errors import UserError

Number = float | int
Length = int | np.integer | Int[np.ndarray, ""] | Int[Array, ""]
InvFreq = Float[np.ndarray, " pairs"] | Float[Array, " pairs"]
Frequencies = tuple[InvFreq, Any]  # and the attention scaling A

# For each type: the fields it cannot do without, the fields it may use. Every type has those of SHARED.
SHARED = ("rope_type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ("inv_freq",)),
    "linear": (("factor",), ("inv_freq",)),
    "ntk": (("factor",), ()),
    "dynamic": (("factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (
        ("short_factor", "long_factor", "original_max_position_embeddings"),
        ("factor", "attention_factor"),
    ),
    "llama3": (("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"), ()),
    "proportional": ((), ("factor",)),
}


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
            value = _canonical(field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)  # frozen, and hashable: lists become tuples
        _check(self)

    def frequencies(self, head_dim: int, length: Length) -> Frequencies:
        """(inv_freq float32 [d/2], A). `length` is n, perhaps traced: dynamic and longrope depend on it."""
        function = self.rope_type if callable(self.rope_type) else ROPE_TYPES[self.rope_type]
        return function(self, head_dim, length)


def _canonical(name: str, value: Any) -> Any:
    """The value as the field holds it (float, int, bool, tuple of floats), or UserError."""
    if name == "rope_type" or (value is None and name not in ("rope_theta", "partial_rotary_factor")):
        return value
    if name == "truncate":
        if not isinstance(value, bool):
            raise UserError(f"truncate is {value!r}, expected true or false: change truncate")
        return value
    if name in ("short_factor", "long_factor", "inv_freq"):
        if isinstance(value, str) or not isinstance(value, Sequence) or not value:
            raise UserError(f"{name} is {value!r}, expected a list of numbers: change {name}")
        return tuple(_canonical(f"{name}[{i}]", v) for i, v in enumerate(value))
    if not is_number(value):
        raise UserError(f"{name} is {value!r}, expected a number: set {name}")
    return token_count(name, value) if name == "original_max_position_embeddings" else float(value)


def is_number(value: Any) -> TypeGuard[float]:
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    return number and math.isfinite(value)


def token_count(name: str, value: Any) -> int:
    """The value as a number of tokens: 4096.0 is one; 4096.5, "4096" and null raise UserError."""
    if not is_number(value) or value != int(value) or value < 1:
        raise UserError(f"{name} is {value!r}, expected a whole number of tokens: change {name}")
    return int(value)


def _check(rope: Rope) -> None:
    """UserError unless the fields make sense together; a function of the user's own checks its own needs."""
    for name, at_least, bound in (
        ("rope_theta", False, 1.0),
        ("factor", True, 1.0),
        ("partial_rotary_factor", True, 0.0),
        ("attention_factor", False, 0.0),
        ("low_freq_factor", False, 0.0),
    ):
        value = getattr(rope, name)
        if value is not None and (value < bound or (value == bound and not at_least)):
            words = "at least" if at_least else "more than"
            raise UserError(f"{name} is {value:g}, expected {words} {bound:g}: change {name}")
    if rope.partial_rotary_factor > 1:
        found = f"partial_rotary_factor is {rope.partial_rotary_factor:g}"
        raise UserError(f"{found}, expected at most 1: change partial_rotary_factor")
    if not callable(rope.rope_type):
        _check_fields(rope, known_type(rope.rope_type))


def _check_fields(rope: Rope, name: str) -> None:
    """UserError unless the fields are those of the type: none missing, none that would be ignored."""
    _needed(rope, *FIELDS[name][0])
    for field in dataclasses.fields(rope):
        known = FIELDS[name][0] + FIELDS[name][1] + SHARED
        if field.name not in known and getattr(rope, field.name) != field.default:
            users = " and ".join(t for t in FIELDS if field.name in FIELDS[t][0] + FIELDS[t][1])
            found = f"{field.name} has no effect on rope_type {name!r}, it belongs to {users}"
            raise UserError(f"{found}: remove it or change rope_type")
    if name == "longrope" and rope.factor is None and rope.attention_factor is None:
        raise UserError("rope_type 'longrope' has neither factor nor attention_factor: set one of them")
    low, high = rope.low_freq_factor, rope.high_freq_factor
    if name == "llama3" and low is not None and high is not None and high <= low:
        raise UserError(f"high_freq_factor is {high:g}, expected more than low_freq_factor = {low:g}")
    fast, slow = rope.beta_fast or 32, rope.beta_slow or 1
    if fast < slow:
        raise UserError(f"beta_fast is {fast:g}, expected at least beta_slow = {slow:g}")


def _needed(rope: Rope, *names: str) -> tuple[Any, ...]:
    """The values of these fields; UserError if one is missing."""
    for name in names:
        if getattr(rope, name) is None:
            title = getattr(rope.rope_type, "__name__", rope.rope_type)
            raise UserError(f"rope_type {title!r} has no {name} and cannot do without it: set {name}")
    return tuple(getattr(rope, name) for name in names)


def known_type(name: Any) -> str:
    """The name itself if it is one of ROPE_TYPES, else UserError with the known names and the closest."""
    if isinstance(name, str) and name in FIELDS:
        return name
    close = difflib.get_close_matches(str(name).lower(), FIELDS, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise UserError(f"unknown rope_type {name!r}: {hint}change it to one of {', '.join(FIELDS)}")


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

    Reads `rope_scaling` (transformers 4; it wins if both are there) or `rope_parameters` (transformers 5;
    where it holds one dict for each layer type, `layer_type` chooses) and what stands beside them at the top
    level. On purpose different: what transformers would ignore in silence raises UserError (a factor without
    rope_type, a lost rope_theta); a dynamic scaling disabled by an enlarged max_position_embeddings is
    corrected with a warning; and `truncate` counts inside a layer type too.
    """
    source, given = _hf_parameters(config, layer_type)
    phi3 = str(config.get("model_type", "")).startswith("phi3")
    name = _hf_type(source, given, phi3)
    values = {k: given[k] for k in sum(FIELDS[name], ()) if given.get(k) is not None}
    values |= {"rope_type": name, "rope_theta": _hf_theta(config, source, given, name)}
    if name == "yarn" and "truncate" in given:
        values["truncate"] = given["truncate"] or False  # null means false in transformers
    partial = given.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial is not None:
        values["partial_rotary_factor"] = partial
    if name == "dynamic":
        values["original_max_position_embeddings"] = _hf_dynamic_window(config, given)
    if name in ("yarn", "llama3", "longrope"):
        values |= _hf_window(config, given, name, nested="." in source, phi3=phi3)
    return Rope(**values)


def _hf_parameters(config: Mapping[str, Any], layer_type: str | None) -> tuple[str, Mapping[str, Any]]:
    """(where it stands in config.json, the parameters of one layer type)."""
    source = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    given = config.get(source) or {}
    if not isinstance(given, Mapping):
        raise UserError(f"{source} is {given!r}, expected an object with rope_type: change it in config.json")
    nested = {k: v for k, v in given.items() if isinstance(v, Mapping)}
    if not nested:
        return source, given
    same = all(v == next(iter(nested.values())) for v in nested.values())
    chosen = next(iter(nested)) if layer_type is None and same else layer_type
    if chosen not in nested:
        expected = f"{source} has one for each of {', '.join(nested)}"
        raise UserError(f"no RoPE for layer type {chosen!r}, {expected}: change layer_types")
    return f"{source}.{chosen}", nested[chosen]


def _hf_type(source: str, given: Mapping[str, Any], phi3: bool) -> str:
    name = given.get("rope_type") or given.get("type")
    if name is None and given.get("factor") is not None:
        found = f"{source} has factor {given['factor']!r} and no rope_type"
        raise UserError(f"{found}, which would scale nothing: add rope_type in config.json")
    if name == "su" or (phi3 and name == "yarn" and given.get("long_factor")):
        return "longrope"  # its names in early Phi-3 files
    return known_type(name or "default")


def _hf_theta(config: Mapping[str, Any], source: str, given: Mapping[str, Any], name: str) -> Any:
    for place in (given, config):
        if "rope_theta" in place:
            if place["rope_theta"] is None:
                raise UserError(f"rope_theta is null in or beside {source}, expected a number: set it")
            return place["rope_theta"]
    v5 = source.startswith("rope_parameters")
    shadowed = not v5 and "rope_theta" in (config.get("rope_parameters") or {})
    if shadowed or (v5 and name != "default"):
        raise UserError(f"rope_theta is missing in and beside {source} ({name}): add the model's base")
    return 10000.0  # what files older than the key mean


def _hf_window(
    config: Mapping[str, Any], given: Mapping[str, Any], name: str, *, nested: bool, phi3: bool
) -> dict[str, Any]:
    """The original window of yarn, llama3 and longrope, and the factor where the two windows imply it."""
    key, enlarged = "original_max_position_embeddings", config.get("max_position_embeddings")
    # A key at the top level overrules the dict, except the dict of one layer type; Phi-3 always has one.
    top = None if nested else config.get(key) or (4096 if phi3 and name == "longrope" else None)
    original = token_count(key, top or given.get(key) or enlarged)
    values: dict[str, Any] = {key: original}
    implied = name == "longrope" or (name == "yarn" and "factor" in given)  # yarn: null, but not absent
    if implied and given.get("factor") is None and enlarged:
        values["factor"] = max(1.0, token_count("max_position_embeddings", enlarged) / original)
    return values


def _hf_dynamic_window(config: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
    """max_position_embeddings is the original window here, unless the file shows that it was enlarged."""
    window, factor = config.get("max_position_embeddings"), given.get("factor")
    original = given.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    if not (is_number(window) and is_number(factor) and is_number(original)) or original == window:
        return window
    if abs(original * factor - window) >= 1:
        return window
    warnings.warn(
        f"dynamic RoPE: max_position_embeddings {window} is already {factor:g} x the original {original}, so"
        f" transformers scales nothing below {window} tokens; here it scales from {original} (for the same"
        f" there, set max_position_embeddings to {original} in config.json)",
        stacklevel=3,
    )
    return original


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
