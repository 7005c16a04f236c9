"""What the tests of checkpoint files compare: messages of one line, and arrays to the bit."""

import numpy as np
import pytest


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text and text
    return text


def assert_same(found: np.ndarray, expected: np.ndarray):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()
