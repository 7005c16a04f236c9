"""A StripedHyena 2 whose last layer is attention, computed from the formulas: numpy, float64, the whole row at once.

An independent check of what lcx computes in pieces. Convolutions are products of Fourier transforms of the whole row;
attention is evaluated at chosen positions only, over all keys before them.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np
from scipy.special import erf

Weights = Mapping[str, np.ndarray]  # the parameters of lcx by their paths, separated by "/"
EPS = 1e-6
BASE = 10000.0  # of the rotary embedding


def at_positions(
    weights: Weights, pattern: str, tokens: np.ndarray, positions: np.ndarray, *, keys_from: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(the residual stream after the last layer [n, D], log-probabilities of the next token [n, V]) at n positions.

    Args:
      pattern: letters of the layers as in `striped_hyena`; "*" is the last and has one head.
      keys_from: attention sees no key before this position. Anything but 0 shows how much the distant keys matter.
    """
    w = {name: np.asarray(x, np.float64) for name, x in weights.items()}
    x = w["embed/embedding"][tokens]
    for i, letter in enumerate(pattern[:-1]):
        layer = _of(w, f"stages_0/block_{i}")
        x = x + _hyena(letter, layer, _norm(x, layer["mixer_norm/scale"]))
        x = x + _mlp(layer, x, _gelu if i == 0 else None)
    layer = _of(w, f"stages_0/block_{len(pattern) - 1}")
    x = x[positions] + _attention(layer, _norm(x, layer["mixer_norm/scale"]), positions, keys_from)
    x = x + _mlp(layer, x, None)
    logits = _norm(x, w["final_norm/scale"]) @ w["embed/embedding"].T
    logits -= logits.max(1, keepdims=True)
    return x, logits - np.log(np.exp(logits).sum(1, keepdims=True))


def _of(weights: Weights, path: str) -> dict[str, np.ndarray]:
    """The weights of one block; their first axis, over repetitions of the pattern, has length 1."""
    return {name.removeprefix(f"{path}/"): x[0] for name, x in weights.items() if name.startswith(f"{path}/")}


def _norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * scale


def _gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + erf(x / math.sqrt(2)))


def _mlp(layer: Weights, x: np.ndarray, activation: Callable[[np.ndarray], np.ndarray] | None) -> np.ndarray:
    x = _norm(x, layer["mlp_norm/scale"])
    gate = x @ layer["mlp/gate_proj/kernel"]
    gate = gate if activation is None else activation(gate)
    return (gate * (x @ layer["mlp/up_proj/kernel"])) @ layer["mlp/down_proj/kernel"]


def _convolved(x: np.ndarray, h: np.ndarray) -> np.ndarray:
    """y_t = sum_k h_k x_(t-k) of one channel."""
    n = 1 << (len(x) + len(h) - 1).bit_length()
    return np.fft.irfft(np.fft.rfft(x, n) * np.fft.rfft(h, n), n)[: len(x)]


def _hyena(letter: str, layer: Weights, x: np.ndarray) -> np.ndarray:
    T, D = x.shape
    y = np.empty((T, D))
    for c in range(D):
        z = x @ layer["mixer/in_proj/kernel"][:, c]
        x1, x2, v = (_convolved(z[:, role], layer["mixer/featurizer"][c, role]) for role in range(3))
        y[:, c] = x1 * (_convolved(x2 * v, _filter(letter, layer, c, D, T)) + _skip(layer, c) * x2 * v)
    return y @ layer["mixer/out_proj/kernel"] + layer["mixer/out_proj/bias"]


def _filter(letter: str, layer: Weights, c: int, D: int, T: int) -> np.ndarray:
    if letter != "H":
        h = layer["mixer/h"] * layer.get("mixer/decay", 1)
        return h[c // (D // len(h))][:T]
    rates = np.exp(layer["mixer/p"][c] + layer["mixer/gamma"][c])
    return sum(R * np.exp(-rate * np.arange(T)) for R, rate in zip(layer["mixer/R"][c], rates, strict=True))


def _skip(layer: Weights, c: int) -> float:
    return layer["mixer/skip"][c] if "mixer/skip" in layer else 0.0


def _attention(layer: Weights, x: np.ndarray, positions: np.ndarray, keys_from: int) -> np.ndarray:
    q, k, v = (x @ layer[f"mixer/{name}_proj/kernel"][:, 0] for name in "qkv")
    q, k = _rotated(q[positions], positions), _rotated(k, np.arange(len(k)))
    y = np.empty((len(positions), v.shape[1]))
    for i, at in enumerate(positions):
        first = min(keys_from, at)
        scores = k[first : at + 1] @ q[i] / math.sqrt(q.shape[1])
        p = np.exp(scores - scores.max())
        y[i] = p @ v[first : at + 1] / p.sum()
    return y @ layer["mixer/o_proj/kernel"][0] + layer["mixer/o_proj/bias"]


def _rotated(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    # The angles are rounded to float32 as in the published code, which at position 1e6 moves them by up to 0.03.
    half = x.shape[1] // 2
    frequencies = (1 / np.float32(BASE) ** (np.arange(half, dtype=np.float32) / half)).astype(np.float32)
    angles = (positions[:, None].astype(np.float32) * frequencies).astype(np.float64)
    cos, sin = np.cos(angles), np.sin(angles)
    a, b = x[:, :half], x[:, half:]
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], 1)
