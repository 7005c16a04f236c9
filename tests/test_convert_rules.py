"""The rules engine on its own: layouts against the formula, accounting for every tensor, partial reads."""

import itertools
import json

import numpy as np
import pytest

from lcx.convert.core.rules import Flat, Part, Rule, Same, Table, Transposed, transpose
from lcx.convert.files.tensor_io import TensorInfo
from lcx.convert.hf import config as hf_config
from lcx.errors import UserError

RNG = np.random.default_rng(0)
LAYOUTS = [
    (Same(), (5, 3), lambda x: x),
    (Same(), (), lambda x: x),
    (Flat(), (3, 4), lambda x: x.reshape(12)),
    (
        Transposed(1),
        (5, 3, 4),
        lambda x: np.array([[x[d, n, h] for d in range(5)] for n in range(3) for h in range(4)]),
    ),
    (
        Transposed(2),
        (3, 4, 5),
        lambda x: np.array([[x[n, h, d] for n in range(3) for h in range(4)] for d in range(5)]),
    ),
    (Transposed(1), (5, 7), lambda x: x.T),
]


@pytest.mark.parametrize("layout, shape, formula", LAYOUTS)
def test_layouts_both_ways_and_in_part(layout, shape, formula):
    array = RNG.normal(size=shape)
    foreign = np.array(formula(array))
    assert layout.foreign_shape(shape) == foreign.shape
    np.testing.assert_array_equal(layout.to_foreign(array), foreign)
    np.testing.assert_array_equal(layout.to_lcx(foreign, shape), array)
    ranges = [[slice(i, j) for i in range(size) for j in range(i + 1, size + 1)] for size in shape]
    for index in itertools.islice(itertools.product(*ranges), 0, None, 7):
        first, last, made, rest = layout.rows(shape, index)
        rows = foreign[first:last] if shape else foreign
        np.testing.assert_array_equal(layout.to_lcx(rows, made)[rest], array[index])


def test_partial_reads_take_no_more_rows_than_needed():
    assert Transposed(1).rows((5, 6, 4), (slice(0, 2), slice(1, 3), slice(0, 4)))[:2] == (4, 12)
    assert Transposed(2).rows((3, 4, 10), (slice(0, 3), slice(0, 4), slice(5, 7)))[:2] == (5, 7)
    assert Same().rows((10, 4), (slice(3, 4), slice(0, 4)))[:2] == (3, 4)
    assert Flat().rows((6, 4), (slice(1, 2), slice(0, 4)))[:2] == (4, 8)


@pytest.mark.parametrize("shape", [(1, 1), (63, 65), (64, 3), (200, 130), (0, 4)])
def test_transpose(shape):
    matrix = RNG.normal(size=shape)
    result = transpose(matrix)
    assert result.flags.c_contiguous
    np.testing.assert_array_equal(result, matrix.T)


SHAPES = {"stack/kernel": (2, 3, 4), "stack/other": (2, 3, 2), "scale": (5,)}
TABLE = [
    *(
        Rule(f"fused.{i}", (Part("stack/kernel", Transposed(), i), Part("stack/other", Transposed(), i)))
        for i in range(2)
    ),
    Rule("norm", (Part("scale", Same()),)),
]


class Memory:
    def __init__(self, tensors):
        self.data = tensors
        self.tensors = {name: TensorInfo(array.dtype, array.shape) for name, array in tensors.items()}

    def read(self, name, start=0, stop=None):
        return self.data[name][start:stop]


def test_fused_stacked_tensors_both_ways():
    tree = {path: RNG.normal(size=shape).astype(np.float32) for path, shape in SHAPES.items()}
    table = Table(TABLE, SHAPES)
    foreign = table.to_foreign(tree)
    assert {name: array.shape for name, array in foreign.items()} == {
        "fused.0": (6, 3),
        "fused.1": (6, 3),
        "norm": (5,),
    }
    np.testing.assert_array_equal(foreign["fused.1"][:4], tree["stack/kernel"][1].T)
    np.testing.assert_array_equal(foreign["fused.1"][4:], tree["stack/other"][1].T)
    source = Memory(foreign)
    assert table.check_source(source.tensors) == []
    for path, shape in SHAPES.items():
        for repeat in range(2) if path != "scale" else [None]:
            expected = tree[path] if repeat is None else tree[path][repeat]
            index = tuple(slice(1, size) for size in (shape if repeat is None else shape[1:]))
            np.testing.assert_array_equal(table.read_leaf(source, path, repeat, index), expected[index])


@pytest.mark.parametrize(
    "rules, shapes, message",
    [
        (TABLE[1:], SHAPES, "no place for the parameters stack/kernel, stack/other"),
        (TABLE, SHAPES | {"extra": (1,)}, "no place for the parameters extra"),
        (TABLE, {"scale": (5,)}, "needs the parameter 'stack/kernel'"),
        ([*TABLE, TABLE[2]], SHAPES, "twice: norm"),
        ([*TABLE, Rule("again", TABLE[2].parts)], SHAPES, "store 'scale' twice"),
        ([Rule("x", (Part("a", Same()), Part("b", Same())))], {"a": (2, 3), "b": (2, 4)}, "different rows"),
    ],
)
def test_tables_must_account_for_everything(rules, shapes, message):
    with pytest.raises(UserError) as error:
        Table(rules, shapes)
    assert message in str(error.value)


def test_checkpoints_must_match_the_table():
    table = Table(TABLE, SHAPES)
    good = {name: TensorInfo(np.dtype("f4"), shape) for name, shape in table.foreign_shapes.items()}
    assert table.check_source(good | {"old.inv_freq": good["norm"]}, harmless=[r".*inv_freq"]) == [
        "old.inv_freq"
    ]
    bad = {
        "1 missing: norm; 1 unexpected: extra": {
            "fused.0": good["fused.0"],
            "fused.1": good["fused.1"],
            "extra": good["norm"],
        },
        "norm is (6,), expected (5,)": good | {"norm": TensorInfo(np.dtype("f4"), (6,))},
        "norm is int32": good | {"norm": TensorInfo(np.dtype("i4"), (5,))},
        "1 unexpected: old.inv_freq": good | {"old.inv_freq": good["norm"]},
    }
    for message, source in bad.items():
        with pytest.raises(UserError) as error:
            table.check_source(source)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_long_lists_are_cut():
    table = Table(TABLE, SHAPES)
    with pytest.raises(UserError, match="20 unexpected: x0, x1, x2, x3, x4, x5 and 14 more"):
        good = {name: TensorInfo(np.dtype("f4"), shape) for name, shape in table.foreign_shapes.items()}
        table.check_source(good | {f"x{i}": good["norm"] for i in range(20)})


# ------------------------------------------------------------------------------------------------ config.json

CONFIG = dict(
    vocab_size=67,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    hidden_act="silu",
    tie_word_embeddings=False,
    rope_theta=1e4,
    rope_scaling=None,
    rope_parameters=None,
    sliding_window=None,
    use_sliding_window=False,
    max_window_layers=2,
    layer_types=None,
    attention_bias=None,
    mlp_bias=False,
    partial_rotary_factor=None,
    original_max_position_embeddings=None,
    architectures=None,
)
STRANGE = [
    -1, 0, 3, 1.5, True, "x", "", [], {}, [1], [None], ["a", "b"], {"a": 1}, 10**30, float("inf"),
    float("nan"), {"rope_type": None}, {"rope_type": ["x"]}, {"rope_type": "linear"}, {"full_attention": {}},
    {"rope_type": "linear", "factor": "2"}, {"rope_type": "yarn", "factor": 0},
    {"full_attention": {"rope_type": "default"}, "sliding_attention": None},
    {"rope_type": "longrope", "short_factor": [1], "long_factor": ["x"]},
]  # fmt: skip


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "phi3"])
def test_strange_values_in_config_json_are_read_or_refused_in_one_line(model_type):
    refused = 0
    for key, value in itertools.product(CONFIG, STRANGE):
        try:
            hf_config.from_config(CONFIG | {"model_type": model_type, key: value})
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 200


def test_defaults_are_those_of_transformers():
    import transformers

    needed = {
        key: CONFIG[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    }
    needed |= {"num_attention_heads": 64, "max_position_embeddings": 100_000}
    for model_type in ("llama", "mistral", "qwen2", "qwen3", "phi3"):
        theirs = transformers.AutoConfig.for_model(
            model_type, **needed | {"hidden_size": 1024, "pad_token_id": None}
        )
        model = hf_config.from_config(needed | {"hidden_size": 1024, "model_type": model_type})
        mixer = model.stages[0].pattern[0].mixer
        assert mixer.num_kv_heads == theirs.num_key_value_heads, model_type
        assert mixer.head_dim == (getattr(theirs, "head_dim", None) or 1024 // 64), model_type
        assert model.norm_eps == theirs.rms_norm_eps, model_type
        assert model.tie_word_embeddings == theirs.tie_word_embeddings, model_type
        assert mixer.window == getattr(theirs, "sliding_window", None), model_type
        assert mixer.rope.rope_theta == theirs.rope_parameters["rope_theta"], model_type
        written = json.loads(json.dumps(hf_config.to_config(model, dtype="float32")))
        assert hf_config.from_config(written) == model
