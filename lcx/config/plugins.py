"""Keeps jax's CUDA plugin from being loaded on machines without an NVIDIA GPU."""

from __future__ import annotations

import os
import sys
import types

from lcx.config.environment import has_accelerator

_VERSIONS = ("12", "13")


def hide_unusable() -> None:
    """Must run before jax is imported, and does nothing afterwards.

    The plugin is also installed where programs are only compiled for a GPU (the extra `aot`). Its libraries print
    several lines about missing drivers when jax loads them, before jax itself can set a log level. So jax gets an
    empty plugin, unless a device is present or JAX_PLATFORMS asks for one.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if "jax" in sys.modules or "cuda" in platforms or "gpu" in platforms or has_accelerator():
        return
    for version in _VERSIONS:
        sys.modules[f"jax_cuda{version}_plugin"] = None  # type: ignore[assignment]  # an import raises ImportError
        empty = types.ModuleType(f"jax_plugins.xla_cuda{version}")
        empty.initialize = lambda: None  # type: ignore[attr-defined]
        sys.modules[empty.__name__] = empty


def show() -> None:
    """Undoes `hide_unusable`, for a program that is to be compiled for a GPU where there is none."""
    for version in _VERSIONS:
        for name in (f"jax_cuda{version}_plugin", f"jax_plugins.xla_cuda{version}"):
            if name in sys.modules and getattr(sys.modules[name], "__file__", None) is None:
                del sys.modules[name]
