"""Global batches: the rows of a mixture in one fixed order, of which each process reads its share.

The order of rows depends only on the data, the settings and the seed, so the position in it (one number, the same on
every process) is the complete state of the iterator. A run resumes from it bit for bit, even with a different number of
processes.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
from typing import Any

import numpy as np

from lcx.data import order, packing
from lcx.data.mixing import BatchSpec, Group, Part, make_groups
from lcx.data.streams import Streams, streams_of
from lcx.data.tokenizers import Tokenizer
from lcx.errors import UserError
from lcx.wording import quantity

_STATE_VERSION = 1
# Checked after a start or a restore; mistakes in the data are usually visible in every batch.
_CHECKED_BATCHES = 3


@dataclasses.dataclass(frozen=True)
class Assemble:
    """Row numbers [b] -> batch. Rows are numbered consecutively over all groups; -1 gives a row of padding.

    With streams there is one group, and a number is that of `Streams.row`.
    """

    groups: tuple[Group, ...]
    seq_len: int
    streams: Streams | None = None

    def __call__(self, rows: np.ndarray) -> packing.Batch:
        if self.streams is None:
            return self._rows(rows)
        epoch, rows = np.divmod(rows, self.streams.num_rows)
        return self.streams.continued(self._rows(rows), rows, epoch)

    def _rows(self, rows: np.ndarray) -> packing.Batch:
        ends = np.cumsum([group.plan.num_rows for group in self.groups])
        owner = np.where(rows >= 0, np.searchsorted(ends, rows, side="right"), -1)
        batch = packing.empty_batch(len(rows), self.seq_len)
        for number, group in enumerate(self.groups):
            mine = np.flatnonzero(owner == number)
            if not len(mine):
                continue
            local = rows[mine] - (ends[number] - group.plan.num_rows)
            part = packing.assemble(
                group.plan,
                group.store.tokens,
                local,
                document_mask=group.document_mask,
                loss_mask=group.store.loss_mask,
            )
            if len(mine) == len(rows):
                return part
            for key, value in part.items():
                batch[key][mine] = value
        return batch


class BatchIterator:
    """Iterator over this process's rows of the global batches; created by `Dataset.batches`.

    Each batch is a dict of numpy arrays [B / processes, T]: tokens, labels, segment_ids, positions (int32)
    and loss_weights (float32).

    Attributes:
      info: documents, tokens, rows, targets (labels of weight 1) and fill (share of slots in use) of one
        pass. With half-overlapping windows `targets` is about twice `tokens`: one pass is two epochs.
      num_batches: number of batches in one pass, None for an endless iterator.
    """

    def __init__(self, groups: tuple[Group, ...], spec: BatchSpec, description: dict[str, Any]):
        self._spec = spec
        self._groups = groups
        self._description = description
        self._streams = streams_of(groups[0].plan, spec.global_batch_size) if spec.streams else None
        self._rows = sum(group.plan.num_rows for group in groups)
        self._next_index = spec.start
        self._pipeline: Any = None
        self._unchecked = _CHECKED_BATCHES
        self.fingerprint = fingerprint(description)
        self.num_batches = None if spec.repeats else -(-self._rows // spec.global_batch_size)

    @functools.cached_property
    def info(self) -> dict[str, Any]:
        return _info(self._groups, self._spec.seq_len)

    def remarks(self) -> list[str]:
        """What a run reports about its rows when it starts.

        Of single tokens in rows of conversations nothing is said: which of their tokens have a loss is known only once
        they are assembled.
        """
        return [*self._of_streams(), *self._without_labels()]

    def _of_streams(self) -> list[str]:
        if (streams := self._streams) is None:
            return []
        left = f"; {quantity(streams.rows_left_out, 'row')} at the end left out" if streams.rows_left_out else ""
        return [
            f"streams: every row of a batch continues that of the batch before, {quantity(streams.length, 'row')} of "
            f"{quantity(self._spec.seq_len, 'token')} an epoch{left}"
        ]

    def _without_labels(self) -> list[str]:
        empty = sum(
            np.count_nonzero(group.plan.row_targets(document_mask=group.document_mask) == 0)
            for group in self._groups
            if group.store.loss_mask is None
        )
        if 2 * empty < self._spec.global_batch_size:  # twice: as the last of one pass and the first of the next
            return []
        return [
            f"warning: {empty} of {quantity(self._rows, 'row')} of {quantity(self._spec.seq_len, 'token')} "
            f"{'holds' if empty == 1 else 'hold'} single tokens without a next one to predict: a batch of nothing else "
            "gives loss 0 and teaches nothing; change seq_len, or raise batch_size or Dataset.min_length"
        ]

    def padding(self) -> packing.Batch:
        """A batch of padding, with the shapes and dtypes of all batches. Nothing is read for it."""
        return packing.empty_batch(self._spec.local_batch_size, self._spec.seq_len)

    def __iter__(self) -> "BatchIterator":
        return self

    def __next__(self) -> packing.Batch:
        if self._pipeline is None:
            self._pipeline = iter(_pipeline(self._groups, self._spec, self._next_index, self._streams))
        batch = next(self._pipeline)
        self._next_index += self._spec.global_batch_size
        if not self._spec.repeat:
            self._next_index = min(self._next_index, self._rows)
        if self._unchecked:
            self._unchecked -= 1
            masked = all(group.document_mask for group in self._groups)
            packing.check_batch(
                batch, vocab_size=self._spec.vocab_size, document_mask=masked, streams=self._spec.streams
            )
        return batch

    def state(self) -> dict[str, Any]:
        """The position, as a JSON object; the same on every process, and independent of prefetched batches."""
        return {
            "version": _STATE_VERSION,
            "next_index": self._next_index,
            "fingerprint": self.fingerprint,
            "description": self._description,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken.

        The number of processes and the batch size may differ, because the position counts rows.

        Raises:
          UserError: the data, the tokenizer, the seed or a setting that decides the order of rows has
            changed.
        """
        try:
            version, next_index, found = state["version"], int(state["next_index"]), state["fingerprint"]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"the saved data state is damaged ({error!r}); start a new workdir") from error
        if version != _STATE_VERSION:
            raise UserError(
                f"the saved data state has version {version}, expected {_STATE_VERSION}; use the release that wrote it"
            )
        if found != self.fingerprint:
            change = _first_difference(state.get("description", {}), self._description)
            raise UserError(
                f"the data differs from what the checkpoint was trained on: {change}; restore the old data"
                " and"
                " settings, or start a new workdir"
            )
        self.close()
        self._next_index = next_index
        self._unchecked = _CHECKED_BATCHES

    def close(self) -> None:
        """Stops the threads and processes that prefetch batches; requesting the next batch starts them again."""
        if self._pipeline is not None:
            self._pipeline.close()
            self._pipeline = None

    def __enter__(self) -> "BatchIterator":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@dataclasses.dataclass(frozen=True)
class Opened:
    """A `lcx.data.Dataset` or `Mixture` whose documents are tokenised. A run opens its data once and reads both splits.

    Attributes:
      tokenizer: the tokenizer that all parts share.
      long_fraction, long_length: see `lcx.data.Mixture`.
    """

    parts: tuple[Part, ...]
    tokenizer: Tokenizer
    long_fraction: float | None = None
    long_length: int | None = None

    def batches(self, spec: BatchSpec) -> BatchIterator:
        """Plans the rows for `Mixture.batches`. Raises UserError for data that a run could not train on."""
        groups = make_groups(self.parts, spec, long_fraction=self.long_fraction, long_length=self.long_length)
        self._check(groups, spec)
        if spec.streams:
            self._check_streams(groups)
        return BatchIterator(groups, spec, describe(self, groups, spec))

    def remarks(self) -> list[str]:
        """What a run reports about its data when it starts, one part after the other."""
        return [
            line
            for part in self.parts
            for line in (*part.corpus.remarks(), *part.dataset.without_effect(part.corpus))
        ]

    def _check_streams(self, groups: tuple[Group, ...]) -> None:
        dataset = self.parts[0].dataset
        for wrong, found in {
            f"{len(groups)} groups of documents with weights": len(groups) > 1,
            f"Dataset.packing={dataset.packing!r}": dataset.packing != "concat",
            "Dataset.document_mask=False": not dataset.document_mask,
        }.items():
            if found:
                raise UserError(
                    f"Trainer.stateful with {wrong}: rows continue each other only in one Dataset with packing "
                    "'concat', document_mask=True and no long_fraction; change it, or set Trainer.stateful to False"
                )

    def _check(self, groups: tuple[Group, ...], spec: BatchSpec) -> None:
        rows = sum(group.plan.num_rows for group in groups)
        names = ", ".join(repr(part.dataset.source) for part in self.parts)
        if not rows:
            raise UserError(
                f"the {spec.split} split of {names} is empty; set Dataset.eval_fraction so that both splits get"
                " documents (0: all train, 1: all eval), or add documents"
            )
        for corpus in (part.corpus for part in self.parts):
            if corpus.store.loss_tokens == 0:
                raise UserError(
                    f"no token of the {corpus.store.conversations} conversations in {corpus.source} has a loss: no"
                    " message has the role 'assistant', or the template's generation blocks are empty; set"
                    " Dataset.chat_loss='all', or Dataset.chat_template"
                )
        if spec.repeats and rows < spec.global_batch_size:
            tokens = sum(group.plan.num_inputs for group in groups)
            raise UserError(
                f"the {spec.split} split of {names} has {quantity(tokens, 'token')}:"
                f" {quantity(rows, 'row')} of seq_len={spec.seq_len},"
                f" fewer than global_batch_size={spec.global_batch_size}; add data (about"
                f" {spec.global_batch_size * spec.seq_len} tokens are needed) or lower one of the two"
            )
        if spec.vocab_size is not None:
            top = max(group.store.max_id for group in groups)
            if top >= spec.vocab_size:
                raise UserError(
                    f"the data {names} holds token id {top} but the model's vocab_size is {spec.vocab_size};"
                    " use the model's own tokenizer (Dataset.tokenizer), or raise vocab_size"
                )


def describe(mixture: Opened, groups: tuple[Group, ...], spec: BatchSpec) -> dict[str, Any]:
    """Everything that determines which tokens are in which row, as JSON; the fingerprint is its hash."""
    return {
        "split": spec.split,
        "seq_len": spec.seq_len,
        "seed": spec.seed,
        "shuffle": spec.shuffles,
        "repeat": spec.repeats,
        "long_fraction": mixture.long_fraction,
        "long_length": mixture.long_length,
        "parts": [
            {
                "source": dataset.source if isinstance(dataset.source, str) else list(dataset.source),
                "weight": part.weight,
                "tokens": part.corpus.store.fingerprint,
                "packing": dataset.packing,
                "document_mask": dataset.document_mask,
                "eval_fraction": dataset.eval_fraction,
                "split": dataset.split,
                **({"eval_documents": list(dataset.eval_documents)} if dataset.eval_documents else {}),
                "min_length": dataset.min_length,
                "long_fraction": dataset.long_fraction,
                "long_length": dataset.long_length,
            }
            for part in mixture.parts
            for dataset in (part.dataset,)
        ],
        **({"streams": spec.global_batch_size} if spec.streams else {}),
        "rows": [group.plan.num_rows for group in groups],
        "order": _probe(groups, spec),
    }


def fingerprint(description: dict[str, Any]) -> str:
    """A hash of a description, without the paths of the sources: moving data does not change it."""
    parts = [{k: v for k, v in part.items() if k != "source"} for part in description["parts"]]
    return hashlib.sha256(json.dumps({**description, "parts": parts}, sort_keys=True).encode()).hexdigest()[
        :32
    ]


def _probe(groups: tuple[Group, ...], spec: BatchSpec) -> str:
    """A hash of the first row numbers, which detects that another release of grain gives another order."""
    ids = _row_ids(groups, spec)
    rows = [int(ids[i]) for i in range(min(32, len(ids)))]
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]


def _first_difference(old: Any, new: Any, path: str = "") -> str:
    """Names one setting that differs; `describe` puts the readable ones first."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in new:
            if key != "source" and old.get(key) != new[key]:
                return _first_difference(old.get(key), new[key], f"{path}.{key}" if path else key)
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            if _without_source(a) != _without_source(b):
                return _first_difference(a, b, f"{path}[{i}]")
    if path.endswith(".tokens"):
        part = path.removesuffix(".tokens")
        return f"the files, the tokenizer or the tokenising options of {part} have changed"
    return f"{path or 'description'} was {old!r:.80} and is {new!r:.80}"


def _without_source(value: Any) -> Any:
    return {k: v for k, v in value.items() if k != "source"} if isinstance(value, dict) else value


def _info(groups: tuple[Group, ...], seq_len: int) -> dict[str, Any]:
    rows = sum(group.plan.num_rows for group in groups)
    inputs = sum(group.plan.num_inputs for group in groups)
    return {
        "documents": sum(group.documents for group in groups),
        "tokens": sum(group.tokens for group in groups),
        "rows": rows,
        "targets": sum(
            group.plan.num_targets(document_mask=group.document_mask, loss_mask=group.store.loss_mask)
            for group in groups
        ),
        "fill": inputs / (rows * seq_len),
        "groups": [
            {"kind": group.kind, "rows": group.plan.num_rows, "weight": group.weight} for group in groups
        ],
    }


def _row_ids(groups: tuple[Group, ...], spec: BatchSpec, streams: Streams | None = None) -> Any:
    """The sequence of row numbers as a grain MapDataset: endless and mixed by weight, or every row once."""
    import grain

    rows = [group.plan.num_rows for group in groups]
    if streams is not None:
        return grain.MapDataset.range(sum(rows)).repeat().map_with_index(streams.row)
    if not spec.repeats:
        ids = grain.MapDataset.range(sum(rows))
        if spec.shuffles:
            ids = ids.map_with_index(order.EpochShuffle(0, sum(rows), order.derive(spec.seed, "rows")))
        return ids
    mixed = []
    base = 0
    for number, count in enumerate(rows):
        ids = grain.MapDataset.range(base, base + count).repeat()
        if spec.shuffles:
            seed = order.derive(spec.seed, "rows", number)
            ids = ids.map_with_index(order.EpochShuffle(base, count, seed))
        mixed.append(ids)
        base += count
    return mixed[0] if len(mixed) == 1 else grain.MapDataset.mix(mixed, [group.weight for group in groups])


def _pipeline(groups: tuple[Group, ...], spec: BatchSpec, start: int, streams: Streams | None) -> Any:
    """The grain pipeline of one process, starting at row `start`."""
    import grain

    # grain computes lengths in floating point: truncate the endless sequence so that they stay exact.
    ids = _row_ids(groups, spec, streams)[start : 1 << 62]
    if not spec.repeats:
        padding = -len(ids) % spec.global_batch_size
        if padding:
            ids = grain.MapDataset.concatenate([ids, grain.MapDataset.source([-1] * padding)])
    # Consecutive local batches go to consecutive processes, so concatenating the processes' blocks gives the
    # global batch in order.
    batches = ids.batch(spec.local_batch_size)[spec.process_index :: spec.process_count]
    batches = batches.map(Assemble(groups, spec.seq_len, streams))
    reading = grain.ReadOptions(num_threads=spec.num_threads, prefetch_buffer_size=2 * spec.num_threads)
    pipeline = batches.to_iter_dataset(reading)
    if spec.num_workers:
        _mark_flags_parsed()
        pipeline = pipeline.mp_prefetch(grain.MultiprocessingOptions(num_workers=spec.num_workers))
    return pipeline


def _mark_flags_parsed() -> None:
    """grain's worker processes read absl flags, which raises in programs that never parsed any."""
    with contextlib.suppress(ImportError):
        from absl import flags

        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
