"""The published 2Mamba models: their saved numbers, and their parameters in the layout of ours."""

import numpy as np


def load(reference, name: str) -> dict[str, np.ndarray]:
    with np.load(reference / "reference" / "two_mamba" / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def triangular(expanded: np.ndarray, head_dim: int, block: int = 16) -> np.ndarray:
    """The last axis from our blocks of 16 rows to the published upper triangle, row by row.

    In a block's first 16 columns both orders of a product stand with factor 1 each, in the triangle one with sqrt 2.
    """
    places, factors, offset = {}, {}, 0
    for at in range(0, head_dim, block):
        for m in range(at, min(at + block, head_dim)):
            for n in range(at, head_dim):
                if m <= n:
                    places[m, n] = offset
                    factors[m, n] = 2**0.5 if m < n < at + block else 1.0
                offset += 1
    order = [(m, n) for m in range(head_dim) for n in range(m, head_dim)]
    return expanded[..., [places[i] for i in order]] * np.array([factors[i] for i in order])
