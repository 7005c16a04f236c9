"""Builds a `tokenizers.Tokenizer` from the files of a folder, with the same ids as in transformers 5.

The steps are those of `TokenizersBackend` in transformers: vocabulary and pipeline, added tokens, post-processor.
Truncation and padding settings stored in a file are never applied.
"""

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lcx.data import json_files, sentencepiece_model
from lcx.data.special import SpecialTokens
from lcx.data.tokenizer_classes import AROUND, DEFAULTS, PIPELINES
from lcx.data.tokenizer_settings import NAMED, Settings, Token, token_of_object
from lcx.errors import UserError

log = logging.getLogger(__name__)

_FIXED_FROM = 100_000  # fix_mistral_regex does not change vocabularies with at most this many tokens
_MISTRAL = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MAX_BYTES = 1 << 30  # limit for a tokenizer.json; the largest published ones have 40 MB


class Vocabulary(NamedTuple):
    """The parts of its files that a tokenizer class uses; of a tokenizer.json that is used as it is, its added tokens.

    Attributes:
      added: tokens with their ids, as tokenizer.json stores them.
      extra: further special tokens that the file itself marks.
      is_json: the file is a tokenizer.json, whose post-processor is used instead of add_bos_token.
      padding: the stored padding of a tokenizer.json.
    """

    vocab: dict[str, int]
    merges: list
    added: tuple[tuple[int, Token], ...] = ()
    extra: tuple[Token, ...] = ()
    post_processor: Any = None
    is_json: bool = False
    padding: Any = None


class Built(NamedTuple):
    """A tokenizer of the library, and its special tokens: {role: text}, such as {"bos_token": "<s>"}."""

    library: Any
    special: dict[str, str]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Captures stderr, and discards what was written to it if an error is raised.

    A panic in Rust code prints its own report to stderr before Python sees an exception.
    """
    try:
        sys.stderr.flush()
        saved = os.dup(2)
    except (OSError, AttributeError, ValueError):  # there is no stderr
        yield
        return
    with tempfile.TemporaryFile() as held, os.fdopen(saved, "wb") as stderr:
        os.dup2(held.fileno(), 2)
        failed = True
        try:
            yield
            failed = False
        finally:
            with contextlib.suppress(OSError, AttributeError, ValueError):
                sys.stderr.flush()
            os.dup2(stderr.fileno(), 2)
            if not failed:
                held.seek(0)
                shutil.copyfileobj(held, stderr)


@contextlib.contextmanager
def guarded(what: str) -> Iterator[None]:
    """Turns every exception of the tokenizers library, including panics of its Rust code, into a UserError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, UserError):
        raise
    except BaseException as error:  # pyo3's PanicException is not a subclass of Exception
        reason = f"{type(error).__name__}: {error}" if type(error) is not Exception else str(error)
        raise UserError(f"{what} ({json_files.one_line(reason)}); check the tokenizer setting") from error


def build(path: Path, settings: Settings) -> Built:
    """The tokenizer of a `tokenizer.json`, a `vocab.json` (with merges.txt next to it) or a `.model`.

    Raises:
      UserError: a file is missing or damaged, or the tokenizers package is not installed.
    """
    try:
        import tokenizers  # noqa: F401
    except ImportError as error:
        raise UserError(f"reading {path} needs the tokenizers package: pip install tokenizers") from error
    with guarded(f"{path} is not a readable tokenizer"), quiet():
        library, source = _pipeline(path, settings)
        named = _with_pad(named_tokens(settings), source.padding)
        library.no_truncation()
        library.no_padding()
        if getattr(library.model, "dropout", None):
            log.warning("%s: BPE dropout is switched off, so that a text always has the same ids", path)
            library.model.dropout = None
        library.encode_special_tokens = bool(settings.option("split_special_tokens"))
        _add_tokens(library, settings, source, named)
        _fix_pattern(library, settings)
        _set_post_processor(library, settings, source, named)
        again = [token for token in (*named.values(), *_extra(settings, source)) if token]
        if settings.tokenizer_class == "Qwen2Tokenizer":
            library.add_tokens([_added(Token(token.content, special=True)) for token in again])
        elif settings.tokenizer_class == "CohereTokenizer":
            flags = {token.content: token for _, token in _all_added(settings, source)}
            library.add_special_tokens([_added(flags.get(token.content, token)) for token in again])
        return Built(library, {role: token.content for role, token in named.items() if token is not None})


def _fix_pattern(library: Any, settings: Settings) -> None:
    """Applies fix_mistral_regex as transformers does: the pattern by which Mistral's own tokenizers split a text."""
    from tokenizers import Regex, pre_tokenizers

    before = library.pre_tokenizer
    if not settings.option("fix_mistral_regex") or before is None or library.get_vocab_size() <= _FIXED_FROM:
        return
    split = pre_tokenizers.Split(Regex(_MISTRAL), behavior="isolated")
    if isinstance(before, pre_tokenizers.Sequence):
        before[0] = split
        return
    if isinstance(before, pre_tokenizers.Metaspace):
        before = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([split, before])


def named_tokens(settings: Settings) -> dict[str, Token | None]:
    """The special tokens by role (bos_token, ...): those named in the folder, else the defaults of the class."""
    defaults = DEFAULTS.get(settings.tokenizer_class, {})
    named: dict[str, Token | None] = {
        key: None if text is None else Token(text, special=True) for key, text in defaults.items()
    }
    named |= dict(settings.named)
    return {key: named[key] for key in (*NAMED, *(k for k in named if k not in NAMED)) if key in named}


def _with_pad(named: dict[str, Token | None], padding: Any) -> dict[str, Token | None]:
    """Adds the token of a stored padding, which transformers makes the pad_token if no other is named."""
    pad = padding.get("pad_token") if isinstance(padding, dict) else None
    if "pad_token" in named or not isinstance(pad, str) or not json_files.is_text(pad):
        return named
    named = named | {"pad_token": Token(pad, special=True)}
    return {key: named[key] for key in (*NAMED, *(k for k in named if k not in NAMED)) if key in named}


def special_of(library: Any, eos_id: int | None, *, what: str) -> SpecialTokens:
    """The ids that the post-processor puts before and after a text, found by encoding an example."""
    whole, plain, problem = None, [], None
    for example in ("a", "0", " ", *list(library.get_vocab(with_added_tokens=False))[:8], ""):
        try:
            with guarded(what), quiet():
                plain = library.encode(example, add_special_tokens=False).ids
                whole = library.encode(example, add_special_tokens=True)
        except UserError as error:  # the vocabulary may lack this character
            problem = error
        if plain and whole is not None:
            break
    if whole is None:
        raise problem or UserError(f"{what}: nothing can be encoded")
    unknown = [i for i in whole.ids if library.id_to_token(i) is None]
    if unknown:
        raise UserError(
            f"{what}: it adds id {unknown[0]}, which the vocabulary does not have; restore the file"
        )
    ids, of_text = whole.ids, [i for i, number in enumerate(whole.sequence_ids) if number is not None]
    if not of_text:  # no example gives a token
        after = tuple(ids[-1:]) if ids and ids[-1] == eos_id else ()
        return SpecialTokens(tuple(ids[: len(ids) - len(after)]), after)
    first, end = of_text[0], of_text[-1] + 1
    if ids[first:end] != plain:
        raise UserError(
            f"{what}: it does more than add tokens around a text; expected a template with one $A"
        )
    return SpecialTokens(tuple(ids[:first]), tuple(ids[end:]))


# ------------------------------------------------------------------------------------------------ the files


def _pipeline(path: Path, settings: Settings) -> tuple[Any, Vocabulary]:
    pipeline = PIPELINES.get(settings.tokenizer_class)
    if path.suffix == ".model":
        model = sentencepiece_model.read(path)
        if pipeline is None:
            return _generic_sentencepiece(model, settings), _of_model(model)
        source = _of_model(model, as_bpe=True)
    elif path.name != "vocab.json":
        data = json_files.read_bytes(path, max_bytes=MAX_BYTES)
        if data is None:
            raise UserError(f"tokenizer file {path} does not exist; check the tokenizer setting")
        if pipeline is None:
            return _as_it_is(data, settings, path)
        source = _of_json(json_files.parse_object(data, path), path)
    else:
        source = _of_bpe_files(path)
        pipeline = pipeline or PIPELINES["GPT2Tokenizer"]
    unknown = named_tokens(settings).get("unk_token")
    library = pipeline(source.vocab, source.merges, settings, unknown.content if unknown else None)
    if source.post_processor is not None:
        library.post_processor = source.post_processor
    return library, source


def _library(data: bytes) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(data.decode())


def _as_it_is(data: bytes, settings: Settings, path: Path) -> tuple[Any, Vocabulary]:
    """A tokenizer.json whose own pipeline is used.

    The library numbers the added tokens itself; the ids in the file matter only beside those of added_tokens.json.
    """
    library = _library(data)
    if settings.added and not settings.replaces_added:
        added = _added_of(json_files.parse_object(data, path), path)
    else:
        own = library.get_added_tokens_decoder()
        added = tuple((i, _token_of(token)) for i, token in own.items())
    return library, Vocabulary({}, [], added, is_json=True, padding=library.padding)


def _added_of(data: dict[str, Any], path: Path) -> tuple[tuple[int, Token], ...]:
    """The added tokens of a tokenizer.json with the ids written there."""
    entries = data.get("added_tokens") or []
    if not isinstance(entries, list):
        raise json_files.wrong(path, "added_tokens", entries, "a list")
    return tuple(
        (json_files.token_id(entry.get("id"), "added_tokens", path), token_of_object(entry, "added_tokens", path))
        for entry in entries
    )


def _of_json(data: dict[str, Any], path: Path) -> Vocabulary:
    """The parts of a tokenizer.json that a class with its own pipeline uses."""
    model = data.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
        raise UserError(f"{path} has no vocabulary in its model: restore the file")
    vocab = model["vocab"]
    if isinstance(vocab, list):
        vocab = {entry[0] if isinstance(entry, list) else entry: i for i, entry in enumerate(vocab)}
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model.get("merges") or []]
    added, post_processor = _added_of(data, path), _post_processor(data, model)
    return Vocabulary(vocab, merges, added, (), post_processor, True, data.get("padding"))


def _post_processor(data: dict[str, Any], model: dict[str, Any]) -> Any:
    if data.get("post_processor") is None:
        return None
    if model.get("type") not in (None, "Unigram"):  # drop the vocabulary, which is slow to parse
        model = model | {"vocab": {}} | ({"merges": []} if model.get("type") == "BPE" else {})
        data = data | {"model": model, "added_tokens": []}
    return _library(json.dumps(data).encode()).post_processor


def _of_model(model: sentencepiece_model.Model, *, as_bpe: bool = False) -> Vocabulary:
    """The parts of a sentencepiece model. With `as_bpe`, also merges for a unigram model, as in transformers."""
    vocab = {piece.text: i for i, piece in enumerate(model.pieces)}
    kinds = (sentencepiece_model.CONTROL, sentencepiece_model.USER_DEFINED)
    extra = tuple(
        Token(piece.text, normalized=False, special=piece.kind == sentencepiece_model.CONTROL)
        for piece in model.pieces
        if piece.kind in kinds
    )
    as_bpe = as_bpe or model.model_type == sentencepiece_model.BPE
    merges = sentencepiece_model.merges_of(vocab) if as_bpe else []
    return Vocabulary(vocab, merges, extra=extra)


def model_tokens(model: sentencepiece_model.Model) -> dict[str, Token]:
    """The special tokens that a sentencepiece model defines itself."""
    found = {
        "bos_token": (model.bos_id, model.bos_piece),
        "eos_token": (model.eos_id, model.eos_piece),
        "unk_token": (model.unk_id, model.unk_piece),
    }
    return {key: Token(piece, special=True) for key, (number, piece) in found.items() if number >= 0}


def _generic_sentencepiece(model: sentencepiece_model.Model, settings: Settings) -> Any:
    """The conversion of transformers for a folder that asks for the generic class."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    library_model: Any
    if model.model_type == sentencepiece_model.BPE:
        source = _of_model(model)
        vocab, texts = source.vocab, {i: text for text, i in source.vocab.items()}
        for number, token in settings.added:  # a folder may rename placeholder pieces of the model
            old = texts.get(number)
            if old and old != token.content and token.content not in vocab:
                vocab[token.content] = vocab.pop(old)
                texts[number] = token.content
        library_model = models.BPE(
            vocab=vocab,
            merges=source.merges,
            unk_token=model.unk_piece,
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
            dropout=None,
        )
    else:
        pairs = [(piece.text, piece.score) for piece in model.pieces]
        library_model = models.Unigram(vocab=pairs, unk_id=model.unk_id, byte_fallback=model.byte_fallback)
    library = Tokenizer(library_model)
    before = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    library.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
    after = [decoders.ByteFallback(), decoders.Fuse()] if model.byte_fallback else []
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), *after])
    return library


def _of_bpe_files(path: Path) -> Vocabulary:
    """vocab.json and merges.txt, the two files of GPT-2."""
    from tokenizers import models

    merges = path.with_name("merges.txt")
    for file in (path, merges):
        if json_files.read_bytes(file, max_bytes=MAX_BYTES) is None:
            raise UserError(f"{file} does not exist, but the other file of the pair does: restore it")
    vocab, pairs = models.BPE.read_file(str(path), str(merges))
    return Vocabulary(vocab, pairs)


# ------------------------------------------------------------------------------------------------ special tokens


def _added(token: Token) -> Any:
    from tokenizers import AddedToken

    flags = {"single_word": token.single_word, "lstrip": token.lstrip, "rstrip": token.rstrip}
    if token.normalized is not None:
        flags["normalized"] = token.normalized
    return AddedToken(token.content, special=token.special, **flags)


def _extra(settings: Settings, source: Vocabulary) -> tuple[Token, ...]:
    """The additional special tokens of the folder, else those that a sentencepiece model marks itself."""
    return settings.extra if settings.extra is not None else source.extra


def _all_added(settings: Settings, source: Vocabulary) -> list[tuple[int, Token]]:
    """The added tokens of the folder and of tokenizer.json by id; for the same id, tokenizer.json wins."""
    of_file = () if settings.replaces_added else source.added
    return sorted((dict(settings.added) | dict(of_file)).items(), key=lambda pair: pair[0])


def _add_tokens(
    library: Any, settings: Settings, source: Vocabulary, named: dict[str, Token | None]
) -> None:
    """Adds the tokens of the folder and, once more, those of tokenizer.json, in the same order as transformers.

    Of a token that occurs twice, the last one's flags are used.
    """
    known = {token.content for token in library.get_added_tokens_decoder().values()}
    roles = {token.content for token in named.values() if token is not None}
    added = _all_added(settings, source)
    tokens = [t if t.content not in roles else dataclasses.replace(t, special=True) for _, t in added]
    known |= {token.content for token in tokens}
    for token in (*named.values(), *_extra(settings, source)):
        if token is not None and token.content not in known and token not in tokens:
            tokens.append(dataclasses.replace(token, special=token.special or token.content in roles))
    library.add_tokens([_added(token) for token in tokens])


def _token_of(token: Any) -> Token:
    flags = (token.single_word, token.lstrip, token.rstrip, token.normalized, token.special)
    return Token(token.content, *flags)


def _set_post_processor(
    library: Any, settings: Settings, source: Vocabulary, named: dict[str, Token | None]
) -> None:
    """Sets what is added around a text, from add_bos_token and add_eos_token if the class uses them."""
    from tokenizers import processors

    around = [named.get(key) for key in AROUND.get(settings.tokenizer_class, ())]
    if around:
        texts = [token.content for token in around if token is not None]
        if len(texts) < len(around):
            raise UserError(f"{settings.tokenizer_class} needs a cls_token and a sep_token, not null")
        library.post_processor = processors.TemplateProcessing(
            single=[f"{texts[0]}:0", "$A:0", f"{texts[1]}:0"],
            pair=[f"{texts[0]}:0", "$A:0", f"{texts[1]}:0", "$B:0"],
            special_tokens=[(text, library.token_to_id(text)) for text in dict.fromkeys(texts)],
        )
        return
    add = {"bos_token": False, "eos_token": False}
    if not source.is_json:
        add = {key: bool(settings.option(f"add_{key}")) for key in add}
    elif settings.tokenizer_class == "CodeLlamaTokenizer":
        add["bos_token"] = True
    elif settings.tokenizer_class != "GPTNeoXTokenizer" and library.post_processor is not None:
        return
    if settings.tokenizer_class == "CodeLlamaTokenizer" and settings.option("add_bos_token") is None:
        add["bos_token"] = True
    tokens = {key: token for key, token in named.items() if token is not None and add.get(key)}
    bos, eos = (tokens[key].content if key in tokens else None for key in add)
    ids = {token.content: library.token_to_id(token.content) for token in tokens.values()}
    single = [*([f"{bos}:0"] if bos else []), "$A:0", *([f"{eos}:0"] if eos else [])]
    pair = [*single, *([f"{bos}:1"] if bos else []), "$B:1", *([f"{eos}:1"] if eos else [])]
    library.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=list(ids.items())
    )
