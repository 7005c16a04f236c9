"""A training step of lcx against transformers + torch: same machine, weights, batches, optimizer, one run.

    JAX_NUM_CPU_DEVICES=2 python benchmarks/train_vs_transformers.py [--cases base:256,...] [--dtypes float32,bfloat16]
                                               [--rounds 7] [--output FILE.json] [--no-memory]

A case is a model and a length: `base` (width 256), `quickstart` (the quickstart's, 16 rows), `wide` (width 1024). Each
side is a process of its own (workers.py): lcx with the memory pages of its commands, torch with and without large ones,
of which the faster counts. In each case they take the same AdamW steps on the same batches, in turns, A B, B A, ...,
after one turn that is not counted; medians are compared, and the losses of every step are kept side by side. A turn is
a step that is not timed and several that are: in training the memory of one step is at hand for the next, while some
virtual machines give it to their host as soon as a process waits. bfloat16 is `Trainer.dtype` on one side and torch's
autocast on the other; weights and optimizer stay float32 in both. Peak memory (float32, the last length of `base`) is
that of a fresh process for each side, less what it holds before the first step. Needs the extra `torch`. With --output,
rows are added to the file's, so that a long run can be taken in parts.
"""

import argparse
import dataclasses
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable

import harness
import workers

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
MODELS = {
    "base": dict(zip(SIZES, (32000, 256, 704, 4, 4, 2), strict=True)),
    "quickstart": dict(zip(SIZES, (258, 128, 352, 4, 4, 2), strict=True)),
    "wide": dict(zip(SIZES, (32000, 1024, 2816, 4, 16, 8), strict=True)),
}
CASES = "base:256,base:2048,base:8192,quickstart:256,wide:2048"
LEARNING_RATE, DECAY = 1e-3, 0.1


@dataclasses.dataclass(frozen=True)
class Case:
    model: str
    T: int
    dtype: str = "float32"

    @property
    def sizes(self) -> dict[str, int]:
        return MODELS[self.model]

    @property
    def rows(self) -> int:
        return 16 if self.model == "quickstart" else max(1, 2048 // self.T)

    @property
    def turn(self) -> int:
        """Steps in one turn: a few seconds."""
        return 2 if self.model == "wide" or self.T > 2048 else 8 if self.model == "quickstart" else 4

    def torch_model(self):
        return hf_model(self.sizes)

    def batches(self, count: int):
        import numpy as np

        rng, shape = np.random.default_rng(0), (self.rows, self.T + 1)
        return [rng.integers(0, self.sizes["vocab_size"], shape).astype("int32") for _ in range(count)]


def hf_model(sizes: dict[str, int]):
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_heads"],
        num_key_value_heads=sizes["num_kv_heads"],
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


class Torch:
    """transformers with its default attention (sdpa) and torch's fused AdamW."""

    def __init__(self, case: Case):
        import torch

        self.torch, self.narrow = torch, case.dtype == "bfloat16"
        torch.set_num_threads(os.cpu_count() or 1)
        self.model = case.torch_model().train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=DECAY, fused=True
        )

    def step(self, batch) -> float:
        tokens = self.torch.tensor(batch).long()
        labels = tokens[:, 1:].contiguous()
        # shift_labels: the labels of the model's own inputs, already shifted, so that both sides score T tokens.
        with self.torch.autocast("cpu", self.torch.bfloat16, enabled=self.narrow):
            out = self.model(input_ids=tokens[:, :-1], labels=labels, shift_labels=labels, use_cache=False)
        out.loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return out.loss.item()


class Lcx:
    """The trainer's own step on the weights of `folder`, compiled as the trainer does."""

    def __init__(self, folder: str, case: Case, remat: str = "dots"):
        import jax

        import lcx
        from lcx import model as model_lib
        from lcx import objectives, sharding
        from lcx.optim import AdamW
        from lcx.training import step as train_step

        # Virtual devices (JAX_NUM_CPU_DEVICES=2) share the rows, or the heads where there is one row.
        data = math.gcd(case.rows, jax.device_count())
        self.mesh = sharding.make_mesh(data=data, fsdp=1, tensor=-1)
        jax.set_mesh(self.mesh)
        model, params = lcx.load(folder, mesh=self.mesh)
        model = model.clone(dtype=case.dtype, remat=remat, parent=None)
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
        self.compiled = False

    def compile_first(self, placed: dict) -> None:
        import jax

        from lcx.training import step as train_step

        if not self.compiled:
            shapes = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for k, x in placed.items()}
            train_step.compile_first(self.step_fn, self.state, shapes)
            self.compiled = True

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
        self.compile_first(placed)
        self.state, metrics = self.step_fn(self.state, placed, np.int32(0))
        return float(metrics["loss"])


class Side:
    """One side in its own process: steps of one case after another. `case`: from what `prepare` gets."""

    def __init__(self, kind: str, case: Callable[..., Case] = Case):
        self.kind, self.case = kind, case
        if kind == "torch":
            import torch

            torch.set_num_threads(os.cpu_count() or 1)
        self.runner: Torch | Lcx | None = None

    def threads(self) -> dict:
        if self.kind == "lcx":
            return harness.jax_threads()
        import torch

        return {"threads": torch.get_num_threads()}

    def prepare(self, folder: str, steps: int, **case) -> None:
        self.runner = None  # frees the memory of the case before
        made = self.case(**case)
        self.batches, self.losses = iter(made.batches(steps)), list[float]()
        self.runner = Torch(made) if self.kind == "torch" else Lcx(folder, made)

    def step(self) -> None:
        assert self.runner is not None
        self.losses.append(self.runner.step(next(self.batches)))

    def take(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    def told(self) -> list[float]:
        return self.losses


def compared(run: harness.Run, sides: workers.Sides, folder: str, case: Case, rounds: int):
    """(seconds of a step in each turn, the name of torch's faster process, the losses of both)."""
    sides.ask("prepare", folder=folder, steps=(case.turn + 1) * (rounds + 1), **dataclasses.asdict(case))
    turns = run.turns(sides.timed("take", steps=case.turn, before="step"), rounds=rounds)
    turns = harness.Turns({name: [x / case.turn for x in times] for name, times in turns.times.items()})
    peer, losses = workers.faster(turns, "torch"), sides.ask("told")
    return turns, peer, {"lcx": losses["lcx"], "torch": losses[peer]}


def difference(losses: dict[str, list[float]]) -> float:
    return max(abs(a - b) for a, b in zip(losses["lcx"], losses["torch"], strict=True))


def speed(run: harness.Run, sides: workers.Sides, folder: str, case: Case, rounds: int) -> dict:
    turns, peer, losses = compared(run, sides, folder, case, rounds)
    ratio, tokens = turns.ratio(peer, "lcx"), case.rows * case.T
    row = {
        **{"model": case.model, "dtype": case.dtype, "T": case.T, "batch": case.rows},
        "lcx_tokens_per_second": round(tokens / turns.seconds("lcx"), 1),
        "torch_tokens_per_second": round(tokens / turns.seconds(peer), 1),
        "seconds": {name: round(seconds, 4) for name, seconds in turns.medians().items()},
        "peer": peer,
        "speed_ratio_median": ratio["median"],
        "speed_ratio_min_max": [ratio["min"], ratio["max"]],
        "max_loss_difference": difference(losses),
        "losses": {name: [round(x, 5) for x in values] for name, values in losses.items()},
    }
    print(json.dumps(row), flush=True)
    return row


def memory(side: str, folder: str, case: Case, remat: str = "dots") -> None:
    """Runs in a process of its own: prints the peak of two steps less what was resident before them, in MiB."""
    runner = Torch(case) if side == "torch" else Lcx(folder, case, remat)
    with open("/proc/self/status") as f:
        before = next(int(line.split()[1]) for line in f if line.startswith("VmRSS")) / 1024
    for batch in case.batches(2):
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
    parser.add_argument("--cases", default=CASES)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--memory", nargs=3, metavar=("SIDE", "FOLDER", "T"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        return memory(args.memory[0], args.memory[1], Case("base", int(args.memory[2])))
    named = [case.split(":") for case in args.cases.split(",")]
    cases = [Case(model, int(T), dtype) for model, T in named for dtype in args.dtypes.split(",")]
    found: dict = {"models": MODELS, "speed": []}
    with tempfile.TemporaryDirectory() as root:
        folders = {model: os.path.join(root, model) for model in {case.model for case in cases}}
        for model, folder in folders.items():
            hf_model(MODELS[model]).save_pretrained(folder)
        lengths = [case.T for case in cases if case.model == "base"]
        if lengths and not args.no_memory:
            found["memory"] = peaks(folders["base"], lengths[-1])
        with workers.started(__file__, ("lcx", "torch")) as sides:
            run = harness.Run("AdamW training step, lcx against transformers + torch", threads=sides.threads)
            found["speed"] = [speed(run, sides, folders[case.model], case, args.rounds) for case in cases]
    if args.output and os.path.exists(args.output):
        with open(args.output) as f:
            found = joined(json.load(f), found, run)
    run.write(args.output or "-", **found)


def peaks(folder: str, T: int) -> dict:
    sides = []
    for side in ("lcx", "torch"):
        command = [sys.executable, __file__, "--memory", side, folder, str(T)]
        env = os.environ | workers.environments(side)[side]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
        sides.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(sides[-1]), flush=True)
    return {"T": T, "sides": sides, "ratio": round(sides[0]["step_mib"] / sides[1]["step_mib"], 3)}


def joined(old: dict, new: dict, run: harness.Run) -> dict:
    """The result with the rows of an earlier part of the same run; what is measured again replaces the old row."""
    same = all(old.get(name) == run.record()[name] for name in ("threads", "machine", "versions"))
    if not (same and old.get("quiet")):
        return new
    cases = {(row["model"], row["dtype"], row["T"]): row for row in [*old["speed"], *new["speed"]]}
    return {**old, **run.record(), **new, "speed": list(cases.values())}


if __name__ == "__main__":
    workers.serve(Side) if workers.asked() else main()
