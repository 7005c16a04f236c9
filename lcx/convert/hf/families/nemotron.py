"""Nemotron (Nemotron-4, Minitron): LayerNorms stored as the difference from 1, half of each head rotated, no gate."""

import dataclasses

from lcx.convert.hf.families.arcee import Arcee
from lcx.convert.hf.rope_parameters import RopeDialect
from lcx.layers import Norm

_NORM = Norm(center=True, bias=True, offset=1.0)


@dataclasses.dataclass(frozen=True)
class Nemotron(Arcee):
    model_type: str = "nemotron"
    architecture: str = "NemotronForCausalLM"
    eps_key: str = "norm_eps"
    rope: RopeDialect = RopeDialect(partial=True)
    partial_factor: float = 0.5
    writes_head_dim: bool = True

    def block(self, config):
        return {"norm": _NORM}

    def decoder(self, config):
        return {"norm": _NORM}


NEMOTRON = Nemotron()
