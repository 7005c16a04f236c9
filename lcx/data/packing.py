"""Plans that lay documents out in rows of `seq_len` tokens, and the gather that turns rows into batches.

A plan is a few index arrays, computed once from the document lengths and independent of the tokens. Row number r is
then a pure function of the plan: any row can be built at any time on any host, which makes it possible to resume
exactly on a different number of processes.

Every row holds `seq_len` inputs and, if the document continues, the token after the last input as its label (T + 1
tokens, shifted here on the host). With the document mask, segment ids count the documents of a row from 1 (0 is
padding), positions restart at 0 in each of them, and no label crosses from one document into the next.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int

from lcx.errors import UserError

Batch = dict[str, np.ndarray]
STRETCH = 1 << 16  # tokens that are laid out in rows at a time


@dataclasses.dataclass(frozen=True)
class Plan:
    """Rows as runs of pieces; a piece is a contiguous range of the token store inside one document.

    Attributes:
      seq_len: inputs in a row (T).
      row_offsets: [R + 1]; row r consists of the pieces row_offsets[r] .. row_offsets[r + 1].
      piece_start: [P] index of the first token of the piece in the store.
      piece_length: [P] number of inputs, at least 1.
      piece_skip: [P] number of leading labels of the piece that another row already scores.
      next_token: [R] store index of the label of the row's last input, -1 if there is none.
    """

    seq_len: int
    row_offsets: Int[np.ndarray, "rows+1"]
    piece_start: Int[np.ndarray, "pieces"]
    piece_length: Int[np.ndarray, "pieces"]
    piece_skip: Int[np.ndarray, "pieces"]
    next_token: Int[np.ndarray, "rows"]

    @property
    def num_rows(self) -> int:
        return len(self.row_offsets) - 1

    @property
    def num_inputs(self) -> int:
        """Number of slots that hold a token: all except padding."""
        return int(self.piece_length.sum())

    def num_targets(
        self, *, document_mask: bool = True, loss_mask: Int[np.ndarray, "store"] | None = None
    ) -> int:
        """Number of labels of weight 1 in one pass over the rows; `loss_mask` as in `assemble`."""
        return int(self.row_targets(document_mask=document_mask, loss_mask=loss_mask).sum())

    def row_targets(
        self, *, document_mask: bool = True, loss_mask: Int[np.ndarray, "store"] | None = None
    ) -> Int[np.ndarray, "rows"]:
        """Number of labels of weight 1 in each row; `loss_mask` as in `assemble`."""
        if loss_mask is not None:
            rows = (np.arange(first, min(first + 64, self.num_rows)) for first in range(0, self.num_rows, 64))
            batches = (
                assemble(self, loss_mask, some, document_mask=document_mask, loss_mask=loss_mask)
                for some in rows
            )
            counts = [np.count_nonzero(batch["loss_weights"], axis=1) for batch in batches]
            return np.concatenate(counts) if counts else np.zeros(0, np.int64)
        within = np.concatenate([[0], np.cumsum(self.piece_length - self.piece_skip)])
        ends = np.diff(self.row_offsets) if document_mask else 1
        return np.diff(within[self.row_offsets]) - ends + (self.next_token >= 0)


def _exclusive_cumsum(lengths: np.ndarray) -> np.ndarray:
    out = np.cumsum(lengths, dtype=np.int64)
    return out - lengths


def _ranges(begin: np.ndarray, length: np.ndarray) -> np.ndarray:
    """begin[0], begin[0] + 1, ... (length[0] numbers), begin[1], ..., without a Python loop."""
    total = int(length.sum())
    return np.arange(total, dtype=np.int64) + np.repeat(begin - _exclusive_cumsum(length), length)


def _as_documents(starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int64 copies without empty documents, which cannot be pieces of a row."""
    starts, lengths = np.asarray(starts, np.int64), np.asarray(lengths, np.int64)
    return starts[lengths > 0], lengths[lengths > 0]


def plan_concat(
    starts: Int[np.ndarray, "docs"], lengths: Int[np.ndarray, "docs"], *, seq_len: int, joined: bool = False
) -> Plan:
    """All documents end to end, cut every `seq_len` tokens; an incomplete last row is kept.

    Every token is an input exactly once and, except the first of each document, a target exactly once.

    Args:
      starts: index of the first token of each document in the store, in the desired order.
      lengths: number of tokens of each document; empty documents are dropped.
      joined: the document boundaries will not be masked, so the label after a row's last input may be the
        first token of the next document.
    """
    starts, lengths = _as_documents(starts, lengths)
    document_begin = _exclusive_cumsum(lengths)
    total = int(lengths.sum())
    row_begin = np.arange(0, total, seq_len, dtype=np.int64)
    cuts = np.union1d(document_begin, row_begin)  # a piece begins wherever a document or a row begins
    document = np.searchsorted(document_begin, cuts, side="right") - 1
    row_offsets = np.searchsorted(cuts, np.append(row_begin, total)).astype(np.int64)

    row_end = np.minimum(row_begin + seq_len, total)
    follower = np.searchsorted(document_begin, row_end, side="right") - 1
    next_token = np.full(len(row_begin), -1, np.int64)
    exists = row_end < total
    if not joined:  # the next token must be inside a document, not the first of one
        exists &= row_end > document_begin[follower] if len(follower) else exists
    next_token[exists] = (starts[follower] + row_end - document_begin[follower])[exists]
    return Plan(
        seq_len=seq_len,
        row_offsets=row_offsets,
        piece_start=starts[document] + cuts - document_begin[document],
        piece_length=np.diff(np.append(cuts, total)),
        piece_skip=np.zeros(len(cuts), np.int64),
        next_token=next_token,
    )


def first_fit(lengths: Sequence[int], *, capacity: int) -> Int[np.ndarray, "items"]:
    """The bin of each item when every item goes to the first bin with room for it, in O(items x log bins).

    `room` is a binary tree of maxima over the bins (leaves at `leaves + bin`), so the first bin with enough room is
    found by descending from the root, left child first.
    """
    leaves = 1
    while leaves < len(lengths):
        leaves *= 2
    room = [capacity] * (2 * leaves)
    bins = np.empty(len(lengths), np.int64)
    for item, length in enumerate(lengths):
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < length:  # no bin in the left subtree has room
                node += 1
        bins[item] = node - leaves
        room[node] -= length
        while node > 1:
            node //= 2
            largest = max(room[2 * node], room[2 * node + 1])
            if room[node] == largest:  # the maxima above do not change either
                break
            room[node] = largest
    return bins


def plan_first_fit(
    starts: Int[np.ndarray, "docs"], lengths: Int[np.ndarray, "docs"], *, seq_len: int
) -> Plan:
    """Whole documents, each in the first row with room for it.

    A document longer than a row is cut every `seq_len` tokens: each full piece is a row (with the next token of the
    document as the label of the last input), and only the remainder is packed with other documents. Nothing is
    dropped.
    """
    starts, lengths = _as_documents(starts, lengths)
    full = lengths // seq_len
    document = np.repeat(np.arange(len(lengths)), full)
    offset = _ranges(np.zeros(len(full), np.int64), full) * seq_len
    goes_on = offset + seq_len < lengths[document]
    full_rows = len(document)

    rest = lengths % seq_len
    has_rest = rest > 0
    rest_length = rest[has_rest]
    bins = first_fit(rest_length.tolist(), capacity=seq_len)
    by_bin = np.argsort(bins, kind="stable")
    per_bin = np.bincount(bins, minlength=0) if len(bins) else np.zeros(0, np.int64)
    pieces_in_row = np.concatenate([np.ones(full_rows, np.int64), per_bin])

    rest_start = (starts + full * seq_len)[has_rest]
    piece_length = np.concatenate([np.full(full_rows, seq_len, np.int64), rest_length[by_bin]])
    next_token = np.full(len(pieces_in_row), -1, np.int64)
    next_token[:full_rows][goes_on] = (starts[document] + offset + seq_len)[goes_on]
    return Plan(
        seq_len=seq_len,
        row_offsets=np.concatenate([[0], np.cumsum(pieces_in_row)]).astype(np.int64),
        piece_start=np.concatenate([starts[document] + offset, rest_start[by_bin]]),
        piece_length=piece_length,
        piece_skip=np.zeros(len(piece_length), np.int64),
        next_token=next_token,
    )


def plan_padded(
    starts: Int[np.ndarray, "docs"], lengths: Int[np.ndarray, "docs"], *, seq_len: int
) -> Plan:
    """One document in each row, cut after `seq_len` tokens, or padded to them; the rest of a long one is dropped."""
    starts, lengths = _as_documents(starts, lengths)
    return Plan(
        seq_len=seq_len,
        row_offsets=np.arange(len(starts) + 1, dtype=np.int64),
        piece_start=starts,
        piece_length=np.minimum(lengths, seq_len),
        piece_skip=np.zeros(len(starts), np.int64),
        next_token=np.where(lengths > seq_len, starts + seq_len, -1),
    )


def plan_windows(
    starts: Int[np.ndarray, "docs"],
    lengths: Int[np.ndarray, "docs"],
    *,
    seq_len: int,
    score_once: bool = False,
    joined: bool = False,
) -> Plan:
    """Windows of T + 1 tokens with stride T // 2 over each long document.

    Shorter documents are packed as by `plan_concat`. A document of T or T + 1 tokens gives one window. If the strides
    do not end exactly at the end of the document, one more window is aligned to its end, so that no tail is lost. No
    two windows are equal.

    Args:
      score_once: labels that the previous window already scores get weight 0, so that each target counts once (for
        evaluation). Otherwise the overlap is trained on twice.
      joined: as in `plan_concat`, for the short documents.
    """
    starts, lengths = _as_documents(starts, lengths)
    long = lengths >= seq_len
    stride = max(1, seq_len // 2)
    # The last window starts `slack` tokens after the first one, so that its last label is the end of the document.
    slack = np.maximum(lengths[long] - (seq_len + 1), 0)
    count = -(-slack // stride) + 1
    document = np.repeat(np.arange(len(slack)), count)
    number = _ranges(np.zeros(len(count), np.int64), count)
    offset = np.minimum(number * stride, slack[document])
    step = offset - np.minimum((number - 1) * stride, slack[document])
    # A window that starts `step` tokens after the previous one shares seq_len - step labels with it.
    skip = np.where(number > 0, seq_len - step, 0) if score_once else np.zeros(len(number), np.int64)
    begin = starts[long][document] + offset
    goes_on = offset + seq_len < lengths[long][document]
    windows = Plan(
        seq_len=seq_len,
        row_offsets=np.arange(len(begin) + 1, dtype=np.int64),
        piece_start=begin,
        piece_length=np.full(len(begin), seq_len, np.int64),
        piece_skip=np.maximum(skip, 0),
        next_token=np.where(goes_on, begin + seq_len, -1),
    )
    short = plan_concat(starts[~long], lengths[~long], seq_len=seq_len, joined=joined)
    return _join(windows, short)


def _join(first: Plan, second: Plan) -> Plan:
    """The rows of `first`, then the rows of `second`."""
    return Plan(
        seq_len=first.seq_len,
        row_offsets=np.concatenate([first.row_offsets, second.row_offsets[1:] + first.row_offsets[-1]]),
        piece_start=np.concatenate([first.piece_start, second.piece_start]),
        piece_length=np.concatenate([first.piece_length, second.piece_length]),
        piece_skip=np.concatenate([first.piece_skip, second.piece_skip]),
        next_token=np.concatenate([first.next_token, second.next_token]),
    )


def empty_batch(batch_size: int, seq_len: int) -> Batch:
    """A batch of padding: token 0, segment 0, weight 0."""
    shape = (batch_size, seq_len)
    batch: Batch = {
        key: np.zeros(shape, np.int32) for key in ("tokens", "labels", "segment_ids", "positions")
    }
    batch["loss_weights"] = np.zeros(shape, np.float32)
    return batch


def assemble(
    plan: Plan,
    tokens: Int[np.ndarray, "store"],
    rows: Int[np.ndarray, "batch"],
    *,
    document_mask: bool = True,
    loss_mask: Int[np.ndarray, "store"] | None = None,
) -> dict[str, Int[np.ndarray, "batch time"] | Float[np.ndarray, "batch time"]]:
    """The rows of a plan as a batch; a row number of -1 gives a row of padding.

    Args:
      tokens: the whole token store (an array or a memory map); only the requested rows are read.
      document_mask: False merges the documents of a row into one segment with consecutive positions, and also scores
        the labels that cross a boundary (as in the training of YaRN and LongLoRA).
      loss_mask: 1 for the tokens of the store that have a loss when they are labels; None if all do.

    Returns:
      tokens, labels, segment_ids, positions: int32 [B, T]; loss_weights: float32 [B, T].
    """
    rows = np.asarray(rows, np.int64)
    batch = empty_batch(len(rows), plan.seq_len)
    where = np.flatnonzero(rows >= 0)
    if len(where):
        _fill(batch, plan, tokens, where, rows[where], document_mask, loss_mask)
    return batch


def _fill(
    batch: Batch,
    plan: Plan,
    tokens: np.ndarray,
    where: np.ndarray,
    rows: np.ndarray,
    document_mask: bool,
    loss_mask: np.ndarray | None,
) -> None:
    """Writes the planned `rows` into the rows `where` of an empty batch."""
    count = plan.row_offsets[rows + 1] - plan.row_offsets[rows]
    piece = _ranges(plan.row_offsets[rows], count)
    length = plan.piece_length[piece].astype(np.int64)
    flat_begin = _exclusive_cumsum(length)
    first_piece = _exclusive_cumsum(count)
    row_length = np.add.reduceat(length, first_piece)

    # Inputs fill a row from the left without gaps, so all pieces of a row are shifted by the same amount.
    shift = where * plan.seq_len - flat_begin[first_piece]
    piece_slot = flat_begin + np.repeat(shift, count)
    number_in_row = np.arange(len(piece)) - np.repeat(first_piece, count)

    flat = {key: value.reshape(-1) for key, value in batch.items()}
    weights = flat["loss_weights"]
    scored = None if loss_mask is None else np.zeros_like(batch["loss_weights"])
    for number, first, inside in _stretches(length):
        in_piece = _ranges(first, inside)
        slot = np.repeat(piece_slot[number], inside) + in_piece
        stored = np.repeat(plan.piece_start[piece[number]], inside) + in_piece
        flat["tokens"][slot] = tokens[stored]
        weights[slot] = in_piece >= np.repeat(plan.piece_skip[piece[number]], inside)
        flat["segment_ids"][slot] = np.repeat(number_in_row[number] + 1, inside) if document_mask else 1
        flat["positions"][slot] = in_piece if document_mask else slot % plan.seq_len
        if loss_mask is not None and scored is not None:
            scored.reshape(-1)[slot] = loss_mask[stored]
    batch["labels"][:, :-1] = batch["tokens"][:, 1:]
    last = where * plan.seq_len + row_length - 1
    next_token = plan.next_token[rows]
    has_next = next_token >= 0
    flat["labels"][last[has_next]] = tokens[next_token[has_next]]
    if document_mask:
        weights[piece_slot + length - 1] = 0  # the label is the first token of the next document, or padding
    weights[last] = has_next  # the label of a row's last input comes from the store, not from the next slot
    if loss_mask is not None and scored is not None:
        # The mask of the label, which is the token of the next slot.
        scored[:, :-1] = scored[:, 1:]
        scored.reshape(-1)[last[has_next]] = loss_mask[next_token[has_next]]
        weights *= scored.reshape(-1)


def _stretches(length: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Pieces of these lengths, one after the other, in stretches of at most STRETCH tokens.

    The index arrays of a stretch are several times larger than its tokens, and a row may have millions.

    Yields:
      The numbers of the pieces in a stretch, and of each the first token and the number of tokens that are in it.
    """
    end = np.cumsum(length, dtype=np.int64)
    begin = end - length
    for start in range(0, int(end[-1]), STRETCH):
        stop = start + STRETCH
        number = np.arange(np.searchsorted(end, start, "right"), np.searchsorted(begin, stop, "left"))
        first = np.maximum(start - begin[number], 0)
        yield number, first, np.minimum(stop - begin[number], length[number]) - first


def check_batch(
    batch: Batch, *, vocab_size: int | None = None, document_mask: bool = True, streams: bool = False
) -> None:
    """Raises UserError naming the first row of a batch that breaks the batch contract.

    Checks shapes and types; that ids are inside the vocabulary; that padding is only at the end of a row and never
    scored; that segments are contiguous and numbered from 1; that positions restart with each segment and increase by
    one (with streams, a row may begin inside a segment, of any number); that labels are the shifted tokens; and, with
    the document mask, that no scored label belongs to another document.
    """
    shape = batch["tokens"].shape
    for key in ("tokens", "labels", "segment_ids", "positions", "loss_weights"):
        want = np.float32 if key == "loss_weights" else np.int32
        if batch[key].dtype != want or batch[key].shape != shape:
            raise UserError(
                f"batch[{key!r}] is {batch[key].dtype} {batch[key].shape}, expected {np.dtype(want)} {shape}"
            )
    for problem, mask in _problems(batch, vocab_size, document_mask, streams):
        if mask.any():
            raise UserError(f"batch row {int(np.argwhere(mask)[0][0])} has {problem}")


def _problems(
    batch: Batch, vocab_size: int | None, document_mask: bool, streams: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """What may be wrong with a batch, and where it is; one after the other, because rows may be long."""
    tokens, labels, segments = batch["tokens"], batch["labels"], batch["segment_ids"]
    positions, weights = batch["positions"], batch["loss_weights"]
    top = np.iinfo(np.int32).max if vocab_size is None else vocab_size
    outside = f"a token id outside [0, {top}); the tokenizer and the model's vocab_size do not match"
    for ids in (tokens, labels):
        yield outside, ids < 0
        yield outside, ids >= top
    real = segments > 0
    same = segments[:, 1:] == segments[:, :-1]
    yield "padding before the end of the row", real[:, 1:] & ~real[:, :-1]
    yield "padding with a loss weight", ~real & (weights != 0)
    yield "a loss weight that is negative or not finite", ~(np.isfinite(weights) & (weights >= 0))
    counts = same | (np.diff(segments, axis=1) == 1)
    if not streams:
        yield "segment ids that do not count 1, 2, 3, ...", real[:, 1:] & ~counts
        yield "a first segment id other than 1", real[:, :1] & (segments[:, :1] != 1)
        yield "a row whose positions do not start at 0", positions[:, :1] != 0
    goes_on = same & real[:, 1:]
    yield "positions that do not step by one", goes_on & (np.diff(positions, axis=1) != 1)
    yield "a segment whose positions do not start at 0", (real[:, 1:] & ~same) & (positions[:, 1:] != 0)
    yield "labels that are not the shifted tokens", goes_on & (labels[:, :-1] != tokens[:, 1:])
    if document_mask:
        yield "a scored label of another document", ~goes_on & (weights[:, :-1] != 0)
