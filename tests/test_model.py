"""The decoder's shape: stages, counts, caches, errors. Its numbers are compared in test_convert_parity.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import lcx
from lcx import model as model_lib
from lcx.errors import UserError
from lcx.mlps import tiles
from lcx.model import llama
from lcx.rope import Rope

SMALL = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_heads=4, max_position_embeddings=64)


@pytest.mark.parametrize(
    "windows, stages",
    [
        ((None,) * 6, [(1, 6)]),
        ((None, 5) * 3, [(2, 3)]),
        ((None, None, None, 5, 5), [(1, 3), (1, 2)]),
        ((5, None, 5), [(3, 1)]),
        ((None, 5, 5) * 2, [(3, 2)]),
        ((7, 5, None) + (5, 5, 9) * 3 + (5,), [(4, 1), (3, 3)]),
        ((None,), [(1, 1)]),
    ],
)
def test_layers_become_the_fewest_stages(windows, stages):
    model = llama(**SMALL, num_layers=len(windows), layer_windows=windows)
    assert [(len(stage.pattern), stage.repeat) for stage in model.stages] == stages
    in_order = [block.mixer.window for s in model.stages for _ in range(s.repeat) for block in s.pattern]
    assert tuple(in_order) == windows and model.num_layers == len(windows)


def test_equal_blocks_of_a_pattern_have_weights_of_their_own():
    """The builder reuses one block object for all layers of a kind; Flax would share its weights."""
    uniform, mixed = (llama(**SMALL, num_layers=6, layer_windows=w) for w in ((None,) * 6, (None, 5, 5) * 2))
    assert model_lib.num_params(mixed) == model_lib.num_params(uniform)
    kernels = model_lib.init_params(mixed, jax.random.key(0))["stages_0"]
    first, second = (kernels[f"block_{i}"]["mixer"]["q_proj"]["kernel"] for i in (1, 2))
    assert not np.array_equal(first, second)


def test_a_scanned_stage_is_traced_once(monkeypatch):
    """Tracing is most of the time to a first token."""
    traced = []
    call = model_lib.Block.__call__
    monkeypatch.setattr(model_lib.Block, "__call__", lambda self, *a, **k: traced.append(1) or call(self, *a, **k))
    model = llama(**SMALL, num_layers=4)
    params = model_lib.abstract_params(model)
    traced.clear()
    jax.eval_shape(model.apply, {"params": params}, jax.ShapeDtypeStruct((1, 5), np.int32))
    assert len(traced) == 1


def test_one_scan_or_many_stages_compute_the_same():
    """Layers with windows as long as the text are full attention, whatever the stages that they fall into."""
    tokens = jax.random.randint(jax.random.key(0), (2, 11), 0, 97)
    whole = llama(**SMALL, num_layers=4)
    cut = llama(**SMALL, num_layers=4, layer_windows=(None, None, 99, 99))
    params = model_lib.init_params(whole, jax.random.key(1))
    halves = {name: params[name] for name in ("embed", "final_norm", "lm_head")}
    for i in range(2):
        halves[f"stages_{i}"] = jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], params["stages_0"])
    found, expected = (
        jax.jit(model.apply)({"params": tree}, tokens) for model, tree in ((cut, halves), (whole, params))
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_parameter_counts_of_published_models():
    """Model cards: Llama-3 8B has 8,030,261,248 parameters, Llama-2 7B 6,738,415,616, Qwen2 0.5B 494,032,768."""
    llama3 = llama(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, num_kv_heads=8,
        max_position_embeddings=8192,
    )  # fmt: skip
    llama2 = llama(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32,
        max_position_embeddings=4096,
    )  # fmt: skip
    qwen2 = llama(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_layers=24, num_heads=14, num_kv_heads=2,
        max_position_embeddings=32768, qkv_bias=True, tie_word_embeddings=True,
    )  # fmt: skip
    counts = [model_lib.num_params(model) for model in (llama3, llama2, qwen2)]
    assert counts == [8_030_261_248, 6_738_415_616, 494_032_768]


def test_training_flops_count_every_product_once():
    """By hand for one layer: 6 per weight that multiplies, 12 N H per visible key, (T + 1) / 2 of them on average."""
    T, D, F, V, N, H = 10, 32, 48, 97, 4, 8
    model = llama(**SMALL, num_layers=1)
    products = 4 * D * N * H + 3 * D * F + V * D
    norms = 3 * D
    assert model_lib.flops_per_token(model, T) == 6 * (products + norms) + 12 * N * H * (T + 1) / 2
    windowed = llama(**SMALL, num_layers=1, layer_windows=(3,))
    seen = (1 + 2 + 3 * 8) / T
    assert model_lib.flops_per_token(windowed, T) == pytest.approx(6 * (products + norms) + 12 * N * H * seen)
    mixing = 12 * N * H * (T + 1) / 2
    head, layer = V * D, products + norms - V * D
    some = {"stages_0/block_0/mixer/q_proj/kernel": D * N * H, "stages_0/block_0/mixer/q_proj/a": 7}
    trained = 2 * D * N * H + 6 * 7  # two more for its own gradient, and low-rank ones all six
    assert model_lib.flops_per_token(model, T, some) == 4 * (head + layer) + trained + mixing
    assert model_lib.flops_per_token(model, T, some, local=True) == 2 * (head + layer) + 2 * trained - 42 + mixing
    above = {"lm_head/embedding": head}
    assert model_lib.flops_per_token(model, T, above) == 2 * (layer - D) + 4 * D + 6 * head + mixing / 3
    tied = llama(**SMALL, num_layers=1, tie_word_embeddings=True)
    assert model_lib.flops_per_token(tied, T, some) == model_lib.flops_per_token(model, T, some)


def test_remat_changes_nothing_but_memory(monkeypatch):
    monkeypatch.setattr(tiles, "TILE", 12)  # 33 tokens: three tiles of 11
    tokens = jax.random.randint(jax.random.key(0), (1, 33), 0, 97)
    params = model_lib.init_params(llama(**SMALL, num_layers=2), jax.random.key(1))

    def gradients(remat):
        model = llama(**SMALL, num_layers=2, remat=remat)
        return jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(model.apply({"params": p}, tokens)))))(params)

    expected = gradients("none")
    for remat in ("dots", "full", "host"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-4), gradients(remat), expected
        )


def test_a_cache_fixes_the_length_of_a_dynamic_rope():
    """The exact rule: a cache of n slots decodes with the rotation of n tokens from the first token on."""
    rope = Rope(rope_type="dynamic", factor=4.0, original_max_position_embeddings=8)
    model = llama(**SMALL, num_layers=2, rope=rope)
    params = model_lib.init_params(model, jax.random.key(1))
    tokens = jax.random.randint(jax.random.key(0), (1, 24), 0, 97)
    run = jax.jit(functools.partial(model.apply, method="hidden"))
    full, _ = run({"params": params}, tokens)
    cache, pieces = model.init_cache(1, 24), []
    for start in range(0, 24, 8):
        x, cache = run({"params": params}, tokens[:, start : start + 8], cache=cache)
        pieces.append(x)
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), full, atol=2e-5)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(num_layers=2, num_kv_heads=3), "num_heads 4 must be a multiple of num_kv_heads 3"),
        (dict(num_layers=2, hidden_size=33), "set head_dim"),
        (dict(num_layers=2, layer_windows=(None,)), "1 entry for num_layers 2"),
    ],
)
def test_sizes_that_do_not_fit(wrong, message):
    with pytest.raises(UserError, match=message):
        llama(**SMALL | wrong)


def test_unknown_remat():
    model = llama(**SMALL, num_layers=1, remat="some")
    with pytest.raises(UserError, match="remat .some.: expected one of none, full, host, dots"):
        model_lib.abstract_params(model)


def test_weights_that_are_not_numbers_are_refused():
    model = llama(**SMALL, num_layers=2)
    params = model_lib.init_params(model, jax.random.key(0))
    params["final_norm"]["scale"] = params["final_norm"]["scale"].at[3].set(jnp.nan)
    with pytest.raises(
        UserError, match="the logits after the prompt are NaN: the weights contain NaN"
    ) as caught:
        lcx.generate(model, params, [[1, 2]], max_new_tokens=2)
    assert "\n" not in str(caught.value)


def test_tokens_of_torch_and_none_at_all():
    model = llama(**SMALL, num_layers=2)
    params = model_lib.init_params(model, jax.random.key(0))
    expected = lcx.logits(model, params, [[1, 2, 3]])
    np.testing.assert_array_equal(lcx.logits(model, params, torch.tensor([[1, 2, 3]])), expected)
    with pytest.raises(UserError, match=r"of shape \(1, 0\), expected integers"):
        lcx.logits(model, params, np.zeros((1, 0), np.int32))
