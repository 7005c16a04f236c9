"""Which values of a .gin file fit which annotation."""

import dataclasses
import inspect
import os
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import flax.linen as nn
import jax
import jaxtyping
import pytest
import toy_job

from lcx.config import typecheck


class Net(nn.Module):
    features: int

    def __call__(self, x):
        return nn.Dense(self.features)(x)


T = typing.TypeVar("T")
Width = typing.NewType("Width", int)


@pytest.mark.parametrize(
    "value, annotation, fitted",
    [
        (3, int, 3), (3, float, 3.0), (3, float | int, 3), (3, float | None, 3.0), (None, float | None, None),
        (3, str | float, 3.0), ([1, 2], tuple[int, ...], (1, 2)), ((1, 2), list[int], [1, 2]),
        ([[1], []], tuple[tuple[int, ...], ...], ((1,), ())), ([1, "a"], tuple[int, str], (1, "a")),
        ([], tuple[()], ()), ([1], tuple, (1,)), ([1, 2], Sequence[float], (1.0, 2.0)), ([1], str | tuple[int], (1,)),
        ({"a": 1}, dict[str, float], {"a": 1.0}), ({"a": [1]}, Mapping[str, tuple[int]], {"a": (1,)}),
        ({"a": 1}, dict, {"a": 1}), ("x", typing.Any, "x"), ("x", T, "x"), (3, Width, 3), ("p", os.PathLike, "p"),
        ("p", str | os.PathLike, "p"), (3, typing.Annotated[int, "doc"], 3), (2, typing.Literal[1, 2], 2),
        ("x", jaxtyping.Float[jax.Array, "B"], "x"), (3, inspect.Parameter.empty, 3), (None, None, None),
        (3, dataclasses.InitVar[int], 3), (3, typing.Optional[int], 3),  # noqa: UP045
    ],
)  # fmt: skip
def test_what_fits(value, annotation, fitted):
    result = typecheck.fit(value, annotation)
    assert result == fitted and repr(result) == repr(fitted)  # 3.0 == 3, but not by name


@pytest.mark.parametrize(
    "value, annotation",
    [
        (True, int), (1, bool), (2.0, int), ("1", int), (1, str), (None, int), (True, float), (3, None),
        ([1, 2.5], tuple[int, ...]), ("ab", tuple[str, ...]), ("ab", Sequence[str]), ([1], tuple[int, int]),
        ([1], tuple[()]), ({1: 2}, dict[str, int]), ([1], dict), (True, typing.Literal[1]), (3, Callable[[], int]),
        ("relu", Callable), (3, toy_job.Job), (2.5, Width), (3, type[int]), (1.5, int | None),
        (2.5, typing.Annotated[int, "doc"]),
    ],
)  # fmt: skip
def test_what_does_not_fit(value, annotation):
    with pytest.raises(typecheck.Mismatch, match="expected .*, found "):
        typecheck.fit(value, annotation)


def untyped(x):
    return x


class Named(Protocol):
    @property
    def name(self) -> str: ...


class Runs(Protocol):
    def __call__(self, x): ...


@pytest.mark.parametrize(
    "source, called, annotation, fits",
    [
        (toy_job.Job, True, toy_job.Job, True), (toy_job.Job, True, object, True), (bool, True, int, True),
        (toy_job.Job, True, toy_job.Job | None, True), (toy_job.Job, True, toy_job.Optimizer, False),
        (toy_job.Job, True, int, False), (Net, True, nn.Module, True), (Net, True, Callable, True),
        (toy_job.Job, True, Callable, False), (toy_job.power, True, float, True), (toy_job.power, True, str, False),
        (untyped, True, str, True), (toy_job.power, False, Callable[[float], float], True),
        (toy_job.power, False, float, False), (toy_job.Job, False, toy_job.Job, False),
        (toy_job.Job, False, type[toy_job.Job], True), (toy_job.power, False, type, False),
        (toy_job.power, False, Callable | None, True), (toy_job.power, False, str | Callable, True),
        (toy_job.Job, True, Named, True), (toy_job.Optimizer, True, Named, False), (Net, True, Runs, True),
        (toy_job.Job, True, Runs, False), (untyped, True, Runs, True),
    ],
)  # fmt: skip
def test_what_references_fit(source, called, annotation, fits):
    def fit():
        return typecheck.fit("a reference", annotation, lambda value: typecheck.Promise(source, called))

    if fits:
        assert fit() == "a reference"
    else:
        with pytest.raises(typecheck.Mismatch):
            fit()
