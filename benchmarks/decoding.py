"""Tokens per second of greedy generation, prompt included, against transformers on torch.

    python benchmarks/decoding.py [--cases 256x1,...] [--dtypes float32,bfloat16] [--rounds 3] [--slow 30]
                                  [--output FILE.json]

A case is context x rows. Both sides have the same random weights (of a Llama of 4 layers and width 256) and the same
prompts, and each is a process of its own (workers.py). A side generates NEW + 1 tokens and notes when it has the first:
`prefill` is the time until then, `whole` the time of all, and `decode` is of the NEW others. A side that takes more
than --slow seconds generates once, lcx with the compilation in its time, and where transformers does, longer contexts
with that dtype and number of rows are left out. The tokens are compared: with float32 they are equal. Rows of earlier
runs in the file are kept, so contexts can be measured one by one. Needs the extra `torch`.
"""

import argparse
import json
import os
import pathlib
import tempfile
import time

import harness
import workers

NEW = 32
CASES = "256x1,2048x1,8192x1,16384x1,65536x1,256x8,2048x8"
MODEL = {
    "vocab_size": 32000, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 131072,
    "tie_word_embeddings": True, "eos_token_id": None, "bos_token_id": 1,
}  # fmt: skip


class Side(workers.Library):
    """Generation with one library, in its own process."""

    def load(self, folder: str, dtype: str) -> None:
        if self.lcx:
            import lcx

            self.model = lcx.load(folder, dtype=dtype)
            return
        import torch
        import transformers

        transformers.logging.disable_progress_bar()
        loaded = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self.model = loaded.eval()

    def prompt(self, T: int, B: int) -> None:
        import numpy as np

        self.prompts = np.random.default_rng(0).integers(0, MODEL["vocab_size"], (B, T)).astype(np.int32)
        self.firsts = list[float]()

    def generate(self) -> None:
        start = time.perf_counter()
        self.found = self._lcx(start) if self.lcx else self._transformers(start)

    def _lcx(self, start: float):
        """What lcx.generate does, in its two parts."""
        import jax
        import numpy as np

        from lcx import sampler

        settings = {"temperature": 0.0, "top_p": 1.0, "seed": 0, "stop": (), "rope_trace": "exact", "lora": None}
        job = sampler._job(*self.model, self.prompts, NEW + 1, *settings.values())
        state = jax.block_until_ready(job.start())
        self.firsts.append(time.perf_counter() - start)
        return np.asarray(job.advance(state, NEW + 1).tokens)[:, : NEW + 1]

    def _transformers(self, start: float):
        import torch

        streamer = First()
        ids = torch.tensor(self.prompts, dtype=torch.long)
        length = {"max_new_tokens": NEW + 1, "min_new_tokens": NEW + 1}
        with torch.inference_mode():
            mask = torch.ones_like(ids)
            out = self.model.generate(
                ids, attention_mask=mask, do_sample=False, pad_token_id=0, streamer=streamer, **length
            )
        self.firsts.append(streamer.times[1] - start)  # the prompt comes before the first token
        return out[:, ids.shape[1] :].numpy()

    def told(self) -> dict:
        return {"firsts": self.firsts, "tokens": self.found.tolist()}


class First:
    """A streamer of transformers that notes when tokens come."""

    def __init__(self):
        self.times = list[float]()

    def put(self, tokens) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def measured(run: harness.Run, sides: workers.Sides, T: int, B: int, dtype: str, flags) -> dict:
    sides.ask("prompt", T=T, B=B)
    known = len(run.sections)
    whole = run.turns(sides.timed("generate"), rounds=flags.rounds, slow=flags.slow)
    told = sides.ask("told")
    prefill = harness.Turns({name: told[name]["firsts"][-len(times) :] for name, times in whole.times.items()})
    rest = {name: [b - a for a, b in zip(prefill.times[name], whole.times[name])] for name in whole.times}
    peer = workers.faster(whole, "transformers")
    row: dict = {"context": T, "rows": B, "dtype": dtype, "peer": peer}
    for what, turns in (("prefill", prefill), ("whole", whole), ("decode", harness.Turns(rest))):
        row[what] = {"lcx": turns.seconds("lcx"), "transformers": turns.seconds(peer)}
        row[f"{what}_speed"] = turns.ratio(peer, "lcx")
    row["decode_tokens_per_second"] = {name: B * NEW / s for name, s in row["decode"].items()}
    row["quiet"] = all(section["quiet"] for section in run.sections[known:])
    same = [
        x == y
        for ours, theirs in zip(told["lcx"]["tokens"], told[peer]["tokens"], strict=True)
        for x, y in zip(ours, theirs, strict=True)
    ]
    row["equal_tokens"] = sum(same) / len(same)
    return row


def beyond(row: dict, T: int, B: int, dtype: str, slow: float) -> bool:
    """Whether this measured row says that a case would take transformers too long."""
    return (row["rows"], row["dtype"]) == (B, dtype) and row["context"] < T and row["whole"]["transformers"] > slow


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default=CASES, metavar="TxB,...")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slow", type=float, default=30.0, metavar="SECONDS")
    parser.add_argument("--output", default=str(harness.RESULTS / "decoding_cpu.json"))
    flags = parser.parse_args()
    rows = []
    if os.path.exists(flags.output):
        rows = json.loads(pathlib.Path(flags.output).read_text())["rows"]
    with tempfile.TemporaryDirectory() as folder, workers.started(__file__, ("lcx", "transformers")) as sides:
        save(folder)
        run = harness.Run("greedy generation", threads=sides.threads)
        for dtype in flags.dtypes.split(","):
            sides.ask("load", folder=folder, dtype=dtype)
            for case in flags.cases.split(","):
                T, B = map(int, case.split("x"))
                if any(beyond(row, T, B, dtype, flags.slow) for row in rows):
                    print(f"{case} {dtype}: left out, transformers took too long for a shorter context", flush=True)
                    continue
                row = measured(run, sides, T, B, dtype, flags)
                print(json.dumps(row), flush=True)
                rows = [old for old in rows if (old["context"], old["rows"], old["dtype"]) != (T, B, dtype)]
                rows.append(row)
                if flags.output != "-":
                    quiet = all(row["quiet"] for row in rows)
                    run.write(flags.output, new_tokens=NEW, model=MODEL, rows=rows, quiet=quiet)


def save(folder: str) -> None:
    """Random weights of the model, as a folder of transformers."""
    import torch
    import transformers

    torch.manual_seed(0)
    transformers.logging.disable_progress_bar()
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**MODEL)).save_pretrained(folder)


if __name__ == "__main__":
    workers.serve(Side) if workers.asked() else main()
