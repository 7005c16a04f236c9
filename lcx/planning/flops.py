"""The operations of a traced function: products of matrices, convolutions, FFTs; recomputation included.

They are counted in the jaxpr and not in the compiled program, whose own count takes the body of a loop once and knows
no library calls. A multiplication and an addition are two operations. Element-wise operations are not counted.
"""

import dataclasses
import math
from typing import Any

import jax
from jax.extend import core

RARE = "rarely_needed"  # a function of this name runs only if experts have far more tokens than others
EITHER = "either_in_place"  # of the loops in a function of this name one runs, once


@dataclasses.dataclass
class Count:
    """Operations over all devices.

    Attributes:
      flops: operations of matrix products, convolutions and FFTs.
      loops: `while` loops whose length depends on the data, with products inside, which are not counted.
      kernels: kernels of Pallas that state no cost, counted as 0.
    """

    flops: float = 0.0
    loops: int = 0
    kernels: int = 0


def count(traced: Any) -> Count:
    """The operations of `jax.jit(f).trace(...)`."""
    total = Count()
    _add(traced.jaxpr.jaxpr, 1.0, total)
    return total


def _add(jaxpr: Any, times: float, total: Count) -> None:
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if params.get("name") == RARE:
            continue
        if params.get("name") == EITHER:
            loops = [inner for inner in params["jaxpr"].eqns if inner.primitive.name == "while"]
            _add_dearest([loop.params["body_jaxpr"] for loop in loops], times, total)
            continue
        if name in ("dot_general", "ragged_dot", "ragged_dot_general"):
            total.flops += times * _product(eqn)
        elif name == "conv_general_dilated":
            total.flops += times * _convolution(eqn)
        elif name == "fft":
            total.flops += times * _fft(eqn)
        elif name == "pallas_call":
            cost = params.get("cost_estimate")
            total.flops += times * (cost.flops if cost else 0)
            total.kernels += cost is None
        elif name == "scan":
            _add(params["jaxpr"].jaxpr, times * params["length"], total)
        elif name == "while":
            inside = Count()
            _add(params["body_jaxpr"].jaxpr, times, inside)
            total.loops += inside.flops > 0 or inside.loops > 0
        elif name == "cond":  # of the branches, the dearest: for kernels they are platforms
            _add_dearest(params["branches"], times, total)
        elif name == "shard_map":  # inside are the arrays of one device
            _add(params["jaxpr"], times * params["mesh"].size, total)
        else:
            for inner in jax.tree.leaves(list(params.values()), is_leaf=_is_jaxpr):
                if _is_jaxpr(inner):
                    _add(getattr(inner, "jaxpr", inner), times, total)


def _add_dearest(branches: Any, times: float, total: Count) -> None:
    tries = []
    for branch in branches:
        tries.append(Count())
        _add(branch.jaxpr, times, tries[-1])
    dearest = max(tries, key=lambda one: one.flops)
    total.flops += dearest.flops
    total.loops += dearest.loops
    total.kernels += dearest.kernels


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)


def _product(eqn: Any) -> float:
    left, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        if left == eqn.invars[1].aval.shape and left == (*out, left[-1]) and contracted == (len(out),):
            return 0.0  # a sum of products over the last axis (tiling.row_dots), which other platforms do not multiply
        return 2.0 * math.prod(out) * math.prod(left[axis] for axis in contracted)
    # Rows [M, K] of several groups give [M, N], since every row meets one matrix of them; [M, K] and [M, N] [E, K, N].
    return 2.0 * math.prod(left) * out[-1]


def _convolution(eqn: Any) -> float:
    kernel = eqn.invars[1].aval.shape
    out = eqn.params["dimension_numbers"].rhs_spec[0]
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) / kernel[out]


def _fft(eqn: Any) -> float:
    """5 n log2 n for n complex numbers, half of it for real ones."""
    n = math.prod(eqn.params["fft_lengths"])
    real = eqn.params["fft_type"] in (jax.lax.FftType.RFFT, jax.lax.FftType.IRFFT)
    shape = max((x.aval.shape for x in (eqn.invars[0], eqn.outvars[0])), key=math.prod)
    rows = math.prod(shape[: len(shape) - len(eqn.params["fft_lengths"])])
    return rows * 5.0 * n * math.log2(max(n, 2)) / (2 if real else 1)
