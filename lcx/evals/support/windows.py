"""Sliding windows over documents that are longer than a model reads at once (Press et al. 2021, arXiv 2108.12409)."""

import math
from typing import Any

import numpy as np
from jaxtyping import Int

from lcx.errors import UserError
from lcx.model import Decoder


def check_windows(evaluation: Any) -> None:
    """The fields `window` and `stride` of an evaluation."""
    owner, window, stride = type(evaluation).__name__, evaluation.window, evaluation.stride
    if window is not None and window < 2:
        raise UserError(f"{owner}.window is {window}, expected at least 2 tokens")
    if stride is not None and not 1 <= stride < (window or math.inf):
        raise UserError(f"{owner}.stride is {stride}, expected 1 .. window - 1")


def windows_of(evaluation: Any, model: Decoder) -> tuple[int, int]:
    """(window, stride) in tokens."""
    window = evaluation.window or model.max_position_embeddings
    stride = evaluation.stride or max(1, window // 2)
    if stride >= window:
        raise UserError(
            f"{type(evaluation).__name__}.stride is {stride}, expected less than the window, {window}"
        )
    return window, stride


def window_rows(lengths: list[int], *, window: int, stride: int) -> Int[np.ndarray, "R 4"]:
    """Every window of every document: (document, begin, end, first scored target), tokens begin .. end of it.

    Targets are tokens first .. end; the token at `begin` of a document's first window has nothing before it.
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
