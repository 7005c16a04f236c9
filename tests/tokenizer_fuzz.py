"""Seeded damage to the files of a tokenizer; whatever comes of it must be a tokenizer or a UserError.

python tests/tokenizer_fuzz.py 3000 [seed]   counts outcomes over many more cases than the suite tries
"""

import collections
import copy
import json
import pathlib
import random
import sys
import tempfile

from lcx.data import load_tokenizer, save_tokenizer, special_tokens, tokenizer_from_json
from lcx.data.tokenizers import check_vocabulary
from lcx.errors import UserError

TEXTS = ["", "hi there", "<s>a</s>  b", "ä☃\x00\r\n"]
VALUES = [
    None, True, False, -1, 0, 1, 2**31, 2**32, 2**63, 2**64, -(2**40), 1e308, float("nan"), float("inf"), 1.5, "", "x",
    "<s>", "\ud800", "\x00", "a" * 5000, [], {}, [[]], [None], {"a": 1}, [1, "a"], {"content": 3}, {"type": "Sequence"},
    {"type": "BPE"}, {"id": -1, "content": "x"}, {"type": "Lowercase"},
    {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
    {"type": "Replace", "pattern": {"String": ""}, "content": "x"},
]  # fmt: skip


def small_tokenizer(folder, *, classes=("TokenizersBackend",), rng=None):
    """A tiny byte-level BPE with everything that a folder may hold beside it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{letter: i + 3 for i, letter in enumerate(letters)}}
    vocab |= {"hi": len(vocab)}
    library = Tokenizer(models.BPE(vocab=vocab, merges=[("h", "i")]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<unk>", "<s>", "</s>", AddedToken("<pad>", special=True)])
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    library.save(str(folder / "tokenizer.json"))
    name = (rng or random.Random(0)).choice(classes)
    files = {
        "tokenizer_config": {
            "tokenizer_class": name, "bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"},
            "add_bos_token": True, "legacy": True, "model_max_length": 8, "extra_special_tokens": ["<img>"],
        },
        "special_tokens_map": {"bos_token": "<s>", "pad_token": {"content": "<pad>", "lstrip": False}},
        "added_tokens": {"<pad>": 260},
        "generation_config": {"eos_token_id": [2, 3]},
        "config": {"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2},
    }  # fmt: skip
    for key, value in files.items():
        (folder / f"{key}.json").write_text(json.dumps(value))


def small_sentencepiece(folder):
    """A tiny BPE model in the format of sentencepiece, like Llama 2's: no normalization, byte fallback."""
    (folder / "tokenizer.model").write_bytes(sentencepiece_bytes())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "add_bos_token": True})
    )


def sentencepiece_bytes(*, kind=2, extra=b""):
    import struct

    def field(number, wire, data):
        return bytes([number << 3 | wire]) + data

    def text(number, data):
        return field(number, 2, bytes([len(data)]) + data)

    def piece(content, score, kind):
        body = text(1, content.encode()) + field(2, 5, struct.pack("<f", score)) + field(3, 0, bytes([kind]))
        return text(1, body)

    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{i:02X}>", 6) for i in range(256))]
    pieces += [(t, 1) for t in ("▁", "h", "i", "a", "b", "t", "e", "r", "hi", "▁hi", "▁▁", "th", "▁a")]
    out = b"".join(piece(content, -float(i), k) for i, (content, k) in enumerate(pieces))
    trainer = field(3, 0, bytes([kind])) + bytes([35 << 3 & 255 | 128, 2, 1])
    normalizer = field(3, 0, b"\1") + field(4, 0, b"\0") + field(5, 0, b"\1")
    return out + text(2, trainer) + text(3, normalizer) + extra


def damaged(data, rng):
    """JSON bytes with one or two faults of the kinds that occur: values, structure, bytes."""
    kind = rng.random()
    if kind < 0.7:
        value = copy.deepcopy(json.loads(data))
        for _ in range(rng.choice([1, 1, 2])):
            change(value, rng)
        return json.dumps(value).encode(errors="surrogatepass")
    if kind < 0.75:
        depth = rng.choice([200, 5000, 100_000])
        return b'{"a":' * depth + b"1" + b"}" * depth if rng.random() < 0.5 else b"[" * depth + b"]" * depth
    raw = bytearray(data)
    for _ in range(rng.choice([1, 3, 20])):
        at = rng.randrange(len(raw))
        choice = rng.random()
        if choice < 0.4:
            raw[at] = rng.randrange(256)
        elif choice < 0.6:
            del raw[at : at + rng.randrange(1, 40)]
        elif choice < 0.8:
            raw[at:at] = rng.choice([b"\xff\xfe", b'"', b"{", b"]", b"NaN", b"1e999", b'"a":1,"a":2,'])
        else:
            del raw[at:]
        if not raw:
            break
    return bytes(raw)


def change(value, rng):
    """Replaces, removes or renames one entry somewhere inside."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(value[key], dict | list) and value[key] and rng.random() < 0.75:
            value = value[key]
            continue
        action = rng.random()
        if action < 0.15:
            del value[key]
        elif action < 0.25 and isinstance(value, dict):
            value[str(rng.choice(VALUES)).encode(errors="replace").decode()] = value.pop(key)
        else:
            value[key] = copy.deepcopy(rng.choice(VALUES))
        return


CLASSES = (
    "TokenizersBackend",
    "LlamaTokenizer",
    "GemmaTokenizer",
    "Qwen2Tokenizer",
    "GPT2Tokenizer",
    "CohereTokenizer",
)


def one_case(folder, rng):
    """Makes a damaged folder; returns which file was damaged."""
    if rng.random() < 0.25:
        small_sentencepiece(folder)
    else:
        small_tokenizer(folder, classes=CLASSES, rng=rng)
        if rng.random() < 0.3:
            save_tokenizer(load_tokenizer(folder), folder)
    target = rng.choice(sorted(folder.iterdir()))
    data = target.read_bytes()
    if target.suffix == ".model":
        raw = bytearray(data)
        for _ in range(rng.choice([1, 2, 8])):
            at = (
                rng.randrange(len(raw))
                if rng.random() < 0.5
                else rng.randrange(max(0, len(raw) - 60), len(raw))
            )
            if rng.random() < 0.7:
                raw[at] = rng.randrange(256)
            else:
                del raw[at : at + rng.randrange(1, 20)]
        target.write_bytes(bytes(raw))
    else:
        target.write_bytes(damaged(data, rng))
        if target.name == "tokenizer.json" and rng.random() < 0.3:  # with a record of the damaged file
            (folder / "lcx_tokenizer.json").unlink(missing_ok=True)
    return target.name


def use(folder):
    """Everything that a run does with a tokenizer."""
    tokenizer = load_tokenizer(folder)
    special_tokens(tokenizer)
    ids = [i for text in TEXTS for i in tokenizer.encode(text, add_special_tokens=True).tolist()]
    tokenizer.decode([*ids, -1, 2**31, 2**40])
    assert tokenizer.vocab_size > 0
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json())))
    check_vocabulary(tokenizer, 2**31)


def outcome(folder):
    """ "read", or the one line of the refusal."""
    try:
        use(folder)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1500, error
        return str(error)
    return "read"


def main(count, seed):
    counts = collections.Counter()
    for case in range(count):
        rng = random.Random(f"{seed}/{case}")
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            target = one_case(folder, rng)
            try:
                found = "read" if outcome(folder) == "read" else "refused"
            except BaseException as error:
                found = f"TRACEBACK {type(error).__name__}"
                print(case, target, repr(error)[:300])
                if isinstance(error, KeyboardInterrupt):
                    raise
            counts[target, found] += 1
    for (target, found), number in sorted(counts.items()):
        print(f"{target:28} {found:10} {number}")
    print({found: sum(n for (_, f), n in counts.items() if f == found) for found in {f for _, f in counts}})


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
