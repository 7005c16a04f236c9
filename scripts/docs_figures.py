"""Writes every measured speed of README.md and docs/ from the files in benchmarks/results, so that they cannot differ.

    python scripts/docs_figures.py

A page holds `<!-- figure: NAME -->...<!-- /figure -->`; what is between is written here. A time is quoted only from a
file that says `"quiet": true`: nothing else ran on the machine meanwhile (benchmarks/harness.py). Of any other file the
page says that the figure is still to be measured, and with which command.
"""

import json
import pathlib
import re
import statistics
from collections.abc import Callable, Iterable
from typing import NamedTuple

import figure_two_mamba
from evaluation_figure import evaluation, ruler_samples
from figure_text import number, ratio, table, with_source
from figures_beside_torch import generation, training, training_line, training_range
from pieces_figures import pieces, pieces_llama
from plan_figures import MILLION_TOKENS_OF_ONE, million_tokens, million_tokens_of_one, one_gpu, plans

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARK = re.compile(r"(<!-- figure: (\S+) -->)(.*?)(<!-- /figure -->)", re.DOTALL)


class Figure(NamedTuple):
    """A piece of text made of one file. `timed`: it holds times, which other work on the machine would change."""

    file: str
    write: Callable[[dict], str]
    command: str
    timed: bool = True


def quiet(result: object) -> bool:
    """Whether there is a record of what else ran, and none of the records is of a busy machine."""
    found = list(_records(result))
    return bool(found) and all(found)


def _records(result: object):
    if isinstance(result, dict):
        if "quiet" in result:
            yield result["quiet"] is True
        for key, value in result.items():
            if key != "watch":  # names of processes, whatever they are
                yield from _records(value)
    elif isinstance(result, list):
        for value in result:
            yield from _records(value)


# ------------------------------------------------------------------------------------ the figures


def operators(result: dict) -> str:
    head = ["", "xla, 4 x 2048", "xla, 1 x 8192", "torch, 1 x 8192", "speed over torch", "with gradients"]
    rows = []
    for name, measured in result["operators"].items():
        cells = {}
        for which in ("forward", "forward+backward"):
            found = {(r["T"], r["form"]): r["ms"] for r in measured["rows"] if r["pass"] == which}
            peer = next(
                (ms for (T, form), ms in found.items() if T == 8192 and form.startswith("torch")), None
            )
            ours = found.get((8192, "xla"))
            cells[which] = [found.get((2048, "xla")), ours, peer, peer / ours if peer and ours else None]
        near, ours, peer, over = cells["forward"]
        trained = cells["forward+backward"][3]
        rows.append(
            [
                name,
                *map(number, (near, ours, peer)),
                *("" if x is None else ratio(x) for x in (over, trained)),
            ]
        )
    return with_source(next(iter(result["operators"].values())), table(head, rows))


def start_up(result: dict) -> str:
    parts = [key for key in ("imports", "data", "tracing", "lowering", "compiling") if key in str(result["rows"])]
    rows = [
        [row["command"], row["state"], *(number(row.get(key)) for key in ("first", "end", *parts))]
        for row in result["rows"]
    ]
    return with_source(result, table(["command", "cache", "first, s", "end, s", *parts], rows))


def growth(result: dict) -> str:
    """A column for each decay: milliseconds, and the time at T over that at T / 2 with the interval of its median."""
    found = {(row["decay"], row["T"]): row for row in result["rows"]}
    decays, lengths = (list(dict.fromkeys(column)) for column in zip(*found))

    def cell(row: dict) -> str:
        if "growth" not in row:
            return number(row["ms"])
        times = row["growth"]
        low, high = times["interval"]
        return f"{number(row['ms'])} ({times['median']:.2f}x, {low:.2f} to {high:.2f})"

    rows = [[str(T), *(cell(found[decay, T]) for decay in decays)] for T in lengths]
    first, last = lengths[0], lengths[-1]
    whole = [f"{found[decay, last]['ms'] / found[decay, first]['ms']:.1f}x ({decay})" for decay in decays]
    said = f"From {first} to {last} tokens, {last // first} times the row, the time grows {', '.join(whole)}."
    return with_source(result, f"{table(['T', *decays], rows)}\n\n{said}")


def step_growth(result: dict) -> str:
    """A row for each decay and T: seconds of a step, and their ratios to the row of half the length."""

    def growth(row: dict) -> str:
        if "growth" not in row:
            return ""
        low, high = row["growth"]["interval"]
        return f"{row['growth']['median']:.2f}x ({low:.2f} to {high:.2f})"

    rows = [
        [
            *(row["decay"], str(row["T"]), f"{row['seconds']:.2f}", growth(row)),
            f"{row['user_seconds']:.2f}" + (f" ({row['user_growth']:.2f}x)" if "growth" in row else ""),
            *(f"{row['system_seconds']:.2f}", number(row["temporary_mib"])),
        ]
        for row in result["rows"]
    ]
    head = ["decay", "T", "step, s", "over half the row", "computing, CPU s", "kernel, CPU s", "temporaries, MiB"]
    return with_source(result, table(head, rows))


def families(result: dict) -> str:
    """A row for each model type: milliseconds of both sides, and how much faster lcx is."""
    rows = []
    for row in result["speed"]:
        speed, times = row["speed_over_torch"], [number(row[side]) for side in ("lcx_ms", "torch_ms")]
        spread = f"{speed['min']:.2f} to {speed['max']:.2f}"
        rows.append([f"`{row['model_type']}`", *times, ratio(speed["median"]), spread])
    return with_source(result, table(["model type", "lcx, ms", "transformers, ms", "speed", "from, to"], rows))


def family_memory(result: dict) -> str:
    """A row for each model type that was measured: the peak of both sides."""
    rows = []
    for row in result["memory"]:
        peaks = [str(row[side]) for side in ("lcx_mib", "lcx_full_mib", "torch_mib")]
        ratios = [f"{row[side]:.2f}x" for side in ("lcx_over_torch", "lcx_full_over_torch")]
        older = r" \*" if row.get("compiler_kept") else ""
        rows.append([f"`{row['model_type']}`{older}", *peaks, *ratios])
    head = ["model type", "lcx, MiB", "lcx, remat full", "transformers, MiB", "ratio", "ratio, remat full"]
    return table(head, rows)


def family_decoding(result: dict) -> str:
    """A row for each side: the cache, and what the process needed beside what it held before."""
    names = {
        "lcx": "lcx",
        "torch": "transformers, the cache of `generate`",
        "torch_whole_text": "transformers, a cache that does not know the windows",
    }
    rows = [[names[row["side"]], f"{row['cache_mib']:.1f}", str(row["peak_mib"])] for row in result["decoding"]]
    return table(["", "cache, MiB", "peak, MiB"], rows)


def decoders(result: dict) -> str:
    names = {
        "llama": "Llama",
        "linearized": "linearized",
        "striped_hyena": "StripedHyena 2",
        "two_mamba": "2Mamba",
    }
    speeds = {(row["T"], row["model"]): row["tokens_per_second"] for row in result["rows"]}
    lengths = sorted({T for T, _ in speeds})
    rows = [[str(T), *(number(speeds.get((T, model))) for model in names)] for T in lengths]
    watches = list({row["T"]: row["watch"] for row in result["rows"]}.values())  # one record for each length
    watch = {key: round(sum(x[key] for x in watches), 1) for key in ("seconds", "other_cpu_seconds")}
    return with_source(result | {"watch": watch}, table(["T", *names.values()], rows))


def step_memory(result: dict) -> str:
    names = {
        "llama": "Llama",
        "linearized": "linearized",
        "two_mamba": "2Mamba",
        "striped_hyena": "StripedHyena 2",
    }
    sizes = {(row["model"], row["T"]): row["temp_gib"] for row in result["rows"] if "temp_gib" in row}
    lengths = sorted({T for _, T in sizes})
    rows = [[title, *(f"{sizes[name, T]:.3g}" for T in lengths)] for name, title in names.items()]
    return table(["", *(f"{T // 1024}K" for T in lengths)], rows)


def plan_errors(result: dict) -> str:
    head = ["configuration", "devices", "planned, MiB", "measured, MiB", "error"]
    rows = [
        [row["name"], str(row["devices"]), *(f"{row[key]:,.0f}" for key in ("planned_mib", "measured_mib")),
         f"{row['error']:+.1%}"] for row in result["rows"]
    ]  # fmt: skip
    errors = [row["error"] for row in result["rows"]]
    said = f"From {min(errors):+.1%} to {max(errors):+.1%} (`python benchmarks/plan_errors.py`)."
    return f"{table(head, rows)}\n\n{said}"


def plan_times(result: dict) -> str:
    head = ["configuration", "devices", "planned, ms", "measured, ms", "error"]
    rows = [
        [row["name"], str(row["devices"]), *(number(1e3 * row[key]) for key in ("planned_s", "measured_s")),
         f"{row['error']:+.0%}"] for row in result["rows"]
    ]  # fmt: skip
    errors = [row["error"] for row in result["rows"]]
    said = f"From {min(errors):+.0%} to {max(errors):+.0%}, the median {statistics.median(errors):+.0%}."
    return with_source(result, f"{table(head, rows)}\n\n{said}")


def evo2_plan(result: dict) -> str:
    head = ["one sequence of", "device", "weights", "keys and values", "piece by piece", "layer by layer"]
    rows = []
    for row in result["rows"]:
        layers = max(row["layers_bytes"].values())
        sizes = (row[f"{name}_bytes"] for name in ("weights", "state", "pieces"))
        rows.append([
            f"{row['letters']:,}", row["topology"], *(f"{size / 2**30:.1f} GiB" for size in (*sizes, layers))
        ])  # fmt: skip
    largest = max(result["rows"][0]["layers_bytes"].items(), key=lambda one: one[1])[0].partition(",")[0]
    said = f"The largest of the programs is that of {largest}. Made by `python benchmarks/evo2_plan.py`."
    return f"{table(head, rows)}\n\n{said}"


def long_genomes(result: dict) -> str:
    jobs = {"positions": "score --per_position", "every": "embed --pool=none"}
    head, found = ["command", "model", "letters", "peak memory of the process"], result["rows"]
    rows = [[jobs.get(r["job"], r["job"]), r["model"], f"{r['letters']:,}", f"{r['peak_mib']} MiB"] for r in found]
    if "difference" in found[0]:
        head = [*head, "largest difference from the formulas"]
        rows = [[*cells, f"{row['difference']:.0e}"] for cells, row in zip(rows, found, strict=True)]
    return table(head, rows)


def evo2_tutorial(result: dict) -> str:
    loss, rows = result["held_out_loss"], result["rows"]
    rows = [*rows, {"section": "", "command": "all", "seconds": sum(row["seconds"] for row in rows)}]
    times = [[str(row["section"]), row["command"], f"{row['seconds']:.0f}"] for row in rows]
    losses = [[name, f"{loss[name]:.4f}"] for name in ("before", "after")]
    learned = table(["fine-tuning", "nats per letter"], losses)
    return f"{learned}\n\n{table(['section', 'command', 'seconds'], times)}"


def stripe(result: dict) -> str:
    head = ["tokens", "per CPU second", "vortex's", "speed", "temporary MiB", "vortex's"]
    found = {(row["T"], row["form"]): row for row in result["rows"] if row["pass"] == "forward+backward"}
    rows = []
    for T in sorted({T for T, _ in found}):
        ours, theirs = found[T, "lcx"], found[T, "published"]
        speeds = [number(row["tokens_per_cpu_second"]) for row in (ours, theirs)]
        memory = [number(row["temp_mib"]) for row in (ours, theirs)]
        rows.append([str(T), *speeds, ratio(ours["speed_over_published"]), *memory])
    grown = {form: result["growth_of_time"]["forward+backward"][form] for form in ("lcx", "published")}
    text = table(head, rows)
    text += f"\n\nTime grows as T^{grown['lcx']:.2f} (vortex's formulation: T^{grown['published']:.2f}), memory as T."
    return with_source(result, text)


def decoding(result: dict) -> str:
    sides = [
        side
        for side in ("linear", "softmax", "transformers")
        if side in result["decoding"][0]["tokens_per_second"]
    ]
    head = ["context", *(f"{side}, tokens/s" for side in sides), "state of linear", "cache of softmax"]
    rows = [
        [
            str(row["length"]),
            *(number(row["tokens_per_second"][side]) for side in sides),
            *(f"{row['cache_bytes'][side] / 1e6:.1f} MB" for side in ("linear", "softmax")),
        ]
        for row in result["decoding"]
    ]
    ahead = result["linear_is_faster_from"]
    said = (
        f"The linear model is ahead of both from {ahead} tokens on."
        if ahead
        else "The linear model is slower throughout."
    )
    behind = [str(row["length"]) for row in result["decoding"] if _behind(row["tokens_per_second"])]
    if behind:
        said += f" With softmax, lcx is slower than transformers at {', '.join(behind)} tokens."
    return with_source(result, f"{table(head, rows)}\n\n{said}")


def _behind(speeds: dict[str, float]) -> bool:
    return speeds["softmax"] < speeds.get("transformers", 0.0)


def decoding_line(result: dict) -> str:
    row = result["decoding"][-1]
    speeds = ", ".join(f"{side} {number(x)}" for side, x in row["tokens_per_second"].items())
    sizes = " and ".join(f"{row['cache_bytes'][side] / 1e6:.1f} MB ({side})" for side in ("linear", "softmax"))
    return f"tokens/s after {row['length']} tokens: {speeds}; {sizes} kept"


def recall_by_length(result: dict) -> str:
    return _recalled(result, "by_length", lambda cell: f"{cell['length']}")


def recall_by_distance(result: dict) -> str:
    return _recalled(result, "by_distance", lambda cell: f"{cell['from']}-{cell['to']}")


def _recalled(result: dict, which: str, head: Callable[[dict], str]) -> str:
    """Percent of values recalled, a row for each variant: the mean over seeds, and the lowest and highest of them."""
    rows, heads = [], list[str]()
    for name, first in result["seeds"][0]["variants"].items():
        heads = [head(cell) for cell in first[which]]
        seeds = [seed["variants"][name][which] for seed in result["seeds"] if name in seed["variants"]]
        each = [[100 * cell["score"] for cell in seed] for seed in seeds]
        rows.append([name, *map(_spread, zip(*each, strict=True))])
    return table(["", *heads], rows)


def _spread(values: Iterable[float]) -> str:
    """The mean, and the lowest and highest where they differ."""
    found = list(values)
    low, high = f"{min(found):.0f}", f"{max(found):.0f}"
    return f"{sum(found) / len(found):.0f}" + (f" ({low} to {high})" if low != high else "")


TRAINING = "train_vs_transformers_cpu.json", "JAX_NUM_CPU_DEVICES=2 python benchmarks/train_vs_transformers.py"
TRAINING_AMX = (
    "train_vs_transformers_amx_cpu.json",
    f"{TRAINING[1]} --no-memory --rounds 3 --cases quickstart:256,wide:2048,base:256,base:2048,base:8192 "
    "--output benchmarks/results/train_vs_transformers_amx_cpu.json",
)
RECALL = "recall_cpu.json", "bash scripts/train_recall.sh"
DECODING = "linearized_decoding_cpu.json", "python benchmarks/linearized.py --softmax HF_FOLDER"
LONG_GENOMES = "python benchmarks/long_genomes.py --fasta=genome.fna.gz"
STEP_GROWTH_NO_DECAY = (
    "python benchmarks/step_growth.py --malloc kept --decays none --slow_until 65536 --layers 2 --rounds 6 "
    "--output FILE.json"
)
STEP_GROWTH = "python benchmarks/step_growth.py --malloc kept --decays softplus --rounds 6 --output FILE.json"


def soak(result: dict) -> str:
    """Counts alone: the runs were made beside other work, which changes every time."""
    kinds = ("kill", "halt", "term", "flip", "disk", "bucket", "lost")
    rows = []

    def of(row: dict) -> tuple[int, bool, bool]:
        return row["processes"], row.get("bucket", False), not row["every"]

    for count, bucket, calls in sorted(set(map(of, result["rows"]))):
        same = [row for row in result["rows"] if of(row) == (count, bucket, calls)]
        outcomes = [one for row in same for one in row["outcomes"]]
        faults = [one for one in outcomes if one["kind"] in kinds]
        good = sum(not one["wrong"] for one in faults)
        late = max((one["seconds"] for one in faults if one["seconds"] is not None), default=0)
        cells = [sum(one["kind"] == kind for one in faults) for kind in kinds]
        equal = f"{sum(row['equal'] for row in same)} of {len(same)}"
        within = "yes" if late <= 60 else "no"
        drawn = "call" if calls else "time"
        place = "a bucket" if bucket else "this machine"
        rows.append([str(x) for x in (count, place, drawn, len(faults), *cells, good, within, equal)])
    head = ["processes", "workdir", "drawn by", "faults", *kinds, "as expected", "all ended within a minute"]
    return table([*head, "runs equal to the bit"], rows)


def resharding(result: dict) -> str:
    plain, *rows = result["rows"]
    parts = [f"{row['over_plain_read']['median']:.2f} times as long on {row['mesh']}" for row in rows]
    told = f"A checkpoint of 2 GB written on {plain['mesh']} takes {number(plain['seconds'])} s to restore on that mesh"
    return with_source(result, f"{told}, and {' and '.join(parts)} (medians of turns).")


def reshard_parts(result: dict) -> str:
    pair = result["two_processes"]
    own, read, held = (max(one[key] for one in pair) for key in ("own_gb", "read_gb", "peak_over_arrays"))
    return (
        f"Two processes that restore it, each with {own:.2f} GB of its arrays, read {read:.2f} GB each, and hold at "
        f"most {held:.1f} times their part meanwhile (`python benchmarks/reshard.py`)."
    )


FIGURES = {
    "soak": Figure("soak.json", soak, "bash scripts/soak.sh", timed=False),
    "reshard": Figure("reshard_cpu.json", resharding, "python benchmarks/reshard.py"),
    "reshard_parts": Figure("reshard_cpu.json", reshard_parts, "python benchmarks/reshard.py", timed=False),
    "operators": Figure("cpu.json", operators, "python benchmarks/kernels.py"),
    "training": Figure(TRAINING[0], training, TRAINING[1]),
    "training_amx": Figure(TRAINING_AMX[0], training, TRAINING_AMX[1]),
    "training_range": Figure(TRAINING_AMX[0], training_range, TRAINING_AMX[1]),
    "training_line": Figure(TRAINING[0], training_line, TRAINING[1]),
    "generation": Figure("decoding_cpu.json", generation, "python benchmarks/decoding.py"),
    "start_up": Figure("start_up_cpu.json", start_up, "python benchmarks/start_up.py"),
    "growth": Figure("second_order_growth_cpu.json", growth, "python benchmarks/second_order_growth.py"),
    "pieces": Figure("pieces_cpu.json", pieces, "python benchmarks/pieces.py"),
    "pieces_llama": Figure("pieces_llama_cpu.json", pieces_llama, "python benchmarks/pieces.py", timed=False),
    "step_growth": Figure("step_growth_kept_cpu.json", step_growth, STEP_GROWTH),
    "step_growth_no_decay": Figure("step_growth_no_decay_cpu.json", step_growth, STEP_GROWTH_NO_DECAY),
    "step_growth_given_back": Figure("step_growth_cpu.json", step_growth, "python benchmarks/step_growth.py"),
    "families": Figure("families_cpu.json", families, "python benchmarks/families.py"),
    "families_memory": Figure(
        "families_memory_cpu.json", family_memory, "python benchmarks/families.py --memory", timed=False
    ),
    "family_decoding": Figure(
        "families_decoding_cpu.json", family_decoding, "python benchmarks/families.py --decoding", timed=False
    ),
    "decoders": Figure("train_step_cpu.json", decoders, "python benchmarks/train_step.py"),
    "step_memory": Figure(
        "train_step_memory_h200.json", step_memory, "python benchmarks/train_step_memory.py", timed=False
    ),
    "plans": Figure("plans.json", plans, "python benchmarks/plan_table.py", timed=False),
    "one_gpu": Figure("plans.json", one_gpu, "python benchmarks/plan_table.py", timed=False),
    "million_tokens": Figure("million_tokens.json", million_tokens, "python benchmarks/million_tokens.py", timed=False),
    "million_tokens_of_one": Figure("million_tokens.json", million_tokens_of_one, MILLION_TOKENS_OF_ONE, timed=False),
    "evo2_plan": Figure("evo2_plan.json", evo2_plan, "python benchmarks/evo2_plan.py", timed=False),
    "long_genomes": Figure("long_genomes_cpu.json", long_genomes, LONG_GENOMES, timed=False),
    "long_attention": Figure("long_genomes_attention_cpu.json", long_genomes, LONG_GENOMES, timed=False),
    "evo2_tutorial": Figure("evo2_tutorial_cpu.json", evo2_tutorial, "python benchmarks/evo2_tutorial.py"),
    "plan_times": Figure("plan_times.json", plan_times, "python benchmarks/plan_times.py"),
    "plan_errors": Figure("plan_errors.json", plan_errors, "python benchmarks/plan_errors.py", timed=False),
    "recall_by_length": Figure(RECALL[0], recall_by_length, RECALL[1], timed=False),
    "recall_by_distance": Figure(RECALL[0], recall_by_distance, RECALL[1], timed=False),
    "stripe": Figure("striped_hyena_cpu.json", stripe, "python benchmarks/striped_hyena.py --width 32"),
    "second_order_forms": Figure(
        "second_order_forms_cpu.json", figure_two_mamba.second_order_forms, "python benchmarks/second_order_forms.py"
    ),
    "evaluation": Figure("evaluation_cpu.json", evaluation, "python benchmarks/evaluation.py"),
    "ruler_samples": Figure("ruler_samples_cpu.json", ruler_samples, "python benchmarks/ruler_samples.py"),
    "two_mamba_decoding": Figure(
        "two_mamba_decode_cpu.json", figure_two_mamba.decoding, "python benchmarks/two_mamba_decode.py"
    ),
    "two_mamba_ablations": Figure(
        "two_mamba_ablations.json",
        figure_two_mamba.ablations,
        "bash scripts/reproduce_two_mamba.sh --ablations",
        timed=False,
    ),
    "decoding": Figure(DECODING[0], decoding, DECODING[1]),
    "decoding_line": Figure(DECODING[0], decoding_line, DECODING[1]),
}


def text(name: str, results: pathlib.Path = RESULTS) -> str:
    figure = FIGURES[name]
    path = results / figure.file
    result = json.loads(path.read_text()) if path.exists() else None
    if result is None or (figure.timed and not quiet(result)):
        return f"not measured on a quiet machine yet (`{figure.command}`)"
    return figure.write(result)


def page(before: str, results: pathlib.Path = RESULTS) -> str:
    """The page with what its marks hold written anew; a mark on a line of its own holds a paragraph or a table."""

    def anew(match: re.Match) -> str:
        start, name, old, end = match.groups()
        space = "\n\n" if old.startswith("\n") or not old else ""
        return f"{start}{space}{text(name, results)}{space}{end}"

    return MARK.sub(anew, before)


def pages() -> list[pathlib.Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


if __name__ == "__main__":
    for path in pages():
        path.write_text(page(path.read_text()))
