"""What users wrote before modules moved still works: checkpoints, .gin files, imports."""

import importlib
import json
import pathlib
import sys
import tarfile

import jax
import numpy as np
import pytest

import lcx
from lcx import moved, train

RECORDED = pathlib.Path(__file__).parent / "recorded" / "old_checkpoint"
NAMES = (RECORDED / "names.txt").read_text().split()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(RECORDED / "workdir.tar.xz") as archive:
        archive.extractall(folder)  # an archive of this repository; Python 3.11.2 has no filters
    return folder / "workdir"


@pytest.fixture(scope="module")
def expected():
    with np.load(RECORDED / "expected.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def loaded(workdir):
    return lcx.load(str(workdir))


def test_the_parameters_are_the_same_bits(loaded, expected):
    leaves = jax.tree_util.tree_leaves_with_path(loaded[1])
    found = {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}
    recorded = {name.removeprefix("params/"): x for name, x in expected.items() if name.startswith("params/")}
    assert found.keys() == recorded.keys()
    for name, x in recorded.items():
        assert found[name].dtype == x.dtype and found[name].tobytes() == x.tobytes(), name


def test_the_function_is_the_same(loaded, expected):
    """Attention with YaRN, linear attention (the published variant too), Hyena SE, MR and LI, 2Mamba, Mamba-2."""
    logits = lcx.logits(*loaded, expected["tokens"])
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=2e-5)


def test_the_run_goes_on_with_its_gin_file(workdir, tmp_path, monkeypatch, capfd):
    """Nothing is left to train; the step, the optimizer's state and the place in the data are restored all the same."""
    monkeypatch.chdir(RECORDED)
    before = _files(workdir / "checkpoints")
    flags = ("--gin.Dataset.source='text.jsonl'", f"--gin.Dataset.cache_dir='{tmp_path}/cache'")
    assert train.main(["--gin_file=run.gin", f"--workdir={workdir}", *flags]) == 0
    assert "step 1 of 1 is done" in capfd.readouterr().err
    assert _files(workdir / "checkpoints") == before
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 1]


def _files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_then_is_found(name):
    module, _, attribute = name.partition(":")
    found = importlib.import_module(module)
    if attribute:
        assert callable(getattr(found, attribute))


@pytest.mark.parametrize("old, new", moved.MODULES.items())
def test_an_old_module_is_the_new_one(old, new):
    parent, _, name = old.rpartition(".")
    scope = {}
    exec(f"from {parent} import {name} as a\nimport {old} as b", scope)  # as users and .gin files write it
    assert scope["a"] is scope["b"] is sys.modules[new] is importlib.import_module(old)
    assert sys.modules[new].__name__ == new
    assert new in {today.rpartition(":")[0] or today for today in (moved.today(old), moved.today(f"{old}:x"))}


@pytest.mark.parametrize("old, new", moved.NAMES.items())
def test_an_old_name_is_the_new_one(old, new):
    (module, _, name), (home, _, attribute) = old.partition(":"), new.partition(":")
    scope = {}
    exec(f"from {module} import {name} as found", scope)
    assert scope["found"] is getattr(importlib.import_module(home), attribute)
    assert moved.today(old) == new


def test_no_row_leads_to_another_row():
    """A name that has moved twice has two rows to its home of today."""
    for old, new in moved.NAMES.items():
        module = new.partition(":")[0]
        assert new not in moved.NAMES and module not in moved.MODULES, old
    assert not set(moved.MODULES) & set(moved.MODULES.values())


def test_a_name_that_never_was_is_refused():
    with pytest.raises(ImportError, match="lcx.metric"):
        importlib.import_module("lcx.metric")
    with pytest.raises(AttributeError, match=r"lcx\.model.*no attribute 'lama'"):
        importlib.import_module("lcx.model").lama  # noqa: B018
