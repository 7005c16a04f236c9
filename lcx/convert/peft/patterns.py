"""Safe matching of regular expressions from untrusted files.

A short pattern such as (a+)+b can keep Python's `re` busy for years, and a match cannot be interrupted from within its
process. A pattern with any repetition is therefore matched in a subprocess with a time limit and 1 GB of memory.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence

from lcx.errors import UserError

MAX_CHARACTERS = 20_000
_SECONDS = 10
_HARMLESS = re.compile(r"(?:[\w.\-]|\\[.\-dw])*")  # nothing in it repeats
_SCRIPT = """
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
patterns, names = json.load(sys.stdin)
json.dump([[bool(re.fullmatch(p, name)) for name in names] for p in patterns], sys.stdout)
"""


def matching(patterns: Sequence[str], names: Sequence[str], *, setting: str) -> dict[str, set[str]]:
    """Pattern -> the names that it matches in full.

    Args:
      setting: the setting that holds the patterns, for error messages.

    Raises:
      UserError: a pattern is not a valid regular expression, or takes too long.
    """
    for pattern in patterns:
        if len(pattern) > MAX_CHARACTERS:
            raise UserError(
                f"{setting} has a pattern of {len(pattern)} characters, expected at most {MAX_CHARACTERS}: change it"
            )
    found = {p: _quick(p, names) if _HARMLESS.fullmatch(p) else None for p in patterns}
    rest = [pattern for pattern, matched in found.items() if matched is None]
    return {p: m or set() for p, m in found.items()} | (_apart(rest, names, setting) if rest else {})


def _quick(pattern: str, names: Sequence[str]) -> set[str]:
    return {name for name in names if re.fullmatch(pattern, name)}


def _apart(patterns: list[str], names: Sequence[str], setting: str) -> dict[str, set[str]]:
    """Matches in a subprocess."""
    shown = ", ".join(repr(pattern[:60]) for pattern in patterns[:3])
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _SCRIPT],
            input=json.dumps([patterns, list(names)]),
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{setting} has the pattern {shown}, which is not matched within {_SECONDS} s: list the names instead"
        ) from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["out of memory"])[-1].rpartition("error: ")[2][:120]
        raise UserError(
            f"{setting} has the pattern {shown}, which is not a valid regular expression ({reason}): correct it"
        )
    rows = json.loads(done.stdout)
    return {
        p: {n for n, yes in zip(names, row, strict=True) if yes}
        for p, row in zip(patterns, rows, strict=True)
    }
