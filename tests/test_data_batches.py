"""Batches end to end: the contract of a batch, exact resume on any number of processes, mixing, clear refusals."""

import dataclasses
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from lcx.data import BatchSpec, ByteTokenizer, Dataset, Mixture, check_batch, store
from lcx.errors import UserError

KEYS = ("tokens", "labels", "segment_ids", "positions", "loss_weights")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LCX_CACHE", str(tmp_path / "cache"))


def write(folder, count, *, low=1, high=300, seed=0):
    """Documents of random printable characters, the first of which tell their number."""
    rng = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    for i in range(count):
        text = f"{seed}:{i:03}|" + bytes(rng.integers(65, 91, rng.integers(low, high)).tolist()).decode()
        (folder / f"{i:04}.txt").write_text(text)
    return str(folder)


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "data", 40)


def take(iterator, count):
    with iterator:
        return list(itertools.islice(iterator, count))


def same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        for key in KEYS:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def merge(parts):
    """The global batches from the local ones of each process."""
    return [
        {key: np.concatenate([batch[key] for batch in batches]) for key in KEYS}
        for batches in zip(*parts, strict=True)
    ]


@pytest.mark.parametrize("packing", ["concat", "first_fit", "windows"])
@pytest.mark.parametrize("document_mask", [True, False])
def test_the_contract_of_a_batch(source, packing, document_mask):
    dataset = Dataset(source, packing=packing, document_mask=document_mask)
    for split in ("train", "eval"):
        for batch in take(dataset.batches(split, global_batch_size=4, seq_len=32), 6):
            assert set(batch) == set(KEYS)
            assert all(batch[key].shape == (4, 32) for key in KEYS)
            assert batch["loss_weights"].dtype == np.float32
            assert all(batch[key].dtype == np.int32 for key in KEYS[:-1])
            check_batch(batch, vocab_size=258, document_mask=document_mask)


@pytest.mark.parametrize("packing", ["concat", "first_fit"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_epoch_holds_every_document_exactly(source, packing, seed):
    """Segments of one epoch, joined where a document was cut, are the documents of the split."""
    dataset = Dataset(source, packing=packing)
    iterator = dataset.batches("train", global_batch_size=3, seq_len=50, seed=seed, repeat=False)
    inputs, pairs = [], set()
    for batch in take(iterator, None):
        real, scored = batch["segment_ids"] > 0, batch["loss_weights"] > 0
        inputs.append(batch["tokens"][real])
        assert (batch["labels"][scored] != 256).all()  # BOS is never a target
        pairs.update(zip(batch["tokens"][scored].tolist(), batch["labels"][scored].tolist(), strict=True))
    documents = list(dataset.document_tokens("train"))
    everything = np.concatenate(documents)
    assert np.array_equal(np.sort(np.concatenate(inputs)), np.sort(everything))
    assert pairs == {pair for ids in documents for pair in itertools.pairwise(ids.tolist())}


def pieces(batches):
    for batch in batches:
        for row in range(len(batch["tokens"])):
            ids = batch["segment_ids"][row]
            for number in range(1, ids.max() + 1):
                yield batch["tokens"][row, ids == number].tolist()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_first_fit_rebuilds_short_documents_as_a_multiset(source, seed):
    dataset = Dataset(source, packing="first_fit", eval_fraction=0.2)
    for split in ("train", "eval"):
        iterator = dataset.batches(split, global_batch_size=2, seq_len=400, seed=seed, repeat=False)
        found = sorted(pieces(take(iterator, None)))
        assert found == sorted(ids.tolist() for ids in dataset.document_tokens(split))


def test_every_epoch_holds_each_row_once_in_another_order(source):
    dataset = Dataset(source)
    rows = dataset.batches("train", global_batch_size=1, seq_len=64, seed=3).info["rows"]
    batches = take(dataset.batches("train", global_batch_size=1, seq_len=64, seed=3), 3 * rows)
    epochs = [[b["tokens"].tobytes() for b in batches[k * rows : (k + 1) * rows]] for k in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert len(set(map(tuple, epochs))) == 3
    other = take(dataset.batches("train", global_batch_size=1, seq_len=64, seed=4), rows)
    assert [b["tokens"].tobytes() for b in other] != epochs[0]


@pytest.mark.parametrize("packing", ["concat", "first_fit", "windows"])
def test_processes_share_one_sequence(source, packing):
    dataset = Dataset(source, packing=packing)

    def on(count):
        return merge(
            [
                take(
                    dataset.batches(
                        "train", global_batch_size=8, seq_len=32, seed=1, process_index=i, process_count=count
                    ),
                    30,
                )
                for i in range(count)
            ]
        )

    one = on(1)
    for count in (2, 4, 8):
        same(one, on(count))


def test_resume_is_exact_also_on_another_number_of_processes(source):
    mixture = Mixture(((Dataset(source), 0.7), (Dataset(source, packing="windows", eval_fraction=0.3), 0.3)))

    def iterator(index=0, count=1, **options):
        arguments = {"global_batch_size": 4, "seq_len": 24, "seed": 5, **options}
        return mixture.batches("train", process_index=index, process_count=count, **arguments)

    reference = take(iterator(), 40)
    for steps in (0, 1, 17, 33):
        parts = [iterator(i, 2) for i in range(2)]
        for part in parts:
            for _ in range(steps):
                next(part)
        states = [json.loads(json.dumps(part.state())) for part in parts]
        assert states[0] == states[1] and states[0]["next_index"] == 4 * steps
        for part in parts:
            part.close()
        for count in (1, 2, 4):
            resumed = [iterator(i, count) for i in range(count)]
            for part in resumed:
                next(part)  # an iterator in use can be moved too
                part.restore(states[0])
            same(merge([take(part, 40 - steps) for part in resumed]), reference[steps:])


def test_resume_with_another_batch_size_goes_on_with_the_next_row(source):
    def iterator(size):
        return Dataset(source).batches("train", global_batch_size=size, seq_len=24, seed=5)

    rows = np.concatenate([batch["tokens"] for batch in take(iterator(6), 10)])
    start = iterator(6)
    for _ in range(3):
        next(start)
    resumed = iterator(5)
    resumed.restore(start.state())
    start.close()
    assert np.array_equal(np.concatenate([b["tokens"] for b in take(resumed, 9)])[:42], rows[18:])


def test_state_does_not_run_ahead_with_the_prefetch(source):
    for threads in (0, 1, 3):
        iterator = Dataset(source).batches("train", global_batch_size=4, seq_len=16, num_threads=threads)
        for step in range(5):
            assert iterator.state()["next_index"] == 4 * step
            next(iterator)
        iterator.close()


def test_threads_and_workers_do_not_change_the_order(source):
    mixture = Mixture(((Dataset(source), 2), (Dataset(source, packing="first_fit"), 1)))

    def batches(**options):
        return take(mixture.batches("train", global_batch_size=4, seq_len=16, seed=2, **options), 12)

    expected = batches(num_threads=0)
    same(batches(num_threads=4), expected)
    same(batches(num_workers=2), expected)


def test_start_counts_rows(source):
    dataset = Dataset(source)
    all_batches = take(dataset.batches("train", global_batch_size=4, seq_len=16), 6)
    same(take(dataset.batches("train", global_batch_size=4, seq_len=16, start=8), 4), all_batches[2:])


def test_what_is_opened_is_not_read_again(source, monkeypatch):
    """One look at the source serves every split, and a BatchSpec says what the arguments of `batches` say."""
    mixture = Mixture(((Dataset(source), 1.0), (Dataset(source, packing="windows"), 2.0)))
    expected = {
        split: take(mixture.batches(split, global_batch_size=4, seq_len=16), 3) for split in ("train", "eval")
    }
    remarks = mixture.remarks()
    opened = mixture.opened()
    monkeypatch.setattr(store, "open_store", None)
    for split, batches in expected.items():
        same(take(opened.batches(BatchSpec(split, global_batch_size=4, seq_len=16)), 3), batches)
    assert opened.remarks() == remarks and opened.tokenizer == ByteTokenizer()


def test_a_spec_can_be_changed_by_name(source):
    spec = BatchSpec("train", global_batch_size=4, seq_len=16)
    held_out = Dataset(source).batches(
        dataclasses.replace(spec, split="eval")
    )  # neither shuffled nor endless
    same(list(held_out), list(Dataset(source).batches("eval", global_batch_size=4, seq_len=16)))
    changed = take(Dataset(source).batches(spec, seed=3), 2)
    same(changed, take(Dataset(source).batches("train", global_batch_size=4, seq_len=16, seed=3), 2))
    with pytest.raises(TypeError, match="batch_size"):
        Dataset(source).batches("train", batch_size=4, seq_len=16)


def changes(folder):
    """Each way to end up with other data, and what the refusal says."""
    other = write(folder / "other", 40, seed=9)
    return [
        ({}, {"seed": 6}, "seed was 5 and is 6"),
        ({}, {"seq_len": 25}, "seq_len was 24 and is 25"),
        ({}, {"shuffle": False}, "shuffle was True and is False"),
        ({"packing": "first_fit"}, {}, r"parts\[0\].packing was 'concat' and is 'first_fit'"),
        ({"eval_fraction": 0.3}, {}, r"parts\[0\].eval_fraction was 0.1 and is 0.3"),
        ({"source": other}, {}, "the files, the tokenizer or the tokenising options of .* have changed"),
        ({"add_eos": True}, {}, "the files, the tokenizer or the tokenising options"),
        ({"document_mask": False}, {}, "document_mask was True and is False"),
    ]


def test_restore_refuses_other_data(source, tmp_path):
    arguments = {"global_batch_size": 4, "seq_len": 24, "seed": 5}
    dataset = Dataset(source)
    state = json.loads(json.dumps(dataset.batches("train", **arguments).state()))
    for settings, options, message in changes(tmp_path):
        other = dataclasses.replace(dataset, **settings).batches("train", **{**arguments, **options})
        with pytest.raises(UserError, match=message) as caught:
            other.restore(state)
        assert "\n" not in str(caught.value)
    (tmp_path / "data" / "0003.txt").write_text("changed")
    with pytest.raises(UserError, match="the data differs from what the checkpoint was trained on"):
        dataset.batches("train", **arguments).restore(state)
    for broken in ({}, {"next_index": 3}, {**state, "next_index": "x"}, None):
        with pytest.raises(UserError, match="data state is damaged"):
            dataset.batches("train", **arguments).restore(broken)
    with pytest.raises(UserError, match="version 99"):
        dataset.batches("train", **arguments).restore({**state, "version": 99})


def test_moved_data_may_resume(source, tmp_path):
    arguments = {"global_batch_size": 4, "seq_len": 24}
    iterator = Dataset(source).batches("train", **arguments)
    next(iterator)
    state = iterator.state()
    expected = take(iterator, 3)
    (tmp_path / "data").rename(tmp_path / "moved")
    moved = Dataset(str(tmp_path / "moved")).batches("train", **arguments)
    moved.restore(state)
    same(take(moved, 3), expected)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_evaluation_reads_every_row_once_and_pads_the_end(source, count):
    dataset = Dataset(source, eval_fraction=0.3)
    iterators = [
        dataset.batches("eval", global_batch_size=8, seq_len=40, process_index=i, process_count=count)
        for i in range(count)
    ]
    rows = iterators[0].info["rows"]
    assert rows % 8  # the case in question
    batches = merge([list(iterator) for iterator in iterators])
    assert len(batches) == iterators[0].num_batches == -(-rows // 8)
    padding = batches[-1]["segment_ids"][rows % 8 :]
    assert not padding.any() and not batches[-1]["loss_weights"][rows % 8 :].any()
    targets = np.concatenate([batch["labels"][batch["loss_weights"] > 0] for batch in batches])
    documents = list(dataset.document_tokens("eval"))
    assert np.array_equal(np.sort(targets), np.sort(np.concatenate([ids[1:] for ids in documents])))
    assert iterators[0].info["targets"] == len(targets)
    first = np.concatenate(documents)[:40]
    assert np.array_equal(batches[0]["tokens"][0], first)  # in the order of the source
    assert all(iterator.state()["next_index"] == rows for iterator in iterators)
    assert next(iterators[0], None) is None
    ended = dataset.batches("eval", global_batch_size=8, seq_len=40)
    ended.restore(iterators[0].state())
    assert list(ended) == []


def test_evaluation_windows_score_each_target_once(source):
    dataset = Dataset(source, packing="windows", eval_fraction=0.3)
    targets = [
        b["labels"][b["loss_weights"] > 0] for b in dataset.batches("eval", global_batch_size=4, seq_len=32)
    ]
    documents = dataset.document_tokens("eval")
    expected = np.concatenate([ids[1:] for ids in documents])
    assert np.array_equal(np.sort(np.concatenate(targets)), np.sort(expected))


def test_training_and_evaluation_share_no_text(tmp_path):
    """Documents are random strings, so a shared run of 16 characters would be a leak."""
    dataset = Dataset(write(tmp_path / "data", 30, low=100), packing="windows", eval_fraction=0.3)

    def runs(split):
        found = set()
        for piece in pieces(
            take(dataset.batches(split, global_batch_size=4, seq_len=32, repeat=False), None)
        ):
            text = bytes(t for t in piece if t < 256)
            found.update(text[i : i + 16] for i in range(len(text) - 15))
        return found

    train, held_out = runs("train"), runs("eval")
    assert len(train) > 1000 and len(held_out) > 1000 and not train & held_out


def shares(mixture, **options):
    """The share of rows that begin with each source's mark; every document here fills at least one row."""
    arguments = {"global_batch_size": 8, "seq_len": 16, **options}
    batches = take(mixture.batches("train", **arguments), 250)
    return np.concatenate([batch["tokens"] for batch in batches])


def only(folder, letter, count, length):
    folder.mkdir()
    for i in range(count):
        (folder / f"{i}.txt").write_text(letter * (length + i))
    return Dataset(str(folder), add_bos=False, eval_fraction=0)


def test_weights_are_shares_of_rows(tmp_path):
    small, large = only(tmp_path / "a", "A", 2, 20), only(tmp_path / "b", "B", 50, 400)
    tokens = shares(Mixture(((small, 3.0), (large, 1.0))))
    assert abs((tokens == 65).mean() - 0.75 * (tokens[(tokens == 65).any(1)] > 0).mean()) < 0.03
    tokens = shares(Mixture(((small, 1e-3), (large, 1.0))))
    assert 0 < (tokens == 65).any(1).mean() < 0.01


@pytest.mark.parametrize("where", ["mixture", "dataset"])
@pytest.mark.parametrize("fraction", [0.25, 0.6, 1.0])
def test_long_fraction_is_a_share_of_rows(tmp_path, where, fraction):
    long, short = only(tmp_path / "a", "A", 3, 320), only(tmp_path / "b", "B", 60, 4)
    short = dataclasses.replace(short, packing="first_fit")
    folder = tmp_path / "both"
    folder.mkdir()
    for name in ("a", "b"):
        for path in (tmp_path / name).iterdir():
            (folder / f"{name}{path.name}").write_text(path.read_text())
    if where == "mixture":
        mixture = Mixture(((long, 1.0), (short, 5.0)), long_fraction=fraction, long_length=100)
    else:
        both = Dataset(str(folder), add_bos=False, eval_fraction=0, long_fraction=fraction, long_length=100)
        mixture = Mixture(((both, 1.0),))
    tokens = shares(mixture, seq_len=64)
    assert abs((tokens == 65).any(1).mean() - fraction) < 0.02
    iterator = mixture.batches("train", global_batch_size=4, seq_len=64)
    assert iterator.info["documents"] == (63 if fraction < 1 else 3)
    assert iterator.info["groups"][0]["kind"] == "long"


def test_weights_hold_within_the_long_rows(tmp_path):
    one, two = only(tmp_path / "a", "A", 3, 320), only(tmp_path / "b", "B", 3, 320)
    three = only(tmp_path / "c", "C", 50, 5)
    mixture = Mixture(((one, 1.0), (two, 3.0), (three, 7.0)), long_fraction=0.8, long_length=100)
    tokens = shares(mixture, seq_len=64)
    for letter, share in zip(b"ABC", (0.2, 0.6, 0.2), strict=True):
        assert abs((tokens == letter).any(1).mean() - share) < 0.02


def test_long_fraction_without_long_documents(tmp_path):
    short = only(tmp_path / "b", "B", 60, 4)
    with pytest.raises(UserError, match="no training document has 64 tokens .the longest has 63.; lower"):
        Mixture(((short, 1.0),), long_fraction=0.6).batches("train", global_batch_size=1, seq_len=64)
    long = only(tmp_path / "a", "A", 3, 320)
    everything = Mixture(((long, 1.0),), long_fraction=0.6).batches("train", global_batch_size=1, seq_len=64)
    assert [group["kind"] for group in everything.info["groups"]] == ["long"]  # nothing else to draw from


def test_evaluation_of_a_mixture_reads_all_of_it(tmp_path):
    one, two = only(tmp_path / "a", "A", 3, 320), only(tmp_path / "b", "B", 7, 30)
    parts = [dataclasses.replace(part, eval_fraction=1) for part in (one, two)]
    mixture = Mixture(((parts[0], 1.0), (parts[1], 100.0)), long_fraction=0.5)
    tokens = np.concatenate([b["tokens"] for b in mixture.batches("eval", global_batch_size=4, seq_len=64)])
    assert [(tokens == letter).sum() for letter in b"AB"] == [963, 231]


def test_too_little_data(tmp_path):
    (tmp_path / "small.txt").write_text("x" * 1000)
    dataset = Dataset(str(tmp_path / "small.txt"), eval_fraction=0, add_bos=False)
    message = "has 1000 tokens: 8 rows of seq_len=128, fewer than global_batch_size=16; add data .about 2048"
    with pytest.raises(UserError, match=message) as caught:
        dataset.batches("train", global_batch_size=16, seq_len=128)
    assert "\n" not in str(caught.value)
    assert len(take(dataset.batches("train", global_batch_size=8, seq_len=128), 3)) == 3
    assert len(take(dataset.batches("train", global_batch_size=16, seq_len=128, repeat=False), None)) == 1


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"global_batch_size": 0}, "global_batch_size=0 is too small"),
        ({"seq_len": 0}, "seq_len=0 is too small"),
        ({"process_count": 3}, "global_batch_size=4 does not divide over 3 processes"),
        ({"process_count": 2, "process_index": 2}, "process_index=2 is not one of 2"),
        ({"start": -1}, "start=-1 is negative"),
        ({"vocab_size": 90}, "holds token id 256 but the model's vocab_size is 90"),
    ],
)
def test_bad_requests(source, options, match):
    with pytest.raises(UserError, match=match):
        Dataset(source).batches("train", **{"global_batch_size": 4, "seq_len": 16, **options})


def test_a_damaged_batch_stops_the_run(source):
    """Ids are checked when a batch is made, not only when the store is opened."""
    iterator = Dataset(source).batches("train", global_batch_size=4, seq_len=16, vocab_size=258)
    object.__setattr__(iterator._spec, "vocab_size", 70)
    with iterator, pytest.raises(UserError, match="token id outside"):
        next(iterator)


def test_one_row_and_seq_len_one(tmp_path):
    (tmp_path / "a.txt").write_text("ab")
    dataset = Dataset(str(tmp_path / "a.txt"), eval_fraction=0)
    batches = take(dataset.batches("train", global_batch_size=1, seq_len=8), 4)
    assert all(batch["tokens"].tolist() == [[256, 97, 98, 0, 0, 0, 0, 0]] for batch in batches)
    assert batches[0]["labels"].tolist() == [[97, 98, 0, 0, 0, 0, 0, 0]]
    assert batches[0]["loss_weights"].tolist() == [[1, 1, 0, 0, 0, 0, 0, 0]]
    tiny = take(dataset.batches("train", global_batch_size=1, seq_len=1, shuffle=False), 4)
    assert [b["tokens"].item() for b in tiny] == [256, 97, 98, 256]
    assert [b["loss_weights"].item() for b in tiny] == [1, 1, 0, 1]


def test_info_counts_windows_twice(source):
    concat = Dataset(source).batches("train", global_batch_size=1, seq_len=16).info
    windows = Dataset(source, packing="windows").batches("train", global_batch_size=1, seq_len=16).info
    assert concat["tokens"] == windows["tokens"] and concat["documents"] == windows["documents"]
    assert concat["targets"] == concat["tokens"] - concat["documents"]
    assert 1.5 < windows["targets"] / concat["targets"] < 2.1
    assert 0.99 < concat["fill"] <= 1


def test_real_stories_with_their_tokenizer(reference):
    dataset = Dataset(
        str(reference / "data" / "text" / "tinystories_train_2MiB.txt"),
        tokenizer=str(reference / "data" / "weights" / "babyllama105" / "hf"),
        separator="<|endoftext|>",
        split="tail",
        eval_fraction=0.2,
        document_mask=False,
    )
    tokenizer = dataset.load_tokenizer()
    iterator = dataset.batches("eval", global_batch_size=4, seq_len=1024, vocab_size=105)
    batches = take(iterator, 3)
    row = batches[0]["tokens"][0]
    first = next(dataset.document_tokens("eval"))
    assert row[0] == tokenizer.bos_id == 1
    assert np.array_equal(row[: len(first)], first[:1024])
    assert (batches[0]["segment_ids"] == 1).all() and (batches[0]["loss_weights"] == 1).all()
    text = (reference / "data" / "text" / "tinystories_train_2MiB.txt").read_text()
    assert tokenizer.decode(first).replace("⁇", "")[:40].strip() in text.replace("\n", "")
    with pytest.raises(UserError, match="the model's vocab_size is 50"):
        dataset.batches("eval", global_batch_size=4, seq_len=1024, vocab_size=50)


def test_real_genome(reference):
    dataset = Dataset(
        str(reference / "data" / "genomes" / "ecoli_k12_mg1655.fna.gz"),
        tokenizer=ByteTokenizer(bos_id=None, eos_id=0, vocab_size=512),
    )
    iterator = dataset.batches("train", global_batch_size=8, seq_len=2048, vocab_size=512)
    assert (
        iterator.info["tokens"] == 4_641_652 + 1 - 464_165
    )  # EOS after the one document, then the held-out tail
    for batch in take(iterator, 3):
        assert set(np.unique(batch["tokens"])) == set(b"ACGT") and (batch["segment_ids"] == 1).all()


def test_the_package_imports_nothing_heavy():
    """A configuration is read, and a mistake in it reported, before any of these is needed."""
    heavy = ["jax", "grain", "tokenizers", "sentencepiece", "pyarrow", "torch", "transformers", "tqdm"]
    code = f"import sys, lcx.data; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
