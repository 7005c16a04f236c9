"""How long it takes to make the samples of RULER: 13 tasks at six lengths.

    python benchmarks/ruler_samples.py --tokenizer=FOLDER --essays=FOLDER --squad=FILE [--hotpotqa=FILE] \
      [--samples=500] [--processes=2] [--output=benchmarks/results/ruler_samples_cpu.json]

Tasks and lengths are divided over the processes; samples are made and dropped, one after the other. Without a file in
the layout of HotpotQA, qa_2 asks the questions of --squad, each about its paragraph and nine others.
"""

import argparse
import collections
import concurrent.futures
import json
import multiprocessing
import os
import pathlib
import tempfile
import time

import harness

from lcx.data import load_tokenizer
from lcx.evals.support.ruler import published
from lcx.evals.support.ruler.lengths import Lengths

LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
GIVEN: dict = {}  # of this process: what `made` needs


def prepare(args: argparse.Namespace, hotpotqa: str) -> None:
    tokenizer = load_tokenizer(args.tokenizer)
    place = pathlib.Path(args.essays)
    files = sorted(place.glob("*.txt")) if place.is_dir() else [place]
    essay = "\n".join(file.read_text(errors="replace") for file in files)
    material = published.Material(essay, args.squad, hotpotqa)
    GIVEN.update(tokenizer=tokenizer, lengths=Lengths(tokenizer), material=material, count=args.samples)


def made(task: str, length: int) -> dict:
    """The CPU seconds of all samples of a task at a length, and their tokens."""
    start = time.process_time()
    tokens = sum(sample.length for sample in published.samples(task, length=length, reserved=1, **GIVEN))
    return {"task": task, "length": length, "cpu_seconds": time.process_time() - start, "tokens": tokens}


def like_hotpotqa(squad: str, path: str) -> str:
    articles = json.loads(pathlib.Path(squad).read_text())["data"]
    paragraphs = [one for article in articles for one in article["paragraphs"]]
    rows = [
        {
            "question": asked["question"],
            "answer": asked["answers"][0]["text"],
            "context": [
                [f"Paragraph {j % len(paragraphs)}", [paragraphs[j % len(paragraphs)]["context"]]]
                for j in range(i, i + 10)
            ],
        }
        for i, one in enumerate(paragraphs)
        for asked in one["qas"]
        if asked["answers"]
    ]
    pathlib.Path(path).write_text(json.dumps(rows))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--essays", required=True)
    parser.add_argument("--squad", required=True)
    parser.add_argument("--hotpotqa")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", default=str(harness.RESULTS / "ruler_samples_cpu.json"))
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the threads
    cells = [(task, length) for length in reversed(LENGTHS) for task in published.TASKS]
    run = harness.Run("samples of RULER", threads={"lcx": {"processes": args.processes, "threads": args.processes}})
    with tempfile.TemporaryDirectory() as folder:
        hotpotqa = args.hotpotqa or like_hotpotqa(args.squad, f"{folder}/hotpotqa.json")
        with (
            run.watched(),
            concurrent.futures.ProcessPoolExecutor(
                args.processes, multiprocessing.get_context("spawn"), prepare, (args, hotpotqa)
            ) as pool,
        ):
            start = time.perf_counter()
            rows = list(pool.map(made, *zip(*cells, strict=True)))
            seconds = time.perf_counter() - start
    by_task: collections.Counter[str] = collections.Counter()
    for row in rows:
        by_task[row["task"]] += row["cpu_seconds"]
    total = {"seconds": seconds, "cpu_seconds": sum(by_task.values()), "samples": args.samples * len(rows)}
    print({key: round(value, 1) for key, value in (total | by_task).items()}, flush=True)
    run.write(args.output, **total, rows=rows)


if __name__ == "__main__":
    main()
