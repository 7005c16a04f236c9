"""Time and peak memory of likelihoods, embeddings and generation over long stretches of a genome, by the commands.

    python benchmarks/long_genomes.py --fasta=genome.fna.gz [--cases score:convolutions:1000000,...]
                                      [--output FILE.json]

Each case is a process of its own, and its peak is VmHWM of that process, interpreter and libraries included. The models
are StripedHyena 2 with random weights: three Hyena layers (SE, MR, LI) of width 64, the same with a layer of attention,
and all four layers with a single head of width 16. Attention costs 2 T^2 D multiply-adds on T letters at width D, and a
weight per head and pair of letters: one head is what makes a million letters a matter of minutes on 2 cores.
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


def save_model(folder: str, name: str, length: int) -> None:
    import jax

    import lcx
    from lcx.model import init_params
    from lcx.striped_hyena import striped_hyena

    model = striped_hyena(vocab_size=512, max_position_embeddings=length, **MODELS[name])
    lcx.save(folder, model, init_params(model, jax.random.key(0)), format="vortex")


def letters(path: str, count: int) -> str:
    """The first `count` letters of the first record of a FASTA file."""
    from lcx.evals.support import dna

    _, text = next(iter(dna.records(path, owner="--fasta")))
    if len(text) < count:
        sys.exit(f"{path}: the first record has {len(text)} letters, expected at least {count}: change --cases")
    return text[0:count].upper()


def command(job: str, folder: pathlib.Path, length: int, text: str) -> list[str]:
    """A module of lcx and its arguments."""
    checkpoint = f"--checkpoint={folder}/model"
    if job == "generate":
        options = f"--prompt={text[:PROMPT]}", f"--max_new_tokens={length - PROMPT}", "--temperature=1", "--seed=0"
        return ["lcx.generate", checkpoint, *options]
    output = f"--output={folder}/{job}.{'tsv' if job == 'score' else 'npz'}"
    own = f"--window={length}" if job == "score" else "--layers=-1"
    return [f"lcx.{job}", checkpoint, f"--fasta={folder}/row.fa", output, own]


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
    return {"job": job, "model": name, "letters": length, **times, "peak_mib": peak // 2**20}


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
    run.write(arguments.output, rows=rows)


if __name__ == "__main__":
    main()
