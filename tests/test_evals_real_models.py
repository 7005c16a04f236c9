"""The evaluations of real weights: against transformers, and the wall of a model beyond its window."""

import dataclasses

import numpy as np
import pytest

import lcx
from lcx.data import Dataset, load_tokenizer
from lcx.evals.loss_by_position import LossByPosition
from lcx.evals.perplexity import Perplexity

TINYSTORIES = "data/text/tinystories_train_2MiB.txt"
BABY = "data/weights/babyllama105/hf"


def test_a_real_model_shows_its_wall_in_the_sliding_window(reference, tmp_path):
    path = str(reference / BABY)
    dataset = Dataset(
        str(reference / TINYSTORIES), separator="<|endoftext|>", eval_fraction=1.0, cache_dir=str(tmp_path)
    )
    task = Perplexity(dataset=dataset, max_tokens=4000)
    result = task(*lcx.load(path), load_tokenizer(path))
    short, own, long = result["windows"]
    assert [entry["window"] for entry in result["windows"]] == [64, 256, 512]
    assert short["tokens"] == own["tokens"] == long["tokens"]  # the same targets
    assert own["perplexity"] < short["perplexity"] < 3 < 2 * own["perplexity"] < long["perplexity"]
    assert (
        "twice the model's window of 256; limited by the longest document, 845 tokens" in result["notes"][0]
    )
    assert all(f"with a window of {W}" in task.finding({"baby": result}) for W in (64, 256, 512))


@pytest.mark.parametrize("scaling", [None, {"rope_type": "yarn", "factor": 4.0}], ids=["unscaled", "yarn"])
def test_the_wall_of_a_real_model_equals_transformers(reference, tmp_path, scaling):
    """The first rows of 1024 tokens: white space around each story removed, BOS before it, end to end.

    The published means of 48 such rows, 4.42 in the last quarter and 0.78 at 128-256, are those of this packing.
    """
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path = str(reference / BABY)
    model, params = lcx.load(path, rope_scaling=scaling)
    dataset = Dataset(
        str(reference / TINYSTORIES), separator="<|endoftext|>", eval_fraction=1.0, cache_dir=str(tmp_path)
    )
    lengths = (1024,) if scaling else None  # by itself, an evaluation goes to 4 times the window of 256
    task = LossByPosition(dataset=dataset, lengths=lengths, max_tokens=48 * 1024)
    if scaling is None:
        result = task(model, params, load_tokenizer(path))
        assert "4 times the model's window of 256" in result["notes"][0]
        assert "beyond it: worse by 3.6" in task.finding({"baby": result})
        (entry,) = result["lengths"]
        assert entry["rows"] == 48 and entry["last_quarter"]["nll"] == pytest.approx(4.42, abs=0.01)
        assert entry["buckets"][1]["nll"] == pytest.approx(0.78, abs=0.01)

    few = 4
    (entry,) = dataclasses.replace(task, max_tokens=few * 1024)(model, params, load_tokenizer(path))[
        "lengths"
    ]
    config = transformers.AutoConfig.from_pretrained(path)
    if scaling:
        config.rope_parameters = {
            **config.rope_parameters,
            **scaling,
            "original_max_position_embeddings": 256,
        }
    config.max_position_embeddings = 1024
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, config=config).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    ids: list[int] = []
    for story in (reference / TINYSTORIES).read_text().split("<|endoftext|>"):
        ids += [tokenizer.bos_token_id, *tokenizer(story.strip(), add_special_tokens=False).input_ids]
        if len(ids) > few * 1024:
            break
    rows = np.lib.stride_tricks.sliding_window_view(np.array(ids[: few * 1024 + 1]), 1025)[::1024]
    with torch.no_grad():
        logp = torch.cat(
            [theirs(torch.tensor(part[:, :-1])).logits.log_softmax(-1) for part in np.split(rows, 2)]
        )
    nll = -logp.gather(-1, torch.tensor(rows[:, 1:, None].copy()))[..., 0].double().numpy()
    assert scaling is None or entry["last_quarter"]["nll"] < 1, "no wall"
    for bucket in [*entry["buckets"], entry["last_quarter"], *entry["curve"]]:
        expected = nll[:, bucket["start"] : bucket["end"]].mean()
        assert bucket["nll"] == pytest.approx(expected, abs=1e-4)
