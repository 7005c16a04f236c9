"""The one exception that a user's input can cause."""


class UserError(ValueError):
    """Bad input from outside: a config, a file, a flag, a shape.

    The message is one line: what was found, what was expected, and which setting to change. The command line
    prints it without a traceback and exits with status 2.
    """
