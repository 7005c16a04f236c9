"""XLA's alarm about a slow compilation: its errors are hidden late in a compilation, and shown again after it."""

import jax
import jax.numpy as jnp
import pytest
from jax._src import compiler
from jax._src.lib import utils

from lcx.config import slow_compilation


@pytest.fixture
def levels(monkeypatch):
    """The levels of XLA's log that were set, while the alarm is expected at once."""
    seen = []
    monkeypatch.setattr(utils, "absl_set_min_log_level", seen.append)
    monkeypatch.setattr(slow_compilation, "_AFTER_S", 0.0)
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "1")

    def slow(*args, original=compiler.compile_or_get_cached, **settings):
        while not seen:  # until the timer has come
            pass
        return original(*args, **settings)

    monkeypatch.setattr(compiler, "compile_or_get_cached", slow)
    return seen


def test_errors_are_hidden_during_a_slow_compilation_only(levels):
    slow_compilation.hide_alarm()
    once = compiler.compile_or_get_cached
    slow_compilation.hide_alarm()
    assert compiler.compile_or_get_cached is once
    assert jax.jit(lambda x: x * 3 + 1)(jnp.float32(2)) == 7
    assert levels[:2] == [3, 1]


def test_a_quick_compilation_changes_nothing(levels, monkeypatch):
    monkeypatch.setattr(slow_compilation, "_AFTER_S", 100.0)
    monkeypatch.setattr(compiler, "compile_or_get_cached", lambda *args: args)
    slow_compilation.hide_alarm()
    assert compiler.compile_or_get_cached(1) == (1,) and not levels


def test_a_level_that_the_user_has_set_stays(levels, monkeypatch):
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
    before = compiler.compile_or_get_cached
    slow_compilation.hide_alarm()
    assert compiler.compile_or_get_cached is before
