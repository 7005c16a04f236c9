"""Training objectives. Each returns sums instead of means, so that the parts of a split global batch add up exactly.

An objective returns (sum of losses, sum of weights), or (sum of losses, sum of weights, {name: sum}). The named sums
are auxiliary losses: they are included in the sum of losses, logged by name, and excluded from the held-out loss.

One with an argument `pieces` can process rows in pieces, one with an argument `state` rows that continue others: with
a state it returns (the above, the state after the rows).
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lcx import mixers
from lcx.errors import UserError
from lcx.mixers.linearized import LinearizedAttention
from lcx.model import Decoder, map_mixers
from lcx.ops.cross_entropy import cross_entropy
from lcx.ops.segments import last, runs
from lcx.pieces import PieceFn, Pieces, rope_length, stretch, total
from lcx.sharding import axis_size

Batch = dict[str, Array]
Sums = tuple[Array, Array] | tuple[Array, Array, dict[str, Array]]
# Which bytes do not occur in sequences; the last stands for all larger ids.
_OF_NO_SEQUENCE = ~np.isin(np.arange(257), list(b"ACGTURYKMSWBDHVN-*acgturykmswbdhvn@#|\x00\x01"))
_TAG_BLOCK = 1 << 16  # tokens of a row in which tags are counted at once
TAKEN = (  # names of metrics that are logged for every objective
    *("loss", "grad_norm", "learning_rate", "tokens", "step", "eval_loss", "tokens_per_second", "mfu", "goodput"),
    *("time", "wall_seconds", "data_seconds", "compute_seconds", "save_seconds"),
)


def next_token(
    model: Decoder, variables: Any, batch: Batch, pieces: Pieces | None = None, state: Any = None
) -> Sums | tuple[Sums, Any]:
    """Sum of the weighted next-token negative log-likelihoods in nats, and the sum of the weights.

    Labels are already shifted by the data pipeline. A weight of zero masks padding and the first token of a document.

    Auxiliary losses, which modules sow by `self.sow("losses", name, value)`, are added. A value is either a loss per
    token [B, T], which is weighted like the tokens, or a scalar, taken as a mean over the tokens that the module sees.
    Losses of the same name are summed over layers; a module applies its own coefficient. Losses per token, and scalars
    that depend on the weights alone, do not depend on how the batch is split; other scalars are computed per
    micro-batch.

    Args:
      model: the architecture.
      variables: {"params": ...}, with LoRA also {"lora": ...}.
      batch: tokens, labels, positions, segment_ids and loss_weights, each [B, T].
      pieces: process rows longer than a piece in pieces, with the same gradients and less memory; see lcx.pieces.
        Losses per token, and scalars that depend on the weights alone, stay the same; other scalars are means over the
        tokens of a piece.
      state: what the model knows before the rows (Decoder.init_cache), for rows that continue others; no gradient flows
        into it. The result is then (the sums, the state after the rows). None: rows begin without one.

    Raises:
      UserError: a module sows a value of another shape, or one named like a metric.
    """
    return _of_rows(functools.partial(_next_token, model), model, variables, batch, pieces, state)


def _of_rows(
    piece: PieceFn, model: Decoder, variables: Any, batch: Batch, pieces: Pieces | None, state: Any
) -> Sums | tuple[Sums, Any]:
    """The sums of `piece` over whole rows, or over their pieces if they are longer than one; and the state after them,
    if there is one before them."""
    if state is not None:
        state = mixers.with_rope_length(jax.lax.stop_gradient(state), rope_length(batch))
    if pieces is None or batch["tokens"].shape[1] <= pieces.length:
        sums, after = piece(variables, state, batch)
    else:
        sums, after = total(piece, model, variables, batch, pieces, state)
    return sums if state is None else (sums, after)


def _next_token(model: Decoder, variables: Any, state: Any, batch: Batch) -> tuple[Sums, Any]:
    """(the sums of next_token over some tokens, the state after them; None without a state before them)."""
    (x, state), sown = model.apply(
        variables,
        batch["tokens"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
        cache=state,
        method="hidden",
        mutable="losses",
    )
    weights = batch["loss_weights"].astype(jnp.float32)
    head, transform = model.head(variables["params"]), model.logit_transform
    loss = cross_entropy(x, head, batch["labels"], weights, transform=transform)
    parts = _auxiliary(sown, weights)
    if not parts:
        return (loss, jnp.sum(weights)), state
    return (sum(parts.values(), loss), jnp.sum(weights), parts), state


def nucleotides(
    model: Decoder,
    variables: Any,
    batch: Batch,
    repeat_weight: float = 0.1,
    pieces: Pieces | None = None,
    state: Any = None,
) -> Sums | tuple[Sums, Any]:
    """next_token for genomes encoded as bytes, with the loss weights of Evo 2 (Brixi et al. 2025).

    Inputs and labels are converted to upper case. A lower-case label (a soft-masked repeat) has weight `repeat_weight`;
    '@', '#' and taxonomic tags between bars, "|d__Bacteria;...|", have weight 0. A tag of which the row contains only
    the end is recognised by letters that do not occur in sequences.
    """
    unread = _in_tags(batch["labels"], batch["segment_ids"])  # tags may extend over pieces

    def piece(variables: Any, state: Any, batch: Batch) -> tuple[Sums, Any]:
        return _next_token(model, variables, state, _weighted(batch, repeat_weight))

    return _of_rows(piece, model, variables, {**batch, "unread": unread}, pieces, state)


def _weighted(batch: Batch, repeat_weight: float) -> Batch:
    """Upper-case inputs and labels, and weights that depend on the case and on what is not to be learned."""
    labels = batch["labels"]
    weights = batch["loss_weights"] * jnp.where(_is_lower(labels), repeat_weight, 1.0)
    weights = jnp.where(batch["unread"] | (labels == ord("@")) | (labels == ord("#")), 0.0, weights)
    upper = {
        name: jnp.where(_is_lower(batch[name]), batch[name] - 32, batch[name])
        for name in ("tokens", "labels")
    }
    return {**batch, **upper, "loss_weights": weights}


def check(objective: Callable) -> None:
    """Raises UserError for a function that cannot be called with (model, variables, batch)."""
    try:
        inspect.signature(objective).bind("model", "variables", "batch")
    except (TypeError, ValueError):  # ValueError: it has no signature, as some builtins
        name = getattr(objective, "__name__", str(objective))
        raise UserError(
            f"Trainer.objective {name} cannot be called with (model, variables, batch), expected a function such as "
            "@objectives.next_token"
        ) from None


@functools.cache  # runs with the same objective share their compiled steps
def over_pieces(objective: Callable, pieces: Pieces) -> Callable:
    """The objective with rows processed in pieces, for an objective that has an argument `pieces`.

    Raises:
      UserError: it has none.
    """
    if "pieces" not in inspect.signature(objective).parameters:
        name = getattr(objective, "__name__", str(objective))
        raise UserError(
            f"Trainer.objective {name} has no argument `pieces`, expected one as next_token has: it needs whole rows; "
            "set Trainer.piece_length to None"
        )
    return functools.partial(objective, pieces=pieces)


def attention_transfer(
    model: Decoder, variables: Any, batch: Batch, output_weight: float = 1000.0, map_weight: float = 0.0
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """How much linear attention differs from the softmax attention that it replaces (LoLCATS, arXiv 2410.10254, eq. 5).

    Every layer receives the activations of the softmax model, so the layers do not depend on each other. The loss of a
    token is the mean over linear layers of output_weight x the mean squared error of the heads' outputs (before the
    output projection) + map_weight x the cross-entropy of the attention maps. The cost of the latter is quadratic in T.

    Args:
      model: a Decoder, or Layers of one. For Layers the batch contains `residual` [B, T, D], the input of the first
        layer, instead of tokens.
      variables: {"params": ...}.
      batch: tokens (or residual), positions and segment_ids.

    Returns:
      (sum of the losses of all tokens that are not padding, number of these tokens).

    Raises:
      UserError: the model has no linear attention, neither weight is positive, or the rows fit into the softmax window,
        so that the linear part would receive no gradient.
    """
    weights = {"outputs": output_weight, "maps": map_weight}
    names = tuple(name for name, weight in weights.items() if weight > 0)
    if not names:
        raise UserError(
            f"attention_transfer with output_weight {output_weight} and map_weight {map_weight}: expected one above 0"
        )

    def teach(mixer):
        if not isinstance(mixer, LinearizedAttention):
            return mixer
        seq_len = batch["positions"].shape[1]
        if mixer.held is not None and seq_len <= mixer.held:  # the feature maps would receive no gradient
            raise UserError(mixer.too_short(seq_len))
        return mixer.clone(transfer=names, parent=None)

    whole = "tokens" in batch
    _, sown = map_mixers(model, teach).apply(
        variables,
        batch["tokens" if whole else "residual"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
        method="hidden" if whole else None,
        mutable="losses",
    )
    # Other sown losses are ignored: they do not depend on anything that is trained here.
    losses = [(path[-1], loss) for path, loss in _sown(sown) if "mixer" in path and path[-1] in weights]
    if not losses:
        raise UserError("attention_transfer: the model has no linear attention; set Trainer.linearize")
    real = (batch["segment_ids"] != 0).astype(jnp.float32)
    total = jnp.zeros((), jnp.float32)
    for name, loss in losses:
        total = total + weights[name] * jnp.sum(loss * real)
    layers = sum(loss.shape[0] for _, loss in losses)
    return total * len(names) / layers, jnp.sum(real)


def is_local(objective: Callable) -> bool:
    """Whether the loss of a layer depends on that layer's weights alone, so that no gradient passes between layers."""
    if isinstance(objective, functools.partial):
        objective = objective.func
    return inspect.unwrap(objective) is attention_transfer


def _sown(variables: Any) -> list[tuple[tuple[str, ...], Array]]:
    """(path, value) of everything in the collection `losses`.

    A path ends with the module and the name under which it sowed the value, whose first axis is the layers of a stage.
    """
    return [
        (tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey)), value)
        for path, value in jax.tree_util.tree_leaves_with_path(variables.get("losses", {}))
    ]


def _auxiliary(variables: Any, weights: Float[Array, "B T"]) -> dict[str, Float[Array, ""]]:
    """{name: sum over layers and tokens, weighted like the tokens} of the values that modules sowed in `losses`."""
    sums: dict[str, Array] = {}
    for (*_, name), value in _sown(variables):
        value = jnp.asarray(value, jnp.float32)
        if value.shape[1:] not in ((), weights.shape):
            raise UserError(
                f"a module sows {name!r} of shape {value.shape[1:]} in `losses`, expected () or one loss per token, "
                f"{weights.shape}: reduce it in the module"
            )
        if name in TAKEN:
            raise UserError(
                f"a module sows {name!r} in `losses`, which is the name of another metric: rename it"
            )
        per_layer = value * jnp.sum(weights) if value.ndim == 1 else value * weights
        sums[name] = sums.get(name, jnp.zeros((), jnp.float32)) + jnp.sum(per_layer)
    return sums


def _is_lower(ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    return (ids >= ord("a")) & (ids <= ord("z"))


def _in_tags(ids: Int[Array, "B T"], segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Which ids are bars or inside a pair of bars, counted separately in each document.

    A document that starts in the middle of a tag has letters before its first bar that do not occur in sequences; its
    first bar then closes a tag instead of opening one.

    Long rows are read in blocks, since the counts take several times the memory of the row. Only whether a document
    starts in a tag can depend on later blocks.
    """
    B, T = ids.shape
    length = T if axis_size("context") > 1 else min(T, _TAG_BLOCK)
    count = -(-T // length)

    def block(carried: tuple[Array, Array, Array], number: Array) -> tuple[tuple[Array, Array, Array], tuple]:
        mine, segments = (stretch(x, number * length, length) for x in (ids, segment_ids))
        document, bars_before, cut_before = carried  # the document that the block continues
        index = runs(segments, document)
        continues, lasts = index == 0, index == index[:, -1:]
        groups = (index + jnp.arange(B)[:, None] * (length + 1)).reshape(-1)

        def of_document(values: Array, reduce: Callable) -> Array:
            return reduce(values.reshape(-1), groups, num_segments=B * (length + 1))[groups].reshape(B, length)

        bars = (mine == ord("|")).astype(jnp.int32)
        before = jnp.cumsum(bars, axis=1) - bars  # bars earlier in the block ...
        before -= of_document(before, jax.ops.segment_min)  # ... and in the document
        before += jnp.where(continues, bars_before[:, None], 0)
        starts_in_tag = jnp.asarray(_OF_NO_SEQUENCE)[jnp.minimum(mine, 256)] & (before == 0)
        cut = of_document(starts_in_tag.astype(jnp.int32), jax.ops.segment_max)
        cut = jnp.where(continues, jnp.maximum(cut, cut_before[:, None]), cut)
        inside = ((before + cut) % 2 == 1) | (bars == 1)
        after = (last(segments, document), before[:, -1] + bars[:, -1], cut[:, -1])
        found = jnp.any(starts_in_tag & continues, axis=1)
        return after, (inside, lasts & (before == 0) & (bars == 0), found, jnp.all(continues, axis=1))

    zeros = jnp.zeros(B, jnp.int32)
    _, (inside, open_end, found, goes_on) = jax.lax.scan(
        block, (zeros.astype(segment_ids.dtype), zeros, zeros), jnp.arange(count)
    )

    def backwards(later: Array, flags: tuple[Array, Array]) -> tuple[Array, Array]:
        found, goes_on = flags
        return found | (goes_on & later), later

    later = jax.lax.scan(backwards, zeros.astype(bool), (found, goes_on), reverse=True)[1]
    inside |= open_end & later[:, :, None]
    return jnp.moveaxis(inside, 0, 1).reshape(B, count * length)[:, :T]