"""What an accelerator says of this library, in minutes: correct first, then fast, then whole training steps.

    bash benchmarks/accelerator.sh [--output FILE.json]         the one to start: again after a crash, then a table
    python benchmarks/accelerator.py --dry --output FILE.json   on a CPU: kernels interpreted, tiny shapes

One unit of work after the other, the most valuable first; each is written to the file when it ends:

    check/OPERATOR/DTYPE    every form of our own against the definition: values and gradients, whole and packed rows
    speed/OPERATOR/T        our forms beside others' (torch, flash-linear-attention, cuDNN), against the roofline
    step/MODEL/T            a whole training step: tokens/s, MFU, peak memory; each in a new process

Operators come from benchmarks/operators.py. What is in the file is not run again: after a kill, a hang (a unit may take
two minutes) or a crash of the device the same command goes on, and gives up a unit that ended its process twice. When
nothing is open or the time is up, a table of everything is printed. Exit status: 0, 1 if any result is wrong, 75 if
more is to be done in a new process.
"""

import argparse
import contextlib
import importlib
import inspect
import json
import pathlib
import pkgutil
import signal
import sys
import time
from collections.abc import Callable

import harness
import jax
import jax.numpy as jnp
import kernels
import numpy as np
from operators import OPERATORS, VARIANTS

import kernels_pallas
from lcx.ops import dispatch
from lcx.training.peak_flops import peak_flops

# bytes/s, data sheets; the first name that the device's contains
BANDWIDTH = {
    **{"B200": 8.0e12, "H200": 4.8e12, "H100": 3.35e12, "A100-SXM4-80GB": 2.04e12, "A100": 1.555e12},
    **{"L40S": 0.864e12, "L4": 0.3e12, "RTX 4090": 1.008e12},
    **{
        "TPU v6": 1.64e12,
        "TPU v5p": 2.765e12,
        "TPU v5 lite": 0.819e12,
        "TPU v5e": 0.819e12,
        "TPU v4": 1.2e12,
    },
}
HOT = ("ssd", "fir_conv_128", "linear_attention", "attention", "long_conv", "lolcats", "second_order_states")
FORMS = {"gpu": ("triton", "mosaic"), "tpu": ("tpu",), "cpu": ()}  # our kernels
MODELS = ("llama", "linearized", "striped_hyena", "two_mamba")
TOLERANCE = {"bfloat16": 2e-2, "float32": 2e-3}  # of the largest value; tensor cores round float32 products
UNIT_SECONDS = 120
AGAIN, WRONG = 75, 1  # exit status


def by_value(names) -> list[str]:
    return sorted(
        names, key=lambda name: (HOT.index(name) if name in HOT else len(HOT), list(VARIANTS).index(name))
    )


def units(args) -> list[str]:
    """The names of all units, the most valuable first."""
    chosen = by_value(args.operators.split(",") if args.operators else VARIANTS)
    timed = [name for name in chosen if name in OPERATORS]
    long = [name for name in timed if OPERATORS[name].linear]
    near, far = (64, 128) if args.dry else (8192, 65536)
    return [
        *(f"check/{name}/bfloat16" for name in chosen),
        *(f"speed/{name}/{near}" for name in timed),
        *(f"step/{name}/{near}" for name in args.models.split(",")),
        *(f"check/{name}/float32" for name in chosen if not args.dry),
        *(f"speed/{name}/{far}" for name in long),
        *(f"step/{name}/{far}" for name in args.models.split(",") if not args.dry),
    ]


# ------------------------------------------------------------------------------------------------------ the three kinds


def check(name: str, dtype: str, args) -> dict:
    """{form: {output or argument's gradient: largest error over the largest value}}, against float32."""
    operator = VARIANTS[name]
    size = operator.small if args.dry else operator.size
    T = 72 if args.dry else kernels.CHECKED  # not a multiple of any tile
    arrays = operator.arrays(size, B=1 if args.dry else 2, T=T, dtype=dtype, seed=1)
    wide = {key: x.astype("float32") if x.dtype == jnp.bfloat16 else x for key, x in arrays.items()}
    y = operator.result(arrays)
    dy = jnp.asarray(np.random.default_rng(2).standard_normal(y.shape), y.dtype)
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(operator.gradients("reference"))(wide, dy.astype("float32"))
    found = {}
    for form in kernels.forms_here(operator, size, dtype, (*args.forms, "xla")):
        result = jax.jit(operator.gradients(form))(arrays, dy)
        found[form] = {
            key: _error(x, z) for (key, x), (_, z) in zip(_named(result), _named(expected), strict=True)
        }
    worst = {form: max(errors.values()) for form, errors in found.items()}
    return {
        "errors": found,
        "wrong": [form for form, error in worst.items() if not error <= TOLERANCE[dtype]],
    }


def _named(result) -> list[tuple[str, np.ndarray]]:
    y, gradients = result
    return [("output", np.asarray(y, "float32"))] + [
        (k, np.asarray(x, "float32")) for k, x in gradients.items()
    ]


def _error(x: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(x - expected).max() / max(np.abs(expected).max(), 1e-30))


def speed(name: str, T: int, args) -> dict:
    """kernels.py's rows of one T, both passes; share_of_floor is that of the roofline."""
    operator = OPERATORS[name]
    size, dtype = (operator.small, "float32") if args.dry else (operator.size, "bfloat16")
    forms = kernels.forms_here(operator, size, dtype, (*args.forms, "xla", "cudnn", "splash"))
    functions = {form: operator.forward(form) for form in forms}
    if not args.dry:
        functions |= kernels.jax_peers(operator)
    torch = kernels.Torch(*("true",) if args.dry else ())  # which answers nothing
    run = harness.Run(operator.note, threads={"lcx": harness.jax_threads(), "torch": torch.threads})
    settings = argparse.Namespace(
        naive_max_t=0, memory_gib=60, slow=2.0, rounds=5, seconds=0.02, ceilings=roof(args)
    )
    if args.dry:
        settings.rounds, settings.seconds = 1, 0.0
    shape = {"B": 1 if args.dry else max(1, operator.tokens // T), "T": T, "dtype": dtype}
    rows = [
        row
        for train in (True, False)
        for row in kernels.point(
            operator, size, functions, torch, run, late=set(), args=settings, train=train, **shape
        )
    ]
    torch.close()
    return {"quiet": run.quiet, "watch": run.watch(), "rows": rows}


def roof(args) -> dict[str, float]:
    """bytes/s and FLOP/s of one device by its data sheet; of one that is in no table, what is measured here."""
    kind, flops = jax.devices()[0].device_kind, peak_flops()
    bandwidth = next((rate for name, rate in BANDWIDTH.items() if name in kind), None)
    if flops and bandwidth:
        return {
            "copy_bytes_per_second": bandwidth,
            "product_flops_per_second": flops / jax.device_count(),
        }
    if args.dry:
        return {"copy_bytes_per_second": 1e10, "product_flops_per_second": 1e11}
    return harness.ceilings(harness.Run("ceilings", threads={"lcx": harness.jax_threads()}))


def step(name: str, T: int, args) -> dict:
    import train_step

    width = train_step.WIDTHS["tiny" if args.dry else "1b"]
    tokens = T if args.dry else max(T, 65536)
    run = harness.Run("a training step", threads={"lcx": harness.jax_threads()})
    dtype, remat = ("float32", "none") if args.dry else ("bfloat16", "full")
    made = train_step.Step(name, width, B=tokens // T, T=T, dtype=dtype, remat=remat)
    seconds = run.turns({name: made.run}, rounds=1 if args.dry else 5).seconds(name)
    flops = train_step.model_lib.flops_per_token(made.model, T) * made.tokens
    used = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "quiet": run.quiet,
        "watch": run.watch(),
        "tokens_per_second": round(made.tokens / seconds, 1),
        "mfu": round(flops / seconds / roof(args)["product_flops_per_second"], 4),
        "xla_peak_gib": round(made.bytes / 2**30, 3),
        "device_peak_gib": used and round(used / 2**30, 3),
        "loss": round(float(made.loss), 4),
    }


KINDS = {"check": lambda name, what, args: check(name, what, args)} | {
    kind: lambda name, what, args, fn=fn: fn(name, int(what), args)
    for kind, fn in (("speed", speed), ("step", step))
}


@contextlib.contextmanager
def interpreted(platform: str = "gpu"):
    """Every kernel of that platform runs on this machine, interpreted: operators take it for one."""
    before, defaults = dispatch.platform, [(fn, fn.__kwdefaults__) for fn in entries().values()]
    dispatch.platform = lambda: platform
    for fn, given in defaults:
        fn.__kwdefaults__ = given | {"interpret": True}
    try:
        yield
    finally:
        dispatch.platform = before
        for fn, given in defaults:
            fn.__kwdefaults__ = given


def entries() -> dict[str, Callable]:
    """The kernels that operators call: all functions of kernels_pallas that take a platform and can be interpreted."""
    found = {}
    for module in pkgutil.iter_modules(kernels_pallas.__path__):
        name = f"kernels_pallas.{module.name}"
        for key, fn in vars(importlib.import_module(name)).items():
            own = inspect.isfunction(fn) and fn.__module__ == name
            if (
                own
                and "interpret" in (fn.__kwdefaults__ or ())
                and "platform" in inspect.signature(fn).parameters
            ):
                found[f"{module.name}.{key}"] = fn
    return found


# ------------------------------------------------------------------------------------------------- units, one by one


def load(path: pathlib.Path) -> dict:
    """The file as it is, for this machine and these versions; another's is put aside."""
    fresh = harness.Run(
        "an accelerator: correct, fast, whole steps", threads={"lcx": harness.jax_threads()}
    ).record()
    fresh = {key: fresh[key] for key in ("what", "created", "threads", "machine", "versions")} | {"units": {}}
    if not path.exists():
        return fresh
    found = json.loads(path.read_text())
    if any(found[key] != fresh[key] for key in ("machine", "versions")):
        path.replace(f"{path}.before")
        return fresh
    return found


def pending(result: dict, names: list[str]) -> list[str]:
    def open_(name):
        unit = result["units"].get(name, {"attempts": 0})
        return "result" not in unit and unit["attempts"] < 2

    return sorted(
        (name for name in names if open_(name)), key=lambda name: result["units"].get(name, {}) != {}
    )


def work(args) -> int:
    """Runs what is open until the time is up. A step ends the process, so that the peak of memory is its own."""
    path, names = pathlib.Path(args.output), units(args)
    result = load(path)
    for name in pending(result, names):
        if time.time() > args.until:
            break
        unit = result["units"].setdefault(name, {"attempts": 0})
        unit["attempts"] += 1
        harness.write(path, result)  # if it ends this process, the next one knows
        signal.alarm(0 if args.dry else UNIT_SECONDS)  # ends the process: a compiler or a device may hang
        kind, what, setting = name.split("/")
        start = time.perf_counter()
        try:
            unit["result"] = KINDS[kind](what, setting, args)
        except Exception as error:  # of any layer down to the device: the others go on
            unit["result"] = {"error": f"{type(error).__name__}: {error}"[:500]}
        signal.alarm(0)
        unit["seconds"] = round(time.perf_counter() - start, 1)
        harness.write(path, result)
        print(line(name, unit), flush=True)
        if kind == "step" or "error" in unit["result"]:
            return AGAIN
    print(table(result, names))
    wrong = any(unit.get("result", {}).get("wrong") for unit in result["units"].values())
    return WRONG if wrong else 0


# ------------------------------------------------------------------------------------------------------------ the table


def line(name: str, unit: dict) -> str:
    result = unit.get("result")
    if result is None:
        return f"{name:36} ended its process {unit['attempts']} times"
    if "error" in result:
        return f"{name:36} ERROR {result['error'][:160]}"
    kind = name.split("/")[0]
    if kind == "check":
        worst = {form: max(errors.values()) for form, errors in result["errors"].items()}
        text = "  ".join(
            f"{form} {error:.1e}" + " WRONG" * (form in result["wrong"]) for form, error in worst.items()
        )
    elif kind == "step":
        memory = result["device_peak_gib"] or result["xla_peak_gib"]
        text = (
            f"{result['tokens_per_second']:,.0f} tokens/s  MFU {100 * result['mfu']:.1f}%  peak {memory} GiB"
        )
    else:
        text = "  ".join(
            f"{'train' if row['pass'] != 'forward' else 'fwd'} {row['form']} {row['ms']:.3f} ms "
            f"({100 * row['share_of_floor']:.0f}%)"
            for row in result["rows"]
        )
    return f"{name:36} {text}" + ("" if result.get("quiet", True) else "  (not quiet)")


def table(result: dict, names: list[str]) -> str:
    """All units, also those that were not reached; percentages of a time are its roofline's share."""
    found = result["units"]
    lines = [line(name, found[name]) for name in names if name in found]
    missing = [name for name in names if name not in found]
    return "\n".join([*lines, f"not reached: {', '.join(missing) or 'nothing'}"])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=480.0, help="after that no unit begins")
    parser.add_argument("--operators", help="instead of all of operators.py, variants included")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--output", help="benchmarks/results/accelerator_<device>.json")
    parser.add_argument("--dry", action="store_true", help="tiny shapes, kernels interpreted, on a CPU")
    args = parser.parse_args()
    args.until = time.time() + args.seconds
    args.forms = FORMS["gpu" if args.dry else jax.default_backend()]
    if not args.output:
        args.output = str(harness.RESULTS / f"accelerator_{harness.device_name()}.json")
    return args


def main() -> int:
    args = parse()
    with interpreted() if args.dry else contextlib.nullcontext():
        return work(args)


if __name__ == "__main__":
    sys.exit(main())
