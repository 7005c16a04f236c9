"""Time and memory of a training step against the length of its one row: whole, and in pieces with exact gradients.

    python benchmarks/pieces.py --letters genome.fna.gz [--models linear,two_mamba,hyena,softmax,llama] [--piece 16384]
                                [--lengths 16384,65536,...] [--compile_only] [--output FILE.json]

Each case is a process of its own, so that its peak of resident memory is its own: compile, one step, one more that is
timed. With --compile_only no step is taken, and the memory is the compiler's count: for lengths whose step takes hours.
The row is the first T letters of a FASTA file (a letter a token). Models of width 64 with MLPs: four layers of Mamba-2
(linear), of 2Mamba, of softmax attention; a StripedHyena 2 without attention (SE, MR, LI). `llama` is the smallest that
is one: two layers of width 32 with one head of 16.

With --output FILE.json the cases of the file that are not run again are kept.
"""

import argparse
import gzip
import json
import os
import pathlib
import resource
import subprocess
import sys
import time

import numpy as np

LENGTHS = [1 << n for n in range(10, 21)]
PIECE = 1 << 14


def model(name: str, T: int):
    from lcx.block import Block
    from lcx.mixers.attention import Attention
    from lcx.mixers.hyena import HyenaLI, HyenaMR, HyenaSE
    from lcx.mixers.mamba2 import Mamba2
    from lcx.mixers.two_mamba import TwoMamba
    from lcx.mlps.gated import GatedMlp
    from lcx.model import Decoder, Stage

    width = 32 if name == "llama" else 64
    mixers = {
        "linear": (Mamba2(num_heads=2, head_dim=64, state_dim=32),),
        "hyena": (HyenaSE(width, num_groups=8), HyenaMR(width, num_groups=8), HyenaLI(width)),
        "two_mamba": (TwoMamba(num_heads=4, head_dim=16),),
        "softmax": (Attention(num_heads=2, num_kv_heads=1, head_dim=32),),
        "llama": (Attention(num_heads=1, num_kv_heads=1, head_dim=16),),
    }[name]
    blocks = tuple(Block(mixer, GatedMlp(2 * width)) for mixer in mixers)
    repeat = {"hyena": 1, "llama": 2}.get(name, 4)
    return Decoder(256, width, (Stage(blocks, repeat),), T, tie_word_embeddings=True, remat="full")


def letters(path: str, count: int) -> np.ndarray:
    """The first `count` letters of the records of a FASTA file."""
    data = pathlib.Path(path).read_bytes()
    lines = (gzip.decompress(data) if path.endswith(".gz") else data).upper().split(b"\n")
    text = b"".join(line.strip() for line in lines if not line.startswith(b">"))
    return np.frombuffer(text[:count], np.uint8)


def one_row(row: np.ndarray) -> dict[str, np.ndarray]:
    """A batch of one row, as the trainer takes it."""
    T = len(row) - 1
    return {
        "tokens": row[None, :-1].astype(np.int32),
        "labels": row[None, 1:].astype(np.int32),
        "positions": np.arange(T, dtype=np.int32)[None],
        "segment_ids": np.ones((1, T), np.int32),
        "loss_weights": np.ones((1, T), np.float32),
    }


class Step:
    """The trainer's step on one row, compiled; its state moves on with every call."""

    def __init__(self, architecture, row: np.ndarray, piece: int):
        import jax

        from lcx import model as model_lib
        from lcx import objectives, sharding
        from lcx.optim import AdamW
        from lcx.pieces import Pieces
        from lcx.training import memory
        from lcx.training import step as train_step
        from lcx.training.run import prepared

        optimizer = AdamW(1e-3, "constant", warmup_steps=0)
        objective = objectives.next_token
        if piece:
            objective = objectives.over_pieces(objective, Pieces(piece))
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
        with jax.set_mesh(mesh):
            run = prepared(optimizer, 10, architecture, mesh, None)
            rates = optimizer.learning_rates(10)
            step = train_step.make_step(
                architecture, run.optimizer, objective, rates, accumulation=1, abstract=run.abstract
            )
            self.batch = sharding.shard_batch(one_row(row), mesh)
            self.compiled = step.lower(run.abstract, self.batch, np.int32(0)).compile()
            memory.give_back()  # as the trainer does
            weights = {"params": model_lib.init_params(architecture, jax.random.key(0), mesh=mesh)}
            self.state = {
                **weights,
                "opt_state": train_step.init_opt_state(run.optimizer, weights, run.abstract),
            }

    def __call__(self) -> float:
        """Takes a step; returns the loss before it, in nats."""
        self.state, metrics = self.compiled(self.state, self.batch, np.int32(0))
        return float(metrics["loss"])


def case(args: argparse.Namespace) -> dict:
    """One process: one model, one length, whole or in pieces."""
    row = letters(args.letters, args.length + 1)
    start = time.perf_counter()
    step = Step(model(args.model, len(row) - 1), row, args.piece)
    compiled = time.perf_counter()
    analysis = step.compiled.memory_analysis()
    result = {
        "model": args.model,
        "T": len(row) - 1,
        "piece": args.piece or None,
        "compile_seconds": round(compiled - start, 1),
        "arguments_mib": round(analysis.argument_size_in_bytes / 2**20, 1),
        "temporary_mib": round(analysis.temp_size_in_bytes / 2**20, 1),
    }
    if args.compile_only:
        return result
    losses, once = [step()], time.perf_counter()
    seconds = once - compiled
    if args.twice:
        losses.append(step())
        seconds = time.perf_counter() - once
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return result | {"losses": losses, "seconds": round(seconds, 2), "peak_resident_mib": round(peak / 2**10)}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--letters", required=True, help="a FASTA file")
    parser.add_argument("--models", default="linear,two_mamba,hyena")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument(
        "--whole_until", type=int, default=1 << 17, help="longest row that is also taken whole"
    )
    parser.add_argument("--piece", type=int, default=PIECE)
    parser.add_argument("--twice", type=int, default=1, help="0: time the first step")
    parser.add_argument("--compile_only", action="store_true", help="the compiler's memory, without a step")
    parser.add_argument("--output", default="-", help="- for none")
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def _pieces(args: argparse.Namespace, T: int) -> list[int]:
    """The piece lengths to try; 0: the whole row."""
    return [args.piece] * (args.piece < T) + [0] * (args.whole_until >= T)


def main() -> None:
    args = parsed()
    if args.model:
        print("answer", json.dumps(case(args)))
        return
    import harness

    run = harness.Run(__doc__.splitlines()[0], threads={"lcx": harness.jax_threads()})
    rows = {}
    if os.path.exists(args.output):
        rows = {
            (row["model"], row["T"], row["piece"]): row
            for row in json.loads(pathlib.Path(args.output).read_text())["rows"]
        }
    for name in args.models.split(","):
        for T in map(int, args.lengths.split(",")):
            for piece in _pieces(args, T):
                command = [sys.executable, __file__, "--letters", args.letters, "--twice", str(args.twice)]
                command += ["--model", name, "--length", str(T), "--piece", str(piece)]
                command += ["--compile_only"] * args.compile_only
                with run.watched():
                    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                row = json.loads(out.split("answer ")[-1])
                rows[name, T, piece or None] = row
                print(row, flush=True)
                run.write(args.output, rows=list(rows.values()))  # the next case may take long


if __name__ == "__main__":
    main()
