"""A training step of lcx against transformers + torch: same machine, weights, batches, optimizer, one run.

    python benchmarks/train_vs_transformers.py [--lengths 256,2048,8192] [--steps 7] [--output FILE.json]

For each length both sides take the same AdamW step (float32) on the same batches, in turns, A B A B ..., after one
that is not counted; medians are compared, and the losses of every step are kept side by side. Peak memory is that of
a process of its own for each side, less what it holds before the first step. Needs the extra `torch`.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys

import harness

MODEL = {
    "vocab_size": 32000,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
}
LEARNING_RATE, DECAY = 1e-3, 0.1


def batches(T: int, count: int):
    import numpy as np

    rng = np.random.default_rng(0)
    return [rng.integers(0, MODEL["vocab_size"], (rows_of(T), T + 1)).astype("int32") for _ in range(count)]


def rows_of(T: int) -> int:
    return max(1, 2048 // T)


def hf_model():
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=MODEL["vocab_size"],
        hidden_size=MODEL["hidden_size"],
        intermediate_size=MODEL["intermediate_size"],
        num_hidden_layers=MODEL["num_layers"],
        num_attention_heads=MODEL["num_heads"],
        num_key_value_heads=MODEL["num_kv_heads"],
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


class Torch:
    """transformers with its default attention (sdpa) and torch's fused AdamW."""

    def __init__(self):
        import torch

        self.torch = torch
        torch.set_num_threads(os.cpu_count() or 1)
        self.model = hf_model().train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=DECAY, fused=True
        )

    def step(self, batch) -> float:
        tokens = self.torch.tensor(batch).long()
        labels = tokens[:, 1:].contiguous()
        # shift_labels: the labels of the model's own inputs, already shifted, so that both sides score T tokens.
        out = self.model(input_ids=tokens[:, :-1], labels=labels, shift_labels=labels, use_cache=False)
        out.loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return out.loss.item()


class Lcx:
    """The trainer's own compiled step, on the weights of `folder`."""

    def __init__(self, folder: str, rows: int):
        import jax

        import lcx
        from lcx import model as model_lib
        from lcx import objectives, sharding
        from lcx.optim import AdamW
        from lcx.training import step as train_step

        # Virtual devices (JAX_NUM_CPU_DEVICES=2) share the rows, or the heads where there is one row.
        data = math.gcd(rows, jax.device_count())
        self.mesh = sharding.make_mesh(data=data, fsdp=1, tensor=-1)
        jax.set_mesh(self.mesh)
        model, params = lcx.load(folder, mesh=self.mesh)
        model = model.clone(remat="dots", parent=None)
        schedule = AdamW(LEARNING_RATE, "constant", warmup_steps=0, weight_decay=DECAY, decay=".")
        weights = {"params": params}
        optimizer = schedule.build({"params": model_lib.abstract_params(model, mesh=self.mesh)}, 100)
        abstract = train_step.abstract_state(
            {"params": model_lib.abstract_params(model, mesh=self.mesh)}, optimizer, self.mesh
        )
        self.state = {**weights, "opt_state": train_step.init_opt_state(optimizer, weights, abstract)}
        self.step_fn = train_step.make_step(
            model,
            optimizer,
            objectives.next_token,
            schedule.learning_rates(100),
            accumulation=1,
            abstract=abstract,
        )

    def step(self, batch) -> float:
        import numpy as np

        from lcx import sharding

        B, T = batch.shape[0], batch.shape[1] - 1
        rows = {
            "tokens": batch[:, :-1],
            "labels": batch[:, 1:],
            "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)),
            "segment_ids": np.ones((B, T), np.int32),
            "loss_weights": np.ones((B, T), np.float32),
        }
        placed = sharding.shard_batch({k: np.ascontiguousarray(v) for k, v in rows.items()}, self.mesh)
        self.state, metrics = self.step_fn(self.state, placed, np.int32(0))
        return float(metrics["loss"])


def speed(run: harness.Run, folder: str, lengths: list[int], steps: int) -> list[dict]:
    rows = []
    for T in lengths:
        sides = {"lcx": Lcx(folder, rows_of(T)), "torch": Torch()}
        losses: dict[str, list[float]] = {name: [] for name in sides}
        made = batches(T, steps + 1)

        def step(name, sides=sides, losses=losses, made=made):
            losses[name].append(sides[name].step(made[len(losses[name])]))

        turns = run.turns(
            {name: harness.calls(lambda name=name, step=step: step(name)) for name in sides}, rounds=steps
        )
        row: dict = {"T": T, "batch": rows_of(T)}
        for name in sides:
            row[f"{name}_tokens_per_second"] = round(rows_of(T) * T / turns.seconds(name), 1)
        ratio = turns.ratio("torch", "lcx")
        row["speed_ratio_median"] = ratio["median"]
        row["speed_ratio_min_max"] = [ratio["min"], ratio["max"]]
        row["max_loss_difference"] = max(
            abs(a - b) for a, b in zip(losses["lcx"], losses["torch"], strict=True)
        )
        row["losses"] = {name: [round(x, 5) for x in values] for name, values in losses.items()}
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def memory(side: str, folder: str, T: int) -> None:
    """Runs in a process of its own: prints the peak of two steps less what was resident before them, in MiB."""
    runner = Lcx(folder, rows_of(T)) if side == "lcx" else Torch()
    with open("/proc/self/status") as f:
        before = next(int(line.split()[1]) for line in f if line.startswith("VmRSS")) / 1024
    for batch in batches(T, 2):
        runner.step(batch)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        json.dumps(
            {
                "side": side,
                "before_mib": round(before),
                "peak_mib": round(peak),
                "step_mib": round(peak - before),
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", default="256,2048,8192")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--output")
    parser.add_argument("--memory", nargs=3, metavar=("SIDE", "FOLDER", "T"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        return memory(args.memory[0], args.memory[1], int(args.memory[2]))
    import tempfile

    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    threads = {"lcx": harness.jax_threads(), "torch": {"threads": torch.get_num_threads()}}
    run = harness.Run("AdamW training step, float32, lcx against transformers + torch", threads=threads)
    lengths = [int(x) for x in args.lengths.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        hf_model().save_pretrained(folder)
        peaks = []
        for side in ("lcx", "torch"):
            command = [sys.executable, __file__, "--memory", side, folder, str(lengths[-1])]
            peaks.append(
                json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            )
            print(json.dumps(peaks[-1]), flush=True)
        rows = speed(run, folder, lengths, args.steps)
    ratio = round(peaks[0]["step_mib"] / peaks[1]["step_mib"], 3)
    memory_found = {"T": lengths[-1], "sides": peaks, "ratio": ratio}
    print(json.dumps(memory_found))
    run.write(args.output or "-", model=MODEL, speed=rows, memory=memory_found)


if __name__ == "__main__":
    main()
