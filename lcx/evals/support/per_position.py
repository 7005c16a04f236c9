"""What a model says at every position of a sequence, and the parquet file that holds it."""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lcx.data import Tokenizer
from lcx.errors import UserError
from lcx.ops.cross_entropy import UNCHANGED, LogitTransform, chunk_tokens
from lcx.ops.tiling import dot

LETTERS = "ACGT"


@functools.cache
def measure(ids: tuple[int, ...]):
    """The measure (`scoring.score`) of -log p(label), the entropy and the probability of each of `ids`, per token.

    Log-likelihoods and entropies are in nats, over the whole vocabulary.
    """

    def measured(
        x: Float[Array, "B T D"],
        head: Float[Array, "V D"],
        labels: Int[Array, "B T"],
        *,
        transform: LogitTransform = UNCHANGED,
    ) -> Float[Array, "B T 2+ids"]:
        def chunk(tokens):
            logits = transform(dot(tokens[0], head.astype(x.dtype), 1, 1))
            log_p = jax.nn.log_softmax(logits, axis=-1)
            p = jnp.exp(log_p)
            nll = -jnp.take_along_axis(log_p, tokens[1][:, None], axis=-1)
            entropy = -jnp.sum(jnp.where(p > 0, p * log_p, 0), axis=-1, keepdims=True)
            return jnp.concatenate([nll, entropy, p[:, np.array(ids, np.int32)]], axis=-1)

        B, T, D = x.shape
        size = chunk_tokens(B * T, *head.shape)
        count = -(-B * T // size)
        flat = jnp.pad(x.reshape(B * T, D), ((0, count * size - B * T), (0, 0))).reshape(count, size, D)
        wanted = jnp.pad(labels.reshape(-1), (0, count * size - B * T)).reshape(count, size)
        return jax.lax.map(chunk, (flat, wanted)).reshape(count * size, -1)[: B * T].reshape(B, T, -1)

    return measured


def letter_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids of A, C, G and T.

    Raises:
      UserError: a letter is not one token.
    """
    found = [tokenizer.encode(letter).tolist() for letter in LETTERS]
    if any(len(ids) != 1 for ids in found):
        raise UserError(
            "SequenceLikelihood.per_position needs a tokenizer with a token for each of A, C, G and T: leave out "
            "SequenceLikelihood.per_position"
        )
    return tuple(ids[0] for ids in found)


class PositionsFile:
    """A parquet file with one row per scored letter, written a few at a time (a context manager).

    It is PATH.partial until it is complete.

    Columns: record, strand ("+" or "-"), position (from 1, on the forward strand), letter (on the strand that is read),
    log_probability of the letter, entropy (both in nats, over the whole vocabulary), and the probabilities A, C, G, T.
    """

    def __init__(self, path: str):
        folder = os.path.dirname(os.path.abspath(path))
        os.makedirs(folder, exist_ok=True)
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as error:
            raise UserError(f"{path} needs pyarrow: pip install 'lcx[parquet]'") from error
        self._pa, self._path = pa, path
        fields = [("record", pa.dictionary(pa.int32(), pa.string())), ("strand", pa.string()), ("position", pa.int64())]
        numbers = [(name, pa.float32()) for name in ("log_probability", "entropy", *LETTERS)]
        self._schema = pa.schema([*fields, ("letter", pa.string()), *numbers])
        self._partial = f"{path}.partial"
        self._writer = pq.ParquetWriter(self._partial, self._schema)

    def __enter__(self):
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._writer.close()
        if kind is None:
            os.replace(self._partial, self._path)

    def add(
        self, record: str, strand: str, positions: Int[np.ndarray, " n"], letters: str, values: Float[np.ndarray, "n 6"]
    ) -> None:
        names = self._pa.DictionaryArray.from_arrays(np.zeros(len(values), np.int32), [record])
        columns = [names, [strand] * len(values), positions, list(letters), -values[:, 0], *values[:, 1:].T]
        arrays = [
            column if column is names else self._pa.array(column, field.type)
            for column, field in zip(columns, self._schema, strict=True)
        ]
        self._writer.write_table(self._pa.Table.from_arrays(arrays, schema=self._schema))

