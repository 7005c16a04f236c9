"""Generates pages of docs/ from what they describe, so that they cannot become outdated.

commands.md is generated from the parsers of the commands, configs.md from the headers of the files in configs/,
families.md from the table of Hugging Face families, by trying a small model of each. The table of what is supported in
docs/index.md is that of README.md.

    python scripts/docs_commands.py
"""

import argparse
import contextlib
import importlib
import inspect
import pathlib
import sys
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parents[1]
COMMANDS = ("train", "plan", "evaluate", "generate", "serve", "embed", "variants", "score", "convert")
COMMANDS += ("data", "report")
HEADER = """# Command lines

This page is written by `python scripts/docs_commands.py` from the commands' own parsers; `--help` shows the same text.
Commands exit with 0 when they did what was asked, with 2 and one line on stderr when the input is wrong, with 130
after Ctrl-C. [Write a configuration](../how-to/configure.md) explains `--gin_file` and `--gin.NAME=VALUE`.
"""


class Captured(Exception):
    def __init__(self, parser: argparse.ArgumentParser, parsed: argparse.Namespace | None = None):
        self.parser, self.parsed = parser, parsed


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser that `python -m lcx.<command>` builds, intercepted when it parses."""
    name = f"lcx.{command}"
    module = importlib.import_module(name)
    if not hasattr(module, "main"):
        module = importlib.import_module(f"{name}.__main__")

    def parse_known_args(self, args=None, namespace=None):
        raise Captured(self)

    original, argv = argparse.ArgumentParser.parse_known_args, sys.argv
    argparse.ArgumentParser.parse_known_args, sys.argv = parse_known_args, [name]
    try:
        module.main()
    except Captured as caught:
        return caught.parser
    finally:
        argparse.ArgumentParser.parse_known_args, sys.argv = original, argv
    raise RuntimeError(f"{name} parses no arguments")


def _value(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    if action.choices:
        return "|".join(map(str, action.choices))
    value = str(action.metavar or action.dest.upper())
    return f"{value} ..." if action.nargs in ("+", "*") else value


def section(command: str) -> str:
    parser = parser_of(command)
    lines = [f"\n## python -m lcx.{command}\n", _description(parser.description or ""), ""]
    lines += ["| flag | value | |", "|---|---|---|"]
    for action in parser._actions:
        if action.dest == "help":
            continue
        flag = ", ".join(f"`{name}`" for name in action.option_strings)
        text = " ".join((action.help or "").split()).replace("|", "\\|")
        required = " (required)" if action.required else ""
        value = _value(action).replace("|", "\\|")
        lines.append(f"| {flag}{required} | {value} | {text} |")
    return "\n".join(lines) + "\n"


def _description(text: str) -> str:
    """The description of a parser as Markdown: indented examples become code blocks with the text of --help."""
    out: list[str] = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        lines = paragraph.split("\n")
        prose = [line for line in lines if not line.startswith("  ")]
        code = [line[2:] for line in lines if line.startswith("  ")]
        out.append("\n".join(prose))
        if code:
            out.append("\n".join(["```text", *code, "```"]))
    return "\n\n".join(out)


def page(commands: Sequence[str] = COMMANDS) -> str:
    return HEADER + "".join(section(command) for command in commands)


CONFIGS_HEADER = """# Configurations

The recipes in `configs/`; this page is written by `python scripts/docs_commands.py` from their first lines. Each file
begins with what it does, on which hardware, how long it takes, what to expect, and its command.
[Write a configuration](../how-to/configure.md) explains how to change them.
"""
FOLDERS = {
    "": "Start",
    "extend": "Extend",
    "linearize": "Linearize",
    "pretrain": "Pretrain",
    "pretrain/genome": "Pretrain: StripedHyena 2 and a Llama on a genome",
    "pretrain/two_mamba": "Pretrain: the models of the 2Mamba paper",
    "pretrain/two_mamba/sizes": "Pretrain: the sizes of the 2Mamba paper, to be included",
    "pretrain/two_mamba/mlp": "Pretrain: another MLP for them, to be added",
    "eval": "Evaluate",
    "models": "Models, to be included",
    "data": "Data, to be included",
}


def configs_page() -> str:
    """A table of each folder of configs/: a file, and the first line of its header."""
    lines = [CONFIGS_HEADER]
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "configs").rglob("*.gin")):
        name = path.relative_to(ROOT / "configs")
        title = path.read_text().splitlines()[0].lstrip("# ").rstrip(".")
        folder = name.parent.as_posix().removeprefix(".")
        found.setdefault(folder, []).append(f"| `configs/{name.as_posix()}` | {title} |")
    for folder in sorted(
        found, key=lambda name: list(FOLDERS).index(name) if name in FOLDERS else len(FOLDERS)
    ):
        lines += [
            f"## {FOLDERS.get(folder, folder)}\n",
            "| file | what it does |",
            "|---|---|",
            *found[folder],
            "",
        ]
    return "\n".join(lines).rstrip() + "\n"


FAMILIES_HEADER = """# Model families

What lcx does with the language models of each Hugging Face `model_type`; this page is written by
`python scripts/docs_commands.py` from the table of families in the code, by trying it on a small model of each.

- **layers**: their kinds with the family's defaults: `full`, `sliding` with a window, or `chunked`; `no rope`: no
  positions; `latent`: the cache holds a vector per token instead of keys and values of heads.
- **extend**: the layers whose rotary embedding `rope_scaling` changes. It may hold one scaling for each kind of layer
  instead: `{"full_attention": {...}, "sliding_attention": {...}}`.
- **LoRA**: the projections that `LoRA.targets` can reach; their adapters are read from and written to PEFT folders.
  Experts get a pair each, written as PEFT had them with transformers 4, a module for each projection of each expert;
  PEFT 0.21 with transformers 5 fuses those of Mixtral, OLMoE, Qwen3-MoE and DeepSeek (if no other module of the same
  name has a pair, which is said), and refuses Qwen2-MoE's. Adapters with `target_parameters` are refused, and pairs of
  the experts of gpt-oss, Llama 4 and Gemma 4 are only written merged into the model.
- **linearize**: whether its softmax layers can become linear attention; of the others, `Linearize.keep_softmax` lists
  the layers that stay.
- **export**: every family is written back, with byte-equal tensors, as transformers 4 and 5 read it. With 4.57.6, small
  random models of all families but Gemma 4 and Ministral 3, which it does not have, load without a missing or
  unexpected tensor and give the logits of 5.23, in float32 equal or within 4e-6 (Nemotron: 3e-5).
  Some things it cannot do: it rejects an OLMo 2 whose scaling is neither `linear` nor `dynamic`, takes a
  `swiglu_limit` of 7 for every gpt-oss, ignores the scaling of every Nemotron and DeepSeek V2's `mscale_all_dim`, and
  lets DeepSeek V3 choose experts of other groups where the biased scores of its best groups are negative.

Of Gemma 4, the models without embeddings for each layer are read (31B, 26B-A4B), and E2B and E4B refused. Its rotation
of a quarter of each head is scaled by `{"rope_type": "proportional", "factor": ...}`, as no other type turns the same
dimensions.

Gemma 3 and 4, Llama 4, Mistral Small 3.1 and Ministral 3 are published with an encoder of images. Of such folders
(`gemma3`, `gemma4`, `llama4`, `mistral3`) the text model is read, and a line says what is left out; it is written as a
folder of text alone, which transformers opens with the family's `ForCausalLM`. An adapter that was trained on the
published folder is read if it changes the text model alone, and refused if it changes the encoder too; one that lcx
writes fits the folder of text alone.

Recipes as their authors published them are in `configs/extend`: `llama3.gin` (ProLong), `olmo3.gin`, `smollm3.gin`,
`qwen3.gin`, `gemma3.gin` and `deepseek.gin`; their headers give the sources, and what was not published. For the other
families too little is: of Granite 3.1, that 500 billion tokens took it from 4K to 128K in increments of window and
`rope_theta`, but not which.

DeepSeek V3's released files are read as they are: weights in FP8 become bfloat16, and the layers of multi-token
prediction are left out, which is said. The biases of its router are kept in float32 and have no gradient.

Over several devices, all families do the same ([meshes](../concepts/meshes.md)): with `context` > 1 each
device holds a part of every row, and attention sends heads, halos, or keys and values, as its kind and the row's length
ask for; with `tensor` > 1 each device holds and computes its share of the experts, or of their width where their number
is not divisible.
"""
_SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 12, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 4096, "sliding_window": 64,
    "shared_expert_intermediate_size": 32, "num_experts_per_tok": 2, "tie_word_embeddings": True,
    "hidden_size_per_layer_input": 0, "global_head_dim": 16, "enable_moe_block": True, "num_experts": 4,
    "top_k_experts": 2, "moe_intermediate_size": 32,
}  # fmt: skip


def _family_row(model_type: str) -> str:
    """A row of the page: what was tried on a small model."""
    from lcx import extend, linearize, mixers
    from lcx.convert.hf import families
    from lcx.convert.hf.experts import WithExperts
    from lcx.convert.hf.layered import Layered
    from lcx.convert.peft import adapter
    from lcx.errors import UserError
    from lcx.lora import all_targets
    from lcx.model import layers

    family = families.FAMILIES[model_type]
    config = {"model_type": model_type, **_SMALL}
    if model_type in ("llama", "ministral3"):
        del config["sliding_window"]
    if isinstance(family, WithExperts):
        config |= {family.experts_key: 4, family.size_key: 32, "n_group": 1, "topk_group": 1}
    if isinstance(family, Layered) and "sliding_window" in dict(family.fixed):
        config |= {"num_key_value_heads": 4, "sliding_window": None}
    model = family.model(config, dtype="float32")
    kinds: dict[str, None] = {}
    for layer in layers(model):
        kind = extend.kind_of(layer.block.mixer).removesuffix("_attention")
        kind += ", latent" * (mixers.kind(layer.block.mixer) == "LatentAttention")
        kinds[kind + ("" if layer.block.mixer.rope else ", no rope")] = None

    def scaled() -> str:
        for name, factor in (("linear", 4.0), ("proportional", 4.0), ("yarn", 64.0)):  # the last for 32 times as it is
            with contextlib.suppress(UserError):
                wider = extend.extend_model(model, {"rope_type": name, "factor": factor}, None)
                break
        else:
            return "none; `context_length` alone"
        pairs = zip(layers(model), layers(wider), strict=True)
        changed = {extend.kind_of(a.block.mixer) for a, b in pairs if a.block.mixer.rope != b.block.mixer.rope}
        return " and ".join(sorted(kind.removesuffix("_attention") for kind in changed))

    def linear() -> str:
        try:
            linearize.Linearize(window=8, feature_dim=4).model(model)
        except UserError as error:
            why = {"softcap": "soft cap of scores", "sinks": "attention sinks", "LatentAttention": "latent attention"}
            why |= {"chunked": "chunks", "temperature": "temperature of scores", "value_norm": "norms of values"}
            return f"no: {next(what for said, what in why.items() if said in str(error))}"
        return "yes"

    def pairs() -> str:
        places = {part.path for parts in adapter.modules(model).values() for part in parts}
        lost = [target for target in all_targets(model) if target.path not in places]
        if not all(len(target.stack) == 2 for target in lost):
            return "not all"
        return "all; adapters but those of experts" if lost else "all"

    cells = [f"`{model_type}`", "; ".join(kinds), scaled(), pairs(), linear(), "yes"]
    return "| " + " | ".join(cells) + " |"


def families_page() -> str:
    """What lcx does with each family."""
    from lcx.convert.hf import families

    head = "| model_type | layers | extend | LoRA | linearize | export |"
    lines = [FAMILIES_HEADER, head, "|---" * 6 + "|"]
    return "\n".join([*lines, *map(_family_row, families.FAMILIES)]) + "\n"


def index_page() -> str:
    """docs/index.md, which ends with README.md's table of what is supported."""
    heading = "## What is supported, and what is not\n"
    before = INDEX.read_text().partition(heading)[0]
    table = (ROOT / "README.md").read_text().partition(heading)[2].partition("\n## ")[0]
    return f"{before}{heading}{table.replace('](docs/', '](')}"


INDEX = ROOT / "docs" / "index.md"
PAGES = {
    INDEX: index_page,
    ROOT / "docs" / "reference" / "families.md": families_page,
    ROOT / "docs" / "reference" / "commands.md": page,
    ROOT / "docs" / "reference" / "configs.md": configs_page,
}

if __name__ == "__main__":
    for path, write in PAGES.items():
        path.write_text(write())
