"""Time and peak memory of likelihoods, embeddings and generation over long stretches of a genome, by the commands.

    python benchmarks/long_genomes.py --fasta=genome.fna.gz [--cases score:convolutions:1000000,...]
                                      [--output FILE.json]

Each case is a process of its own, and its peak is VmHWM of that process, interpreter and libraries included. The models
are StripedHyena 2 with random weights: three Hyena layers (SE, MR, LI) of width 64, the same with a layer of attention,
and all four layers with a single head of width 16. Attention costs 2 T^2 D multiply-adds on T letters at width D, and a
weight per head and pair of letters: one head is what makes a million letters a matter of minutes on 2 cores.

Two jobs are checked against the formulas in float64 (`whole_row.py`) at CHECKED positions, and need the model with one
head: `positions` (log p of every letter, lcx.score --per_position) and `every` (the embedding of every letter, in
pieces of ODD_PIECE letters). `difference` is the largest, `without_distant` how much larger it were if attention saw no
key of the first half.
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

CHILD = """
import importlib, re, sys
status = importlib.import_module(sys.argv[1]).main(sys.argv[2:])
print("peak", int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024)
sys.exit(status)
"""
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "se_groups": 8, "mr_groups": 8}
NARROW = {"hidden_size": 16, "intermediate_size": 32, "num_heads": 1, "se_groups": 4, "mr_groups": 4}
MODELS = {
    "convolutions": {"pattern": "SDH", **WIDE},
    "hybrid": {"pattern": "SDH*", **WIDE},
    "one_head": {"pattern": "SDH*", **NARROW},
}
CASES = (
    *("score:convolutions:65536", "score:convolutions:1000000", "score:hybrid:65536"),
    *("embed:convolutions:65536", "embed:convolutions:1000000"),
    *("generate:convolutions:16384", "generate:convolutions:101024"),
)
PROMPT = 1024  # letters before what is generated
CHECKED = 512  # positions
ODD_PIECE = 10_000  # letters, for the check that pieces do not matter: no power of two
# The usual initialisation leaves filters and attention so weak that a check would not notice them.
LARGER = {"block_1/mixer/h": 1e6, "mixer/R": 4, "q_proj/kernel": 3}


def weights(name: str, length: int) -> tuple[Any, dict[str, Any]]:
    """(a model for so many letters, its parameters by their paths)."""
    import jax
    from flax.traverse_util import flatten_dict

    from lcx.model import init_params
    from lcx.striped_hyena import striped_hyena

    model = striped_hyena(vocab_size=512, max_position_embeddings=length, **MODELS[name])
    flat = flatten_dict(init_params(model, jax.random.key(0)), sep="/")
    factors = {path: next((by for end, by in LARGER.items() if path.endswith(end)), 1) for path in flat}
    return model, {path: x * factors[path] for path, x in flat.items()}


def save_model(folder: str, name: str, length: int) -> None:
    from flax.traverse_util import unflatten_dict

    import lcx

    model, flat = weights(name, length)
    lcx.save(folder, model, unflatten_dict(flat, sep="/"), format="vortex")


def letters(path: str, count: int) -> str:
    """The first `count` letters of the first record of a FASTA file."""
    from lcx.evals.support import dna

    _, text = next(iter(dna.records(path, owner="--fasta")))
    if len(text) < count:
        sys.exit(f"{path}: the first record has {len(text)} letters, expected at least {count}: change --cases")
    return text[0:count].upper()


def command(job: str, folder: pathlib.Path, length: int, text: str) -> list[str]:
    """A module of lcx and its arguments."""
    files = f"--checkpoint={folder}/model", f"--fasta={folder}/row.fa"
    whole = f"--output={folder}/out.tsv", f"--window={length}"
    match job:
        case "generate":
            options = f"--prompt={text[:PROMPT]}", f"--max_new_tokens={length - PROMPT}", "--temperature=1", "--seed=0"
            return ["lcx.generate", files[0], *options, "--allowed=ACGT", f"--output={folder}/out.fa"]
        case "score":
            return ["lcx.score", *files, *whole]
        case "positions":
            return ["lcx.score", *files, *whole, f"--per_position={folder}/out.parquet"]
        case "embed":
            return ["lcx.embed", *files, "--layers=-1", f"--output={folder}/out.npz"]
        case "every":
            options = "--layers=-1", "--pool=none", f"--piece_length={ODD_PIECE}"
            return ["lcx.embed", *files, *options, f"--output={folder}/out.npz"]
    sys.exit(f"--cases has {job}, expected score, positions, embed, every or generate")


def case(job: str, name: str, length: int, fasta: str) -> dict[str, object]:
    """One case in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="lcx-long-genomes-") as made:
        folder, text = pathlib.Path(made), letters(fasta, length)
        (folder / "row.fa").write_text(f">row\n{text}\n")
        save_model(f"{folder}/model", name, length)
        start, cpu = time.monotonic(), children_seconds()
        argv = [sys.executable, "-c", CHILD, *command(job, folder, length, text)]
        result = subprocess.run(argv, capture_output=True, text=True, env=os.environ)
        seconds, cpu = time.monotonic() - start, children_seconds() - cpu
        if result.returncode:
            sys.exit(result.stdout[-2000:] + result.stderr[-2000:])
        peak = int(result.stdout.split()[-1])
        times = {"seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1)}
        row = {"job": job, "model": name, "letters": length, **times, "peak_mib": peak // 2**20}
        if job == "generate" and (made := generated(folder)) != length:
            sys.exit(f"generate wrote {made} letters, expected {length}")
        return row | (checked(job, name, text, folder) if job in ("positions", "every") else {})


def generated(folder: pathlib.Path) -> int:
    return sum(len(line) for line in (folder / "out.fa").read_text().split("\n") if not line.startswith(">"))


def checked(job: str, name: str, text: str, folder: pathlib.Path) -> dict[str, float]:
    """The largest difference between an output and `whole_row.py`."""
    import numpy as np
    import whole_row

    T, pattern = len(text), str(MODELS[name]["pattern"])
    at = np.unique(np.r_[0:4, T - 5 : T - 1, np.random.default_rng(0).integers(0, T - 1, CHECKED - 8)])
    tokens = np.frombuffer(text.encode(), np.uint8).astype(int)
    if job == "every":
        with np.load(folder / "out.npz") as file:
            found = file["-1"][at]
    else:
        import pyarrow.parquet as pq

        found = pq.read_table(folder / "out.parquet", columns=["log_probability"])[0].to_numpy()[at]
    flat, differences = weights(name, T)[1], []
    for keys_from in (0, T // 2):
        stream, log_p = whole_row.at_positions(flat, pattern, tokens, at, keys_from=keys_from)
        right = stream if job == "every" else log_p[np.arange(len(at)), tokens[at + 1]]
        differences.append(float(np.abs(found - right).max()))
    return {"difference": differences[0], "without_distant": differences[1]}


def children_seconds() -> float:
    """Processor time of the processes that have ended: busy neighbours lengthen it less than the time on the clock."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fasta", required=True)
    parser.add_argument("--cases", default=",".join(CASES), metavar="JOB:MODEL:LETTERS,...")
    parser.add_argument("--output", default="-", metavar="FILE.json")
    arguments = parser.parse_args()
    import harness

    run = harness.Run("likelihoods, embeddings and generation over long stretches of a genome",
                      threads={"lcx": {"threads": os.cpu_count() or 1}})  # fmt: skip
    rows = []
    for one in arguments.cases.split(","):
        job, name, length = one.split(":")
        with run.watched():
            rows.append(case(job, name, int(length), arguments.fasta))
        print(json.dumps(rows[-1]), flush=True)
        run.write(arguments.output, rows=rows)  # after each case, as some take long


if __name__ == "__main__":
    main()
