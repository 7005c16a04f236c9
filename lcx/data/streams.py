"""Rows in streams: row i of a batch continues where row i of the batch before ended, for models that keep their state.

The documents are joined end to end and cut into rows (packing.plan_concat). The first part of the rows is read by the
first row of the batches, one after the other, the next part by the second row, and so on. Segment ids therefore name
documents over whole streams, and positions go on where the row before ended:

    segment ids   the number of the document in the order of the rows, from 1, and others in every epoch: a state that
                  belongs to the last document of a row is used by the next row exactly if that row continues it
    positions     count from 0 in each document, over all of its rows
"""

import dataclasses

import numpy as np
from jaxtyping import Int

from lcx.data.packing import Batch, Plan

_IDS = np.iinfo(np.int32).max - 1  # segment ids are 1 .. _IDS


@dataclasses.dataclass(frozen=True)
class Streams:
    """The rows of a plan of joined documents, divided into `count` streams.

    Attributes:
      length: rows of a stream in one epoch. Up to count - 1 rows at the end of the plan are in no stream.
      offset: [R] tokens of its first document that are before the row.
      document: [R] number of its first document.
      documents: number of documents in all rows.
    """

    count: int
    length: int
    offset: Int[np.ndarray, "rows"]
    document: Int[np.ndarray, "rows"]
    documents: int

    @property
    def num_rows(self) -> int:
        return len(self.offset)

    @property
    def rows_left_out(self) -> int:
        return self.num_rows - self.count * self.length

    def row(self, index: int, _: int) -> int:
        """The row at this place of the endless order of rows, plus num_rows for every epoch before it."""
        epoch, place = divmod(index, self.count * self.length)
        step, stream = divmod(place, self.count)
        return epoch * self.num_rows + stream * self.length + step

    def continued(self, batch: Batch, rows: Int[np.ndarray, "B"], epoch: Int[np.ndarray, "B"]) -> Batch:
        """An assembled batch of these rows, with the segment ids and positions described at the top of this file."""
        segments = batch["segment_ids"]
        first = (self.document[rows] + epoch * self.documents)[:, None]
        ids = np.where(segments > 0, 1 + (first + segments - 1) % _IDS, 0).astype(np.int32)
        on = np.where(segments == 1, self.offset[rows][:, None], 0).astype(np.int32)
        return {**batch, "segment_ids": ids, "positions": batch["positions"] + on}


def streams_of(plan: Plan, count: int) -> Streams:
    """The rows of packing.plan_concat(..., joined=False) in `count` streams."""
    pieces = np.diff(plan.row_offsets)
    # Whether a row's first document began in an earlier row, and how many of its tokens are in the row before.
    continues = np.concatenate([[False], plan.next_token[:-1] >= 0])
    last = plan.piece_length[plan.row_offsets[1:] - 1]
    added = np.where(continues, np.concatenate([[0], last[:-1]]), 0)
    # That document may have filled the row before, and the one before that: sums over such rows.
    whole = continues & np.concatenate([[False], pieces[:-1] == 1])
    sums = np.cumsum(added)
    begin = np.maximum.accumulate(np.where(whole, 0, np.arange(len(added))))
    started = np.concatenate([[0], np.cumsum(pieces)])
    document = started[:-1] - np.cumsum(continues)
    return Streams(
        count=count,
        length=len(pieces) // count,
        offset=sums - sums[begin] + added[begin],
        document=document,
        documents=int(started[-1] - np.count_nonzero(continues)),
    )
