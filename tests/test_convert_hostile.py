"""config.json, index and header with anything in them: read or refused in one line, never a traceback or a hang."""

import json
import random
import re
import shutil

import pytest
from hf_folders import make

from lcx.convert import api
from lcx.convert.hf import folder as hf_folder
from lcx.convert.hf.format import HuggingFace
from lcx.convert.hf.source import HfSource
from lcx.errors import UserError

DEEP, HUGE = '"@deep"', '"@huge"'
VALUES = [
    None, True, False, 0, -1, 1, 2, 3, 7, 10**12, 2**31, 2**63, -(10**30), 0.0, 0.5, -2.5, 1e308, float("nan"),
    float("inf"), "", "x", "4", "../x", "/etc/passwd", "a\nb", [], [1], [[]], {}, {"a": 1}, {"rope_type": "yarn"},
    ["sliding_attention", "full_attention"], [None, None], "@deep", "@huge", "yarn", "qwen3", "phi3", 16, 64,
]  # fmt: skip
KEYS = [
    "sliding_window", "layer_types", "rope_scaling", "rope_parameters", "head_dim", "partial_rotary_factor", "lcx_rope",
    "quantization_config", "original_max_position_embeddings", "a\nb", "eos_token_id", "logit_scale",
]  # fmt: skip
ROPE_KEYS = [
    "factor",
    "rope_type",
    "type",
    "rope_theta",
    "beta_fast",
    "mscale",
    "long_factor",
    "truncate",
    "a\nb",
]


def dumps(value) -> str:
    return json.dumps(value).replace(DEEP, "[" * 100_000 + "]" * 100_000).replace(HUGE, "9" * 3000)


def mutate(rng: random.Random, config: dict) -> dict:
    config = json.loads(json.dumps(config))
    for _ in range(rng.choice((1, 1, 2))):
        where, names = rng.choice(((config, [*config, *KEYS]), (config["rope_parameters"], ROPE_KEYS)))
        if isinstance(where, dict):
            where[rng.choice(names)] = rng.choice(VALUES)
        if not isinstance(config.get("rope_parameters"), dict):
            break
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("hostile") / "m")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Two files and an index."""
    root = tmp_path_factory.mktemp("hostile")
    api.write(root / "m", HfSource(make(root / "whole")), format=HuggingFace(max_shard_bytes=1500))
    return root / "m"


def outcome(read) -> str:
    """'read', or the one line of the refusal."""
    try:
        read()
    except UserError as error:
        assert len(str(error)) < 1200 and re.fullmatch(r"[^\n\r]+", str(error)), str(error)
        return str(error)
    return "read"


def test_any_config(folder):
    path, config = folder / "config.json", json.loads((folder / "config.json").read_text())
    rng, text, outcomes = random.Random(0), path.read_text(), []
    try:
        for _ in range(150):
            path.write_text(dumps(mutate(rng, config)))
            outcomes.append(outcome(lambda: HfSource(folder)))
    finally:
        path.write_text(text)
    refused = [line for line in outcomes if line != "read"]
    assert len(refused) > 75 and len(set(refused)) > 40
    assert "read" in outcomes


def test_a_fault_of_any_model_type_suggests_no_other(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": ""}))
    found = outcome(lambda: HfSource(tmp_path / "m"))
    assert found.endswith("config.json has pad_token_id = '', expected an id, or null")


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "x.safetensors", "model.safetensors", "a.yml"])
def test_devices_are_not_opened(tmp_path, name):
    """/dev/zero never ends, and a pipe waits for a writer."""
    (tmp_path / name).symlink_to("/dev/null")
    wanted = "no checkpoint" if name == "a.yml" else "is not a regular file|leads out of the folder|has no config"
    assert re.search(wanted, outcome(lambda: api.source(tmp_path)))


def test_any_index(sharded):
    path = sharded / hf_folder.WEIGHT_FILES[1]
    text = path.read_text()
    index, rng, outcomes = json.loads(text), random.Random(1), []
    try:
        for _ in range(60):
            changed = json.loads(text)
            where = rng.choice((changed, changed["weight_map"], changed["metadata"]))
            where[rng.choice(list(where))] = rng.choice(VALUES)
            path.write_text(dumps(changed))
            outcomes.append(outcome(lambda: hf_folder.HfFolder(sharded)))
    finally:
        path.write_text(text)
    assert len(set(outcomes)) > 10 and len(index["weight_map"]) == 21


def test_any_header(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, data, rng, outcomes = json.loads(whole[8 : 8 + length]), whole[8 + length :], random.Random(2), []
    names = [name for name in header if name != "__metadata__"]
    try:
        for _ in range(100):
            changed = json.loads(json.dumps(header))
            entry = changed[rng.choice(names)]
            key = rng.choice(list(entry))
            if rng.random() < 0.4 and isinstance(entry[key], list):
                entry[key][rng.randrange(len(entry[key]))] = rng.choice(VALUES)
            else:
                entry[key] = rng.choice([*VALUES, "F16", "I8", "BF16"])
            head = dumps(changed).encode()
            path.write_bytes(len(head).to_bytes(8, "little") + head + data)
            outcomes.append(outcome(lambda: HfSource(folder)))
    finally:
        path.write_bytes(whole)
    assert outcomes.count("read") < 10 and len(set(outcomes)) > 30
    assert all(line == "read" or str(folder) in line for line in outcomes)
