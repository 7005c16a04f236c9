"""Steps of scripts/reproduce_two_mamba.sh besides training and evaluation."""
import argparse
import json
import pathlib

import numpy as np

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content }}"
    "{% endgeneration %}{% else %}{{ message.content }}{% endif %}{% endfor %}"
)
IDS = {"first_id": 33, "vocabulary": 32, "filler": 32}


def recall_rows(folder: pathlib.Path, rows: int, length: int, pairs: tuple[int, ...]) -> None:
    from lcx.evals.recall import Recall

    made = []
    for count in pairs:
        tokens, places = Recall(rows=rows // len(pairs), pairs=count, seed=count, **IDS).made(length, 258)
        made += [_conversation(row, np.sort(at)) for row, at in zip(tokens, places, strict=True)]
    order = np.random.default_rng(0).permutation(len(made))
    (folder / "recall.jinja").write_text(TEMPLATE)
    (folder / "recall.jsonl").write_text("".join(json.dumps({"messages": made[i]}) + "\n" for i in order))


def _conversation(row: np.ndarray, places: np.ndarray) -> list[dict[str, str]]:
    text, start, turns = "".join(map(chr, row.tolist())), 0, []
    for place in places.tolist():
        turns += [{"role": "user", "content": text[start:place]}, {"role": "assistant", "content": text[place]}]
        start = place + 1
    return turns + [{"role": "user", "content": text[start:]}] * (start < len(text))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what")
    parser.add_argument("--output")
    a = parser.parse_args()
    recall_rows(pathlib.Path(a.output), 32000, 32, (2, 4))
