"""Conversations on their way: rows of every layout, batches with a mask, a run, and generation in its template."""

import dataclasses
import json

import chat_templates as files
import numpy as np
import pytest
from conversations import (  # noqa: F401
    CONVERSATIONS,
    TOOL,
    cache_fixture,
    folders_fixture,
    oracle,
    read,
    theirs_fixture,
    turns,
    write_rows,
)

from lcx.data import Dataset, Mixture, load_tokenizer
from lcx.errors import UserError

# ------------------------------------------------------------------------------------------------------------- rows


def test_sharegpt_and_parquet_are_the_same_conversations(tmp_path, folders):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = [CONVERSATIONS[name] for name in ("plain", "no system", "unicode", "ends with user")]
    want = read(write_rows(tmp_path / "messages.jsonl", rows), folders["chatml"])
    spelled = {"user": "human", "assistant": "gpt", "system": "system"}
    other = [
        {"conversations": [{"from": spelled[m["role"]], "value": m["content"]} for m in row["messages"]]}
        for row in rows
    ]
    assert read(write_rows(tmp_path / "sharegpt.jsonl", other), folders["chatml"]) == want
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    assert read(tmp_path / "data.parquet", folders["chatml"]) == want
    beside = {"system": "be brief", "conversations": other[0]["conversations"][1:]}
    assert read(write_rows(tmp_path / "system.jsonl", [beside]), folders["chatml"]) == want[:1]


def test_tools_of_a_parquet_file_may_be_json_text(tmp_path, folders):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    row = {"messages": turns("a", "b"), "tools": [TOOL]}
    want = read(write_rows(tmp_path / "data.jsonl", [row]), folders["tools"])
    pq.write_table(pa.Table.from_pylist([{**row, "tools": json.dumps([TOOL])}]), tmp_path / "data.parquet")
    assert read(tmp_path / "data.parquet", folders["tools"]) == want


def test_text_and_conversations_in_one_run(tmp_path, folders):
    """Text has its loss everywhere, also beside conversations in one store."""
    source = (
        write_rows(
            tmp_path / "a.jsonl", [{"text": "hello there"}, CONVERSATIONS["plain"], {"messages": None}]
        ),
        write_rows(tmp_path / "b.jsonl", [{"text": "general"}, {"messages": []}]),
    )
    dataset = Dataset(source, tokenizer=str(folders["chatml"]), eval_fraction=0)
    masks = [mask.tolist() for mask in dataset.document_masks("train")]
    assert len(masks) == 3 and all(masks[0]) and all(masks[2]) and not all(masks[1]) and any(masks[1])
    (remark,) = dataset.remarks()
    share = sum(map(sum, masks)) / sum(map(len, masks))
    assert f"1 conversation of 3 documents; loss on {share:.1%} of {sum(map(len, masks))} tokens" in remark
    assert remark.endswith("; a conversation has no special tokens but its template's")


BAD_ROWS = [
    ({"messages": "hello"}, {"chat": True}, "'messages' is a str, expected a list of messages"),
    ({"messages": ["hello"]}, {"chat": True}, "line 1, message 1 is a str, expected an object"),
    ({"messages": [{"role": 3, "content": "x"}]}, {}, "message 1: 'role' is 3"),
    ({"messages": [{"content": "x"}]}, {"chat": True}, "message 1: 'role' is None"),
    ({"messages": [{"role": "user", "content": 7}]}, {}, "message 1: 'content' is a int"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, {}, "a part of type 'image'"),
    ({"messages": [{"role": "user", "content": [5]}]}, {}, "a part of type 'int'"),
    ({"conversations": [{"from": "function_call", "value": "x"}]}, {}, "'from' is 'function_call'"),
    ({"conversations": [{"from": ["a"], "value": "x"}]}, {}, "'from' is"),
    ({"conversations": [{"from": "gpt", "value": {}}]}, {}, "'value' a dict"),
    ({"messages": [{"role": "user", "content": "x"}], "tools": "{"}, {}, "'tools' is not a list"),
    ({"messages": [{"role": "user", "content": "x"}], "tools": ["a"]}, {}, "'tools' is not a list"),
    ({"messages": turns("x"), "chat_template_kwargs": 3}, {}, "'chat_template_kwargs' is a int"),
    ({"messages": [{"role": "user", "content": "x"}], "text": "y"}, {}, "has both 'messages' and 'text'"),
    ({"text": "x"}, {"chat": True}, "has fields ['text'], expected 'messages'"),
    ({"messages": [{"role": "user", "content": "x"}]}, {"chat": False}, "expected the field 'text'"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "settings", "message"), BAD_ROWS)
def test_rows_of_another_shape_are_refused_in_one_line(tmp_path, folders, row, settings, message):
    source = write_rows(tmp_path / "data.jsonl", [row])
    with pytest.raises(UserError) as found:
        read(source, folders["chatml"], **settings)
    assert message in str(found.value) and "data.jsonl" in str(found.value) and "\n" not in str(found.value)


def test_a_run_without_any_loss_is_refused(tmp_path, folders):
    source = write_rows(tmp_path / "data.jsonl", [{"messages": turns("hello there " * 9)}] * 2)
    ((_, mask), _) = read(source, folders["chatml"])
    assert not any(mask)
    dataset = Dataset(source, tokenizer=str(folders["chatml"]), eval_fraction=0)
    with pytest.raises(UserError, match=r"data.jsonl has a loss: no message has the role 'assistant'"):
        dataset.batches("train", global_batch_size=1, seq_len=8)


def test_both_columns_are_read_as_asked(tmp_path, folders):
    row = {"messages": turns("a", "b"), "text": "hello"}
    source = write_rows(tmp_path / "data.jsonl", [row])
    assert len(read(source, folders["chatml"], chat=False)[0][0]) < len(
        read(source, folders["chatml"], chat=True)[0][0]
    )


def test_half_a_surrogate_pair_is_replaced(tmp_path, folders):
    (tmp_path / "data.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a\\ud83d"}, {"role": "assistant", "content": "b"}]}\n'
    )
    ((ids, _),) = read(tmp_path / "data.jsonl", folders["chatml"])
    assert "a\N{REPLACEMENT CHARACTER}" in load_tokenizer(str(folders["chatml"])).decode(ids)


# ------------------------------------------------------------------------------------------------------------ batches


@pytest.fixture
def source(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        {
            "messages": turns(
                *["".join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(1, 60))) for _ in range(n)]
            )
        }
        for n in (2, 4, 3, 6, 2, 2, 8, 4) * 5
    ]
    return write_rows(tmp_path / "data.jsonl", [*rows, {"text": "a text without a speaker " * 9}])


@pytest.mark.parametrize("packing", ["concat", "first_fit", "windows"])
@pytest.mark.parametrize("document_mask", [True, False])
@pytest.mark.parametrize("split", ["train", "eval"])
def test_the_mask_arrives_in_the_weights_of_the_labels(source, folders, packing, document_mask, split):
    """Against the same rows without a mask: a label keeps its weight where its token has a loss, cut or not."""
    settings = {"tokenizer": str(folders["chatml"]), "packing": packing, "document_mask": document_mask}
    dataset = Dataset(source, eval_fraction=0.4, **settings)
    every = dataclasses.replace(dataset, chat_loss="all")
    arguments = {"global_batch_size": 4, "seq_len": 48, "shuffle": False, "repeat": False}
    masked, plain = dataset.batches(split, **arguments), every.batches(split, **arguments)
    store = dataset.open().store
    marked = np.where(store.loss_mask == 1, store.tokens.astype(np.int64) + 10_000, store.tokens)
    total = 0
    with masked, plain:
        for one, other in zip(masked, plain, strict=True):
            np.testing.assert_array_equal(one["labels"], other["labels"])
            weight = one["loss_weights"]
            assert ((weight == other["loss_weights"]) | (weight == 0)).all()
            total += weight.sum()
        assert masked.info["targets"] == total < plain.info["targets"]
    # The same plan over tokens that say themselves whether they have a loss.
    from lcx.data.packing import assemble

    (group,) = masked._groups
    rows = np.arange(group.plan.num_rows)
    truth = assemble(group.plan, marked, rows, document_mask=document_mask)
    found = assemble(group.plan, store.tokens, rows, document_mask=document_mask, loss_mask=store.loss_mask)
    np.testing.assert_array_equal(found["loss_weights"], truth["loss_weights"] * (truth["labels"] >= 10_000))
    assert found["loss_weights"].sum() == total > 0


def test_the_mask_survives_damage_and_worker_processes(source, folders):
    import pickle

    dataset = Dataset(source, tokenizer=str(folders["chatml"]))
    store = dataset.open().store
    before = store.loss_mask.copy()
    assert "loss_mask" not in pickle.loads(pickle.dumps(store)).__dict__
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(store)).loss_mask, before)
    path = store.folder / "loss_mask.bin"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    np.testing.assert_array_equal(dataset.open().store.loss_mask, before)
    path.unlink()
    np.testing.assert_array_equal(dataset.open().store.loss_mask, before)


def test_the_fingerprint_follows_the_template_and_the_settings(tmp_path, source, folders):
    def fingerprint(tokenizer="chatml", **settings):
        return Dataset(source, tokenizer=str(folders[tokenizer]), **settings).open().store.fingerprint

    (tmp_path / "other.jinja").write_text(files.CHATML.replace("helpful", "short"))
    seen = [
        fingerprint(),
        fingerprint("marked"),
        fingerprint(chat_loss="all"),
        fingerprint(chat_template=str(tmp_path / "other.jinja")),
    ]
    assert len(set(seen)) == 4
    (tmp_path / "same.jinja").write_text(files.CHATML)
    assert fingerprint(chat_template=str(tmp_path / "same.jinja")) == seen[0]


def test_a_mixture_of_text_and_conversations(tmp_path, source, folders):
    text = write_rows(tmp_path / "text.jsonl", [{"text": f"story {i} " * 20} for i in range(30)])
    parts = tuple((Dataset(s, tokenizer=str(folders["chatml"])), 1.0) for s in (source, text))
    with Mixture(parts).batches("train", global_batch_size=8, seq_len=32, vocab_size=500) as batches:
        weights = np.concatenate([next(batches)["loss_weights"] for _ in range(4)])
    share = weights.mean(axis=1)
    assert (share > 0.9).any() and (share < 0.8).any()
    assert len(Mixture(parts).remarks()) == 1


# ---------------------------------------------------------------------------------------------------------- generation


@pytest.fixture
def generated(monkeypatch):
    """What `stream_text` hands to the model: {"ids": ..., "stop": ...}."""
    from lcx import terminal

    seen = {}

    class Model:
        vocab_size = 1 << 20

    def stream(model, params, tokens, *, stop_tokens, **_):
        seen.update(ids=tokens[0], stop=set(stop_tokens))
        return iter([np.array([5])])

    monkeypatch.setattr(terminal, "load", lambda *_, **__: (Model(), {}))
    monkeypatch.setattr(terminal, "stream", stream)

    def run(folder, prompt, **settings):
        terminal.stream_text(checkpoint=str(folder), prompt=prompt, max_new_tokens=4, **settings)
        return seen

    return run


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral", "marked", "tools"])
@pytest.mark.parametrize("system", [None, "be brief"])
def test_generation_asks_in_the_same_template(generated, tmp_path, theirs, name, system):
    folder = files.write_tokenizer(tmp_path / "model", files.TEMPLATES[name])
    (folder / "config.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    found = generated(folder, "hello <|im_end|> 你好", chat=True, system=system)
    messages = turns("hello <|im_end|> 你好", system=system)
    assert (
        found["ids"] == oracle(theirs[name], {"messages": messages}, add_generation_prompt=True)["input_ids"]
    )
    end = {"llama3": "<|eot_id|>", "mistral": "</s>"}.get(name, "<|im_end|>")
    assert {7, 9, theirs[name].convert_tokens_to_ids(end)} <= found["stop"]


def test_generation_says_what_it_cannot_do(generated, tmp_path):
    folder = files.write_tokenizer(tmp_path / "model")
    (folder / "config.json").write_text("{}")
    for settings, message in [
        ({"chat": True}, "has no chat template .*set --chat_template to a .jinja file"),
        ({"chat": True, "chat_template": "nowhere"}, "--chat_template='nowhere' is not a file"),
        ({"system": "x"}, "set --chat"),
        ({"chat_template": "x"}, "set --chat"),
    ]:
        with pytest.raises(UserError, match=message):
            generated(folder, "hello", **settings)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    with pytest.raises(UserError, match="cannot render the prompt: no;"):
        generated(folder, "hello", chat=True)


def test_a_run_trains_on_conversations_and_answers_in_their_template(
    generated, tmp_path, source, folders, capfd
):
    """The template that the run was given is the one that its checkpoint is asked in."""
    import lcx
    from lcx.evals.loss_by_position import LossByPosition
    from lcx.evals.perplexity import Perplexity
    from lcx.model import llama
    from lcx.optim import AdamW
    from lcx.trainer import Trainer

    (tmp_path / "own.jinja").write_text(files.CHATML.replace("You are helpful.", "Short."))
    data = Dataset(source, tokenizer=str(folders["marked"]), chat_template=str(tmp_path / "own.jinja"))
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_layers": 1,
        "num_heads": 2,
        "max_position_embeddings": 64,
    }
    model = llama(vocab_size=512, **sizes)
    settings = {"steps": 2, "batch_size": 8, "seq_len": 48, "log_every": 1, "eval_every": 1}
    run = Trainer(data=data, model=model, optimizer=AdamW(learning_rate=1e-3), **settings).run(
        str(tmp_path / "run")
    )
    assert run.step == 2
    said = capfd.readouterr().err
    assert "40 conversations of 41 documents; loss on" in said
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    total = weight = 0.0
    with data.batches("eval", global_batch_size=8, seq_len=48) as batches:
        for batch in batches:
            logits = np.asarray(lcx.logits(model, run.state["params"], batch["tokens"], positions=batch["positions"],
                                           segment_ids=batch["segment_ids"]), np.float64)  # fmt: skip
            nll = (
                np.log(np.exp(logits).sum(-1))
                - np.take_along_axis(logits, batch["labels"][..., None], -1)[..., 0]
            )
            total += (nll * batch["loss_weights"]).sum()
            weight += batch["loss_weights"].sum()
    (last,) = [line["eval_loss"] for line in lines if line["step"] == 2 and "eval_loss" in line]
    assert last == pytest.approx(total / weight, abs=1e-4)
    by_position, perplexity = (
        LossByPosition(data, lengths=(48,), document_mask=True),
        Perplexity(data, windows=(512,)),
    )
    (measured,) = by_position(model, run.state["params"], None)["lengths"]
    assert measured["nll"] == pytest.approx(last, abs=1e-4) and measured["tokens"] == weight
    (measured,) = perplexity(model, run.state["params"], None)["windows"]
    assert measured["tokens"] == sum(mask[1:].sum() for mask in data.document_masks("eval", packed=False))
    ids = generated(tmp_path / "run", "hello", chat=True)["ids"]
    assert "Short." in load_tokenizer(str(folders["marked"])).decode(ids)
