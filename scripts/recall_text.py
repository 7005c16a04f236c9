"""Writes text in which what comes next can only be known from far back: keys that come again with their values.

    python scripts/recall_text.py --output=recall.jsonl --documents=20000 --length=128 [--seed=0]

Every document draws some of 16 keys (A to P) and gives each one of 16 values (Q to `), which it keeps to the end. The
text is a stream of these pairs; in half of the documents, pairs of spaces lie between them. Documents differ in the
number of keys and the share of spaces, so some repeat a key soon and others late; a model learns the near ones first. A
key cannot be guessed, nor its value at first sight; every later value can be looked up, and be known in no other way.
"""

import argparse
import json

import numpy as np

KEYS, VALUES, FILLER = range(65, 81), range(81, 97), 32  # bytes, the ids that configs/eval/recall.gin names


def document(rng: np.random.Generator, length: int) -> str:
    """A text of `length` characters (even)."""
    count = round(np.exp(rng.uniform(np.log(2), np.log(len(KEYS)))))
    keys = rng.choice(KEYS, count, replace=False)
    values = rng.choice(VALUES, count)
    drawn = rng.integers(count, size=length // 2)
    pairs = np.stack([keys[drawn], values[drawn]], 1)
    spaces = rng.uniform(0, 0.95) if rng.random() < 0.5 else 0.0
    pairs[rng.random(length // 2) < spaces] = FILLER
    return pairs.astype(np.uint8).tobytes().decode()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True)
    parser.add_argument("--documents", type=int, default=20000)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    with open(args.output, "w", encoding="utf-8") as file:
        for _ in range(args.documents):
            file.write(json.dumps({"text": document(rng, args.length)}) + "\n")


if __name__ == "__main__":
    main()
