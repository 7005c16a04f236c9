"""Tokens per second of greedy generation, prompt included, against transformers on torch.

    python benchmarks/decoding.py [--cases 256x1,2048x1,8192x1,256x8,2048x8] [--dtypes float32,bfloat16] [--rounds 3]
                                  [--output FILE.json]

A case is context x rows. Both sides have the same random weights (of a Llama of 4 layers and width 256) and the same
prompts. `prefill` is the time of the first token; `decode` that of NEW more, from the difference to a generation that
goes on, and null where that is not longer. The tokens are compared: with float32 they are equal. Rows of earlier runs
in the file are kept, so long contexts can be measured one by one. Needs the extra `torch`.
"""

import argparse
import functools
import json
import pathlib
import tempfile

import harness

NEW = 32
MODEL = {
    "vocab_size": 32000, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 131072,
    "tie_word_embeddings": True, "eos_token_id": None, "bos_token_id": 1,
}  # fmt: skip


def pair(dtype: str):
    """(lcx's model and parameters, transformers' model) of the same weights."""
    import torch
    import transformers

    import lcx

    torch.manual_seed(0)
    transformers.logging.disable_progress_bar()
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**MODEL)).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        model, params = lcx.load(folder, dtype=dtype)
    return model, params, theirs.to(getattr(torch, dtype))


def measured(run: harness.Run, sides, T: int, B: int, dtype: str, rounds: int) -> dict:
    import numpy as np
    import torch

    import lcx

    model, params, theirs = sides
    prompts = np.random.default_rng(0).integers(0, MODEL["vocab_size"], (B, T)).astype(np.int32)
    ids = torch.tensor(prompts, dtype=torch.long)
    found = {}

    def ours(count: int):
        found["lcx"] = lcx.generate(model, params, prompts, max_new_tokens=count)

    def of_theirs(count: int):
        length = {"max_new_tokens": count, "min_new_tokens": count}
        with torch.inference_mode():
            mask = torch.ones_like(ids)
            out = theirs.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, **length)
        found["transformers"] = out[:, T:].numpy()

    both = {"lcx": ours, "transformers": of_theirs}
    row: dict = {"context": T, "rows": B, "dtype": dtype}
    for what, count in (("prefill", 1), ("whole", NEW + 1)):
        turns = run.turns(
            {name: harness.calls(functools.partial(side, count)) for name, side in both.items()},
            rounds=rounds,
        )
        row[what] = turns.medians()
        row[f"{what}_speed"] = turns.ratio("transformers", "lcx")
    seconds = {name: row["whole"][name] - row["prefill"][name] for name in both}
    row["decode_tokens_per_second"] = {name: B * NEW / s if s > 0 else None for name, s in seconds.items()}
    row["quiet"] = all(section["quiet"] for section in run.sections[-2:])
    row["equal_tokens"] = float((found["lcx"] == found["transformers"]).mean())
    return row


def main() -> None:
    import os

    import torch

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default="256x1,2048x1,8192x1,256x8,2048x8", metavar="TxB,...")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", default=str(harness.RESULTS / "decoding_cpu.json"))
    flags = parser.parse_args()
    threads = {"lcx": harness.jax_threads(), "transformers": {"threads": torch.get_num_threads()}}
    run = harness.Run("greedy generation", threads=threads)
    rows = []
    if os.path.exists(flags.output):
        rows = json.loads(pathlib.Path(flags.output).read_text())["rows"]
    for dtype in flags.dtypes.split(","):
        sides = pair(dtype)
        for case in flags.cases.split(","):
            T, B = map(int, case.split("x"))
            row = measured(run, sides, T, B, dtype, flags.rounds)
            print(json.dumps(row), flush=True)
            rows = [old for old in rows if (old["context"], old["rows"], old["dtype"]) != (T, B, dtype)]
            rows.append(row)
            if flags.output != "-":
                quiet = all(row["quiet"] for row in rows)
                run.write(flags.output, new_tokens=NEW, model=MODEL, rows=rows, quiet=quiet)


if __name__ == "__main__":
    main()
