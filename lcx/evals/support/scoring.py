"""The loss of every token of many rows, on one device or a mesh, without storing the logits.

One program is compiled per shape.
"""

import collections
import contextlib
import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float, Int

from lcx import sharding
from lcx.model import Decoder
from lcx.ops.cross_entropy import token_nll

TOKENS_PER_BATCH = 1 << 14
_IN_FLIGHT = 2  # batches queued on the devices; with many, several CPU devices of one process can deadlock


def mesh_of(params: Any) -> Mesh | None:
    """The mesh over which the parameters are sharded; None if they are on a single device."""
    for leaf in jax.tree.leaves(params):
        placed = getattr(leaf, "sharding", None)
        if isinstance(placed, NamedSharding) and isinstance(placed.mesh, Mesh) and placed.mesh.size > 1:
            return placed.mesh
    return None


def on_mesh(params: Any) -> contextlib.AbstractContextManager:
    """The context manager (jax.set_mesh) in which to compile and call functions of these parameters."""
    mesh = mesh_of(params)
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def score(
    model: Decoder,
    params: Any,
    tokens: Int[np.ndarray, "R T"],
    labels: Int[np.ndarray, "R T"],
    *,
    positions: Int[np.ndarray, "R T"] | None = None,
    segment_ids: Int[np.ndarray, "R T"] | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    description: str = "scoring",
) -> Float[np.ndarray, "R T"]:
    """-log p(label) in nats of every token, float32, computed in the model's dtype.

    Rows are processed in batches of tokens_per_batch tokens. The last batch is padded to the same shape, so that one
    compiled program serves all. On a terminal there is a progress bar. With several processes, each passes all rows
    and receives all results.
    """
    from tqdm import tqdm

    R, T = tokens.shape
    mesh = mesh_of(params)
    parts, context = (
        (1, 1) if mesh is None else (mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["context"])
    )
    size = _rounded(max(1, min(tokens_per_batch // T, R)), parts)
    width = _rounded(T, context)
    arrays = {"tokens": tokens, "labels": labels, "positions": positions, "segment_ids": segment_ids}
    out = np.empty((R, T), np.float32)
    pending: collections.deque[tuple[int, jax.Array]] = collections.deque()

    def collect() -> None:
        start, values = pending.popleft()
        stop = min(start + size, R)
        out[start:stop] = np.asarray(values)[: stop - start, :T]
        bar.update((stop - start) * T)

    bar = tqdm(total=R * T, desc=description, unit="tok", unit_scale=True, disable=None, delay=1)
    with on_mesh(params), bar:
        for start in range(0, R, size):
            batch = {
                k: None if a is None else _filled(a[start : start + size], size, width)
                for k, a in arrays.items()
            }
            pending.append((start, _score(model, params, **{k: _placed(a, mesh) for k, a in batch.items()})))
            if len(pending) >= _IN_FLIGHT:
                collect()
        while pending:
            collect()
    return out


@functools.partial(jax.jit, static_argnames="model")
def _score(model, params, tokens, labels, positions, segment_ids):
    x, _ = model.apply(
        {"params": params}, tokens, positions=positions, segment_ids=segment_ids, method="hidden"
    )
    nll = token_nll(x, model.head(params), labels, transform=model.logit_transform)
    return sharding.constrain(nll, None, None)  # replicated, because each process reads all of it


def _filled(rows: np.ndarray, size: int, width: int) -> np.ndarray:
    """Pads with zeros on the right and below. Causal attention does not attend to padding on the right."""
    return np.pad(rows, ((0, size - rows.shape[0]), (0, width - rows.shape[1])))


def _placed(rows: np.ndarray | None, mesh: Mesh | None) -> Any:
    if rows is None or mesh is None:
        return rows
    return jax.make_array_from_callback(rows.shape, sharding.batch_sharding(mesh), lambda index: rows[index])


def _rounded(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
