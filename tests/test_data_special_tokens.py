"""Which special tokens stand around a text, in data, evaluations and prompts; what keeps documents of a row apart."""

import dataclasses

import numpy as np
import pytest

from lcx.data import ByteTokenizer, Dataset, Mixture, load_tokenizer, separating_tokens, special_tokens
from lcx.data.special import SpecialTokens, described
from lcx.errors import UserError
from lcx.evals import passkey
from lcx.evals.support import documents


@dataclasses.dataclass(frozen=True)
class Kind(ByteTokenizer):
    """Bytes that say themselves what they add."""

    adds: SpecialTokens = SpecialTokens()

    @property
    def special(self):
        return self.adds


NOTHING, BOS, BOTH = SpecialTokens(), SpecialTokens((256,)), SpecialTokens((256,), (257,))


@pytest.mark.parametrize(
    ("adds", "settings", "expected"),
    [
        (
            NOTHING,
            {},
            SpecialTokens((), (257,), separator=True),
        ),  # the way of Qwen, and of a BOS that is not added
        (NOTHING, {"add_eos": False}, NOTHING),
        (NOTHING, {"add_bos": True}, BOS),
        (NOTHING, {"add_bos": True, "add_eos": True}, BOTH),
        (BOS, {}, BOS),
        (BOS, {"add_bos": True}, BOS),
        (BOS, {"add_bos": False}, NOTHING),
        (BOS, {"add_eos": True}, BOTH),
        (BOTH, {"add_eos": False}, BOS),
        (SpecialTokens((64, 65)), {}, SpecialTokens((64, 65))),
        (SpecialTokens((64, 65)), {"add_bos": True}, SpecialTokens((256, 64, 65))),
    ],
)
def test_settings_and_tokenizer(adds, settings, expected):
    assert separating_tokens(Kind(adds=adds), **settings) == expected
    if not expected.separator:
        assert special_tokens(Kind(adds=adds), **settings) == expected
    else:
        assert special_tokens(Kind(adds=adds)) == NOTHING


def test_what_the_tokenizer_does_not_have():
    for name in ("bos", "eos"):
        with pytest.raises(UserError, match=f"add_{name}=True but the tokenizer has no {name.upper()} token"):
            special_tokens(Kind(bos_id=None, eos_id=None), **{f"add_{name}": True})


def test_nothing_between_documents_is_an_error_that_names_the_setting():
    joined = {"document_mask": False}
    assert separating_tokens(Kind(), **joined).after == (257,)
    with pytest.raises(UserError, match="set Dataset.add_eos=True, or document_mask=True"):
        separating_tokens(Kind(), add_eos=False, **joined)
    with pytest.raises(UserError, match="set Dataset.add_eos=True, or document_mask=True"):
        separating_tokens(Kind(adds=BOS), add_bos=False, **joined)
    with pytest.raises(UserError, match="set Dataset.add_bos=True, or document_mask=True"):
        separating_tokens(Kind(eos_id=None), **joined)
    with pytest.raises(UserError, match="neither BOS nor EOS.: set document_mask=True"):
        separating_tokens(Kind(bos_id=None, eos_id=None), **joined)
    assert separating_tokens(Kind(bos_id=None, eos_id=None)) == NOTHING  # the document mask separates


def test_in_words():
    assert described(Kind(), NOTHING) == "BOS before each document: no; EOS after: no"
    assert described(Kind(), BOTH) == "BOS before each document: yes; EOS after: yes"
    line = described(Kind(bos_id=None, eos_id=None), SpecialTokens((5, 6)), of="prompt")
    assert line == "BOS before each prompt: no; EOS after: no; other special tokens: 5, 6"


# name of the case: (before, after) of a packed document, before of a prompt, the line of a run
CASES = {
    "plain": (((), (2,)), (), "BOS before each document: no; EOS after: yes"),
    "eos_only": (((), (2,)), (), "BOS before each document: no; EOS after: yes"),
    "no_bos_key": (((), (2,)), (), "BOS before each document: no; EOS after: yes"),
    "adds_bos": (((1,), ()), (1,), "BOS before each document: yes; EOS after: no"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("document_mask", [True, False])
def test_packed_documents_are_separated(reference, tmp_path, name, document_mask):
    (before, after), prompt, line = CASES[name]
    texts = ["hi", "hi hi", "ho hi"]
    (tmp_path / "data").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "data" / f"{i}.txt").write_text(text)
    folder = str(reference / "cases" / "tokenizers" / name)
    tokenizer = load_tokenizer(folder)
    dataset = Dataset(
        str(tmp_path / "data"),
        tokenizer=folder,
        document_mask=document_mask,
        eval_fraction=0,
        cache_dir=str(tmp_path / "cache"),
    )
    assert dataset.describe_special_tokens() == line
    assert Mixture(((dataset, 1.0), (dataset, 2.0))).describe_special_tokens() == line
    expected = [[*before, *tokenizer.encode(text).tolist(), *after] for text in texts]
    assert [ids.tolist() for ids in dataset.document_tokens("train")] == expected
    length = sum(map(len, expected))
    with dataset.batches(
        "train", global_batch_size=1, seq_len=length, shuffle=False, repeat=False, num_threads=0
    ) as rows:
        batch = next(iter(rows))
    assert batch["tokens"][0].tolist() == [i for ids in expected for i in ids]
    segments = np.repeat([1, 2, 3] if document_mask else [1, 1, 1], [len(ids) for ids in expected])
    assert batch["segment_ids"][0].tolist() == segments.tolist()
    # An evaluation of whole documents sees what the tokenizer itself adds, and no separator.
    alone = [ids.tolist() for ids in dataset.document_tokens("train", packed=False)]
    assert alone == [tokenizer.encode(text, add_special_tokens=True).tolist() for text in texts]
    ids = passkey._build(tokenizer, 12345, after=0).tokens
    assert tuple(ids[: len(prompt)]) == prompt and ids[len(prompt)] != 1
    assert passkey._build(tokenizer, 12345, after=0, add_bos=False).tokens == ids[len(prompt) :]


def test_evaluations_of_documents_and_of_rows(tmp_path):
    class Model:
        vocab_size = 258

    (tmp_path / "data").mkdir()
    for i in range(2):
        (tmp_path / "data" / f"{i}.txt").write_text("ab" * (i + 1))
    dataset = Dataset(str(tmp_path / "data"), eval_fraction=1.0, cache_dir=str(tmp_path / "cache"))
    reading = dict(tokenizer=Kind(), model=Model(), max_tokens=None, owner="Perplexity")
    alone = documents.read(dataset, "eval", **reading)
    assert [ids.tolist() for ids in alone.tokens] == [[97, 98], [97, 98, 97, 98]]
    assert alone.special == "BOS before each document: no; EOS after: no"
    packed = documents.read(dataset, "eval", packed=True, **reading)
    assert [ids.tolist() for ids in packed.tokens] == [[97, 98, 257], [97, 98, 97, 98, 257]]
    assert packed.special == "BOS before each document: no; EOS after: yes"
    asked = documents.read(dataclasses.replace(dataset, add_bos=True, add_eos=True), "eval", **reading)
    assert [ids.tolist() for ids in asked.tokens] == [[256, 97, 98, 257], [256, 97, 98, 97, 98, 257]]
