"""Plans of large models, on a machine that has none of the devices: the table of docs/results/plans.md.

    python benchmarks/plan_table.py [--only NAME] [--topologies v5p:4x4x4,...] [--output benchmarks/results/plans.json]

Each row is `python -m lcx.plan --json` with the flags in ROWS. The models are described by their published config.json
alone. Plans in the file that are not made again are kept. Needs the extra `aot`; minutes for each plan on 2 cores.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072, "num_key_value_heads": 8, "rope_theta": 500000.0, "vocab_size": 128256,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192},
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
MODELS = {  # the sizes of Llama 3.1, from Meta's config.json
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80},
}
# name -> (model, .gin file, flags). Of 64 devices, 4 hold a row together.
MESH = {"MeshShape.fsdp": "16", "MeshShape.context": "4", "Trainer.batch_size": "16", "Trainer.accumulation": "1"}
WINDOW = {"Trainer.rope_scaling": "None", "Trainer.context_length": "None", "CONTEXT_LENGTH": "131072"}
ROWS = {
    "Llama 3.1 8B, 128K": ("8B", "configs/extend/yarn.gin", WINDOW | MESH),
    "Llama 3.1 70B, 128K": ("70B", "configs/extend/yarn.gin", WINDOW | MESH),
    "Llama 3.1 8B, 128K, LoRA": ("8B", "configs/extend/lora.gin", WINDOW | MESH),
}
TOPOLOGIES = ("v5p:4x4x4", "v6e:8x8", "h200:64")


def plan(name: str, topology: str) -> dict:
    """The plan of a row for these devices; {"error": ...} if it cannot be made."""
    model, gin_file, settings = ROWS[name]
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/config.json", "w") as file:
            json.dump(LLAMA | MODELS[model], file)
        flags = settings | {"MODEL": f"'{folder}'", "TEXT": "'text'"}
        command = [sys.executable, "-m", "lcx.plan", f"--gin_file={gin_file}", f"--topology={topology}", "--json"]
        command += [f"--gin.{key}={value}" for key, value in flags.items()]
        result = subprocess.run(command, capture_output=True, text=True, cwd=os.path.dirname(HERE))
    row = {"name": name, "topology": topology}
    if result.returncode not in (0, 1):
        return row | {"error": (result.stderr.strip().splitlines() or ["no message"])[-1]}
    return row | json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=ROWS, help="one of the rows")
    parser.add_argument("--topologies", default=",".join(TOPOLOGIES))
    parser.add_argument("--output", default=os.path.join(HERE, "results", "plans.json"))
    args = parser.parse_args()
    rows = {}
    if os.path.exists(args.output):
        with open(args.output) as file:
            rows = {(row["name"], row["topology"]): row for row in json.load(file)["rows"]}
    for name in [args.only] if args.only else ROWS:
        for topology in args.topologies.split(","):
            rows[name, topology] = row = plan(name, topology)
            print({key: row.get(key) for key in ("name", "topology", "error", "peak_bytes", "fits", "compile_seconds")})
            with open(args.output, "w") as file:
                text = json.dumps({"what": "plans of large models", "rows": list(rows.values())})
                file.write(text.replace('{"name"', '\n{"name"') + "\n")


if __name__ == "__main__":
    main()
