"""Fixtures of the checkpoint tests: a folder with three steps, and a copy of it to damage."""

import shutil

import pytest
from checkpoint_workers import write_steps


@pytest.fixture(name="three_steps", scope="module")
def three_steps_fixture(tmp_path_factory):
    directory = tmp_path_factory.mktemp("three")
    write_steps(directory, [1, 2, 3])
    return directory


@pytest.fixture(name="steps_dir")
def steps_dir_fixture(three_steps, tmp_path):
    return shutil.copytree(three_steps, tmp_path / "checkpoints")
