"""The token store: built once, found by the contents of its inputs, never half written, never silently damaged."""

import errno
import json
import multiprocessing
import os
import pickle
import shutil
import stat
import subprocess
import sys

import numpy as np
import pytest

from lcx import paths
from lcx.data import ByteTokenizer, SpecialTokens, find_files, open_store, special_tokens, store, token_files
from lcx.errors import UserError


class Counting(ByteTokenizer):
    """Bytes, counting how many documents were tokenised."""

    calls = 0

    def encode(self, text, **options):
        type(self).calls += 1
        return super().encode(text, **options)


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "data").mkdir()
    for i in range(5):
        (tmp_path / "data" / f"{i}.txt").write_text(f"document {i} " * (i + 1))
    Counting.calls = 0
    return tmp_path


def opened(corpus, tokenizer=None, **options):
    files = find_files(str(corpus / "data"))
    return open_store(files, tokenizer or Counting(), cache_dir=str(corpus / "cache"), **options)


def documents(tokens):
    return [
        bytes(tokens.tokens[a:b].astype(np.uint8)).decode()
        for a, b in zip(tokens.offsets, tokens.offsets[1:], strict=False)
    ]


def test_tokenised_once(corpus):
    first = opened(corpus)
    assert documents(first) == [f"document {i} " * (i + 1) for i in range(5)]
    assert first.names == [f"{i}.txt" for i in range(5)]
    assert first.num_documents == 5 and first.num_tokens == sum(map(len, documents(first)))
    assert first.max_id == max(first.tokens) and Counting.calls == 5
    again = opened(corpus)
    assert Counting.calls == 5 and again.fingerprint == first.fingerprint
    assert np.array_equal(again.tokens, first.tokens)


def test_special_tokens_and_empty_documents(corpus):
    (corpus / "data" / "2.txt").write_text("")
    tokens = opened(corpus, special=special_tokens(Counting(), add_bos=True, add_eos=True))
    assert tokens.num_documents == 4 and tokens.max_id == 257
    for a, b in zip(tokens.offsets, tokens.offsets[1:], strict=False):
        assert tokens.tokens[a] == 256 and tokens.tokens[b - 1] == 257
        assert (tokens.tokens[a + 1 : b - 1] < 256).all()
    with pytest.raises(UserError, match="add_bos=True but the tokenizer has no BOS token"):
        special_tokens(ByteTokenizer(bos_id=None), add_bos=True)


def test_every_input_changes_the_fingerprint(corpus):
    seen = {opened(corpus).fingerprint}

    def fresh(**options):
        found = opened(corpus, **options).fingerprint
        assert found not in seen
        seen.add(found)

    fresh(special=SpecialTokens(before=(256,)))
    fresh(special=SpecialTokens(after=(257,)))
    fresh(special=SpecialTokens(before=(256,), after=(257,)))
    fresh(special=SpecialTokens(before=(65,)))
    fresh(special=SpecialTokens(before=(65, 66)))
    fresh(special=SpecialTokens(after=(65, 66)))
    fresh(separator=" ")
    fresh(tokenizer=ByteTokenizer(eos_id=3))
    file = corpus / "data" / "3.txt"
    times = os.stat(file)
    file.write_text(file.read_text().replace("3", "8"))  # as long as before
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    fresh()
    file.rename(corpus / "data" / "7.txt")
    fresh()
    (corpus / "data" / "8.txt").write_text("more")
    fresh()


def test_moved_data_is_the_same_data(corpus):
    first = opened(corpus)
    (corpus / "data").rename(corpus / "elsewhere")
    files = find_files(str(corpus / "elsewhere"))
    assert open_store(files, Counting(), cache_dir=str(corpus / "cache")).fingerprint == first.fingerprint
    assert Counting.calls == 5


def test_remembered_hashes_notice_a_change(corpus, monkeypatch):
    monkeypatch.setattr(store, "_REMEMBERED", 0)
    monkeypatch.setattr(store, "_SETTLED_NS", -1)
    first = opened(corpus)
    assert len(json.loads((corpus / "cache" / "file_hashes.json").read_text())) == 5
    assert opened(corpus).fingerprint == first.fingerprint
    file = corpus / "data" / "3.txt"
    times = os.stat(file)
    file.write_text(file.read_text().replace("3", "8"))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert opened(corpus).fingerprint != first.fingerprint
    (corpus / "cache" / "file_hashes.json").write_text("{broken")
    assert opened(corpus).fingerprint != first.fingerprint


def damage_token(folder):
    data = bytearray((folder / "tokens.bin").read_bytes())
    data[7] ^= 1
    (folder / "tokens.bin").write_bytes(data)


def cut_tokens(folder):
    os.truncate(folder / "tokens.bin", 10)


def damage_index(folder):
    data = bytearray((folder / "documents.bin").read_bytes())
    data[-1] ^= 1
    (folder / "documents.bin").write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        damage_token,
        cut_tokens,
        damage_index,
        lambda folder: (folder / "meta.json").unlink(),
        lambda folder: (folder / "meta.json").write_text("{"),
        lambda folder: (folder / "tokens.bin").unlink(),
    ],
)
def test_a_damaged_store_is_built_again(corpus, damage):
    first = opened(corpus)
    expected = np.array(first.tokens)
    damage(first.folder)
    again = opened(corpus)
    assert Counting.calls == 10
    assert np.array_equal(again.tokens, expected)
    assert not list((corpus / "cache").glob("*.partial"))


def test_large_stores_are_sampled_with_both_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "_BLOCK", 8)
    monkeypatch.setattr(token_files, "_CHECKED_BLOCKS", 4)
    data = np.arange(1000, dtype=np.uint8).tobytes()
    (tmp_path / "tokens.bin").write_bytes(data)
    sums = [store.zlib.crc32(data[i : i + 8]) for i in range(0, 1000, 8)]
    assert token_files.blocks_match(tmp_path / "tokens.bin", sums)
    for position in (0, 999):
        wrong = bytearray(data)
        wrong[position] ^= 1
        (tmp_path / "tokens.bin").write_bytes(wrong)
        assert not token_files.blocks_match(tmp_path / "tokens.bin", sums)


def test_many_blocks_round_trip(corpus, monkeypatch):
    monkeypatch.setattr(token_files, "_BLOCK", 16)
    monkeypatch.setattr(store, "_CHUNK_CHARACTERS", 20)
    tokens = opened(corpus)
    assert documents(tokens) == [f"document {i} " * (i + 1) for i in range(5)]
    assert len(json.loads((tokens.folder / "meta.json").read_text())["block_crc32"]) == -(
        -2 * tokens.num_tokens // 16
    )


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_nothing_behind(corpus, monkeypatch, code):
    def full(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(store.TokenWriter, "_flush", full)
    with pytest.raises(UserError, match="the disk is full .* set LCX_CACHE .or Dataset.cache_dir.") as caught:
        opened(corpus)
    assert "\n" not in str(caught.value)
    assert list((corpus / "cache").iterdir()) == []
    monkeypatch.undo()
    assert opened(corpus).num_documents == 5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs file size limits, which are Unix only")
def test_a_real_write_error_leaves_nothing_behind(corpus):
    """The operating system refuses the write: a limit on the file size stands for the full disk."""
    (corpus / "data" / "big.txt").write_text("x" * 200_000)
    code = f"""
import resource, signal
from lcx.data import ByteTokenizer, find_files, open_store
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    open_store(find_files({str(corpus / "data")!r}), ByteTokenizer(), cache_dir={str(corpus / "cache")!r})
except ValueError as error:
    print(type(error).__name__, error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("UserError the disk is full") and run.stdout.count("\n") == 1
    assert list((corpus / "cache").iterdir()) == []


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_cache_that_cannot_be_written(corpus):
    (corpus / "cache").mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(UserError, match="cannot write the token cache"):
        opened(corpus)


def test_a_cache_folder_that_is_a_file(corpus):
    (corpus / "cache").write_text("x")
    with pytest.raises(UserError, match="cannot write the token cache .* set LCX_CACHE .or Dataset.cache_dir."):
        opened(corpus)


def test_a_failed_source_leaves_nothing_behind(corpus):
    (corpus / "data" / "9.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="9.txt is not UTF-8"):
        opened(corpus)
    assert list((corpus / "cache").iterdir()) == []


def test_abandoned_half_stores_are_removed(corpus):
    old, young = corpus / "cache" / "a.host.1.partial", corpus / "cache" / "b.host.2.partial"
    for folder in (old, young):
        folder.mkdir(parents=True)
        (folder / "tokens.bin").write_text("x")
    os.utime(old, (0, 0))
    opened(corpus)
    assert not old.exists() and young.exists()


def test_no_text_at_all(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("")
    with pytest.raises(UserError, match="holds no text"):
        opened(tmp_path)


def test_a_tokenizer_that_breaks_its_word(corpus):
    class Wild(ByteTokenizer):
        def encode(self, text):
            return super().encode(text) + 70_000

    with pytest.raises(UserError, match="outside of its vocab_size"):
        opened(corpus, Wild())


def test_wide_vocabularies(corpus):
    class Wide(ByteTokenizer):
        def encode(self, text):
            return super().encode(text) + 100_000

    tokens = opened(corpus, Wide(vocab_size=120_000))
    assert tokens.tokens.dtype == np.uint32 and tokens.max_id == int(max(tokens.tokens)) > 100_000


def test_a_pickled_store_maps_the_file(corpus):
    tokens = opened(corpus)
    assert len(tokens.tokens)
    data = pickle.dumps(tokens)
    assert np.array_equal(pickle.loads(data).tokens, tokens.tokens)
    assert isinstance(pickle.loads(data).tokens.base, np.memmap)
    (corpus / "data" / "0.txt").write_text("a longer text " * 10_000)
    longer = opened(corpus)
    assert len(longer.tokens) > 100_000 and len(pickle.dumps(longer)) < 2 * len(data)


def _open_in_process(folder, results):
    files = find_files(os.path.join(folder, "data"))
    results.put(open_store(files, ByteTokenizer(), cache_dir=os.path.join(folder, "cache")).fingerprint)


def test_processes_that_build_at_once_agree(corpus):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_open_in_process, args=(str(corpus), results)) for _ in range(3)]
    for process in processes:
        process.start()
    assert len({results.get(timeout=60) for _ in processes}) == 1
    for process in processes:
        process.join()
    assert len(list((corpus / "cache").iterdir())) == 1


def test_losing_the_race_to_publish(corpus):
    """A store that appeared meanwhile is kept when it is sound, and replaced when it is not."""
    first = opened(corpus)
    copy = corpus / "cache" / "copy.partial"
    shutil.copytree(first.folder, copy)
    store._publish(copy, first.folder)
    assert copy.exists() and store._read_store(first.folder, first.fingerprint) is not None
    (first.folder / "meta.json").write_text("{")
    store._publish(copy, first.folder)
    assert not copy.exists() and store._read_store(first.folder, first.fingerprint) is not None


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LCX_CACHE", raising=False)
    assert paths.cache_folder(None) == tmp_path / "lcx"
    monkeypatch.setenv("LCX_CACHE", str(tmp_path / "mine"))
    assert paths.cache_folder(None) == tmp_path / "mine"
    assert paths.cache_folder(str(tmp_path / "given")) == tmp_path / "given"
    for setting, given in (("LCX_CACHE", None), ("Dataset.cache_dir", "s3://bucket/mine")):
        monkeypatch.setenv("LCX_CACHE", "gs://bucket/mine")
        with pytest.raises(UserError, match=f"^{setting} is ..://bucket/mine: .* is not supported"):
            paths.cache_folder(given)
