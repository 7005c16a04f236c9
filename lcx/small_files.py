"""Files that a user brings: only regular ones are opened, and of small ones no more than a limit is read.

Opening a pipe would wait for a writer, and reading a device such as /dev/zero would never end.
"""

import io
import os
import stat

from lcx.errors import UserError

MOST_BYTES = 64 << 20


def opened(path: str | os.PathLike) -> io.FileIO:
    """A regular file, open for unbuffered reading; raises as `read_bytes`."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise UserError(f"{path} is not a regular file, expected one: remove it or restore the file")
    return io.FileIO(path)


def read_bytes(path: str | os.PathLike, *, max_bytes: int = MOST_BYTES) -> bytes:
    """The bytes of a regular file.

    Raises:
      UserError: it is a folder, a pipe or a device, or has more bytes than the limit.
      OSError: it does not exist or cannot be read.
    """
    with opened(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > max_bytes:
            raise UserError(f"{path} has {size:,} bytes, expected at most {max_bytes:,}: restore the file")
        return io.BufferedReader(stream).read(size)  # a limit above the size would be allocated


def read_text(path: str | os.PathLike, *, max_bytes: int = MOST_BYTES, errors: str = "strict") -> str:
    """The UTF-8 text of a regular file, with line breaks as "\\n"; raises as `read_bytes`, or UnicodeDecodeError."""
    text = read_bytes(path, max_bytes=max_bytes).decode("utf-8", errors)
    return text.replace("\r\n", "\n").replace("\r", "\n")
