"""Generation from text to text, and the tokenizer of a checkpoint.

    model, params = lcx.load(path)
    lcx.generate_text(model, params, lcx.load_tokenizer(path), "Once upon a time", max_new_tokens=50)
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lcx import hub
from lcx.checkpoint.folder import find_step, read_json
from lcx.convert.api import detect, load, tokenizer_record
from lcx.data import Tokenizer, check_vocabulary, special_tokens, tokenizer_from_json, tokenizers
from lcx.data.special import described
from lcx.errors import UserError
from lcx.model import Decoder
from lcx.sampler import default_new_tokens, generate

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def tokenizer_of(checkpoint: str, format: str | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint.

    For a Hugging Face folder it is read from that folder; a savanna or vortex model has a byte tokenizer; for an lcx
    checkpoint it is the recorded one, or tokenizer files in the step folder, the checkpoints folder or the workdir.

    Raises:
      UserError: there is no checkpoint or no tokenizer, or its files are missing or damaged.
    """
    folder = Path(hub.local(checkpoint)).expanduser()
    if (known := tokenizer_record(folder, format)) is not None:
        return tokenizer_from_json(dict(known))
    if os.path.lexists(folder / "config.json"):  # also a broken link, which is then named
        return tokenizers.load_tokenizer(folder)
    detect(folder, format)  # raises if this is no checkpoint, with what was expected
    directory, step = find_step(folder)
    record = read_json(directory / str(step), "meta").get("tokenizer")
    places = [directory / str(step), directory, directory.parent]
    beside = next((p for p in places if any((p / file).is_file() for file in _FILES)), directory.parent)
    return tokenizers.load_tokenizer(str(beside)) if record is None else tokenizer_from_json(record, folder=str(beside))


def opened(
    checkpoint: str,
    *,
    of: str,
    check: Callable[[Decoder, Tokenizer], Any] = lambda model, tokenizer: None,
    **loading: Any,
) -> tuple[Decoder, Any, Tokenizer]:
    """(model, parameters, tokenizer) of a checkpoint; prints on stderr which special tokens surround a text.

    Args:
      of: what the texts are, for that line, such as "sequence".
      check: called with model and tokenizer before any parameter is read.
      loading: settings of lcx.load.

    Raises:
      UserError: it is no checkpoint, or its model or tokenizer cannot be read.
    """
    place = hub.local(checkpoint)
    tokenizer = tokenizer_of(place)
    print(described(tokenizer, special_tokens(tokenizer), of=of), file=sys.stderr)
    return *load(place, check=lambda model: check(model, tokenizer), **loading), tokenizer


def load_tokenizer(path: str | os.PathLike | Tokenizer) -> Tokenizer:
    """The tokenizer of a checkpoint in any format that lcx.load reads, or of files that hold only a tokenizer.

    Args:
      path: a checkpoint; or whatever data.load_tokenizer accepts: "bytes", a file, a folder, a name on the hub.

    Raises:
      UserError: there is no tokenizer, or it is damaged.
    """
    if not isinstance(path, str | os.PathLike):
        return path
    return tokenizer_of(os.fspath(path)) if _is_checkpoint(path) else tokenizers.load_tokenizer(path)


def _is_checkpoint(path: str | os.PathLike) -> bool:
    try:
        return Path(path).expanduser().exists() and bool(detect(path))
    except UserError:
        return False


def generate_text(
    model: Decoder,
    params: Mapping[str, Any],
    tokenizer: Tokenizer,
    prompt: str | Sequence[str],
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    add_bos: bool | None = None,
) -> str | list[str]:
    """The continuation of a prompt, without the prompt itself; a list of continuations for a list of prompts.

    Args:
      model, params, tokenizer: of one checkpoint, from lcx.load and lcx.load_tokenizer.
      prompt: one text or several.
      max_new_tokens: maximum length of a continuation, which ends earlier at a token that ends a document. None: 256,
        or as many as the model's window leaves after the longest prompt.
      temperature, top_p, seed: as in lcx.generate; temperature 0 selects the most likely token.
      add_bos: whether to put BOS before the prompt; None: as the tokenizer does.

    Raises:
      UserError: the prompt is empty and no BOS is added, the tokenizer has tokens outside the model's vocabulary, or a
        setting is out of range.
    """
    check_vocabulary(tokenizer, model.vocab_size)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    rows = [ids_of(tokenizer, text, add_bos=add_bos) for text in prompts]
    stops = stop_ids(tokenizer)
    if max_new_tokens is None:
        max_new_tokens = default_new_tokens(model, max(map(len, rows), default=0))
    new = generate(
        model,
        params,
        rows,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop_tokens=stops,
    )
    texts = []
    for row, continuation in zip(rows, new.tolist(), strict=True):
        end = next((i for i, token in enumerate(continuation) if token in stops), len(continuation))
        # Decoded together with the prompt, because some tokenizers drop the space before the first word of a text.
        texts.append(tokenizer.decode(row + continuation[:end])[len(tokenizer.decode(row)) :])
    return texts[0] if isinstance(prompt, str) else texts


def ids_of(tokenizer: Tokenizer, text: str, *, add_bos: bool | None = None) -> list[int]:
    """The token ids of a prompt, including special tokens that the tokenizer puts before a text.

    Raises:
      UserError: there are none, or `text` is not a str.
    """
    if not isinstance(text, str):
        raise UserError(f"the prompt is a {type(text).__name__}, expected text; lcx.generate takes tokens")
    ids = [*special_tokens(tokenizer, add_bos=add_bos).before, *tokenizer.encode(text).tolist()]
    if not ids:
        raise UserError("the prompt is empty and no BOS is added to start from: set --prompt, or --add_bos")
    return ids


def stop_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids of the tokens that end a text: EOS, BOS (the start of the next document) and the tokenizer's own."""
    known = [tokenizer.bos_id, tokenizer.eos_id, *getattr(tokenizer, "stop_ids", ())]
    return sorted({token for token in known if token is not None})
