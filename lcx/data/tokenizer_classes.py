"""The tokenizer classes of transformers 5: which one a folder means, and the pipeline each of them builds.

Most tokenizer.json files are used as they are. The classes of `PIPELINES` take only the vocabulary, the merges and the
post-processor from the file, and set up normalizer, pre-tokenizer and decoder themselves, whatever the file says; so
ids equal to those of transformers need the same pipelines here.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lcx.data import json_files
from lcx.data.tokenizer_settings import Settings

GENERIC = "TokenizersBackend"
GENERIC_NAMES = frozenset({GENERIC, "PythonBackend", "PreTrainedTokenizer", "BloomTokenizer"})

# model_type -> class, from transformers.models.auto.tokenization_auto; other model_types name theirs in
# tokenizer_config.json, or have one that leaves tokenizer.json as it is.
_OF_MODEL_TYPES = {
    "LlamaTokenizer": "idefics idefics2",
    "GemmaTokenizer": "diffusion_gemma gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text recurrent_gemma"
    " shieldgemma2 t5gemma zaya",
    "Qwen2Tokenizer": "audioflamingo3 colqwen2 cosmos3_omni dots3_note fun_asr_nano hunyuan_vl internvl lighton_ocr"
    " moss_transcribe_diarize ovis2 qianfan_ocr qwen2 qwen2_5_omni qwen2_5_vl qwen2_audio qwen2_moe qwen2_vl qwen3"
    " qwen3_asr qwen3_moe qwen3_next qwen3_omni_moe qwen3_vl qwen3_vl_moe vibevoice",
    "Qwen3_5Tokenizer": "qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen4_exp",
    "GPT2Tokenizer": "blip-2 codegen dbrx emu3 gpt2 gpt_neo gptj hyperclovax_vision_v2 instructblip"
    " instructblipvideo jais2 opt phi starcoder2",
    "GPTNeoXTokenizer": "falcon_mamba gpt_neox mamba mamba2 mpt olmo olmoe rwkv xlstm",
    "CohereTokenizer": "aya_vision cohere cohere2",
    GENERIC: "arctic aria beam bigbird_pegasus camembertv2-base canary chatlm cohere_asr ernie4_5 ernie4_5_moe"
    " flex_olmo fuyu glm glm4 glm4_moe glm4_moe_lite glm4v glm4v_moe glm_image glmasr got_ocr2 gpt_bigcode"
    " gradium_phonon_tts granite granitemoe granitemoehybrid granitemoeshared h2ovl_chat hyperclovax hyperclovax_vlm"
    " internlm2 internlm3 iquestcoder jamba kimi_k25 kimi_linear kosmos-2 llava llava_next mimo_v2_flash minicpm3"
    " minicpm_ocr minicpmv minicpmv4_6 minicpmv4_7 minimax_m2 ministral ministral3 mistral mistral3 mistral_large4"
    " mixtral modernbert modernbert-decoder molmo molmo2 nemo_speechlm nemotron nvfp4 nystromformer olmo2 olmo3"
    " olmo_hybrid opencua openvla paddleocr_vl pegasus_x persimmon phi3 phi3_v phimoe pix2struct pixtral pocket_tts"
    " smolvlm stablelm step3_vl umt5 vipllava voxtral voxtral_realtime xlm-roberta-xl",
}
REGISTERED = {kind: name for name, kinds in _OF_MODEL_TYPES.items() for kind in kinds.split()}
# model_types of which the folders on the hub name a wrong class
_OVERRULED = (
    "arctic camembertv2-base chatlm cohere_asr ernie4_5 ernie4_5_moe fuyu h2ovl_chat hyperclovax hyperclovax_vision_v2"
    " hyperclovax_vlm internlm2 internlm3 iquestcoder jamba llava llava_next minicpm3 minicpmv minimax_m2 modernbert"
    " modernbert-decoder molmo molmo2 nemotron nvfp4 opencua openvla paddleocr_vl phi3 phi3_v phimoe qwen2 qwen3_5"
    " qwen3_5_moe qwen3_5_moe_text qwen4_exp siglip2 smolvlm step3_vl vipllava"
)
OVERRULED = frozenset(_OVERRULED.split())


def declared(folder: Path, config: Mapping[str, Any], model_config: Mapping[str, Any]) -> str | None:
    """The class that tokenizer_config.json names, else config.json; without "Fast" at its end."""
    own = json_files.text(config, "tokenizer_class", folder / "tokenizer_config.json")
    name = own or json_files.text(model_config, "tokenizer_class", folder / "config.json")
    return name.removesuffix("Fast") if name else None


def resolve(name: str | None, model_type: Any, *, byte_level: bool, has_code: bool = False) -> str:
    """The class that AutoTokenizer of transformers 5.23 takes.

    Args:
      name: the declared class.
      byte_level: tokenizer.json holds the word ByteLevel, which LlamaTokenizer is not for.
      has_code: tokenizer_config.json names Python code of its own (auto_map), which is never run.
    """
    known = model_type if isinstance(model_type, str) else ""
    registered = REGISTERED.get(known)
    name = GENERIC if name in GENERIC_NAMES else name
    if name is None:
        return registered or GENERIC
    if has_code:
        return name
    if name == "LlamaTokenizer" and byte_level and known not in OVERRULED:
        return GENERIC
    if registered == GENERIC:
        return GENERIC
    if registered is not None and registered != name and known in OVERRULED:
        return registered
    return name


# ------------------------------------------------------------------------------------------------ pipelines

# @ stands for one letter, # for the classes of letters
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?@+|\p{N}| ?[^\s#\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_END = "<|endoftext|>"
_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_GPT = {"bos_token": _END, "eos_token": _END, "unk_token": _END}

# The special tokens that a class has where the folder names none.
DEFAULTS: dict[str, dict[str, str]] = {
    "LlamaTokenizer": _LLAMA,
    "CodeLlamaTokenizer": _LLAMA
    | {
        "prefix_token": "▁<PRE>",
        "middle_token": "▁<MID>",
        "suffix_token": "▁<SUF>",
        "eot_token": "▁<EOT>",
        "fill_token": "<FILL_ME>",
    },
    "GemmaTokenizer": {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    },
    "Qwen2Tokenizer": {"eos_token": _END, "unk_token": _END, "pad_token": _END},
    "Qwen3_5Tokenizer": {"eos_token": _END, "unk_token": _END, "pad_token": _END},
    "GPT2Tokenizer": _GPT,
    "CodeGenTokenizer": _GPT,
    "GPTNeoXTokenizer": _GPT | {"pad_token": "<|padding|>"},
    "CohereTokenizer": {
        "bos_token": "<BOS_TOKEN>",
        "eos_token": "<|END_OF_TURN_TOKEN|>",
        "unk_token": "<UNK>",
        "sep_token": "<SEP>",
        "pad_token": "<PAD>",
        "cls_token": "<CLS>",
        "mask_token": "<MASK_TOKEN>",
    },
}


def _metaspace_decoder(*, strip: bool) -> Any:
    from tokenizers import decoders

    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, *([decoders.Strip(content=" ", left=1)] if strip else [])])


def _llama(vocab: dict[str, int], merges: list, settings: Settings, unk: str | None) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    prefix = settings.option("add_prefix_space") is not False
    code = settings.tokenizer_class == "CodeLlamaTokenizer"
    first = "first" if code or not settings.option("legacy") else "always"
    model: dict[str, Any] = {"unk_token": str(unk)} if code else {}
    library = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True, dropout=None, **model)
    )
    library.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme=first if prefix else "never", split=False
    )
    library.decoder = _metaspace_decoder(strip=prefix or code)
    return library


def _gemma(vocab: dict[str, int], merges: list, settings: Settings, unk: str | None) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    library = Tokenizer(
        models.BPE(
            vocab=vocab, merges=merges, fuse_unk=True, unk_token=str(unk), dropout=None, byte_fallback=True
        )
    )
    library.pre_tokenizer = pre_tokenizers.Split(pattern=" ", behavior="merged_with_previous", invert=False)
    library.decoder = _metaspace_decoder(strip=False)
    library.normalizer = normalizers.Replace(" ", "▁")
    return library


def _byte_level(vocab: dict[str, int], merges: list, settings: Settings, unk: str | None) -> Any:
    """GPT-2 and its relatives: bytes as letters, and what each does before."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name, prefix = settings.tokenizer_class, bool(settings.option("add_prefix_space"))
    library = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=merges,
            dropout=None,
            continuing_subword_prefix="",
            end_of_word_suffix="",
            fuse_unk=False,
        )
    )
    library.decoder = decoders.ByteLevel()
    if name not in ("GPT2Tokenizer", "CodeGenTokenizer"):
        library.normalizer = normalizers.NFC()
    before: list[Any] = []
    if name == "CohereTokenizer":
        before = [pre_tokenizers.Digits(individual_digits=True)]
    elif name.startswith("Qwen"):
        letters = r"\p{L}\p{M}" if name == "Qwen3_5Tokenizer" else r"\p{L}"
        pattern = _QWEN.replace("@", f"[{letters}]").replace("#", letters)
        before = [pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)]
    last = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=not name.startswith("Qwen"))
    library.pre_tokenizer = pre_tokenizers.Sequence([*before, last]) if before else last
    return library


Pipeline = Callable[[dict[str, int], list, Settings, str | None], Any]
PIPELINES: dict[str, Pipeline] = {
    "LlamaTokenizer": _llama,
    "CodeLlamaTokenizer": _llama,
    "GemmaTokenizer": _gemma,
    "Qwen2Tokenizer": _byte_level,
    "Qwen3_5Tokenizer": _byte_level,
    "GPT2Tokenizer": _byte_level,
    "CodeGenTokenizer": _byte_level,
    "GPTNeoXTokenizer": _byte_level,
    "CohereTokenizer": _byte_level,
}
