"""Tests over a mesh of eight devices, which a CPU only pretends to have when it is told so before jax starts."""

import pathlib
import sys

import pytest

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # tiny_runs


def pytest_collection_modifyitems(items):
    import jax

    if jax.device_count() >= 8:
        return
    flags = "XLA_FLAGS=--xla_force_host_platform_device_count=8 NPROC=32"
    reason = f"needs 8 devices, found {jax.device_count()}: set {flags}"
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))
