"""The one exception that a user's input can cause, checks of numbers, and one line of any other exception."""

import math


class UserError(ValueError):
    """Bad input from outside: a config, a file, a flag, a shape.

    The message is one line: what was found, what was expected, and which setting to change. The command line
    prints it without a traceback and exits with status 2.
    """


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
