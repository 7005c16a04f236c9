"""Rotary position embeddings (RoPE) and the methods to extend them: one function per type.

RoPE rotates the pair (x_j, x_{j+d/2}) of a query or key at position p by the angle p * inv_freq_j. A method of context
extension is a choice of `inv_freq` and of the attention scaling A (cos and sin are multiplied by A, so the logits by
A^2). H is the head size, r partial_rotary_factor, d = int(H*r) the number of rotated dimensions, j = 0 .. d/2-1,
b rope_theta, w_j = b^(-2j/d), L the window of pretraining, s = factor = new window / L, n the length of the text.

    default       w_j, A = 1. A larger rope_theta alone is "ABF" (adjusted base frequency).
    linear        w_j / s, A = 1. Position interpolation: position m becomes m/s [1].
    ntk           the base b s^(d/(d-2)), A = 1. Keeps the highest frequency, divides the lowest by s [2].
    dynamic       the base b (s n/L - (s-1))^(d/(d-2)) for n > L, else b; A = 1. NTK with a scale that grows with n [2].
    yarn          w_j (1-g_j) + w_j/s g_j, A = 0.1 ln s + 1. The ramp g_j rises from 0, at the pair that makes
                  beta_fast (32) rotations inside L, to 1, at the one that makes beta_slow (1) rotations [2].
    llama3        w_j (g_j + (1-g_j)/s), A = 1, g_j = clip((L w_j/2pi - low) / (high - low), 0, 1) [3].
    longrope      w_j / long_factor_j for n > L, else w_j / short_factor_j; A = sqrt(1 + ln s / ln L) [4].
    proportional  b^(-2j/H) / s for the first int(r*H/2) pairs of the head, 0 for the others; A = 1.

    [1] Chen et al. 2023, arXiv 2306.15595           [2] Peng et al. 2023 (YaRN), arXiv 2309.00071, section 3
    [3] Llama team 2024 (Llama 3), arXiv 2407.21783  [4] Ding et al. 2024 (LongRoPE), arXiv 2402.13753

YaRN follows the released code (the ramp is linear in j), not the paper's text (linear in the number of rotations). A
given `attention_factor` replaces A, as does the quotient of mscale and mscale_all_dim if both are given. (Latent
attention multiplies its scores by `score_factor` in addition.) All types give the same values as transformers, where
"ntk" is expressed as type default with a larger rope_theta.

**The n of dynamic and longrope.** lcx uses one n for a whole generation, the length of the cache. Cached keys and new
queries then have the same rotation, and cached decoding equals the full forward pass at that n. transformers
changes its frequencies while it decodes but keeps the cached keys, so its cached decoding differs from its own full
forward pass. To reproduce it, at every forward pass use n = last position + 1 for longrope, and for dynamic the
largest n since the last text shorter than L.

**Your own type** is a function with the same signature, from any package, given in place of a type's name:

    def halved(rope, head_dim, length):
        inv_freq, attention_scaling = default(rope, head_dim, length)
        return inv_freq / 2, attention_scaling

    Rope(rope_type=halved)        # in a .gin file: Rope.rope_type = @my_package.halved

`extend.py` applies a scaling to a pretrained model and checks it.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lcx import moved, rope_fields
from lcx.errors import UserError
from lcx.rope_fields import FIELDS
from lcx.rope_fields import needed as _needed
from lcx.wording import quantity

Number = float | int
Length = int | np.integer | Int[np.ndarray, ""] | Int[Array, ""]
InvFreq = Float[np.ndarray, " pairs"] | Float[Array, " pairs"]
Frequencies = tuple[InvFreq, Any]  # and the attention scaling A
_ORIGINAL = "original_max_position_embeddings"


@dataclasses.dataclass(frozen=True)
class Rope:
    """One rotary embedding. The fields have the names and meanings of Hugging Face's `rope_parameters`.

    Attributes:
      original_max_position_embeddings: the context window of pretraining in tokens. Any type may have it, so that a
        second extension is relative to the same window.
      inv_freq: explicit w_j as stored in a checkpoint, if they differ from those of rope_theta, even by rounding.

    Raises:
      UserError: an unknown type, a field that the type needs is missing or one that it would ignore is set, or a number
        is out of range.
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

    __no_type_check__ = True  # no type checks by jaxtyping: the checks below give better messages

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = rope_fields.canonical(field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)  # frozen, and hashable: lists become tuples
        rope_fields.check(self)

    def frequencies(self, head_dim: int, length: Length) -> Frequencies:
        """(inv_freq float32 [d/2], A). `length` is n, which may be traced; dynamic and longrope depend on it."""
        function = self.rope_type if callable(self.rope_type) else ROPE_TYPES[self.rope_type]
        return function(self, head_dim, length)


def rotary_dim(rope: Rope, head_dim: int) -> int:
    """d, the number of rotated dimensions of a head. Raises UserError unless it is even and positive."""
    dim = int(head_dim * rope.partial_rotary_factor)
    if dim < 2 or dim % 2:
        raise UserError(
            f"head_dim {head_dim} x partial_rotary_factor {rope.partial_rotary_factor:g} is {dim},"
            " expected an even number of at least 2 rotary dimensions: change one of them"
        )
    return dim


def _powers(theta: float, dim: int) -> np.ndarray:
    """1 / w_j = theta^(2j/d) in float32, rounded at the same places as in transformers (so are all types below).

    A difference of one bit would rotate position 131072 by up to 0.005 rad away from what the weights were trained on.
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
        raise UserError(f"{name} has {quantity(len(values), 'number')}, expected {expected}: change {name}")
    return np.asarray(values, np.float32)


def linear(rope: Rope, head_dim: int, length: Length) -> Frequencies:
    (s,) = _needed(rope, "factor")
    return default(rope, head_dim, length)[0] / s, 1.0


def ntk_theta(rope: Rope, head_dim: int) -> float:
    """The base b s^(d/(d-2)) of type ntk. transformers has no such type and expresses it as this larger rope_theta."""
    (s,), dim = _needed(rope, "factor"), rotary_dim(rope, head_dim)
    if dim == 2:
        raise UserError("NTK scaling found 2 rotary dimensions, expected at least 4: change rope_type")
    return rope.rope_theta * s ** (dim / (dim - 2))


def ntk(rope: Rope, head_dim: int, length: Length) -> Frequencies:
    del length
    return 1 / _powers(ntk_theta(rope, head_dim), rotary_dim(rope, head_dim)), 1.0


def dynamic(rope: Rope, head_dim: int, length: Length) -> Frequencies:
    ntk_theta(rope, head_dim)  # raises for two rotary dimensions, for which d/(d-2) is infinite
    s, window = _needed(rope, "factor", "original_max_position_embeddings")
    dim = rotary_dim(rope, head_dim)
    # With x = s n/L - (s-1) = 1 + s (n-L)/L the frequencies (b x^(d/(d-2)))^(-2j/d) equal w_j x^(-2j/(d-2)). This form
    # needs no power of a large base in float32 and has no cancellation, also if n is traced.
    w, power = 1 / _powers(rope.rope_theta, dim), (-np.arange(0, dim, 2) / (dim - 2)).astype(np.float32)
    if isinstance(length, jax.Array):
        return w * (1 + s * jnp.maximum(length - window, 0).astype(jnp.float32) / window) ** power, 1.0
    return w * np.float32(1 + s * max(int(length) - window, 0) / window) ** power, 1.0


def yarn(rope: Rope, head_dim: int, length: Length) -> Frequencies:
    del length
    s, window = _needed(rope, "factor", "original_max_position_embeddings")
    dim = rotary_dim(rope, head_dim)

    def pair(turns: float) -> float:  # the (fractional) j of the pair that makes `turns` rotations inside the window
        return dim * math.log(window / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = pair(rope.beta_fast or 32.0), pair(rope.beta_slow or 1.0)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)  # d - 1 instead of d/2 - 1, as in the released code
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low or 0.001), 0, 1)
    w_inverse, keep = _powers(rope.rope_theta, dim), 1 - ramp

    def mscale(k: float) -> float:
        return 0.1 * k * math.log(s) + 1.0

    scaling = mscale(1.0) if rope.attention_factor is None else rope.attention_factor
    if rope.attention_factor is None and rope.mscale and rope.mscale_all_dim:
        scaling = mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return 1 / (s * w_inverse) * (1 - keep) + 1 / w_inverse * keep, scaling


def score_factor(rope: Rope | None) -> float:
    """What latent attention multiplies all scores by: (0.1 mscale_all_dim ln s + 1)^2, in DeepSeek's form of YaRN.

    There A, the quotient of mscale and mscale_all_dim, acts on the rotated part of a head only; this acts on both.
    """
    if rope is None or not rope.mscale_all_dim or not rope.factor:
        return 1.0
    return (0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0) ** 2


def llama3(rope: Rope, head_dim: int, length: Length) -> Frequencies:
    s, window, low, high = _needed(rope, *FIELDS["llama3"][0])
    w, _ = default(rope, head_dim, length)
    turns = window / (2 * math.pi / w)  # in the original window
    # Llama 4 Scout has equal factors: nothing between what is kept and what is scaled.
    keep = np.clip((turns - low) / (high - low), 0, 1) if high > low else (turns >= low).astype(w.dtype)
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
    """Rotates queries or keys according to their positions, in Hugging Face's rotate-half layout (pairs j and j + d/2).

    Positions are converted from integers straight to float32, which is exact below 2^24 (bfloat16 would be exact only
    up to 256). The computation is in float32 and the result has the dtype of x. Dimensions beyond 2 * pairs are
    unchanged. Positions of shape [1, T] need the cosines of one row instead of B.
    """
    pairs = inv_freq.shape[0]
    angle = positions[:, :, None, None].astype(jnp.float32) * inv_freq  # [B or 1, T, 1, pairs]
    cos, sin = jnp.cos(angle) * attention_scaling, jnp.sin(angle) * attention_scaling
    y = x[..., : 2 * pairs].astype(jnp.float32)
    # Swapping the halves, instead of computing each half separately, lets XLA fuse the backward pass, which makes it
    # 3 times faster on CPU.
    swapped = jnp.concatenate([y[..., pairs:], y[..., :pairs]], axis=-1)
    y = y * jnp.concatenate([cos, cos], axis=-1) + swapped * jnp.concatenate([-sin, sin], axis=-1)
    return jnp.concatenate([y.astype(x.dtype), x[..., 2 * pairs :]], axis=-1)


def extended_window(rope: Rope, max_position_embeddings: int) -> int:
    """The context window in tokens of a model whose config.json has this max_position_embeddings.

    Some files keep the original window in max_position_embeddings, as model cards recommend for YaRN; then the window
    is factor times the original one. The factors of llama3 and longrope are not ratios of windows, so for these types
    an enlarged max_position_embeddings is the window.
    """
    original, factor = rope.original_max_position_embeddings, rope.factor
    if original is None or factor is None:
        return max_position_embeddings
    if rope.rope_type in ("llama3", "longrope") and max_position_embeddings > original:
        return max_position_embeddings
    return max(max_position_embeddings, round(factor * original))


__getattr__ = moved.names_of(__name__)
