"""The pipelines that tokenizer classes of transformers 5 build themselves.

Most tokenizer.json files are used as they are. The classes of `PIPELINES` take only the vocabulary, the merges and the
post-processor from the file, and set up normalizer, pre-tokenizer and decoder themselves, regardless of the file. To
give the same ids as transformers, lcx needs the same pipelines.
"""

from collections.abc import Callable
from typing import Any

from lcx.data.tokenizer_settings import Settings

# ------------------------------------------------------------------------------------------------ pipelines

# placeholders: @ for one letter, # for the classes of letters
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?@+|\p{N}| ?[^\s#\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_END = "<|endoftext|>"
_LLAMA: dict[str, str | None] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_GPT: dict[str, str | None] = {"bos_token": _END, "eos_token": _END, "unk_token": _END}

# The default special tokens of a class, used if the folder names none. With null no other token takes the role, not
# even that of a stored padding.
DEFAULTS: dict[str, dict[str, str | None]] = {
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
    "GPT2Tokenizer": _GPT | {"pad_token": None},
    "CodeGenTokenizer": _GPT | {"pad_token": None},
    "GPTNeoXTokenizer": _GPT | {"pad_token": "<|padding|>"},
    "BertTokenizer": {
        "unk_token": "[UNK]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "mask_token": "[MASK]",
    },
    "RobertaTokenizer": _LLAMA
    | {"sep_token": "</s>", "pad_token": "<pad>", "cls_token": "<s>", "mask_token": "<mask>"},
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
# Classes that put these tokens before and after a text, regardless of tokenizer.json.
AROUND = {name: ("cls_token", "sep_token") for name in ("BertTokenizer", "RobertaTokenizer")}


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
    """GPT-2 and its relatives: byte-level BPE, with the pre-tokenizer of each class."""
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
    if name not in ("GPT2Tokenizer", "CodeGenTokenizer", "RobertaTokenizer"):
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


def _bert(vocab: dict[str, int], merges: list, settings: Settings, unk: str | None) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    library = Tokenizer(models.WordPiece(vocab, unk_token=str(unk)))
    library.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.option("tokenize_chinese_chars") is not False,
        strip_accents=settings.option("strip_accents"),
        lowercase=settings.option("do_lower_case") is not False,
    )
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece(prefix="##")
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
    "RobertaTokenizer": _byte_level,
    "BertTokenizer": _bert,
}
# Classes whose vocabulary may be a sentencepiece model.
OF_SENTENCEPIECE = frozenset({"LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer"})
# Classes whose vocabulary may be vocab.json with merges.txt.
OF_TWO_FILES = frozenset(name for name, pipeline in PIPELINES.items() if pipeline is _byte_level) - {
    "Qwen3_5Tokenizer"
}
