"""The training state and the compiled training step.

The state is a plain dict; each entry is an item of the checkpoint:

    params      the model's parameters: float32 if they train, else in the dtype in which they are stored
    lora        with LoRA only: the low-rank matrices. Of the params, only those that LoRA.beside matches train too
    fp8         with projections in FP8 only: what their next scales are made from (training.fp8_scaling)
    row_state   with rows that continue each other only: what the last batch left (training.row_state)
    opt_state   the optimizer's state, sharded over the mesh like the parameters it belongs to
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from lcx import sharding
from lcx.model import Decoder
from lcx.multihost.agreement import all_compiled
from lcx.ops.fp8 import accumulated
from lcx.optim import combine, partition, plateau_scale
from lcx.training import fp8_scaling, memory, row_state

State = dict[str, Any]


def weights_of(state: State) -> State:
    """The weights in a state (params, lora), without the optimizer's state and the history of FP8 scales."""
    return {name: state[name] for name in ("params", "lora") if name in state}


def all_trains(state: State) -> Any:
    """Tree of bool: True for every weight, or with LoRA only for the low-rank matrices."""
    weights = weights_of(state)
    moves = {name: name == "lora" or "lora" not in weights for name in weights}
    return {name: jax.tree.map(lambda _, yes=yes: yes, weights[name]) for name, yes in moves.items()}


def moving(state: State, trains: Any = None) -> Any:
    """The weights that the optimizer updates: those where `trains` is True (None: all_trains)."""
    return partition(weights_of(state), all_trains(state) if trains is None else trains)[0]


def kept(abstract: Any, trains: Any, stored: Any) -> Any:
    """Abstract parameters, the frozen ones in the dtypes of `stored`: float32 would not make them more precise."""
    return jax.tree.map(
        lambda leaf, yes, like: (
            leaf if yes else jax.ShapeDtypeStruct(leaf.shape, like.dtype, sharding=leaf.sharding)
        ),
        abstract,
        trains,
        stored,
    )


def as_kept(params: Any, abstract: Any) -> Any:
    """Parameters cast to the dtypes of `abstract`.

    Each original is freed right after it is cast, to avoid a second full copy; do not use `params` afterwards.
    """

    def one(x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
        if x.dtype == like.dtype:
            return x
        y = x.astype(like.dtype)
        x.delete()
        return y

    return jax.tree.map(one, params, abstract)


def abstract_state(
    weights: State, optimizer: optax.GradientTransformation, mesh: Mesh, trains: Any = None
) -> State:
    """ShapeDtypeStructs with shardings for the whole state.

    Args:
      weights: abstract params (and lora) with shardings.
      optimizer: its state is sharded like the weights it belongs to; counters are replicated.
      mesh: where the state will be placed.
      trains: tree of bool, which of the weights train; None: all_trains.
    """
    moved = moving(weights, trains)
    shapes = jax.eval_shape(optimizer.init, moved)

    def like(leaf, weight):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=weight.sharding)

    def alone(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.replicated(mesh))

    opt_state = optax.tree_utils.tree_map_params(optimizer, like, shapes, moved, transform_non_params=alone)
    return {**weights, "opt_state": opt_state}


def init_opt_state(
    optimizer: optax.GradientTransformation, weights: State, abstract: State, trains: Any = None
) -> Any:
    """The initial optimizer state, created directly in its shards, so that no device holds all of it."""
    out = jax.tree.map(lambda x: x.sharding, abstract["opt_state"])
    return jax.jit(optimizer.init, out_shardings=out)(moving(weights, trains))


def make_step(
    model: Decoder,
    optimizer: optax.GradientTransformation,
    objective: Callable,
    learning_rates: optax.Schedule,
    *,
    accumulation: int,
    abstract: State,
    trains: Any = None,
) -> Callable[[State, dict[str, jax.Array], jax.typing.ArrayLike], tuple[State, dict[str, jax.Array]]]:
    """The compiled function step(state, batch, step number) -> (new state, metrics).

    It donates the old state, which must not be used afterwards. Metrics are scalars: loss (nats per token), grad_norm,
    learning_rate, tokens, and the named parts of the loss.

    The gradient is that of the weighted mean over the whole global batch. Losses and weights are summed over
    micro-batches and devices and divided once at the end, so neither accumulation nor the mesh changes the result.

    Args:
      model: the architecture.
      optimizer: from AdamW.build.
      objective: see lcx.objectives.
      learning_rates: step -> learning rate, only for the metrics.
      accumulation: number of micro-batches that the batch is divided into, see `micro_batches`.
      abstract: abstract state with shardings, from abstract_state.
      trains: tree of bool, which of the weights train; None: all_trains. No gradient is computed for the others.
    """
    trains = all_trains(abstract) if trains is None else trains

    def sums(moving, recording, still, before, batch):
        variables = combine(moving, still) | recording
        if before is None:
            (loss, *rest), after = objective(model, variables, batch), None
        else:
            (loss, *rest), after = objective(model, variables, batch, state=before)
        # rest: the summed weights and, for some objectives, {name: summed part of the loss}
        return loss, (after, *rest)

    def step(state: State, batch: dict[str, jax.Array], number: jax.Array):
        moving, still = partition(weights_of(state), trains)
        recording, before = fp8_scaling.of(state), row_state.of(state)
        gradient = jax.value_and_grad(sums, argnums=(0, 1), has_aux=True)
        gradient = functools.partial(gradient, moving, recording, still, before)
        (loss, (after, weight, *parts)), (grads, recorded) = accumulate(gradient, micro_batches(batch, accumulation))
        total = jnp.where(weight > 0, weight, 1.0)  # a batch that is entirely masked has loss 0, not NaN
        grads = jax.tree.map(lambda g: g / total.astype(g.dtype), grads)
        updates, opt_state = optimizer.update(grads, state["opt_state"], moving)
        metrics = {
            "loss": loss / total,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(learning_rates(number) * plateau_scale(opt_state), jnp.float32),
            "tokens": weight,
            **{name: part / total for named in parts for name, part in named.items()},
        }
        moved = combine(optax.apply_updates(moving, updates), still)
        moved["params"], scaling = fp8_scaling.after_step(moved["params"], recording, recorded)
        return {**moved, **scaling, **row_state.after_step(before, after), "opt_state": opt_state}, metrics

    out = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(step, donate_argnums=0, out_shardings=(out, None))


def compile_first(step: Any, state: State, batch: dict[str, jax.ShapeDtypeStruct]) -> None:
    """Compiles the jitted step before its first batch exists, waits for all processes to have done so, and gives the
    compiler's memory back: a long row and the compiler never need memory at the same time.

    Args:
      step: from make_step.
      state: the state that the first call will get.
      batch: the shapes of its batch, from sharding.abstract_batch.
    """
    step.lower(state, batch, np.int32(0)).compile()  # kept by jax: the first call does not compile again
    all_compiled()
    memory.give_back()


def micro_batches(batch: dict[str, jax.Array], count: int) -> dict[str, jax.Array]:
    """[B, T] -> [count, B / count, T]; on more devices than B / count rows with a smaller count (micro_batch_count).

    Micro-batch i takes every count-th row. Rows are sharded in contiguous blocks, so each device contributes to every
    micro-batch from the rows it already holds, without communication.
    """
    parts = sharding.axis_size("data") * sharding.axis_size("fsdp")
    count = sharding.micro_batch_count(jax.tree.leaves(batch)[0].shape[0], count, parts)
    return jax.tree.map(
        lambda x: jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1), batch
    )


def accumulate(function: Callable, micro: dict[str, jax.Array]) -> Any:
    """The sum of `function`'s results (a tree of arrays) over the leading axis of the micro-batches.

    Of magnitudes that FP8 products record it is the largest (ops.fp8.accumulated).
    """
    one = jax.tree.map(lambda x: x[0], micro)
    if jax.tree.leaves(micro)[0].shape[0] == 1:
        return function(one)
    function = jax.jit(function, inline=True)  # traced once, for its shapes and for the loop
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, one))
    return jax.lax.scan(lambda total, one: (accumulated(total, function(one)), None), zeros, micro)[
        0
    ]


@functools.cache
def make_sums(
    model: Decoder, objective: Callable, accumulation: int = 1
) -> Callable[[State, dict[str, jax.Array]], tuple]:
    """The compiled function sums(weights, batch) -> (summed loss without its named parts, summed weight).

    It processes one micro-batch at a time, and is compiled once per model, objective and accumulation.
    """

    def sums(weights: State, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        loss, weight, *parts = accumulate(
            lambda micro: objective(model, weights, micro), micro_batches(batch, accumulation)
        )
        return loss - sum(x for named in parts for x in named.values()), weight

    return jax.jit(sums)


def mean_loss(sums: Callable, weights: State, batches: Iterable[dict[str, Any]], mesh: Mesh) -> float | None:
    """The mean loss per unit of weight over some batches of this process's rows, in nats; None if they have no weight.

    Args:
      sums: from make_sums.
      weights: params, and lora if there is one.
      batches: each with the rows of this process.
      mesh: where the weights are.
    """
    loss = weight = 0.0
    for batch in batches:
        batch_loss, batch_weight = sums(weights, sharding.shard_batch(batch, mesh))
        loss, weight = loss + float(batch_loss), weight + float(batch_weight)
    return loss / weight if weight else None
