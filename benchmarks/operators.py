"""The operators at the shapes of real models: one table for the benchmarks and for the tests that compile kernels.

    operator = OPERATORS["fir_conv"]
    arrays = operator.arrays(operator.size, B=1, T=1024, dtype="float32", seed=0)       # {name: array}
    y = operator.call(arrays, implementation=None)
    structs = operator.structs(operator.size, B=8, T=8192, dtype="bfloat16")            # shapes only

Work is counted per forward pass: the FLOPs of the cheapest known algorithm for the definition (not of the one that
runs), and the bytes of every argument and result once. Times are compared with the floor that follows from both.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Size:
    """D channels with G filters of K taps; or N heads, P features, H values; or D embed, V vocabulary."""

    D: int = 0
    G: int = 0
    K: int = 0
    N: int = 0
    kv: int = 0
    P: int = 0
    H: int = 0
    V: int = 0


@dataclasses.dataclass(frozen=True)
class Operator:
    """An operator at one of the shapes that models use.

    Attributes:
      size: as in the model that `note` names; `small`: for a CPU.
      shapes: (size, B, T) -> {argument: (shape, kind)}; kind "x" is in the dtype of activations, "w" a float32
        weight; "positive", "decay", "labels" and "documents" are drawn as their names say (see arrays).
      call: ({argument: array}, implementation) -> result.
      flops: (size, T) -> for one token, forward.
      tokens: of the whole problem (B = tokens / T) in the table of targets.
    """

    name: str
    note: str
    size: Size
    small: Size
    shapes: Callable[[Size, int, int], dict[str, tuple[tuple[int, ...], str]]]
    call: Callable
    flops: Callable[[Size, int], float]
    tokens: int = 8 * 8192
    linear: bool = True  # time grows as T
    products: bool = True  # its kernels are matrix products
    backward: float = 2.0  # FLOPs of the backward pass over those of the forward pass

    def structs(self, size: Size, *, B: int, T: int, dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
        types = {"x": dtype, "positive": dtype, "labels": "int32", "documents": "int32"}
        return {
            name: jax.ShapeDtypeStruct(shape, types.get(kind, "float32"))
            for name, (shape, kind) in self.shapes(size, B, T).items()
        }

    def arrays(self, size: Size, *, B: int, T: int, dtype: str, seed: int = 0) -> dict[str, jax.Array]:
        rng, kinds = np.random.default_rng(seed), self.shapes(size, B, T)
        out = {}
        for name, struct in self.structs(size, B=B, T=T, dtype=dtype).items():
            x = rng.standard_normal(struct.shape, np.float32)
            kind = kinds[name][1]
            if kind == "w":
                x *= struct.shape[-1] ** -0.5
            elif kind == "decay":  # a half-life of about 7 tokens for some heads, of hundreds for others
                x = -np.exp(x - 3)
            elif kind == "positive":
                x = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
            elif kind == "labels":
                x = rng.integers(0, size.V, struct.shape)
            elif kind == "documents":  # 300 tokens long or so
                x = np.cumsum(rng.random(struct.shape) < 1 / 300, axis=1) + 1
            out[name] = jnp.asarray(x, struct.dtype)
        return out

    def packed(self) -> "Operator":
        """The same operator on rows of several documents."""
        shapes = self.shapes
        return dataclasses.replace(
            self,
            name=f"{self.name}_packed",
            shapes=lambda size, B, T: shapes(size, B, T) | {"segment_ids": ((B, T), "documents")},
        )

    def trained(self, arrays) -> dict:
        """The arrays that have a gradient."""
        return {name: x for name, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}

    def forward(self, implementation: str | None = None):
        return lambda arrays: self.call(arrays, implementation)

    def gradients(self, implementation: str | None = None):
        """arrays, cotangent -> (result, gradients)."""

        def both(arrays, dy):
            trained = self.trained(arrays)
            y, pull = jax.vjp(lambda t: self.call({**arrays, **t}, implementation), trained)
            return y, pull(dy)[0]

        return both

    def result(self, arrays) -> jax.ShapeDtypeStruct:
        return jax.eval_shape(self.forward("xla"), arrays)

    def work(self, size: Size, *, B: int, T: int, dtype: str, train: bool) -> tuple[float, float]:
        """(FLOPs, bytes) of a forward pass, or of a forward and a backward pass."""
        structs = self.structs(size, B=B, T=T, dtype=dtype)
        count = lambda x: math.prod(x.shape) * x.dtype.itemsize  # noqa: E731
        inputs, y = sum(map(count, structs.values())), count(self.result(structs))
        flops, moved = B * T * self.flops(size, T), inputs + y
        if train:
            flops *= 1 + self.backward
            moved += inputs + y + sum(map(count, self.trained(structs).values()))
        return flops, moved


def _short_conv(a, implementation):
    from lcx.ops.short_conv import short_conv

    return short_conv(a["x"], a["w"], segment_ids=a.get("segment_ids"), implementation=implementation)[0]


def _fir_conv(a, implementation):
    from lcx.ops.fir_conv import fir_conv

    ids = a.get("segment_ids")
    return fir_conv(a["x1"], a["x2"], a["v"], a["h"], segment_ids=ids, implementation=implementation)[0]


def _long_conv(a, implementation):
    from lcx.ops.long_conv import long_conv

    options = {"skip": a["skip"], "segment_ids": a.get("segment_ids"), "implementation": implementation}
    return long_conv(a["x1"], a["x2"], a["v"], a["h"], **options)


def _linear_attention(a, implementation):
    from lcx.ops.linear_attention import linear_attention

    decay = a.get("log_decay")
    options = {"segment_ids": a.get("segment_ids"), "implementation": implementation}
    return linear_attention(a["q"], a["k"], a["v"], log_decay=decay, normalize=decay is None, **options)[0]


def _lolcats(kind):
    def call(a, implementation):
        from lcx.ops.linear_attention import Window, linear_attention

        window = Window(kind=kind, size=64, q=a["window_q"], k=a["window_k"], scale=a["gamma"])
        options = {"segment_ids": a.get("segment_ids"), "implementation": implementation}
        return linear_attention(a["q"], a["k"], a["v"], normalize=True, window=window, **options)[0]

    return call


def _second_order(form):
    def call(a, implementation):
        from lcx.ops.second_order_attention import second_order_attention

        options = {"segment_ids": a.get("segment_ids"), "implementation": implementation}
        return second_order_attention(a["q"], a["k"], a["v"], log_decay=a["log_decay"], form=form, **options)[
            0
        ]

    return call


def _attention(a, implementation):
    from lcx.ops.attention import attention

    decay = {"log_decay": a["log_decay"]} if "log_decay" in a else {}
    ids = a.get("segment_ids")
    options = {"q_segment_ids": ids, "kv_segment_ids": ids, "implementation": implementation}
    return attention(a["q"], a["k"], a["v"], **options, **decay)


def _cross_entropy(a, implementation):
    from lcx.ops.cross_entropy import cross_entropy

    weights = jnp.ones(a["labels"].shape, jnp.float32)
    form = {"xla": "chunked"}.get(implementation, implementation)  # the operator's name for this form
    return cross_entropy(a["x"], a["head"], a["labels"], weights, implementation=form)


def _gated(filters):
    def shapes(s, B, T):
        x = ((B, s.D, T), "x")
        return {"x1": x, "x2": x, "v": x} | filters(s, T)

    return shapes


def _heads(s, B, T, *, decay, positive=False):
    kind = "positive" if positive else "x"
    shapes = {
        "q": ((B, T, s.kv, s.P), kind),
        "k": ((B, T, s.kv, s.P), kind),
        "v": ((B, T, s.N, s.H), "x"),
    }
    return shapes | ({"log_decay": ((B, T, s.N), "decay")} if decay else {})


def _softmax_shapes(s, B, T, decay):
    shapes = {
        "q": ((B, T, s.N, s.H), "x"),
        "k": ((B, T, s.kv, s.H), "x"),
        "v": ((B, T, s.kv, s.H), "x"),
    }
    return shapes | ({"log_decay": ((B, T, s.N), "decay")} if decay else {})


def _lolcats_shapes(s, B, T):
    shapes = _heads(s, B, T, decay=False, positive=True)
    x = ((B, T, s.N, s.H), "x")
    return shapes | {"window_q": x, "window_k": x, "gamma": ((s.N,), "w")}


def _states_flops(s, T):
    return s.N * 4 * (s.H * (s.H + 1) // 2) * (s.H + 1)


def _pairs_flops(s, T):
    return s.N * 2 * T * s.H  # two products with half the pairs


_TABLE = (
    Operator(
        name="short_conv",
        note="featuriser of Hyena, 3 taps",
        size=Size(D=4096, K=3),
        small=Size(D=128, K=3),
        shapes=lambda s, B, T: {"x": ((B, s.D, T), "x"), "w": ((s.D, s.K), "w")},
        call=_short_conv,
        flops=lambda s, T: 2 * s.K * s.D,
        products=False,
    ),
    Operator(
        name="fir_conv_7",
        note="Hyena-SE of StripedHyena 2 7B",
        size=Size(D=4096, G=256, K=7),
        small=Size(D=128, G=8, K=7),
        shapes=_gated(lambda s, T: {"h": ((s.G, s.K), "w")}),
        call=_fir_conv,
        flops=lambda s, T: 2 * s.K * s.D,
    ),
    Operator(
        name="fir_conv_128",
        note="Hyena-MR of StripedHyena 2 7B",
        size=Size(D=4096, G=256, K=128),
        small=Size(D=128, G=8, K=128),
        shapes=_gated(lambda s, T: {"h": ((s.G, s.K), "w")}),
        call=_fir_conv,
        flops=lambda s, T: 2 * s.K * s.D,
    ),
    Operator(
        name="long_conv",
        note="Hyena-LI, 768 channels",
        size=Size(D=768),
        small=Size(D=64),
        shapes=_gated(lambda s, T: {"h": ((s.D, T), "w"), "skip": ((s.D,), "w")}),
        call=_long_conv,
        flops=lambda s, T: s.D * 15 * math.log2(2 * T),  # three real FFTs of 2 T points
    ),
    Operator(
        name="linear_attention",
        note="16 heads of 128, normalised",
        size=Size(N=16, kv=16, P=128, H=128),
        small=Size(N=4, kv=4, P=64, H=64),
        shapes=lambda s, B, T: _heads(s, B, T, decay=False, positive=True),
        call=_linear_attention,
        flops=lambda s, T: s.N * 4 * s.P * s.H,
        tokens=8 * 4096,
    ),
    Operator(
        name="ssd",
        note="Mamba-2: 64 heads of 64 that share one q and k of 128, decay",
        size=Size(N=64, kv=1, P=128, H=64),
        small=Size(N=4, kv=1, P=64, H=64),
        shapes=lambda s, B, T: _heads(s, B, T, decay=True),
        call=_linear_attention,
        flops=lambda s, T: s.N * 4 * s.P * s.H,
        tokens=8 * 4096,
    ),
    Operator(
        name="lolcats",
        note="linear attention with a softmax window of 64, 32 heads of 128, 64 features of either sign",
        size=Size(N=32, kv=32, P=128, H=128),
        small=Size(N=4, kv=4, P=128, H=64),
        shapes=_lolcats_shapes,
        call=_lolcats("terraced"),
        flops=lambda s, T: s.N * (4 * s.P * s.H + 4 * 96 * s.H),
        tokens=4 * 8192,
    ),
    Operator(
        name="second_order_tiles",
        note="2Mamba, 16 heads of 128, decay",
        size=Size(N=16, kv=16, P=128, H=128),
        small=Size(N=2, kv=2, P=32, H=32),
        shapes=lambda s, B, T: _softmax_shapes(s, B, T, True),
        call=_second_order("tiles"),
        flops=_pairs_flops,
        tokens=2 * 8192,
        linear=False,
        backward=2.5,
    ),
    Operator(
        name="second_order_states",
        note="2Mamba, 16 heads of 64, decay",
        size=Size(N=16, kv=16, P=64, H=64),
        small=Size(N=2, kv=2, P=32, H=32),
        shapes=lambda s, B, T: _softmax_shapes(s, B, T, True),
        call=_second_order("states"),
        flops=_states_flops,
        tokens=2 * 65536,
    ),
    Operator(
        name="attention",
        note="Llama 3 8B: 32 heads of 128 over 8",
        size=Size(N=32, kv=8, H=128),
        small=Size(N=2, kv=1, H=64),
        shapes=lambda s, B, T: _softmax_shapes(s, B, T, False),
        call=_attention,
        flops=_pairs_flops,
        tokens=2 * 8192,
        linear=False,
        backward=2.5,
    ),
    Operator(
        name="attention_decay",
        note="forgetting attention, 16 heads of 128",
        size=Size(N=16, kv=16, H=128),
        small=Size(N=2, kv=1, H=64),
        shapes=lambda s, B, T: _softmax_shapes(s, B, T, True),
        call=_attention,
        flops=_pairs_flops,
        tokens=2 * 8192,
        linear=False,
        backward=2.5,
    ),
    Operator(
        name="cross_entropy",
        note="head of 32000",
        size=Size(D=2048, V=32000),
        small=Size(D=128, V=4096),
        shapes=lambda s, B, T: {
            "x": ((B, T, s.D), "x"),
            "head": ((s.V, s.D), "x"),
            "labels": ((B, T), "labels"),
        },
        call=_cross_entropy,
        flops=lambda s, T: 2 * s.D * s.V,
        tokens=8192,
    ),
)
OPERATORS = {operator.name: operator for operator in _TABLE}
# Variants that take other paths in the same kernels: packed rows as in training, the other window, both forms in one.
_OTHERS = (
    *(operator.packed() for operator in _TABLE if operator.name != "cross_entropy"),
    dataclasses.replace(OPERATORS["lolcats"], name="lolcats_sliding", call=_lolcats("sliding")),
    dataclasses.replace(
        OPERATORS["second_order_states"],
        name="second_order_either",
        note="2Mamba from 4096 tokens on: the data decides between tiles and states",
        call=_second_order(None),
    ).packed(),
)
VARIANTS = OPERATORS | {operator.name: operator for operator in _OTHERS}
