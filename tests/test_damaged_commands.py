"""A checkpoint whose stored numbers were changed: every command says the same line and falls back to the same step."""

import importlib
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import tensorstore as ts
from flax.traverse_util import flatten_dict

import lcx
from lcx.checkpoint import Checkpointer, model_json
from lcx.convert import __main__ as convert_main
from lcx.convert import api
from lcx.errors import UserError
from lcx.model import init_params, llama

ROOT = pathlib.Path(__file__).resolve().parents[1]
WHAT = "params/final_norm/scale does not match the saved fingerprint"


def change(step):
    """Another number under a valid encoding, which only the fingerprint can tell."""
    base = {"driver": "ocdbt", "base": f"file://{step / 'params'}/", "path": "final_norm.scale/"}
    array = ts.open({"driver": "zarr", "kvstore": base}, open=True).result()
    array.write(np.asarray(array.read().result()) * 2).result()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir with steps 1 and 2, and the folder with what commands read besides."""
    folder = tmp_path_factory.mktemp("damaged")
    model = llama(
        vocab_size=258, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2, max_position_embeddings=16
    )
    tokenizer = {"kind": "bytes", "bos_id": 256, "eos_id": 257, "vocab_size": 258}
    with Checkpointer(folder / "run" / "checkpoints") as checkpointer:
        for step in (1, 2):
            params = init_params(model, jax.random.key(step))
            meta = {"model": model_json.to_json(model), "tokenizer": tokenizer}
            checkpointer.save(step, {"params": params}, json={"meta": meta}, wait=True)
    (folder / "a.fa").write_text(">a\nACGTACGT\n")
    (folder / "a.vcf").write_text("#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\na\t2\t.\tC\tG\t.\t.\t.\n")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": f"{i} and more text"}) + "\n" for i in range(60)))
    return folder


COMMANDS = {
    "train": ("train", "--gin_file={1}/configs/extend/yarn.gin --workdir=out --gin.MODEL='{0}' --gin.TEXT='a.jsonl' "
              "--gin.Dataset.tokenizer='bytes' --gin.CONTEXT_LENGTH=32 --gin.Trainer.batch_size=1 "
              "--gin.Trainer.accumulation=1"),
    "train, blocks": ("train", "--gin_file={1}/configs/linearize/llama_blocks.gin --workdir=out --gin.MODEL='{0}' "
                      "--gin.TEXT='a.jsonl' --gin.TOKENIZER='bytes' --gin.Trainer.seq_len=16 "
                      "--gin.Trainer.batch_size=1 --gin.Trainer.accumulation=1"),
    "evaluate": ("evaluate", "--checkpoint={0} --output=out --evals=passkey"),
    "generate": ("generate", "--checkpoint={0} --prompt=A"),
    "serve": ("serve", "--checkpoint={0} --port=0"),
    "convert to hf": ("convert.__main__", "--src={0} --dst=out --dst_format=hf"),
    "convert to lcx": ("convert.__main__", "--src={0} --dst=out --dst_format=lcx"),
    "score": ("score", "--checkpoint={0} --fasta=a.fa --output=out.tsv"),
    "variants": ("variants", "--checkpoint={0} --fasta=a.fa --variants=a.vcf --output=out.tsv"),
    "embed": ("embed", "--checkpoint={0} --fasta=a.fa --layers=layers.0 --output=out.npz"),
    "lcx.load": (None, ""),
}  # fmt: skip


def said(command, place, capsys):
    module, words = COMMANDS[command]
    if module is None:
        with pytest.raises(UserError) as caught:
            lcx.load(place)
        return str(caught.value)
    assert importlib.import_module(f"lcx.{module}").main(words.format(place, ROOT).split()) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_the_same(run, command, tmp_path, monkeypatch, capsys):
    """With a step that is named there is no other to fall back to; nor if it is the only one."""
    monkeypatch.chdir(run)
    monkeypatch.setenv("LCX_CACHE", str(run / "cache"))
    shutil.copytree(run / "run", tmp_path / "run")
    steps = tmp_path / "run" / "checkpoints"
    change(steps / "2")
    assert said(command, str(steps / "2"), capsys) == f"checkpoint {steps / '2'} is damaged: {WHAT}; use another step"
    shutil.rmtree(steps / "1")
    expected = f"no usable checkpoint in {steps}: step 2: {WHAT}; restore files from a backup"
    assert said(command, str(tmp_path / "run"), capsys) == expected
    assert not (run / "out.tsv").exists() and not (run / "out.npz").exists()


def converted(place, out):
    assert convert_main.main([f"--src={place}", f"--dst={out}", "--dst_format=lcx"]) == 0
    return lcx.load(out)[1]


def as_blocks_do(place, out):
    api.verify_source(place)
    source = api.source(place)
    return {path: source.read(path, tuple(map(slice, info.shape))) for path, info in source.leaves.items()}


@pytest.mark.parametrize("reader", [lambda place, out: lcx.load(place)[1], converted, as_blocks_do])
def test_every_reader_falls_back_with_the_same_line(run, reader, tmp_path, caplog):
    shutil.copytree(run / "run", tmp_path / "run")
    steps = tmp_path / "run" / "checkpoints"
    change(steps / "2")
    caplog.set_level("WARNING", "lcx.checkpoint")
    found = reader(str(tmp_path / "run"), str(tmp_path / "out"))
    lines = {record.getMessage() for record in caplog.records if record.name == "lcx.checkpoint"}
    assert lines == {f"damaged checkpoint in {steps} (step 2: {WHAT}); using step 1"}
    whole = lcx.load(run / "run" / "checkpoints" / "1")[1]
    jax.tree.map(np.testing.assert_array_equal, flatten_dict(found, sep="/"), flatten_dict(whole, sep="/"))
