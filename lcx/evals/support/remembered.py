"""What is read once: texts and tables that the checks before a model is loaded have read need not be read again."""

import contextlib
import contextvars
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

_known: contextvars.ContextVar[dict[Hashable, Any] | None] = contextvars.ContextVar("remembered", default=None)


@contextlib.contextmanager
def remembering() -> Iterator[None]:
    """Within the context, `once` keeps what it has made; outside of it a file may have changed since."""
    token = _known.set({})
    try:
        yield
    finally:
        _known.reset(token)


def once(key: Hashable, make: Callable[[], T]) -> T:
    """What `make` returns, made only once for equal keys within `remembering`."""
    known = _known.get()
    if known is None:
        return make()
    if key not in known:
        known[key] = make()
    return known[key]
