"""Llama 2 to 3.2, and other models with model_type "llama"."""

import dataclasses

from lcx.convert.hf.llama_like import LlamaLike
from lcx.errors import UserError


@dataclasses.dataclass(frozen=True)
class Llama(LlamaLike):
    model_type: str = "llama"
    architecture: str = "LlamaForCausalLM"
    biases: str = "config"
    mlp_bias: bool = True

    def check_expressible(self, model, shape):
        super().check_expressible(model, shape)
        if model.hidden_size % shape["num_heads"]:
            raise UserError(
                f"the model has hidden_size {model.hidden_size}, which transformers' llama wants to be a multiple of "
                f"num_heads {shape['num_heads']}; save with format 'lcx'"
            )


LLAMA = Llama()
