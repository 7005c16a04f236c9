"""The architecture of Evo 2: published sizes and layer orders."""

import pytest

from lcx.errors import UserError
from lcx.mixers.attention import Attention
from lcx.mixers.hyena import HyenaLI, HyenaMR, HyenaSE
from lcx.model import num_params
from lcx.striped_hyena import striped_hyena

ONE = "SDH*SDHSDH*SDHSDH*SDHSDH*"
SEVEN = ONE + "SDHSDH*"
FORTY = SEVEN + "SDH*SDHSDH*SDHSDH*"
KINDS = {HyenaSE: "S", HyenaMR: "D", HyenaLI: "H", Attention: "*"}


def evo2(pattern, width, mlp, groups):
    return striped_hyena(
        pattern=pattern,
        hidden_size=width,
        intermediate_size=mlp,
        num_heads=width // 128,
        se_groups=groups,
        mr_groups=groups,
        max_position_embeddings=8192,
    )


@pytest.mark.parametrize(
    "pattern, width, mlp, groups, billions, compiled",
    [
        (ONE, 1920, 5120, 128, 1.108, 11),
        (SEVEN, 4096, 11008, 256, 6.482, 11),
        (SEVEN, 4096, 11264, 256, 6.583, 11),
        (SEVEN[:24], 8192, 22528, 512, 19.740, 10),
        (FORTY, 8192, 21888, 512, 40.334, 22),
        (FORTY, 8192, 22528, 512, 41.121, 22),
    ],
)
def test_published_sizes(pattern, width, mlp, groups, billions, compiled):
    model = evo2(pattern, width, mlp, groups)
    assert num_params(model) == pytest.approx(billions * 1e9, rel=1e-3)
    layers = [block for s in model.stages for _ in range(s.repeat) for block in s.pattern]
    assert "".join(KINDS[type(block.mixer)] for block in layers) == pattern
    assert [block.mlp.activation for block in layers] == ["gelu"] + ["identity"] * (len(pattern) - 1)
    assert sum(len(stage.pattern) for stage in model.stages) == compiled


@pytest.mark.parametrize(
    "wrong, message",
    [({"pattern": "SDX"}, "'X'"), ({"pattern": ""}, "expected letters"), ({"groups": 7}, "se_groups 7")],
)
def test_sizes_that_do_not_fit(wrong, message):
    with pytest.raises(UserError, match=message):
        evo2(**{"pattern": "S", "width": 256, "mlp": 8, "groups": 4, **wrong})
