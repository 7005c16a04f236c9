"""What every test shares: the CPU, a compile cache, checked array shapes, the folder of real data."""

import contextlib
import gc
import itertools
import os
import pathlib

import pytest
import quick_xla
import shared_steps

# Before the first import of jax. Compiled programs are kept between runs: much of the suite's time is XLA's.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path.home() / ".cache" / "lcx" / "xla-tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# How quick_xla.py has it. 0 tests all programs as users run them.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# An operation in a program has so many frames of Python as its location; jax's default of 10 slows tracing down.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "1")
os.environ["XLA_FLAGS"] = quick_xla.flags(os.environ.get("XLA_FLAGS", ""))

import jax
import jaxtyping

# Shapes and dtypes in these signatures are checked at every call of a test, and cost a user nothing.
jaxtyping.install_import_hook(["lcx.rope", "lcx.ops"], "beartype.beartype")
if quick_xla.wanted():
    quick_xla.small_programs()
    shared_steps.install()
# Tracing makes many objects that live long: Python's usual thresholds search them for cycles again and again.
gc.set_threshold(50_000, 10, 5)

MAPS = pathlib.Path("/proc/self/maps")
TESTS = itertools.count(1)
# Compiled as for users: what compilers are asked, and rows of 1024 tokens of a trained model, which take 0.5 s of CPU
# time each without LLVM's passes and 0.1 s with them. Operators where rounding matters: quick_xla.as_for_users there.
OPTIMIZED = ("test_aot", "test_evals_real_models")
# Files whose tests take many seconds each. They come first, so that no worker begins one when the others are done, and
# that no file is divided among workers there, each of which would make what its tests share (processes, runs) again.
LONG = (
    *("test_kernels_compile", "test_ladder_dna", "test_reproduce_striped_hyena", "test_pieces", "test_linearize"),
    *("test_docs", "test_serve", "test_evals_real_models", "test_trainer_processes", "test_trainer_faults"),
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(autouse=True, scope="module")
def optimizations(request):
    name, how = request.module.__name__, contextlib.nullcontext()
    if name.startswith(OPTIMIZED):
        how = quick_xla.as_for_users()
    with how:
        yield


@pytest.fixture(autouse=True)
def bounded_programs():
    """Lets compiled programs go before they are too many: XLA maps memory for each, and a process that reaches Linux's
    limit (65530 maps) crashes in the compiler. Counting takes 20 ms, so it follows every tenth test."""
    yield
    if next(TESTS) % 10 == 0 and MAPS.exists() and MAPS.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def reference() -> pathlib.Path:
    """The folder of reference numbers and real data, from the environment variable LCX_REFERENCE."""
    folder = os.environ.get("LCX_REFERENCE")
    if not folder:
        pytest.skip("needs real data: set LCX_REFERENCE to the folder that holds reference/ and data/")
    path = pathlib.Path(folder).resolve()
    if not path.is_dir():
        pytest.fail(f"LCX_REFERENCE is {folder!r}, expected a folder: correct it or unset it")
    return path
