"""Commands that compute on a CPU start again with glibc's tunable for large pages, where it has an effect."""

import os
import subprocess
import sys

import pytest

from lcx import huge_pages

CONFIG = """
from __gin__ import dynamic_registration
import told
"""


@pytest.fixture
def madvise(tmp_path, monkeypatch):
    kernel = tmp_path / "enabled"
    kernel.write_text("always [madvise] never\n")
    monkeypatch.setattr(huge_pages, "_KERNEL", kernel)
    monkeypatch.setattr(huge_pages, "_glibc", lambda: (2, 36))
    monkeypatch.setattr(huge_pages, "_ACCELERATORS", (str(tmp_path / "nvidia0"),))
    return kernel


@pytest.mark.parametrize(
    ("environment", "tunables"),
    [
        ({}, "glibc.malloc.hugetlb=1"),
        ({"JAX_PLATFORMS": "cpu"}, "glibc.malloc.hugetlb=1"),
        ({"GLIBC_TUNABLES": "glibc.malloc.check=1"}, "glibc.malloc.check=1:glibc.malloc.hugetlb=1"),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, None),
        ({"JAX_PLATFORMS": "cuda,cpu"}, None),
    ],
    ids=str,
)
def test_when_they_are_wanted(madvise, environment, tunables):
    assert huge_pages.wanted(environment) == (tunables is not None)
    if tunables is not None:
        assert huge_pages.with_tunable(environment) == {**environment, "GLIBC_TUNABLES": tunables}


def test_where_they_have_no_effect(madvise, tmp_path, monkeypatch):
    (tmp_path / "nvidia0").touch()
    assert not huge_pages.wanted({})
    assert huge_pages.wanted({"JAX_PLATFORMS": "cpu"})
    (tmp_path / "nvidia0").unlink()
    for text in ("[always] madvise never\n", "always madvise [never]\n"):
        madvise.write_text(text)
        assert not huge_pages.wanted({})
    madvise.unlink()
    assert not huge_pages.wanted({})
    madvise.write_text("always [madvise] never\n")
    monkeypatch.setattr(huge_pages, "_glibc", lambda: (2, 34))
    assert not huge_pages.wanted({})


def test_a_command_starts_again_with_its_arguments(tmp_path):
    told = "import os, sys\nsys.exit(f'{os.environ.get(\"GLIBC_TUNABLES\")} {sys.argv[1:]}')\n"
    (tmp_path / "told.py").write_text(told)
    (tmp_path / "run.gin").write_text(CONFIG)
    environment = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    environment["JAX_PLATFORMS"] = "cpu"
    want = "glibc.malloc.hugetlb=1" if huge_pages.wanted(environment) else None
    flags = ["--gin_file=run.gin", f"--workdir={tmp_path}/two words"]
    command = [sys.executable, "-W", "ignore", "-m", "lcx.train", *flags]
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), os.getcwd()])
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert f"{want} {flags}" in done.stderr, done.stderr
