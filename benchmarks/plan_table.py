"""Plans of large models, on a machine that has none of the devices: the table of docs/results/plans.md.

    python benchmarks/plan_table.py [--only NAME;...] [--kinds h200,v5p,v6e] [--again] [--output FILE.json]

Each row is `python -m lcx.plan --json` with the flags in ROWS. The models are described by their published config.json
alone, or by a file in configs/models. Every plan is written as soon as it is made; one that the file already holds is
kept, unless --again is given, so a table that was interrupted goes on where it was. Of a step that does not fit,
`would_fit` is the smallest mesh that should hold it: state and gradients divide over fsdp, activations over context;
it is empty if that needs more devices than a pod of that kind has.
Needs the extra `aot`; minutes for each plan on 2 cores.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile

from lcx.planning.topology import largest

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072, "num_key_value_heads": 8, "rope_theta": 500000.0, "vocab_size": 128256,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192},
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
LLAMAS = {  # the sizes of Llama 3.1, from Meta's config.json
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80},
    "405B": {"hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128, "num_hidden_layers": 126},
}
# The last rung of configs/extend/evo2_ladder.gin, without weights: the step is the same.
EVO2 = """from __gin__ import dynamic_registration
from lcx import striped_hyena
from lcx import trainer
include '{root}/configs/models/{model}.gin'
include '{root}/configs/extend/evo2_ladder.gin'
trainer.train.job = @trainer.Trainer()
trainer.Trainer.init_from = None
trainer.Trainer.model = @striped_hyena.striped_hyena()
trainer.Trainer.seq_len = 1048576
striped_hyena.striped_hyena.init_length = 1048576
"""
SLICES = {  # kind: {devices: topology}; no slice of TPUs has one chip
    **{kind: {count: f"{kind}:{count}" for count in (1, 8, 64, 128, 256, 512)} for kind in ("h100", "h200")},
    "v5p": {8: "v5p:2x2x2", 64: "v5p:4x4x4", 128: "v5p:4x4x8", 256: "v5p:4x8x8", 512: "v5p:8x8x8"},
    "v6e": {8: "v6e:2x4", 64: "v6e:8x8", 128: "v6e:8x16", 256: "v6e:16x16"},  # no larger one exists
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A training run.

    Attributes:
      model: a size of LLAMAS, whose config.json MODEL is set to; a name in configs/models; None: as the .gin file says.
      gin_files: the recipe, and what is read after it; (): EVO2.
      mesh: fsdp, context, tensor.
      settings: further --gin flags.
      elsewhere: {kind of device: its own mesh}, where the mesh above has too little memory.
    """

    model: str | None
    gin_files: tuple[str, ...]
    mesh: tuple[int, int, int]
    settings: dict[str, str]
    elsewhere: dict[str, tuple[int, int, int]] = dataclasses.field(default_factory=dict)

    def flags(self, kind: str) -> dict[str, str]:
        sizes = dict(zip(("fsdp", "context", "tensor"), map(str, self.elsewhere.get(kind, self.mesh))))
        tensor = {"TENSOR": sizes["tensor"]} if "TENSOR" in self.settings else {}
        return {f"MeshShape.{axis}": size for axis, size in sizes.items()} | self.settings | tensor


def extended(length: int, rows: int) -> dict[str, str]:
    """configs/extend/yarn.gin with rows of this length; up to the model's own window nothing is extended."""
    own = {"Trainer.rope_scaling": "None", "Trainer.context_length": "None"} if length <= 131072 else {}
    return own | {"CONTEXT_LENGTH": str(length), "Trainer.batch_size": str(rows), "Trainer.accumulation": "1"}


YARN, LORA, MILLION = ("configs/extend/yarn.gin",), ("configs/extend/lora.gin",), 1 << 20
HOST = {"Trainer.remat": "'host'"}
BLOCKS = {"Blocks.layers_per_block": "9", "Trainer.remat": "'full'"}
MEDIUM = {"SEQ_LEN": "65536", "Trainer.batch_size": "8", "MeshShape.data": "8", "TOKENIZER": "'tokenizer'"}
TWO_MAMBA = tuple(f"configs/pretrain/two_mamba/{name}.gin" for name in (
    "squared__sm_norm__A_mask_type_neg_softplus__in_conv_k_2", "sizes/medium"
))  # fmt: skip
ROWS = {
    "Llama 3.1 8B, 32K": Row("8B", YARN, (8, 1, 1), extended(32768, 64) | {"Trainer.accumulation": "8"}),
    "Llama 3.1 8B, 128K": Row("8B", YARN, (16, 4, 1), extended(131072, 16), {"v6e": (16, 8, 1)}),
    "Llama 3.1 8B, 1M": Row("8B", YARN, (4, 16, 1), extended(MILLION, 4)),
    "Llama 3.1 70B, 128K": Row("70B", YARN, (32, 8, 1), extended(131072, 32)),
    "Llama 3.1 405B, a block of 9 layers": Row("405B", ("configs/linearize/llama_blocks.gin",), (8, 1, 1), BLOCKS),
    "Evo 2 7B, 1M": Row("evo2_7b", (), (4, 16, 1), {"Trainer.batch_size": "4"}),
    "Evo 2 7B, 1M, context 32": Row("evo2_7b", (), (4, 32, 1), {"Trainer.batch_size": "4"}),
    "Evo 2 40B, 1M": Row("evo2_40b", (), (4, 32, 4), {"Trainer.batch_size": "4", "TENSOR": "4"}, {"v6e": (4, 32, 2)}),
    "2Mamba medium, 64K": Row(None, TWO_MAMBA, (1, 1, 1), MEDIUM),
    "Llama 3.1 8B, 128K, LoRA": Row("8B", LORA, (16, 4, 1), extended(131072, 16)),
    "Llama 3.1 8B, 1M, LoRA, in pieces": Row(
        "8B", LORA, (1, 8, 1), extended(MILLION, 1) | {"Trainer.piece_length": "131072"}
    ),
    # One row on one device, in the ways that docs/how-to/long-rows.md compares.
    "128K, remat full": Row("8B", LORA, (1, 1, 1), extended(131072, 1)),
    "128K, pieces of 16K": Row("8B", LORA, (1, 1, 1), extended(131072, 1) | {"Trainer.piece_length": "16384"}),
    "128K, remat host": Row("8B", LORA, (1, 1, 1), extended(131072, 1) | HOST),
    "1M, remat host": Row("8B", LORA, (1, 1, 1), extended(MILLION, 1) | HOST),
}


def slice_of(row: Row, kind: str) -> str | None:
    """The topology that a row is planned for on this kind of device; None if there is none of its size."""
    count = math.prod(row.elsewhere.get(kind, row.mesh)) * int(row.settings.get("MeshShape.data", 1))
    return SLICES[kind].get(count)


def command(row: Row, topology: str, folder: str) -> list[str]:
    """The command that plans a row; what it reads of the model is written to the folder."""
    flags, files = row.flags(topology.partition(":")[0]), list(row.gin_files)
    if row.model in LLAMAS:
        with open(f"{folder}/config.json", "w") as file:
            json.dump(LLAMA | LLAMAS[row.model], file)
        flags |= {"MODEL": f"'{folder}'"}
    elif not files:
        files = [f"{folder}/run.gin"]
        with open(files[0], "w") as file:
            file.write(EVO2.format(root=ROOT, model=row.model))
    data = "FASTA" if not row.gin_files else "TEXT"
    made = [sys.executable, "-m", "lcx.plan", f"--topology={topology}", "--json"]
    made += [f"--gin_file={file}" for file in files]
    return made + [f"--gin.{key}={value}" for key, value in (flags | {data: "'text'"}).items()]


def plan(name: str, topology: str) -> dict:
    """The plan of a row for these devices; {"error": ...} if it cannot be made."""
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(command(ROWS[name], topology, folder), capture_output=True, text=True, cwd=ROOT)
    made = {"name": name, "topology": topology}
    if result.returncode not in (0, 1) or not result.stdout.strip():
        return made | {"error": (result.stderr.strip().splitlines() or ["no message"])[-1]}
    made |= json.loads(result.stdout.splitlines()[-1])
    return made | {"would_fit": None if made["fits"] else would_fit(made)}


def would_fit(made: dict) -> dict[str, int]:
    """The sizes of the smallest mesh that should hold the step, by the parts of its peak and not by a compiler.

    Empty if there is no slice of TPUs as large.
    """
    state = made["parameter_bytes"] + made["optimizer_bytes"]
    gradients = made["parameter_bytes"] * made["trained_parameters"] / made["model_parameters"]
    rest = max(made["activation_bytes"] - gradients, 0) + made["batch_bytes"]
    mesh, most = made["mesh"], largest(made["topology"].partition(":")[0])
    powers = [1 << power for power in range(12)]
    fitting = [
        (a * b, a, b) for a, b in itertools.product(powers, powers)
        if (state + gradients) / a + rest / b <= 0.95 * made["memory_bytes"]
        and math.prod(mesh.values()) * a * b <= most
    ]  # fmt: skip
    return {axis: mesh[axis] * min(fitting)[i] for i, axis in ((1, "fsdp"), (2, "context"))} if fitting else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="some of the rows, separated by ;")
    parser.add_argument("--kinds", default="h200,v5p,v6e", help="of devices, also h100")
    parser.add_argument("--again", action="store_true", help="also those that the file holds")
    parser.add_argument("--output", default=os.path.join(HERE, "results", "plans.json"))
    args = parser.parse_args()
    rows = {}
    if os.path.exists(args.output):
        with open(args.output) as file:
            rows = {(row["name"], row["topology"]): row for row in json.load(file)["rows"]}
    names = args.only.split(";") if args.only else list(ROWS)
    for kind, name in itertools.product(args.kinds.split(","), names):
        topology = slice_of(ROWS[name], kind)
        if topology is None or not args.again and "error" not in rows.get((name, topology), {"error": ""}):
            continue
        rows[name, topology] = row = plan(name, topology)
        shown = ("name", "topology", "error", "peak_bytes", "fits", "would_fit", "compile_seconds")
        print({key: row[key] for key in shown if key in row}, flush=True)
        order = {name: number for number, name in enumerate(ROWS)}
        found = sorted(rows.values(), key=lambda row: (order.get(row["name"], len(order)), row["topology"]))
        with open(args.output, "w") as file:
            text = json.dumps({"what": "plans of large models", "rows": found})
            file.write(text.replace('{"name"', '\n{"name"') + "\n")


if __name__ == "__main__":
    main()
