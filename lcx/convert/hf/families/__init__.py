"""The table of Hugging Face families, one file each, looked up by the model_type of config.json."""

from lcx.convert.core.rules import Rule
from lcx.convert.hf.families.arcee import ARCEE
from lcx.convert.hf.families.cohere2 import COHERE2
from lcx.convert.hf.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from lcx.convert.hf.families.ernie4_5 import ERNIE4_5
from lcx.convert.hf.families.exaone4 import EXAONE4
from lcx.convert.hf.families.gemma2 import GEMMA2
from lcx.convert.hf.families.gemma3 import GEMMA3
from lcx.convert.hf.families.gemma4 import GEMMA4
from lcx.convert.hf.families.glm4 import GLM, GLM4
from lcx.convert.hf.families.gpt_oss import GPT_OSS
from lcx.convert.hf.families.granite import GRANITE
from lcx.convert.hf.families.llama import LLAMA
from lcx.convert.hf.families.llama4 import LLAMA4
from lcx.convert.hf.families.ministral import MINISTRAL
from lcx.convert.hf.families.ministral3 import MINISTRAL3
from lcx.convert.hf.families.mistral import MISTRAL
from lcx.convert.hf.families.mixtral import MIXTRAL
from lcx.convert.hf.families.nemotron import NEMOTRON
from lcx.convert.hf.families.olmo2 import OLMO2, OLMO3
from lcx.convert.hf.families.olmoe import OLMOE
from lcx.convert.hf.families.phi3 import PHI3
from lcx.convert.hf.families.qwen2 import QWEN2
from lcx.convert.hf.families.qwen2_moe import QWEN2_MOE
from lcx.convert.hf.families.qwen3 import QWEN3
from lcx.convert.hf.families.qwen3_moe import QWEN3_MOE
from lcx.convert.hf.families.seed_oss import SEED_OSS
from lcx.convert.hf.families.smollm3 import SMOLLM3
from lcx.convert.hf.family import Family
from lcx.model import Decoder

_ALL = (
    LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, GEMMA2, GEMMA3, OLMO2, OLMO3, SMOLLM3, GRANITE, COHERE2, GLM4, MINISTRAL,
    MIXTRAL, QWEN2_MOE, QWEN3_MOE, GPT_OSS, DEEPSEEK_V2, DEEPSEEK_V3, LLAMA4, GEMMA4,
    MINISTRAL3, ARCEE, SEED_OSS, EXAONE4, OLMOE, ERNIE4_5, NEMOTRON, GLM,
)  # fmt: skip
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ALL}


def find(model_type: object, own: Family | None = None) -> Family | None:
    """The family of a model_type; the user's own takes precedence over the table. None if there is none."""
    if own is not None and own.model_type == model_type:
        return own
    return FAMILIES.get(model_type) if isinstance(model_type, str) else None


def rules(model: Decoder) -> list[Rule]:
    """The mapping between tensors and parameters for a model whose model_type is in the table."""
    return FAMILIES[model.model_type].rules(model)
