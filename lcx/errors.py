"""The one exception that a user's input can cause, and the settings that it names; checks of numbers; one line of any
other exception."""

import contextlib
import contextvars
import math
import re
import shlex
import types
from collections.abc import Iterable, Iterator, Mapping

_names = contextvars.ContextVar[Mapping[str, str | None]]("names", default=types.MappingProxyType({}))
_urls: dict[str, str] = {}  # {the folder of a copy: the URL}
_flags = contextvars.ContextVar[frozenset[str]]("flags", default=frozenset())


class UserError(ValueError):
    """Bad input from outside: a config, a file, a flag, a shape.

    The message is one line: what was found, what was expected, and which setting to change. The command line
    prints it without a traceback and exits with its status. A path in the copy of a URL is named by the URL.
    """

    status = 2

    def __init__(self, message: str):
        super().__init__(by_url(message, where=True))


class TemporaryError(UserError):
    """What may pass by itself: the same command may succeed later, and a scheduler should start it again."""

    status = 75  # EX_TEMPFAIL


def copied(folder: str, url: str) -> None:
    """From now on errors name files below this folder by the URL of which it is a copy."""
    _urls[folder] = url


def by_url(text: str, *, where: bool = False) -> str:
    """The text with URLs in place of the folders of their copies.

    One that names the URL itself is left alone: it says what is here and what is there.

    Args:
      where: whether to add where the copies are, as an error does: a full disk is one of this machine.
    """
    found = []
    for folder, url in sorted(_urls.items(), key=lambda item: -len(item[0])):
        path = re.compile(rf"(?<![\w./-]){re.escape(folder)}(?![\w-]|\.\w)")
        if url not in text and path.search(text):
            text = path.sub(url.replace("\\", r"\\"), text)
            found.append(f" ({url} is copied to {folder})")
    return text + "".join(found if where else ())


def check_sizes(of: str, **sizes: int | None) -> None:
    """Raises UserError for a size below 1; None is a size that is not used.

    Args:
      of: the class or function whose settings they are.
    """
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise UserError(f"{of}.{name} is {size}, expected at least 1: change {of}.{name}")


def check_positive(of: str, **numbers: float | None) -> None:
    """Raises UserError for a number that is not positive and finite; None is a number that is not used."""
    for name, number in numbers.items():
        if number is not None and not 0 < number < math.inf:
            raise UserError(f"{of}.{name} is {number}, expected a positive number: change {of}.{name}")


def check_not_negative(of: str, **numbers: float | None) -> None:
    """Raises UserError for a number that is negative or not finite; None is a number that is not used."""
    for name, number in numbers.items():
        if number is not None and not 0 <= number < math.inf:
            raise UserError(
                f"{of}.{name} is {number}, expected a finite number, at least 0: change {of}.{name}"
            )


def first_line(error: BaseException) -> str:
    """What an exception says, for a message of one line; the name of its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def naming(names: Mapping[str, str | None]) -> Iterator[None]:
    """Lets a UserError name the settings that its reader has; also a decorator.

    Args:
      names: {a setting as messages name it, such as "Dataset.source": what the user sets, such as "--fasta"}. None: the
        user has no such setting, and the clause of the message that advises to change it is left out.
    """
    before = _names.set({**_names.get(), **names})
    try:
        yield
    except UserError as error:
        error.args = (named(str(error), names),)
        raise
    finally:
        _names.reset(before)


@contextlib.contextmanager
def command_has(flags: Iterable[str]) -> Iterator[None]:
    """Tells `naming_flags` the flags of the running command, such as "--seed"."""
    before = _flags.set(frozenset(flags))
    try:
        yield
    finally:
        _flags.reset(before)


@contextlib.contextmanager
def naming_flags(*settings: str) -> Iterator[None]:
    """`naming` for a function of Python programs and commands: settings are flags where the command has them.

    A name may be two words, "setting adapter", of which the last is the flag: the bare one is a word of English.
    """
    flags = {name: f"--{name.split()[-1]}" for name in settings}
    with naming({name: flag for name, flag in flags.items() if flag in _flags.get()}):
        yield


def as_read(line: str) -> str:
    """A line that is not an error with the settings that its reader has, within a block or function of `naming`."""
    return named(line, _names.get()) if _names.get() else line


def named(message: str, names: Mapping[str, str | None]) -> str:
    """The message with the settings that its reader has; see `naming`."""
    if not names:
        return message
    for setting in (name for name, own in names.items() if own is None):
        said = re.escape(setting) + r"\b"
        message = re.sub(rf" \([^()]*{said}[^()]*\)|[;,:][^;,:()]*{said}[^;,:()]*", "", message)
    known = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    value = r"(?:=(?:'([^']*)'|\"([^\"]*)\"|(\w+)))?"
    return re.sub(rf"(?<![\w./-])({known})\b{value}", lambda found: _own(found, names), message)


def _own(found: re.Match, names: Mapping[str, str | None]) -> str:
    """The user's setting with the value that the message gives it: "Dataset.format='csv'" is --format=csv."""
    own, value = names[found[1]], next(filter(None, found.groups()[1:]), None)
    if own is None or value is None:
        return own or found[0]
    if own.startswith("--") and value in ("True", "False"):
        return own if value == "True" else f"--no-{own[2:]}"
    return f"{own}={shlex.quote(value)}" if own.startswith("--") else found[0].replace(found[1], own)
