"""The training and evaluation splits: complete, disjoint, stable, also for copies and for a single document."""

import numpy as np
import pytest

from lcx.data import Dataset, Mixture
from lcx.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LCX_CACHE", str(tmp_path / "cache"))


def write(folder, texts):
    folder.mkdir(exist_ok=True)
    for i, text in enumerate(texts):
        (folder / f"{i:04}.txt").write_text(text)
    return str(folder)


def texts(dataset, split):
    tokens = dataset.document_tokens(split)
    return [bytes(ids[ids < 256].astype(np.uint8)).decode() for ids in tokens]


@pytest.mark.parametrize("rule", ["hash", "tail"])
def test_splits_are_disjoint_and_complete(tmp_path, rule):
    source = write(tmp_path / "data", [f"text number {i}" for i in range(300)])
    dataset = Dataset(source, split=rule, eval_fraction=0.2)
    train, held_out = texts(dataset, "train"), texts(dataset, "eval")
    assert sorted(train + held_out) == sorted(f"text number {i}" for i in range(300))
    assert 40 <= len(held_out) <= 80
    if rule == "tail":
        assert held_out == [f"text number {i}" for i in range(240, 300)]
    assert dataset.document_names("train")[0] == "0000.txt"


def test_documents_carry_bos_and_eos(tmp_path):
    dataset = Dataset(write(tmp_path / "data", ["ab", "cd"]), eval_fraction=0, add_eos=True)
    assert [ids.tolist() for ids in dataset.document_tokens("train")] == [
        [256, 97, 98, 257],
        [256, 99, 100, 257],
    ]
    assert all(ids.dtype == np.int32 for ids in dataset.document_tokens("train"))
    plain = Dataset(write(tmp_path / "data", ["ab", "cd"]), eval_fraction=0, add_bos=False)
    assert [ids.tolist() for ids in plain.document_tokens("train")] == [[97, 98], [99, 100]]


def test_by_hash_a_document_keeps_its_side_when_others_come(tmp_path):
    few = Dataset(write(tmp_path / "data", [f"text number {i}" for i in range(100)]))
    before = set(texts(few, "eval"))
    more = Dataset(write(tmp_path / "data", [f"text number {i}" for i in range(400)]))
    assert before == {text for text in texts(more, "eval") if int(text.split()[-1]) < 100}


@pytest.mark.parametrize("rule", ["hash", "tail"])
def test_copies_are_never_on_both_sides(tmp_path, rule):
    """Every text occurs five times, at random places."""
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(40), 5))
    dataset = Dataset(write(tmp_path / "data", [f"text {i}" for i in order]), split=rule, eval_fraction=0.1)
    train, held_out = texts(dataset, "train"), texts(dataset, "eval")
    assert train and held_out and not set(train) & set(held_out)


@pytest.mark.parametrize("rule", ["hash", "tail"])
def test_identical_documents_cannot_be_divided(tmp_path, rule):
    for count, text in ((2, "same"), (50, "same"), (50, "other")):
        source = write(tmp_path / f"{count}{text}", [text] * count)
        with pytest.raises(
            UserError, match=rf"all {count} documents of .* identical.*set Dataset.eval_fraction"
        ):
            Dataset(source, split=rule).open()
        for side in ("train", "eval"):
            assert len(texts(Dataset(source, split=rule, eval_fraction=float(side == "eval")), side)) == count


def test_copies_that_are_left_out_are_counted_and_said(tmp_path):
    """Of 40 texts the last is held out, and two of its copies are before it."""
    source = write(tmp_path / "data", [f"text {i % 20 if i in (1, 21) else i}" for i in range(22)])
    corpus = Dataset(source, split="tail", eval_fraction=0.1).open()
    assert corpus.copies == 1 and len(corpus.train) == 19 and len(corpus.eval) == 2
    assert corpus.remarks() == [
        f"{source}: 1 training document left out: held-out documents have the same text"
    ]
    assert Dataset(source, split="hash").open().copies == 0


@pytest.mark.parametrize("rule", ["hash", "tail"])
def test_many_copies_are_said_aloud(tmp_path, caplog, rule):
    """One text in 96 of 99 documents: wherever it goes, one side gets nearly nothing."""
    corpora = []
    for start in range(4):
        common = [f"common {start}"] * 48
        source = write(tmp_path / f"{rule}{start}", [*common, "one", "two", "three", *common])
        corpora.append(Dataset(source, split=rule, eval_fraction=0.5).open())
    few = [corpus for corpus in corpora if len(corpus.train) < 20]
    assert few and len(caplog.records) == len(few)
    assert "only 4 of the 99 documents of" in caplog.text and "set Dataset.eval_fraction" in caplog.text


def test_tail_of_copies_that_leaves_nothing_to_train_on(tmp_path):
    source = write(tmp_path / "data", [*["a", "b"] * 9, *["b", "a"] * 9])
    with pytest.raises(UserError, match="only 2 of the 36 documents .* one split would be empty"):
        Dataset(source, split="tail", eval_fraction=0.5).open()


def test_a_part_of_a_mixture_is_never_emptied_silently(tmp_path):
    held = Dataset(write(tmp_path / "held", [f"text {i}" for i in range(20)]), eval_fraction=1.0)
    train = Dataset(write(tmp_path / "train", [f"text {i}" for i in range(10)]), eval_fraction=0.0)
    with pytest.raises(UserError, match=r"all 10 training documents of .*train are copies.*eval_fraction=0"):
        Mixture(((held, 1.0), (train, 1.0))).open()
    more = Dataset(write(tmp_path / "more", [f"text {i}" for i in range(30)]), eval_fraction=0.0)
    mixture = Mixture(((held, 1.0), (more, 1.0)))
    assert mixture.open()[1].copies == 20 and "20 training documents left out" in mixture.remarks()[0]


def test_copies_across_the_parts_of_a_mixture(tmp_path):
    shared = [f"shared {i}" for i in range(60)]
    one = Dataset(write(tmp_path / "one", shared), split="hash", eval_fraction=0.5)
    two = Dataset(write(tmp_path / "two", shared[::-1]), split="tail", eval_fraction=0.3)
    assert set(texts(two, "train")) & set(texts(one, "eval"))  # alone they would leak
    mixture = Mixture(((one, 1.0), (two, 1.0)))
    train, held_out = texts(mixture, "train"), texts(mixture, "eval")
    assert train and held_out and not set(train) & set(held_out)
    assert len(mixture.document_names("train")) == len(train)


@pytest.mark.parametrize("rule", ["hash", "tail"])
@pytest.mark.parametrize("count", [2, 3, 12])
def test_few_documents_reach_both_splits(tmp_path, rule, count):
    for start in range(5):
        folder = tmp_path / f"data{start}"
        dataset = Dataset(
            write(folder, [f"{start} {i}" for i in range(count)]), split=rule, eval_fraction=0.1
        )
        train, held_out = texts(dataset, "train"), texts(dataset, "eval")
        assert train and held_out and len(train) + len(held_out) == count


def test_a_single_document_is_cut_into_head_and_tail(tmp_path):
    text = "".join(chr(97 + i % 26) for i in range(1000))
    dataset = Dataset(write(tmp_path / "data", [text]), eval_fraction=0.25, add_bos=False)
    assert texts(dataset, "train") == [text[:750]] and texts(dataset, "eval") == [text[750:]]
    iterator = dataset.batches("eval", global_batch_size=1, seq_len=8)
    assert iterator.info["tokens"] == 250


def test_a_document_of_one_token_cannot_be_cut(tmp_path):
    dataset = Dataset(write(tmp_path / "data", ["x"]), add_bos=False)
    assert texts(dataset, "train") == ["x"] and texts(dataset, "eval") == []


def test_documents_held_out_by_name(tmp_path):
    """Contigs of a genome, with or without the name of the file; a copy of one is not trained on."""
    fasta = tmp_path / "genome.fa"
    contigs = enumerate(["ACGT", "GG", "TTA", "GG", "CAT"])
    fasta.write_text("".join(f">chr{i} of a toy\n{text}\n" for i, text in contigs))
    dataset = Dataset(str(fasta), eval_documents=("chr1", "genome.fa:*4"), eval_fraction=0.0)
    assert dataset.document_names("eval") == ["genome.fa:chr1", "genome.fa:chr4"]
    assert dataset.document_names("train") == ["genome.fa:chr0", "genome.fa:chr2"]
    assert dataset.open().copies == 1
    with pytest.raises(UserError, match=r"names 'chr9', but no document of .*genome.fa:chr0, genome.fa:chr1"):
        Dataset(str(fasta), eval_documents=("chr1", "chr9")).open()
    with pytest.raises(UserError, match="holds out all 5 documents .* name fewer"):
        Dataset(str(fasta), eval_documents=("chr*",)).open()
    with pytest.raises(UserError, match="all 2 training documents of .* are copies of those that Dataset.eval_doc"):
        Dataset(write(tmp_path / "same", ["A."] * 3), eval_documents=("0001.txt",)).open()


def test_everything_on_one_side(tmp_path):
    source = write(tmp_path / "data", [f"text {i}" for i in range(20)])
    assert len(texts(Dataset(source, eval_fraction=0), "train")) == 20
    assert len(texts(Dataset(source, eval_fraction=1), "eval")) == 20
    with pytest.raises(UserError, match="the eval split of .* is empty; set Dataset.eval_fraction"):
        Dataset(source, eval_fraction=0).batches("eval", global_batch_size=1, seq_len=8)
    with pytest.raises(UserError, match="the train split of .* is empty"):
        Dataset(source, eval_fraction=1).batches("train", global_batch_size=1, seq_len=8)


def test_min_length_holds_for_both_splits(tmp_path):
    source = write(tmp_path / "data", ["x" * (i + 1) + str(i) for i in range(60)])
    dataset = Dataset(source, min_length=30, eval_fraction=0.3, add_bos=False)
    lengths = [len(ids) for split in ("train", "eval") for ids in dataset.document_tokens(split)]
    assert min(lengths) == 30 and len(lengths) == 33
    with pytest.raises(UserError, match="all 60 documents are shorter than Dataset.min_length=100"):
        Dataset(source, min_length=100).open()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"packing": "pack"}, "Dataset.packing='pack' is unknown; expected one of concat"),
        ({"split": "random"}, "Dataset.split='random' is unknown"),
        ({"eval_fraction": 1.5}, "eval_fraction=1.5 is not between 0 and 1"),
        ({"long_fraction": 0.0}, "long_fraction=0.0 is not above 0"),
        ({"long_length": 0}, "long_length=0"),
        ({"long_length": 9}, "Dataset.long_length=9 has no effect without Dataset.long_fraction"),
        ({"text_field": ""}, "Dataset.text_field is empty"),
    ],
)
def test_settings_are_checked_when_built(settings, match):
    with pytest.raises(UserError, match=match):
        Dataset("x", **settings)


def test_unknown_split(tmp_path):
    with pytest.raises(UserError, match="split 'test' does not exist; expected one of train, eval"):
        Dataset(write(tmp_path / "data", ["a", "b"])).batches("test", global_batch_size=1, seq_len=4)


def test_mixtures_are_checked_when_built(tmp_path):
    one, two = Dataset("a"), Dataset("b", long_fraction=0.5)
    for parts, options, match in [
        ((), {}, "parts is empty"),
        (((one, 0.0),), {}, "not a positive number"),
        (((one, -1),), {}, "not a positive number"),
        (((one, float("nan")),), {}, "not a positive number"),
        ((one,), {}, "expected .Dataset, weight. pairs"),
        (((one, 1), (two, 1)), {"long_fraction": 0.6}, "on the Mixture and on a Dataset"),
        (((one, 1),), {"long_fraction": 2.0}, "Mixture.long_fraction=2.0"),
    ]:
        with pytest.raises(UserError, match=match):
            Mixture(parts, **options)


def test_parts_need_the_same_tokenizer(tmp_path):
    from lcx.data import ByteTokenizer

    source = write(tmp_path / "data", ["a", "b"])
    mixture = Mixture(((Dataset(source), 1), (Dataset(source, tokenizer=ByteTokenizer(vocab_size=300)), 1)))
    with pytest.raises(UserError, match="another tokenizer"):
        mixture.batches("train", global_batch_size=1, seq_len=4)


def test_the_first_four_fifths_of_the_stories(reference):
    dataset = Dataset(
        str(reference / "data" / "text" / "tinystories_train_2MiB.txt"),
        separator="<|endoftext|>",
        split="tail",
        eval_fraction=0.2,
    )
    raw = (reference / "data" / "text" / "tinystories_train_2MiB.txt").read_text().split("<|endoftext|>")
    stories = [story.strip() for story in raw]
    train, held_out = texts(dataset, "train"), texts(dataset, "eval")
    assert held_out == stories[-len(held_out) :] and len(held_out) == round(0.2 * len(stories))
    assert train == [story for story in stories[: -len(held_out)] if story not in set(held_out)]
