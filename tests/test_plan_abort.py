"""A compiler that aborts the process while it is kept silent leaves one line."""

import subprocess
import sys

import pytest
from tiny_runs import ROOT

from lcx.planning.silence import reason

PROGRAM = """
import os
from lcx.planning import silence
with silence.quiet():
    os.write(2, b"a notice\\n")
with silence.quiet():
    os.write(2, b"W1130 16:12:08.1 1 x.cc:1] a warning\\nF1130 16:12:09.1 1 target.cc:7] Check failed: x <= 16\\n")
    os.write(2, b"*** Check failure stack trace: ***\\n")
    os.abort()
"""


def test_one_line_with_the_reason():
    found = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=ROOT)
    line = "error: the compiler for these devices has aborted (Check failed: x <= 16): choose another --topology or "
    assert (found.returncode, found.stdout, found.stderr) == (2, "", f"{line}MeshShape\n")


@pytest.mark.parametrize("log, said", [("", "it gives no reason"), ("first\nlast\n", "last")])
def test_without_a_failed_check(log, said):
    assert f"({said})" in reason(log)
