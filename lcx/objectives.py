"""What a training step minimises. An objective returns sums, so that any split of the global batch adds up exactly.

(sum of losses, sum of weights), or (sum of losses, sum of weights, {name: sum}) where parts of the first are logged by
name: they are in what is minimised, and not in the held-out loss.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lcx.errors import UserError
from lcx.mixers.linearized import LinearizedAttention
from lcx.model import Decoder, map_mixers
from lcx.ops.cross_entropy import cross_entropy
from lcx.ops.segments import runs

Batch = dict[str, Array]
Sums = tuple[Array, Array] | tuple[Array, Array, dict[str, Array]]
TAKEN = ("loss", "grad_norm", "learning_rate", "tokens", "step", "eval_loss", "tokens_per_second", "mfu")


def next_token(model: Decoder, variables: Any, batch: Batch) -> Sums:
    """Sum of the weighted next-token nll in nats, and the sum of the weights.

    Labels come shifted from the data; a zero weight masks padding and the first token of a document.

    Auxiliary losses are added: what a module sows by `self.sow("losses", name, value)`, a loss for every token [B, T],
    weighted like the tokens, or a scalar, a mean over the tokens that the module sees. Layers add up; a coefficient is
    the module's own. Only a loss for every token, and a scalar of the weights alone, is the same for every split of a
    batch: other scalars are those of a micro-batch.

    Raises:
      UserError: a module sows something of another shape, or under the name of another metric.
    """
    (x, _), sown = model.apply(
        variables,
        batch["tokens"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
        method="hidden",
        mutable="losses",
    )
    weights = batch["loss_weights"].astype(jnp.float32)
    head, transform = model.head(variables["params"]), model.logit_transform
    loss = cross_entropy(x, head, batch["labels"], weights, transform=transform)
    parts = _auxiliary(sown, weights)
    if not parts:
        return loss, jnp.sum(weights)
    return sum(parts.values(), loss), jnp.sum(weights), parts


def nucleotides(model: Decoder, variables: Any, batch: Batch, repeat_weight: float = 0.1) -> Sums:
    """next_token for genomes in bytes, as Evo 2 weighs them (Brixi et al. 2025).

    The model reads and predicts upper case. A lower-case label (a soft-masked repeat) weighs `repeat_weight`; '@', '#'
    and tags between bars, "|d__Bacteria;...|", weigh nothing. A tag that the row cuts in two is recognised by letters
    that no sequence has.
    """
    labels = batch["labels"]
    weights = batch["loss_weights"] * jnp.where(_is_lower(labels), repeat_weight, 1.0)
    unread = _in_tags(labels, batch["segment_ids"]) | (labels == ord("@")) | (labels == ord("#"))
    upper = {
        name: jnp.where(_is_lower(batch[name]), batch[name] - 32, batch[name])
        for name in ("tokens", "labels")
    }
    return next_token(model, variables, {**batch, **upper, "loss_weights": jnp.where(unread, 0.0, weights)})


def attention_transfer(
    model: Decoder, variables: Any, batch: Batch, output_weight: float = 1000.0, map_weight: float = 0.0
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """How far linear attentions are from the softmax ones in whose place they are (LoLCATS, arXiv 2410.10254, eq. 5).

    Every layer gets what the softmax model computes, so that the layers do not depend on each other. The loss of a
    token is the mean over linear layers of output_weight x the mean squared error of the heads' outputs (before the
    output projection) + map_weight x the cross-entropy of the attention maps. The latter is quadratic in the length.

    Args:
      model: a Decoder, or Layers of one; then the batch has `residual` [B, T, D], what goes into the first of them, in
        place of tokens.

    Raises:
      UserError: the model has no linear attention, no weight is positive, or every key of a row is in the window.
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
        if mixer.held is not None and seq_len <= mixer.held:  # it would teach the feature maps nothing
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
    # Other losses that modules sow have no part in it: nothing that trains here reaches them.
    losses = [(path[-1], loss) for path, loss in _sown(sown) if "mixer" in path and path[-1] in weights]
    if not losses:
        raise UserError("attention_transfer: the model has no linear attention; set Trainer.linearize")
    real = (batch["segment_ids"] != 0).astype(jnp.float32)
    total = jnp.zeros((), jnp.float32)
    for name, loss in losses:
        total = total + weights[name] * jnp.sum(loss * real)
    layers = sum(loss.shape[0] for _, loss in losses)
    return total * len(names) / layers, jnp.sum(real)


def _sown(variables: Any) -> list[tuple[tuple[str, ...], Array]]:
    """(path, value) of everything in the collection `losses`. The path ends in the module and the name that it gave;
    the first axis of the value is the layers of a stage."""
    return [
        (tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey)), value)
        for path, value in jax.tree_util.tree_leaves_with_path(variables.get("losses", {}))
    ]


def _auxiliary(variables: Any, weights: Float[Array, "B T"]) -> dict[str, Float[Array, ""]]:
    """name -> the sum over layers, weighted as the tokens are, of what modules sowed in `losses`."""
    sums: dict[str, Array] = {}
    for (*_, name), value in _sown(variables):
        value = jnp.asarray(value, jnp.float32)
        if value.shape[1:] not in ((), weights.shape):
            raise UserError(
                f"a module sows {name!r} of shape {value.shape[1:]} in `losses`, expected () or one loss a token, "
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
    """Bars and what is between them, document by document."""
    B, T = ids.shape
    documents = (runs(segment_ids) + jnp.arange(B)[:, None] * (T + 1)).reshape(-1)

    def of_document(values: Array, reduce) -> Array:
        return reduce(values.reshape(-1), documents, num_segments=B * (T + 1))[documents].reshape(B, T)

    bars = (ids == ord("|")).astype(jnp.int32)
    counted = jnp.cumsum(bars, axis=1)
    before = counted - bars  # bars earlier in the row ...
    before -= of_document(before, jax.ops.segment_min)  # ... and in the document
    of_no_sequence = ~jnp.isin(ids, jnp.array(list(b"ACGTURYKMSWBDHVN-*acgturykmswbdhvn@#|\x00\x01")))
    cut = of_document((of_no_sequence & (before == 0)).astype(jnp.int32), jax.ops.segment_max)
    return ((before + cut) % 2 == 1) | (bars == 1)
