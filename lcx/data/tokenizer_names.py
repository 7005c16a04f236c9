"""Which tokenizer class of transformers 5 a folder means: the rules and tables of its AutoTokenizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcx.data import json_files

GENERIC = "TokenizersBackend"
GENERIC_NAMES = frozenset({GENERIC, "PythonBackend", "PreTrainedTokenizer", "BloomTokenizer"})

# model_type -> class, from transformers.models.auto.tokenization_auto; other model_types name theirs in
# tokenizer_config.json, or have one that leaves tokenizer.json as it is. Of the classes, "Tokenizer" is left out.
_OF_MODEL_TYPES = {
    "Llama": "idefics idefics2",
    "CodeLlama": "code_llama",
    "Gemma": "diffusion_gemma gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text recurrent_gemma shieldgemma2 t5gemma"
    " zaya",
    "Qwen2": "audioflamingo3 colqwen2 cosmos3_omni dots3_note fun_asr_nano hunyuan_vl internvl lighton_ocr"
    " moss_transcribe_diarize ovis2 qianfan_ocr qwen2 qwen2_5_omni qwen2_5_vl qwen2_audio qwen2_moe qwen2_vl qwen3"
    " qwen3_asr qwen3_moe qwen3_next qwen3_omni_moe qwen3_vl qwen3_vl_moe vibevoice",
    "Qwen3_5": "qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen4_exp",
    "GPT2": "blip-2 codegen dbrx emu3 gpt2 gpt_neo gptj hyperclovax_vision_v2 instructblip instructblipvideo jais2 opt"
    " phi starcoder2",
    "GPTNeoX": "falcon_mamba gpt_neox mamba mamba2 mpt olmo olmoe rwkv xlstm",
    "Cohere": "aya_vision cohere cohere2",
    "Albert": "albert yoso",
    "Bart": "florence2",
    "Barthez": "barthez",
    "Bartpho": "bartpho",
    "Bert": "align bark bert blip bros chinese_clip convbert distilbert electra ernie flava git grounding-dino layoutlm"
    " megatron-bert mm-grounding-dino nezha nomic_bert qdqbert realm retribert squeezebert tvp vilt visual_bert",
    "BertGeneration": "bert-generation",
    "BertJapanese": "bert-japanese",
    "Bertweet": "bertweet",
    "BigBird": "big_bird",
    "BioGpt": "biogpt",
    "Blenderbot": "blenderbot",
    "BlenderbotSmall": "blenderbot-small",
    "ByT5": "byt5",
    "CLIP": "aimv2 clip clipseg groupvit omdet-turbo oneformer owlv2 owlvit sam3 sam3_video xclip",
    "CTRL": "ctrl",
    "Camembert": "camembert",
    "Canine": "canine",
    "Clvp": "clvp",
    "Cpm": "cpm",
    "CpmAnt": "cpmant",
    "DPRQuestionEncoder": "dpr",
    "Deberta": "deberta",
    "DebertaV2": "deberta-v2",
    "Dia": "dia",
    "Esm": "esm",
    "Esmc": "esmc esmfold2",
    "FNet": "fnet",
    "FSMT": "fsmt",
    "Flaubert": "flaubert",
    "Funnel": "funnel",
    "GPTNeoXJapanese": "gpt_neox_japanese",
    "GPTSw3": "gpt-sw3",
    "Herbert": "herbert",
    "LED": "led",
    "Lasr": "lasr_ctc lasr_encoder",
    "LayoutLMv2": "layoutlmv2",
    "LayoutLMv3": "layoutlmv3",
    "LayoutXLM": "layoutxlm",
    "Luke": "luke",
    "Lxmert": "lxmert",
    "M2M100": "m2m_100",
    "MBart": "mbart",
    "MBart50": "mbart50",
    "MLuke": "mluke",
    "MPNet": "mpnet",
    "Marian": "marian",
    "MarkupLM": "markuplm",
    "Mgpstr": "mgp-str",
    "MobileBert": "mobilebert",
    "Mvp": "mvp",
    "MyT5": "myt5",
    "Nllb": "nllb nllb-moe",
    "Nougat": "nougat pp_formulanet",
    "OpenAIGPT": "openai-gpt",
    "PLBart": "plbart",
    "Parakeet": "granite_speech5_ctc nemotron3_5_asr nemotron_asr_streaming parakeet_ctc parakeet_rnnt parakeet_tdt",
    "Pegasus": "pegasus",
    "Perceiver": "perceiver",
    "Phobert": "phobert",
    "ProphetNet": "prophetnet",
    "Rag": "rag",
    "Reformer": "reformer",
    "RemBert": "rembert",
    "RoCBert": "roc_bert",
    "RoFormer": "roformer",
    "Roberta": "bart bridgetower clap data2vec-text ibert lilt longformer mega mra roberta roberta-prelayernorm",
    "SeamlessM4T": "seamless_m4t seamless_m4t_v2",
    "Siglip": "siglip",
    "Siglip2": "siglip2",
    "Speech2Text": "speech_to_text",
    "SpeechT5": "speecht5",
    "Splinter": "splinter",
    "T5": "mt5 musicgen musicgen_melody switch_transformers t5",
    "Tapas": "tapas",
    "Tipsv2": "tipsv2",
    "Udop": "udop",
    "VideoPrism": "videoprism",
    "Vits": "vits",
    "Wav2Vec2CTC": "data2vec-audio hubert unispeech unispeech-sat wav2vec2 wav2vec2-bert wav2vec2-conformer",
    "Wav2Vec2PhonemeCTC": "wav2vec2_phoneme",
    "Whisper": "whisper",
    "XGLM": "xglm",
    "XLM": "xlm",
    "XLMRoberta": "gte jina_embeddings_v3 metaclip_2 trocr xlm-roberta xmod",
    "XLNet": "xlnet",
}
_OF_GENERIC = (
    "EvollaModel arctic aria beam bigbird_pegasus camembertv2-base canary chatlm cohere_asr ernie4_5 ernie4_5_moe"
    " flex_olmo fuyu glm glm4 glm4_moe glm4_moe_lite glm4v glm4v_moe glm_image glmasr got_ocr2 gpt_bigcode"
    " gradium_phonon_tts granite granitemoe granitemoehybrid granitemoeshared h2ovl_chat hyperclovax hyperclovax_vlm"
    " internlm2 internlm3 iquestcoder jamba kimi_k25 kimi_linear kosmos-2 llava llava_next mimo_v2_flash minicpm3"
    " minicpm_ocr minicpmv minicpmv4_6 minicpmv4_7 minimax_m2 ministral ministral3 mistral mistral3 mistral_large4"
    " mixtral modernbert modernbert-decoder molmo molmo2 nemo_speechlm nemotron nvfp4 nystromformer olmo2 olmo3"
    " olmo_hybrid opencua openvla paddleocr_vl pegasus_x persimmon phi3 phi3_v phimoe pix2struct pixtral pocket_tts"
    " smolvlm stablelm step3_vl umt5 vipllava voxtral voxtral_realtime xlm-roberta-xl"
)
REGISTERED = {kind: f"{name}Tokenizer" for name, kinds in _OF_MODEL_TYPES.items() for kind in kinds.split()}
REGISTERED |= dict.fromkeys(_OF_GENERIC.split(), GENERIC)
# model_types without their own configuration class: they determine no tokenizer class if none is declared
_NAMES_ONLY = (
    "barthez bartpho bert-japanese bertweet byt5 code_llama cpm herbert mbart50 mega mluke myt5 nezha nllb phobert"
    " qdqbert realm retribert wav2vec2_phoneme"
)
_WITHOUT_CONFIG = frozenset(_NAMES_ONLY.split())
# model_types whose folders on the hub declare a wrong class
_OVERRULED = (
    "arctic camembertv2-base chatlm cohere_asr ernie4_5 ernie4_5_moe fuyu h2ovl_chat hyperclovax hyperclovax_vision_v2"
    " hyperclovax_vlm internlm2 internlm3 iquestcoder jamba llava llava_next minicpm3 minicpmv minimax_m2 modernbert"
    " modernbert-decoder molmo molmo2 nemotron nvfp4 opencua openvla paddleocr_vl phi3 phi3_v phimoe qwen2 qwen3_5"
    " qwen3_5_moe qwen3_5_moe_text qwen4_exp siglip2 smolvlm step3_vl vipllava"
)
OVERRULED = frozenset(_OVERRULED.split())


def _classes(names: str) -> frozenset[str]:
    return frozenset(f"{name}Tokenizer" for name in names.split())


_BERTS = "DPRContextEncoder DPRQuestionEncoder DPRReader DistilBert Electra LayoutLM Lxmert MobileBert SqueezeBert"
ALIASES = dict.fromkeys(_classes(_BERTS), "BertTokenizer")
ALIASES |= dict.fromkeys(_classes("Bart LED Longformer Mvp"), "RobertaTokenizer") | {"Phi3Tokenizer": "LlamaTokenizer"}
# Classes that set up their own pipeline from the vocabulary; tokenizer.json can represent it.
REBUILT = _classes(
    "Albert Barthez Bert BigBird Blenderbot CLIP Camembert CodeGen CodeLlama Cohere ConvBert Deberta DebertaV2"
    " Esmc FNet Funnel GPT2 GPTNeoX Gemma Herbert LayoutLMv2 LayoutLMv3 LayoutXLM Llama Luke MBart MBart50 MLuke"
    " MPNet Nllb Nougat OpenAIGPT Pegasus Qwen2 Qwen3_5 Reformer RemBert Roberta Siglip2 Splinter T5 Tipsv2 Udop"
    " VideoPrism Whisper XGLM XLMRoberta XLNet"
)
# Classes whose rules are Python code that tokenizer.json cannot represent.
PYTHON = _classes(
    "Bartpho BertGeneration BertJapanese Bertweet BioGpt BlenderbotSmall ByT5 CTRL Canine Clvp Cpm CpmAnt Dia Esm FSMT"
    " FastSpeech2Conformer Flaubert GPTNeoXJapanese GPTSw3 Lasr M2M100 Marian MarkupLM Mgpstr MyT5 PLBart Parakeet"
    " Perceiver Phobert Pop2Piano ProphetNet Rag RoCBert RoFormer SeamlessM4T Siglip Speech2Text SpeechT5 Tapas Vits"
    " Wav2Vec2CTC Wav2Vec2PhonemeCTC XLM"
) | {"MistralCommonBackend", "SentencePieceBackend"}


def declared(folder: Path, config: Mapping[str, Any], model_config: Mapping[str, Any]) -> str | None:
    """The class that tokenizer_config.json names, else config.json; without the suffix "Fast"."""
    own = json_files.text(config, "tokenizer_class", folder / "tokenizer_config.json")
    name = own or json_files.text(model_config, "tokenizer_class", folder / "config.json")
    return name.removesuffix("Fast") if name else None


def resolve(name: str | None, model_type: Any, *, byte_level: bool, has_code: bool = False) -> str | None:
    """The class that AutoTokenizer of transformers 5.23 chooses; None if it would run code from the folder.

    Args:
      name: the declared class.
      byte_level: whether tokenizer.json contains the word ByteLevel, so LlamaTokenizer cannot be the right class.
      has_code: whether tokenizer_config.json refers to Python code (auto_map).
    """
    kind = model_type if isinstance(model_type, str) else ""
    registered = REGISTERED.get(kind)
    if name in GENERIC_NAMES:
        name = GENERIC
    if has_code:  # the rules below are for folders without code
        if name == GENERIC or name in REBUILT | PYTHON | ALIASES.keys():
            return ALIASES.get(name, name)
        if registered is None or kind in _WITHOUT_CONFIG - OVERRULED:
            return None
        return ALIASES.get(registered, registered) if name is None else GENERIC
    if name is None:
        found = GENERIC if kind in _WITHOUT_CONFIG else registered or GENERIC
    elif name == "LlamaTokenizer" and byte_level and kind not in OVERRULED or registered == GENERIC:
        found = GENERIC
    else:
        found = registered if registered is not None and kind in OVERRULED else name
    return ALIASES.get(found, found)
