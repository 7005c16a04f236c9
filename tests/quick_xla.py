"""How tests have XLA compile for a CPU: quickly, since most of what they compile runs once.

LLVM's expensive passes are half of the time of a compilation. Of the other half, two thirds go to XLA's newer emitters
of fused operations, which lower through MLIR, and to cutting a program into 32 pieces for as many threads. The same
program without them (two_mamba and four more mixers, values and gradients): 13.9 s, 6.4 s, 1.6 s.

Around each of the many programs of one operation jax itself spends as long as XLA; `small_programs` saves much of that.

JAX_DISABLE_MOST_OPTIMIZATIONS=0 turns all of it off: programs are then compiled as for users.
"""

import contextlib
import functools
import importlib.metadata
import itertools
import os
from unittest import mock

# Names of XLA's options, as in XLA_FLAGS: (quick, XLA's default).
OPTIONS: dict[str, tuple] = {"xla_cpu_parallel_codegen_split_count": (1, 32)}
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):  # XLA exits at a name it lacks
    OPTIONS["xla_cpu_use_fusion_emitters"] = (False, True)


def wanted() -> bool:
    return os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS", "").lower() in ("1", "true")


def flags(*more: str) -> str:
    """XLA_FLAGS of a process: `more`, and of these what it does not name. Processes whose numbers are compared need the
    same."""
    given = " ".join(more)
    quick = (f"--{name}={str(value).lower()}" for name, (value, _) in OPTIONS.items() if name not in given)
    return " ".join((given, *quick)) if wanted() else given


@contextlib.contextmanager
def as_for_users():
    """XLA's defaults for what is compiled in this process meanwhile."""
    import jax
    from jax._src import compiler

    flag = "jax_disable_most_optimizations"
    before, get = jax.config.values[flag], compiler.get_compile_options

    @functools.wraps(get)
    def options(*args, backend=None, env_options_overrides=None, **kwargs):
        if backend is not None and backend.platform == "cpu":
            defaults = {name: default for name, (_, default) in OPTIONS.items()}
            env_options_overrides = defaults | (env_options_overrides or {})
        return get(*args, backend=backend, env_options_overrides=env_options_overrides, **kwargs)

    jax.config.update(flag, False)
    try:
        with mock.patch.object(compiler, "get_compile_options", options):
            yield
    finally:
        jax.config.update(flag, before)


MODULES = 100  # that share one MLIR context; constants of a module live as long as its context


def small_programs():
    """Leaves out what jax does around every program of this process and few of them need.

    `jnp.asarray(x)` of a NumPy array compiles the identity for each shape of x: here x is copied to the device instead.
    Every program is lowered in an MLIR context of its own, into which all dialects are loaded: here many share one.
    An operation like x * 2 at a new shape takes 10 ms of CPU time instead of 16, jnp.asarray 0.2 instead of 12.
    """
    import jax
    import numpy as np
    from jax._src.interpreters import mlir
    from jax._src.lax import lax

    stage, start, count = getattr(lax, "_stage_impl", None), mlir.ModuleContext.__init__, itertools.count()
    shared = functools.lru_cache(1)(lambda hundred: mlir.make_ir_context())

    def copied(x):
        values = getattr(x, "val", x)  # jax's TypedNdArray holds the array
        weak = getattr(x, "weak_type", False)
        if type(values) is np.ndarray and not weak and jax.sharding.get_abstract_mesh().empty:
            return jax.device_put(values.copy())
        return stage(x)

    @functools.wraps(start)
    def start_in_shared(self, *, platforms, context=None, **kwargs):
        if context is None and tuple(platforms) == ("cpu",):
            context = shared(next(count) // MODULES)
        start(self, platforms=platforms, context=context, **kwargs)

    if stage is not None:  # not in every version of jax
        lax.stage_p.def_impl(copied)
    mlir.ModuleContext.__init__ = start_in_shared
