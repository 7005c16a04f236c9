"""Sliding windows over documents that are longer than a model's context (Press et al. 2021, arXiv 2108.12409)."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from lcx.errors import UserError
from lcx.model import Decoder
from lcx.wording import quantity


def check_windows(evaluation: Any) -> None:
    """Raises UserError if the fields `window` and `stride` of an evaluation are out of range."""
    owner, window, stride = type(evaluation).__name__, evaluation.window, evaluation.stride
    if window is not None and window < 2:
        raise UserError(f"{owner}.window is {window}, expected at least 2 tokens")
    if stride is not None and not 1 <= stride < (window or math.inf):
        raise UserError(f"{owner}.stride is {stride}, expected 1 .. window - 1")


def windows_of(evaluation: Any, model: Decoder) -> tuple[int, int]:
    """(window, stride) of an evaluation in tokens, with defaults from the model's context length."""
    window = evaluation.window or model.max_position_embeddings
    stride = evaluation.stride or max(1, window // 2)
    if stride >= window:
        raise UserError(
            f"{type(evaluation).__name__}.stride is {stride}, expected less than the window, {window}"
        )
    return window, stride


def cut_into_windows(lengths: Sequence[int], window: int, room: int, stride: int) -> list[str]:
    """A note about sequences that do not fit into a window, of whose tokens `room` are theirs; none if all fit."""
    long = sum(length > room for length in lengths)
    if not long:
        return []
    of = quantity(len(lengths), "sequence")
    return [f"{long} of {of} longer than a window: scored in windows of {window} tokens, {stride} apart"]


def beyond_window(window: int, model: Decoder) -> list[str]:
    """A note about windows that are longer than the model's own; none if they are not."""
    own = model.max_position_embeddings
    return [f"windows of {window} tokens are longer than the model's own, {own}"] if window > own else []


def window_rows(lengths: list[int], *, window: int, stride: int) -> Int[np.ndarray, "R 4"]:
    """Every window of every document, as rows (document, begin, end, first).

    The window contains the tokens begin, ..., end - 1 of the document, and scores those from `first` on. Each token is
    scored in the first window that contains it, except for the first token of a document, which has no context.

    Args:
      lengths: tokens of each document.
      window, stride: in tokens.
    """
    rows = []
    for document, length in enumerate(lengths):
        scored = 1
        for begin in range(0, max(length, 1), stride):
            end = min(begin + window, length)
            if end > scored:
                rows.append((document, begin, end, scored))
                scored = end
            if end == length:
                break
    return np.array(rows, np.int64).reshape(-1, 4)


def rows_of(kind: str, lengths: list[int], *, window: int, stride: int) -> Int[np.ndarray, "R 4"]:
    """`window_rows` under a published definition of perplexity.

    Args:
      kind: "press" and "non_overlapping": as `window_rows`. "yarn": windows of window - 1 tokens, because BOS will
        precede each, so that the first token of a document is scored. "longlora": windows of window + 1 tokens (their
        inputs are the first `window`), each of which scores all but its first; a shorter rest is left out, unless it is
        a whole document.
    """
    if kind == "longlora":
        rows = [
            (document, begin, min(begin + window + 1, length), begin + 1)
            for document, length in enumerate(lengths)
            for begin in range(0, max(1, length - window), stride)
            if length > 1
        ]
        return np.array(rows, np.int64).reshape(-1, 4)
    if kind != "yarn":
        return window_rows(lengths, window=window, stride=stride)
    rows = []
    for document, length in enumerate(lengths):
        scored = 0
        for begin in range(0, length, stride):
            end = min(begin + window - 1, length)
            if end > scored:
                rows.append((document, begin, end, scored))
                scored = end
            if end == length:
                break
    return np.array(rows, np.int64).reshape(-1, 4)
