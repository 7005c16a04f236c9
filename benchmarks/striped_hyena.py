"""The three hyena mixers of StripedHyena 2 against vortex's formulation of them, for rows of 1K to 128K tokens.

    JAX_NUM_CPU_DEVICES=1 python benchmarks/striped_hyena.py [--lengths 1024,4096] [--output FILE.json]

A stripe is SE, MR and LI, one after the other, each added to its input. `published` is the same function as vortex and
savanna compute it, with jnp.fft: the featurizer and SE tap by tap, MR and LI by Fourier transforms of 2 T points, gates
on their own. Both have the same weights; the run first checks that outputs and gradients agree. Then both
are timed in turns (medians), compiled, with batch 1, in seconds of CPU time over all threads, which other work on the
machine affects little. Memory is that of the temporary arrays of the compiled programs.
"""

import argparse
import json
import math
import os
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)

import harness  # noqa: E402

# isort: split
import flax.linen as nn  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from lcx.mixers.hyena import HyenaLI, HyenaMR, HyenaSE  # noqa: E402

CHECKED, TOLERANCE = 1000, 1e-4


def mixers(width: int) -> dict:
    groups = width // 16  # channels that share a filter, as in Evo 2 7B
    return {
        "SE": HyenaSE(num_channels=width, num_groups=groups),
        "MR": HyenaMR(num_channels=width, num_groups=groups),
        "LI": HyenaLI(num_channels=width),
    }


def weights(width: int):
    """Initial parameters plus noise, so that the filters of MR and the skips contribute."""
    rng = np.random.default_rng(0)
    x = jnp.zeros((1, 4, width))
    params = {
        name: nn.meta.unbox(jax.jit(mixer.init)(jax.random.key(i), x)["params"])
        for i, (name, mixer) in enumerate(mixers(width).items())
    }
    return jax.tree.map(lambda w: w + 0.05 * rng.standard_normal(w.shape).astype(np.float32), params)


def ours(params, x):
    for name, mixer in mixers(x.shape[2]).items():
        x = x + mixer.apply({"params": params[name]}, x)[0]
    return x


# ------------------------------------------------------------------------------- as in vortex and savanna


def published(params, x):
    for name in ("SE", "MR", "LI"):
        x = x + published_mixer(name, params[name], x)
    return x


def published_mixer(name, p, x):
    T, C = x.shape[1], x.shape[2]
    z = jnp.einsum("btd,dr->brt", x, p["in_proj"]["kernel"].reshape(C, 3 * C))
    z = taps_one_by_one(z, p["featurizer"].reshape(3 * C, -1))
    x1, x2, v = z[:, 0::3], z[:, 1::3], z[:, 2::3]
    g = x2 * v
    if name == "SE":
        y = taps_one_by_one(g, jnp.repeat(p["h"], C // p["h"].shape[0], axis=0))
    else:
        y = by_fourier(g, filters(name, p, T, C)) + p["skip"][:, None] * g
    return jnp.einsum("bct,cd->btd", x1 * y, p["out_proj"]["kernel"]) + p["out_proj"]["bias"]


def filters(name, p, T, C):
    if name == "MR":
        h = (p["h"] * p["decay"])[:, :T]
        return jnp.repeat(jnp.pad(h, ((0, 0), (0, T - h.shape[1]))), C // h.shape[0], axis=0)
    log_pole = -jnp.exp(p["p"] + p["gamma"])
    return jnp.sum(p["R"][:, :, None] * jnp.exp(log_pole[:, :, None] * jnp.arange(T)), axis=1)


def taps_one_by_one(x, w):
    T = x.shape[2]
    return sum(w[:, k, None] * jnp.pad(x, ((0, 0), (0, 0), (k, 0)))[:, :, :T] for k in range(w.shape[1]))


def by_fourier(x, h):
    T = x.shape[2]
    return jnp.fft.irfft(jnp.fft.rfft(x, 2 * T) * jnp.fft.rfft(h, 2 * T), 2 * T)[:, :, :T]


FORMS = {"lcx": ours, "published": published}
PASSES = ("forward", "forward+backward")


def with_gradients(fn):
    def both(params, x, dy):
        y, pull = jax.vjp(fn, params, x)
        return y, pull(dy)

    return both


def check(width: int) -> dict[str, float]:
    """The largest differences of output and gradients, relative to the largest values."""
    params, x = weights(width), jax.random.normal(jax.random.key(9), (2, CHECKED, width))
    dy = jax.random.normal(jax.random.key(10), x.shape)
    (y, grads), (expected, expected_grads) = (
        jax.jit(with_gradients(fn))(params, x, dy) for fn in FORMS.values()
    )
    expected_grads[0]["MR"]["decay"] = jnp.zeros_like(expected_grads[0]["MR"]["decay"])  # a buffer there

    def off(a, b):
        return float(jnp.max(jnp.abs(a - b)) / jnp.maximum(jnp.max(jnp.abs(b)), 1e-30))

    found = {
        "output": off(y, expected),
        "gradients": max(jax.tree.leaves(jax.tree.map(off, grads, expected_grads))),
    }
    if max(found.values()) > TOLERANCE:
        raise SystemExit(f"the two are not the same function: {found}")
    return found


def on_cpu(compiled, *arrays):
    """n -> CPU seconds of n calls."""

    def run(n: int) -> float:
        start = time.process_time()
        for _ in range(n):
            jax.block_until_ready(compiled(*arrays))
        return time.process_time() - start

    return run


def measure(run: harness.Run, width: int, T: int, which: str, args) -> list[dict]:
    params, x = weights(width), jax.random.normal(jax.random.key(0), (1, T, width))
    runs, temp = {}, {}
    for name, fn in FORMS.items():
        arrays = (params, x) if which == "forward" else (params, x, jnp.ones_like(x))
        compiled = jax.jit(fn if which == "forward" else with_gradients(fn)).lower(*arrays).compile()
        temp[name] = compiled.memory_analysis().temp_size_in_bytes
        runs[name] = on_cpu(compiled, *arrays)
    seconds = run.turns(runs, rounds=args.rounds, seconds=args.seconds).medians()
    return [
        {
            "pass": which,
            "T": T,
            "form": name,
            "cpu_ms": round(seconds[name] * 1e3, 3),
            "tokens_per_cpu_second": round(T / seconds[name]),
            "temp_mib": round(temp[name] / 2**20, 2),
            "speed_over_published": round(seconds["published"] / seconds[name], 3),
            "memory_over_published": round(temp[name] / temp["published"], 3),
        }
        for name in FORMS
    ]


def growth(rows: list[dict], key: str) -> dict[str, dict[str, float]]:
    """{pass: {form: p}}, where `key` ~ T^p between the shortest and the longest T."""
    found: dict = {}
    for which in PASSES:
        for form in FORMS:
            mine = {row["T"]: row[key] for row in rows if (row["pass"], row["form"]) == (which, form)}
            a, b = min(mine), max(mine)
            if a < b:
                found.setdefault(which, {})[form] = round(math.log(mine[b] / mine[a]) / math.log(b / a), 3)
    return found


def plot(rows: list[dict], path: str, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(10, 3.8))
    for ax, key, label in zip(
        axes, ("tokens_per_cpu_second", "temp_mib"), ("tokens per CPU second", "temporary MiB"), strict=True
    ):
        for n, form in enumerate(FORMS):
            for which, style in zip(PASSES, ("-", "--"), strict=True):
                mine = [row for row in rows if (row["pass"], row["form"]) == (which, form)]
                xs, ys = [row["T"] for row in mine], [row[key] for row in mine]
                ax.plot(xs, ys, style, color=f"C{n}", marker="o", ms=4, label=f"{form}, {which}")
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xlabel("tokens in a row")
        ax.set_ylabel(label)
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    fig.suptitle(title, fontsize=11)
    fig.tight_layout()
    fig.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", default="1024,4096,16384,65536,131072")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.2, help="length of one turn of a form")
    parser.add_argument("--output", help="benchmarks/results/striped_hyena_<device>.json; - for none")
    args = parser.parse_args()
    output = args.output or os.path.join(HERE, "results", f"striped_hyena_{harness.device_name()}.json")
    what = "a stripe of SE, MR, LI against vortex's formulation with jnp.fft; in turns, medians, batch 1, float32"
    run = harness.Run(what, threads={form: harness.jax_threads() for form in FORMS})
    differences, rows = check(args.width), []
    print(f"the same function: {differences}", flush=True)
    for which in PASSES:
        for T in map(int, args.lengths.split(",")):
            for row in measure(run, args.width, T, which, args):
                rows.append(row)
                print(
                    f"{row['pass']:16} T={row['T']:<7} {row['form']:10} {row['cpu_ms']:10.2f} ms "
                    f"{row['tokens_per_cpu_second']:9,} tokens/s {row['temp_mib']:9.1f} MiB",
                    flush=True,
                )
    grown = {"growth_of_time": growth(rows, "cpu_ms"), "growth_of_memory": growth(rows, "temp_mib")}
    print(json.dumps(grown))
    run.write(output, width=args.width, differences=differences, **grown, rows=rows)
    if output != "-":
        plot(
            rows,
            output.replace(".json", ".svg"),
            f"SE, MR, LI of width {args.width}; {harness.machine()['cpu']}",
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
