"""The small world in which the documentation's commands run: what each /path/to/... of the pages is, at toy size.

A command runs as it stands on the page, followed by flags that make it small (`small`).
"""

from __future__ import annotations

import gzip
import json
import os
import pathlib
import re
import shutil

import jax
import numpy as np
from tiny_runs import write_text

import lcx
from lcx import model as model_lib
from lcx.mixers.two_mamba import published
from lcx.model import Block, Decoder, Mlp, Stage
from lcx.rope import Rope
from lcx.striped_hyena import striped_hyena

WINDOW = 64
TRAIN = {
    "Trainer.steps": "2",
    "Trainer.batch_size": "2",
    "Trainer.accumulation": "1",
    "Trainer.eval_batches": "1",
    "Trainer.eval_every": "1000",  # never within so few steps; 0 contradicts a plateau schedule
    "Trainer.seq_len": "128",
    "Trainer.remat": "'none'",
    "Trainer.dtype": "'float32'",
    "AdamW.warmup_steps": "1",
}
TINY = {"hidden_size": "32", "intermediate_size": "32", "num_heads": "2"}
LADDER = {
    f"to_{name}/Rung.{key}": value
    for name, length in (("8k", 128), ("16k", 192), ("32k", 256))
    for key, value in {"context_length": str(length), "steps": "1", "batch_size": "2"}.items()
}
# Of a configuration: settings beyond TRAIN that make it small.
SETTINGS: dict[str, dict[str, str]] = {
    "extend/yarn.gin": {"CONTEXT_LENGTH": "128"},
    "extend/lora.gin": {"CONTEXT_LENGTH": "128"},
    "extend/evo2_lora.gin": {"LoRA.rank": "2"},
    "extend/pi.gin": {"CONTEXT_LENGTH": "128"},
    "extend/ladder.gin": LADDER,
    "linearize/llama_transfer.gin": {"Linearize.window": "8", "Linearize.feature_dim": "4"},
    "linearize/llama_blocks.gin": {"Linearize.window": "8", "Linearize.feature_dim": "4"},
    "linearize/tinystories_transfer.gin": {"Linearize.window": "8", "Linearize.feature_dim": "4", "SEQ_LEN": "128"},
    "linearize/tinystories_no_transfer.gin": {"Linearize.window": "8", "Linearize.feature_dim": "4", "SEQ_LEN": "128"},
    "quickstart.gin": {f"model.llama.{key}": value for key, value in TINY.items()} | {"model.llama.num_layers": "1"},
    "pretrain/two_mamba.gin": {"Decoder.hidden_size": "32", "Stage.repeat": "1", "Mlp.intermediate_size": "32",
                               "TwoMamba.num_heads": "2", "TwoMamba.head_dim": "8"},
    "hybrid.gin": {"Stage.pattern": "(@model.Block(), @attend/model.Block())"},  # one of each of its four blocks
    "pretrain/striped_hyena.gin": {f"striped_hyena.{key}": value for key, value in TINY.items()}
    | {"striped_hyena.se_groups": "2", "striped_hyena.mr_groups": "2"},
}  # fmt: skip
CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
ONE_EVALUATION = {
    "evaluate.evals": "(@lcx.evals.loss_by_position.LossByPosition(),)",
    "LossByPosition.max_tokens": "256",
}


def make(folder: pathlib.Path) -> None:
    """Makes path/to/ in the folder where the commands run, with the files that the pages name."""
    to = folder / "path" / "to"
    write_text(to, documents=4)  # to/text/*.txt
    (to / "text").rename(to / "books")
    (to / "books" / "00.txt").rename(to / "held_out.txt")
    (to / "text").mkdir()
    texts = [path.read_text() for path in sorted((to / "books").iterdir())]
    (to / "text" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (to / "novels").symlink_to(to / "books")
    stories = to / "reference" / "data" / "text" / "tinystories_train_2MiB.txt"
    stories.parent.mkdir(parents=True)
    for path in (stories, to / "tinystories.txt"):
        path.write_text("<|endoftext|>".join(texts))
    (folder / "long_prompt.txt").write_text("def main():\n    return 1\n")
    chats = ([{"role": "user", "content": text[:20]}, {"role": "assistant", "content": text[20:60]}] for text in texts)
    (to / "conversations.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    _models(to)
    _genomes(to)


def _models(to: pathlib.Path) -> None:
    model = model_lib.llama(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=32,
        num_layers=2,
        num_heads=2,
        max_position_embeddings=WINDOW,
        rope=Rope(),
    )
    lcx.save(to / "hf_folder", model, model_lib.init_params(model, jax.random.key(0)), format="hf")
    write_tokenizer(to / "hf_folder")
    shutil.copytree(to / "hf_folder", to / "chat_folder")
    for weights in (to / "babyllama105", to / "reference" / "data" / "weights" / "babyllama105"):
        weights.mkdir(parents=True)
        (weights / "hf").symlink_to(to / "hf_folder")
    (to / "chat_folder" / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    mixer = published("squared__sm_norm__A_mask_type_neg_softplus__in_conv_k_2", num_heads=2, head_dim=16)
    stages = (Stage((Block(mixer=mixer, mlp=Mlp(32, parent=None), parent=None),), 1),)
    two_mamba = Decoder(258, 32, stages, max_position_embeddings=WINDOW, parent=None)
    params = model_lib.init_params(two_mamba, jax.random.key(0))
    lcx.save(to / "two_mamba_folder", two_mamba, params, format="two_mamba")
    write_tokenizer(to / "two_mamba_folder")
    evo2 = striped_hyena(
        pattern="SH*",
        hidden_size=32,
        intermediate_size=32,
        num_heads=2,
        se_groups=2,
        mr_groups=2,
        max_position_embeddings=128,  # no shorter than the filters, as savanna wants it
        init_length=128,
    )
    lcx.save(to / "savanna_folder", evo2, model_lib.init_params(evo2, jax.random.key(0)), format="savanna")
    shutil.copy(next((to / "savanna_folder").rglob("*.pt")), to / "evo2_7b.pt")


def write_tokenizer(folder: pathlib.Path) -> None:
    """A tokenizer.json whose tokens are the 256 bytes, and two of its own."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "<s>", "</s>"])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))


def _genomes(to: pathlib.Path) -> None:
    letters = "".join(np.random.default_rng(0).choice(list("ACGT"), 1200))
    fasta = "".join(f">record{i}\n{letters[i * 300 : (i + 1) * 300]}\n" for i in range(4))
    (to / "genomes").mkdir()
    for path in (to / "genome.fna.gz", to / "genomes" / "a.fna.gz"):
        path.write_bytes(gzip.compress(fasta.encode()))
    (to / "sequences.fa").write_text(fasta)
    other = "A" if letters[9] != "A" else "C"
    (to / "variants.vcf").write_text(
        "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
        f"record0\t10\t.\t{letters[9]}\t{other}\t.\t.\t.\n"
    )


def with_includes(file: str) -> list[str]:
    """The file and what it includes, as paths from the folder where commands run."""
    found = [os.path.normpath(file)]
    for name in re.findall(r"^include '(.+)'", pathlib.Path(file).read_text(), re.M):
        beside = os.path.join(os.path.dirname(file), name)
        found += with_includes(beside if os.path.exists(beside) else name)
    return found


def small(verb: str, words: list[str], folder: pathlib.Path) -> list[str]:
    """The words of a command of the pages, with flags after them that make it small."""
    words = [word.replace("/path/to/", f"{folder}/path/to/") for word in words]
    files = [word.removeprefix("--gin_file=") for word in words if word.startswith("--gin_file=")]
    files = [name for file in files for name in with_includes(file)]
    texts = "".join(pathlib.Path(name).read_text() for name in files)
    known = "Dataset" if files else "lcx.data.dataset.Dataset"  # without a file, only other tests have imported it
    cache = {f"{known}.cache_dir": f"'{folder}/cache'"} if not files or "import data" in texts else {}
    if re.search(r"^data.Dataset.source = 'stdlib'", texts, re.M):
        cache |= {"Dataset.source": f"'{folder}/path/to/books/*.txt'"}
    if verb == "train":
        own = [SETTINGS.get(name.removeprefix("configs/"), {}) for name in reversed(files)]
        extra = TRAIN | cache | {key: value for settings in own for key, value in settings.items()}
    elif verb == "evaluate":
        extra = ONE_EVALUATION | cache if not any("dna" in n or "sequences" in n for n in files) else {}
        extra = extra if not any(word.startswith(("--gin.evaluate.evals", "--evals")) for word in words) else cache
    elif verb == "generate":
        return [*words, "--max_new_tokens=4"]
    else:
        extra = {}
    return [*words, *(f"--gin.{name}={value}" for name, value in extra.items())]
