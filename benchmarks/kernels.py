"""Times every operator on this machine: lcx's forms, the definition, and other libraries' implementations side by side.

    python benchmarks/kernels.py [--operators fir_conv_128,...] [--lengths 1024,...] [--forms xla,...] [--rounds 3]
                                 [--output FILE.json] [--plot FILE.svg]

For each operator (benchmarks/operators.py), every form that runs here is first compared with the definition in float32
on random data. Then T is swept over powers of two, forward and forward + backward, with the number of tokens fixed, so
that time per token shows how cost grows. Forms take turns in one run; medians are compared. "naive" is the definition
itself, if its memory suffices; torch's own and (on NVIDIA GPUs) flash-linear-attention, power retention, cuDNN and
tokamax are measured in the same turns where they can be imported.

A row has milliseconds, bytes in addition to arguments and results (temp_mib, counted by XLA; torch has none), and, for
the work of the cheapest known algorithm, bytes/s, FLOP/s, and the share of the time that its floor on this machine
takes (bytes at the speed of a copy, FLOPs at that of a large matrix product, both measured first).

Written to benchmarks/results/<device>.json and .svg unless told otherwise. Each operator has its own record of what
else ran, so that a few can be measured at a time: the others in the file stay as they are.
"""

import argparse
import json
import os
import sys
import tempfile

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves memory for torch

import harness
import jax
import jax.numpy as jnp
import numpy as np
from operators import OPERATORS, Operator

HERE = os.path.dirname(os.path.abspath(__file__))
FORMS = ("xla", "triton", "mosaic", "tpu", "cudnn", "splash")
CHECKED = 300  # tokens: not a multiple of any tile
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # relative to the largest value
ON_CPU = jax.default_backend() == "cpu"


class Torch(harness.Child):
    """The process of torch_peers.py; without torch, a table with nobody in it."""

    def __init__(self, *command: str):
        super().__init__(*(command or (sys.executable, os.path.join(HERE, "torch_peers.py"))))
        self.threads = self.ask({"threads": True}) or {}

    def check(self, name: str, arrays: dict) -> dict:
        """{peer: its result as an array, or the reason why it has none}."""
        with tempfile.TemporaryDirectory() as folder:
            floats = {
                k: np.asarray(v, "float32" if v.dtype == jnp.bfloat16 else None) for k, v in arrays.items()
            }
            np.savez(f"{folder}/in.npz", **floats)
            answer = self.ask({"check": name, "inputs": f"{folder}/in.npz", "outputs": folder}) or {}
            return {k: np.load(v) if v.endswith(".npy") else v for k, v in answer.items()}

    def prepare(
        self, operator: Operator, size, *, B: int, T: int, dtype: str, train: bool, without: set
    ) -> dict:
        request = {
            "prepare": operator.name,
            "size": vars(size),
            "shapes": operator.shapes(size, B, T),
            "dtype": dtype,
            "train": train,
            "without": sorted(without),
        }
        return self.ask(request) or {}


def jax_peers(operator: Operator) -> dict:
    """Implementations of other libraries in jax: {name: arrays -> result}."""
    if jax.default_backend() != "gpu" or not operator.name.startswith(("attention", "second_order_tiles")):
        return {}

    def cudnn(a):  # for operators with decay or squared scores: the flash attention that they would replace
        return jax.nn.dot_product_attention(a["q"], a["k"], a["v"], is_causal=True, implementation="cudnn")

    def tokamax_attention(a):
        import tokamax

        return tokamax.dot_product_attention(a["q"], a["k"], a["v"], is_causal=True)

    if operator.name == "attention":
        return {"cudnn attention": cudnn, "tokamax attention": tokamax_attention}
    return {"cudnn attention": cudnn}


def forms_here(operator: Operator, size, dtype: str, wanted: tuple[str, ...]) -> list[str]:
    """The forms of lcx that run here, according to the operator."""
    from lcx.errors import UserError

    arrays, found = operator.structs(size, B=2, T=CHECKED, dtype=dtype), []
    for form in wanted:
        try:
            jax.eval_shape(operator.forward(form), arrays)
        except UserError:
            continue
        found.append(form)
    return found


def checks(operator: Operator, size, dtype: str, forms: list[str], torch: Torch) -> dict[str, float | str]:
    """{form: largest error of the result over the largest value}, against the definition in float32."""
    arrays = operator.arrays(size, B=2, T=CHECKED, dtype=dtype, seed=1)
    wide = {k: v.astype("float32") if v.dtype == jnp.bfloat16 else v for k, v in arrays.items()}
    with jax.default_matmul_precision("highest"):
        expected = np.asarray(jax.jit(operator.forward("reference"))(wide), "float32")
    results: dict = {form: np.asarray(jax.jit(operator.forward(form))(arrays), "float32") for form in forms}
    results |= torch.check(operator.name, arrays)
    scale = np.abs(expected).max()
    return {
        k: float(np.abs(y - expected).max() / scale) if isinstance(y, np.ndarray) else y
        for k, y in results.items()
    }


def point(
    operator: Operator,
    size,
    forms: dict,
    torch: Torch,
    run: harness.Run,
    *,
    late: set,
    B: int,
    T: int,
    dtype: str,
    train: bool,
    args,
):
    """The rows of one T. forms is {name: arrays -> result}, late the names of forms to skip."""
    arrays = operator.arrays(size, B=B, T=T, dtype=dtype)
    dy = jnp.ones_like(operator.result(arrays))
    runs, temp = {}, {}
    for name, fn in forms.items():
        if name in late or (name == "naive" and args.naive_max_t < T):
            continue

        def both(arrays, dy, fn=fn):
            trained = operator.trained(arrays)
            y, pull = jax.vjp(lambda t: fn({**arrays, **t}), trained)
            return y, pull(dy.astype(y.dtype))

        inputs = (arrays, dy) if train else (arrays,)
        try:
            compiled = jax.jit(both if train else fn).lower(*inputs).compile()
            temp[name] = compiled.memory_analysis().temp_size_in_bytes
            if temp[name] > args.memory_gib * 2**30:
                print(f"  {name}: would take {temp[name] / 2**30:.1f} GiB, left out", flush=True)
                continue
            jax.block_until_ready(compiled(*inputs))
        except Exception as error:  # out of memory, or a shape that a peer refuses
            print(f"  {name}: {type(error).__name__}: {str(error)[:150]}", flush=True)
            continue
        runs[name] = harness.on_device(compiled, *inputs)
    first = torch.prepare(operator, size, B=B, T=T, dtype=dtype, train=train, without=late)
    runs |= {name: torch.side({"run": name}) for name, s in first.items() if s <= args.slow}
    times = run.turns(runs, rounds=args.rounds, seconds=args.seconds, slow=args.slow).medians()
    times |= {name: seconds for name, seconds in first.items() if seconds > args.slow}
    flops, moved = operator.work(size, B=B, T=T, dtype=dtype, train=train)
    floor = max(
        flops / args.ceilings["product_flops_per_second"], moved / args.ceilings["copy_bytes_per_second"]
    )
    for name, seconds in times.items():
        yield {
            "operator": operator.name,
            "pass": "forward+backward" if train else "forward",
            "T": T,
            "B": B,
            "form": name,
            "ms": round(seconds * 1e3, 4),
            "temp_mib": round(temp[name] / 2**20, 2) if name in temp else None,
            "gb_per_s": round(moved / seconds / 1e9, 2),
            "gflop_per_s": round(flops / seconds / 1e9, 2),
            "share_of_floor": round(floor / seconds, 4),
            "over_xla": round(times["xla"] / seconds, 3) if "xla" in times else None,
            "over_naive": round(times["naive"] / seconds, 3) if "naive" in times else None,
        }


def sweep(operator: Operator, torch: Torch, args) -> dict:
    size = operator.small if ON_CPU else operator.size
    dtype = "float32" if ON_CPU else "bfloat16"
    forms = forms_here(operator, size, dtype, args.forms)
    errors = checks(operator, size, dtype, forms, torch)
    print(f"{operator.name} ({operator.note}): errors {errors}", flush=True)
    wrong = [form for form in forms if not errors[form] <= TOLERANCE[dtype]]
    functions = {form: operator.forward(form) for form in forms if form not in wrong}
    functions |= {"naive": operator.forward("reference")} | jax_peers(operator)
    threads = {"lcx": harness.jax_threads(), "torch": torch.threads}
    run = harness.Run(operator.note, threads=threads)
    rows: list[dict] = []
    late: set[str] = set()
    for train in (False, True):
        for T in args.lengths:
            B = max(1, (args.tokens or (max(args.lengths) if ON_CPU else operator.tokens)) // T)
            shape = {"B": B, "T": T, "dtype": dtype, "train": train}
            for row in point(operator, size, functions, torch, run, late=late, args=args, **shape):
                print(line(row), flush=True)
                rows.append(row)
            late |= {row["form"] for row in rows if row["ms"] > 1e3 * args.slow} - set(forms)
    return run.record() | {
        "size": vars(size),
        "dtype": dtype,
        "errors": errors,
        "wrong": wrong,
        "growth": exponents(rows),
        "rows": rows,
    }


def measured_before(path: str) -> dict:
    """The operators in that file whose records say what else ran."""
    if not os.path.exists(path):
        return {}
    with open(path) as file:
        found = json.load(file)["operators"]
    return {name: result for name, result in found.items() if name in OPERATORS and "quiet" in result}


def line(row: dict) -> str:
    memory = "" if row["temp_mib"] is None else f"{row['temp_mib']:9.1f} MiB"
    return (
        f"  {row['pass']:16} T={row['T']:<8} B={row['B']:<4} {row['form']:20} {row['ms']:10.3f} ms {memory:13} "
        f"{row['gb_per_s']:8.1f} GB/s {row['gflop_per_s']:10.1f} GFLOP/s "
        f"{100 * row['share_of_floor']:5.1f}% of the floor"
    )


def exponents(rows: list[dict]) -> dict[str, dict[str, float | None]]:
    """{pass: {form: p}} where time ~ T^p over the sweep."""
    per_token: dict = {}
    for row in rows:
        per_token.setdefault(row["pass"], {}).setdefault(row["form"], {})[row["T"]] = (
            row["ms"] / row["B"] / row["T"]
        )
    return {
        which: {
            form: p and round(p, 3)
            for form, times in forms.items()
            if (p := harness.growth(times)) is not None
        }
        for which, forms in per_token.items()
    }


def plot(results: dict, path: str, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 4
    fig, axes = plt.subplots(
        -(-len(results) // columns), columns, figsize=(16, 3.4 * -(-len(results) // columns))
    )
    axes = np.atleast_1d(axes).ravel()
    for ax in axes[len(results) :]:
        ax.axis("off")
    for ax, (name, result) in zip(axes, results.items(), strict=False):
        rows = [row for row in result["rows"] if row["pass"] == "forward+backward"]
        for form in dict.fromkeys(row["form"] for row in rows):
            mine = [row for row in rows if row["form"] == form]
            per_token = [row["ms"] * 1e6 / row["B"] / row["T"] for row in mine]
            ax.loglog([row["T"] for row in mine], per_token, marker="o", ms=3, label=form, base=2)
        ax.set_yscale("log")
        ax.set_title(name, fontsize=10)
        ax.legend(fontsize=7)
    fig.supxlabel("tokens in a row")
    fig.supylabel("ns per token, forward + backward")
    fig.suptitle(title)
    fig.tight_layout()
    fig.savefig(path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--operators", default=",".join(OPERATORS))
    parser.add_argument("--lengths", help="default: powers of two (of four on a CPU) up to --max_t")
    parser.add_argument("--max_t", type=int, default=2**13 if ON_CPU else 2**20)
    parser.add_argument("--naive_max_t", type=int, default=2048 if ON_CPU else 16384)
    parser.add_argument(
        "--tokens",
        type=int,
        help="B = tokens / T; default: the number in operators.py, on a CPU the longest T",
    )
    parser.add_argument(
        "--slow", type=float, default=0.5, help="skip a form at longer T once a call takes this many seconds"
    )
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--rounds", type=int, default=3 if ON_CPU else 7)
    parser.add_argument("--seconds", type=float, default=0.02, help="length of one turn of a form")
    parser.add_argument("--memory_gib", type=float, default=2 if ON_CPU else 60)
    parser.add_argument("--output", help="benchmarks/results/<device>.json; - for none")
    parser.add_argument("--plot", help="default: next to the output; - for none")
    args = parser.parse_args()
    args.forms = tuple(args.forms.split(","))
    args.lengths = (
        [int(T) for T in args.lengths.split(",")]
        if args.lengths
        else [2**n for n in (range(9, 14, 2) if ON_CPU else range(10, 21)) if 2**n <= args.max_t]
    )
    args.output = args.output or os.path.join(HERE, "results", f"{harness.device_name()}.json")
    args.plot = args.plot or (args.output.replace(".json", ".svg") if args.output != "-" else "-")
    return args


def main() -> int:
    args = parse()
    run = harness.Run(
        "operators: milliseconds against T; forms in turns, medians", threads={"lcx": harness.jax_threads()}
    )
    args.ceilings = harness.ceilings(run)
    print(json.dumps(harness.machine() | args.ceilings), flush=True)
    torch, results = Torch(), {}
    for name in args.operators.split(","):
        results[name] = sweep(OPERATORS[name], torch, args)
    torch.close()
    results = measured_before(args.output) | results
    run.write(args.output, ceilings=args.ceilings, operators=results)
    if args.plot != "-":
        plot(results, args.plot, f"{harness.machine()['device']}, {jax.__version__}")
    wrong = {name: result["wrong"] for name, result in results.items() if result["wrong"]}
    if wrong:
        print(f"wrong results, not measured: {wrong}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
