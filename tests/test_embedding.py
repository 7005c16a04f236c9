"""Embeddings against transformers' hidden states, and pieces, windows, batches and strands against whole rows."""

import json
import pathlib

import jax
import numpy as np
import pytest
import torch
from doc_world import write_tokenizer

import lcx
from lcx import activations, embedding
from lcx import model as model_lib
from lcx.data.nucleotides import reverse_complement
from lcx.embed import main
from lcx.errors import UserError
from lcx.locks import LOCK, only_writer
from lcx.striped_hyena import striped_hyena

rng = np.random.default_rng(0)
DNA = ["".join(rng.choice(list("ACGT"), n)) for n in (300, 17, 1, 110)]
EVERY = [
    "0", "layers.1.input", "2.after_mixer", "layers.3", "blocks.1.mlp.l3", "blocks.2.projections", "-1.mixer",
    "blocks.3.inner_mha_cls.out_proj", "0.mixer.out_proj.input", "embed", "norm",
]  # fmt: skip


@pytest.fixture(scope="module")
def evo2():
    model = striped_hyena(
        pattern="SDH*", hidden_size=32, intermediate_size=32, num_heads=2, se_groups=2, mr_groups=2,
        max_position_embeddings=512, init_length=128,
    )  # fmt: skip
    return model, model_lib.init_params(model, jax.random.key(0))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """(folder, transformers' model)."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("llama") / "m"
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder, model


def hidden_states(model, tokens):
    with torch.no_grad():
        found = model.model(torch.tensor([tokens]), output_hidden_states=True)
    inside = {}

    def keep(name):
        return lambda module, args, out: inside.update({name: out[0] if isinstance(out, tuple) else out})

    hooks = [
        model.model.layers[1].self_attn.register_forward_hook(keep("model.layers.1.self_attn")),
        model.model.layers[2].mlp.down_proj.register_forward_hook(keep("model.layers.2.mlp.down_proj")),
        model.model.layers[0].post_attention_layernorm.register_forward_hook(keep("layers.0.post_attention_layernorm")),
    ]
    with torch.no_grad():
        model.model(torch.tensor([tokens]))
    for hook in hooks:
        hook.remove()
    states = {"layers.0": found.hidden_states[1], "1.input": found.hidden_states[1], "1": found.hidden_states[2]}
    states |= {"embed": found.hidden_states[0], "final_norm": found.hidden_states[-1], **inside}
    return {name: np.asarray(x[0]) for name, x in states.items()}


@pytest.mark.parametrize("pool", ["none", "mean", "last", "max"])
def test_activations_are_those_of_transformers(llama, pool):
    folder, theirs = llama
    model, params = lcx.load(folder)
    rows = [rng.integers(0, 258, n).tolist() for n in (40, 9)]
    expected = [hidden_states(theirs, row) for row in rows]
    found = lcx.embed(model, params, rows, layers=list(expected[0]), pool=pool, piece_length=16)
    reduce = {"none": lambda x: x, "mean": lambda x: x.mean(0), "last": lambda x: x[-1], "max": lambda x: x.max(0)}
    for name, values in found.items():
        for i, states in enumerate(expected):
            np.testing.assert_allclose(values[i], reduce[pool](states[name]), atol=2e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def whole(evo2):
    """At every position, each sequence alone in one piece."""
    rows = [lcx.embed(*evo2, [text], layers=EVERY, pool="none", piece_length=512) for text in DNA]
    return {name: [row[name][0] for row in rows] for name in EVERY}


@pytest.mark.parametrize(("piece", "pools"), [(64, ()), (96, ("mean",))])
def test_pieces_give_the_same_as_the_whole(evo2, whole, piece, pools):
    found = lcx.embed(*evo2, DNA, layers=EVERY, pool="none", piece_length=piece)
    pooled = {pool: lcx.embed(*evo2, DNA, layers=EVERY, pool=pool, piece_length=piece) for pool in pools}
    for name, expected in whole.items():
        scale = max(1, max(np.abs(x).max() for x in expected))
        for i, x in enumerate(expected):
            np.testing.assert_allclose(found[name][i], x, atol=1e-4 * scale)
            for pool in pools:
                np.testing.assert_allclose(pooled[pool][name][i], x.mean(0), atol=1e-4 * scale)
    tokens = np.frombuffer(DNA[0].encode(), np.uint8)[None].astype(np.int32)
    logits = whole["norm"][0] @ np.asarray(evo2[1]["embed"]["embedding"]).T  # the head is the embedding
    np.testing.assert_allclose(logits, lcx.logits(*evo2, tokens)[0], atol=1e-4)
    assert whole["blocks.2.projections"][0].shape == (300, 96)


def test_windows_and_strands(evo2):
    names = ["2", "blocks.1.mlp.l3"]
    found = lcx.embed(*evo2, DNA, layers=names, window=100, overlap=30)
    spans = [(0, 100), (70, 170), (140, 240), (210, 300)]
    for name in names:
        assert [len(x) for x in found[name]] == [4, 1, 1, 2]  # 110 letters: 0..100 and 70..110
        alone = lcx.embed(*evo2, [DNA[0][a:b] for a, b in spans], layers=names)
        np.testing.assert_allclose(found[name][0], alone[name], atol=1e-5)
    both = lcx.embed(*evo2, DNA, layers=names, window=100, overlap=30, reverse_complement=True)
    other = lcx.embed(*evo2, [reverse_complement(DNA[0][a:b]) for a, b in spans], layers=names)
    np.testing.assert_allclose(both["2"][0], (alone["2"] + other["2"]) / 2, atol=1e-5)
    per_letter = lcx.embed(*evo2, DNA[1:2], layers=["2"], pool=None, reverse_complement=True)["2"][0]
    strands = lcx.embed(*evo2, [DNA[1], reverse_complement(DNA[1])], layers=["2"], pool="none")["2"]
    np.testing.assert_allclose(per_letter, (strands[0] + strands[1][::-1]) / 2, atol=1e-5)


def test_arrays_and_single_names(evo2):
    tokens = rng.integers(0, 255, (3, 20)).astype(np.int32)
    found = lcx.embed(*evo2, tokens, layers=2, pool="none")
    assert found["2"].shape == (3, 20, 32) and found["2"].dtype == np.float32
    assert lcx.embed(*evo2, tokens, layers="blocks.2")["blocks.2"].shape == (3, 32)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"layers": []}, "layers is empty"),
        ({"layers": ["9"]}, "the layers 0 to 3"),
        ({"layers": ["0", 0]}, "layers has '0' twice"),
        ({"layers": ["blocks.1.mlp.l9"]}, "mlp.down_proj"),
        ({"layers": ["nothing"]}, "embed, final_norm and layers.N"),
        ({"pool": "sum"}, "expected one of mean, last, max, none"),
        ({"overlap": 3}, "overlap is 3"),
        ({"window": 0}, "window is 0"),
        ({"piece_length": 0}, "piece_length is 0"),
        ({"sequences": [""]}, "sequence 0 is empty"),
        ({"sequences": [[1, 600]]}, "token ids from 0 to 511"),
        ({"sequences": [[1, 2]], "reverse_complement": True}, "found token ids"),
    ],
)
def test_bad_settings_are_one_line(evo2, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        lcx.embed(*evo2, **{"sequences": ["ACGT"], "layers": ["2"], **settings})
    assert "\n" not in str(caught.value)


def test_text_needs_a_tokenizer(llama):
    model, params = lcx.load(llama[0])
    with pytest.raises(UserError, match="set tokenizer"):
        lcx.embed(model, params, ["hi"], layers=[0])
    tokenizer = lcx.load_tokenizer(llama[0])
    found = lcx.embed(model, params, ["hi there"], layers=[0], tokenizer=tokenizer)["0"]
    ids = tokenizer.encode("hi there").tolist()
    np.testing.assert_allclose(found, lcx.embed(model, params, [ids], layers=[0])["0"], atol=1e-5)


def test_memory_bound_of_positions(evo2, monkeypatch):
    monkeypatch.setattr(embedding, "_MOST_NUMBERS", 128 * 4 * 32)
    embedder = embedding.Embedder(*evo2, ["2"], pool="none")
    assert embedder.piece_length == 128
    assert isinstance(activations.points(evo2[0], ["2"])["2"], activations.Point)


def read(path):
    if path.suffix == ".npz":
        found = np.load(path)
        return {name: found[name] for name in found.files}
    if path.suffix == ".parquet":
        table = pytest.importorskip("pyarrow.parquet").read_table(path)
        return {name: np.array(table[name].to_pylist()) for name in table.column_names}
    import tensorstore as ts

    found = {"record": np.array((path / "record.txt").read_text().splitlines())}
    for folder in path.iterdir():
        if folder.is_dir():
            spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{folder}/"}}
            found[folder.name] = ts.open(spec).result().read().result()
    return found


@pytest.mark.parametrize("ending", ["npz", "parquet", "zarr"])
def test_the_command(ending, evo2, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lcx.save("evo2", *evo2, format="savanna")
    pathlib.Path("g.fa").write_text("".join(f">r{i}\n{text.lower()}\n" for i, text in enumerate(DNA)) + ">none\n")
    output = f"out/e.{ending}"
    words = ["--checkpoint=evo2", "--fasta=g.fa", "--layers=blocks.1.mlp.l3, 2", f"--output={output}", "--window=100"]
    assert main(words) == 0
    assert "because they are empty: 1 sequence" in capsys.readouterr().err
    found = read(tmp_path / output)
    assert list(found["record"]) == ["g.fa:r0"] * 3 + ["g.fa:r1", "g.fa:r2"] + ["g.fa:r3"] * 2
    assert list(found["stop"][:3]) == [100, 200, 300] and list(found["start"][:3]) == [0, 100, 200]
    expected = lcx.embed(*evo2, DNA, layers=["blocks.1.mlp.l3", "2"], window=100)
    for name, rows in expected.items():
        np.testing.assert_allclose(found[name], np.concatenate(rows), atol=1e-5)
    assert main(words) == 2 and "there already" in capsys.readouterr().err
    assert [path.name for path in pathlib.Path("out").iterdir()] == [f"e.{ending}"]
    with only_writer(f"{output}{LOCK}", of="x", setting="y"):
        assert main([*words, "--overwrite"]) == 2 and "is being written by" in capsys.readouterr().err
    if ending == "npz":
        pathlib.Path("texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DNA))
        assert main([*words[:1], "--dataset=texts.jsonl", *words[2:], "--overwrite", "--pool=none"]) == 0
        assert read(tmp_path / output)["2"].shape == (sum(map(len, DNA)), 32)
        assert main([*words, "--dataset=texts.jsonl"]) == 2
        of_text = [words[0], "--dataset=texts.jsonl", *words[2:], "--overwrite"]
        pathlib.Path("notes.jsonl").write_text('{"text": "hello"}\nno JSON\n')
        of_notes = [words[0], "--dataset=notes.jsonl", *words[2:], "--overwrite"]
        for refused, says in (
            ([*of_text, "--both_strands"], "--both_strands needs --fasta"),
            ([*of_text, "--keep_case"], "--keep_case needs --fasta"),
            ([*words, "--overwrite", "--text_field=x"], "--text_field needs --dataset"),
            (of_notes, "(--on_bad_line=skip leaves such lines out)"),
        ):
            capsys.readouterr()
            assert main(refused) == 2
            error = capsys.readouterr().err
            assert says in error and "Dataset" not in error, error
        assert main([*of_notes, "--on_bad_line=skip"]) == 0
        assert "1 row skipped that cannot be read" in capsys.readouterr().err
        pathlib.Path("p.fa").write_text(">p1\nMKTAYIAKQRQISFVKSHFSRQ\n>g1\nACGTACGTNNACGT\n")
        assert main([words[0], "--fasta=p.fa", *words[2:], "--overwrite"]) == 0
        assert "T are most of 1 of 2 sequences, the first 'p.fa:p1': expected DNA" in capsys.readouterr().err
        with pytest.raises(UserError, match="holds 'e', which is no letter of DNA or RNA"):
            lcx.embed(*evo2, ["hello"], layers="2", reverse_complement=True)
        assert main([*words[:3], "--output=x.csv"]) == 2
