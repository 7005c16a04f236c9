"""Long rows layer by layer: the same scores and embeddings as piece by piece and at once."""

import jax
import numpy as np
import pytest

import lcx
from lcx import layer_order
from lcx.evals.support import scoring
from lcx.llama import llama
from lcx.model import layers
from lcx.parameters import init_params
from lcx.striped_hyena import striped_hyena

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "vocab_size": 64, "max_position_embeddings": 512}
POINTS = ["embed", "layers.1.mixer", "layers.1.mlp.down_proj.input", "layers.2.input", "final_norm", "-1"]


@pytest.fixture(scope="module")
def model():
    hyena = striped_hyena(pattern="*D*", activated_layers=None, se_groups=4, mr_groups=4, **SIZES)
    rng = np.random.default_rng(0)
    params = init_params(hyena, jax.random.key(0))
    return hyena, jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), params)


def test_scores_and_embeddings_are_the_same(model, monkeypatch):
    tokens = np.random.default_rng(1).integers(1, 64, (2, 150)).astype(np.int32)
    labels = np.roll(tokens, -1, axis=1)
    whole = scoring.score(*model, tokens, labels, description=None)
    rows = [tokens[0].tolist(), tokens[1, :90].tolist(), tokens[1, :40].tolist()]
    asked = {"mean": POINTS, "last": ["layers.1.mixer"]}
    found = {pool: lcx.embed(*model, rows, layers=points, pool=pool) for pool, points in asked.items()}
    monkeypatch.setattr(layer_order, "saves", lambda *args: True)
    monkeypatch.setattr(scoring, "LONG", 32)
    np.testing.assert_allclose(
        scoring.score(*model, tokens, labels, tokens_per_batch=64, description=None), whole, atol=1e-4
    )
    for pool, expected in found.items():
        again = lcx.embed(*model, rows, layers=asked[pool], pool=pool, piece_length=64)
        for name in asked[pool]:
            np.testing.assert_allclose(again[name], expected[name], atol=1e-4, err_msg=f"{pool} of {name}")


def test_only_many_keys_and_values_are_worth_it():
    evo2 = striped_hyena(
        pattern="SDH*SDHSDH*SDHSDH*SDHSDH*SDHSDH*", hidden_size=4096, intermediate_size=11264, num_heads=32,
        se_groups=256, mr_groups=256, max_position_embeddings=1 << 20, dtype="bfloat16",
    )  # fmt: skip
    assert layer_order.saves(evo2, 1, 1 << 20) and not layer_order.saves(evo2, 1, 1 << 16)
    caches = [layer_order.cache_bytes(layer.block, evo2, 1, 1 << 20) for layer in layers(evo2)]
    assert sum(size > 0 for size in caches) == 5 and max(caches) == pytest.approx(2**34, rel=1e-3)
    grouped = llama(num_layers=16, num_kv_heads=1, **SIZES | {"hidden_size": 1024, "num_heads": 16})
    assert not layer_order.saves(grouped, 1, 1 << 20)  # its caches are no larger than the stream
