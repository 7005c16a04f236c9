"""Text generation on a terminal: reads a prompt as text or from a file, and prints the continuation token by token."""

import collections
import contextlib
import errno
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from lcx import hub, paths, sharding
from lcx.checkpoint.folder import find_step, read_json
from lcx.convert.api import load, tokenizer_record
from lcx.data import (
    SpecialTokens,
    Tokenizer,
    check_vocabulary,
    special_tokens,
)
from lcx.data.chat import prompt_ids, turn_end_ids
from lcx.data.chat_templates import chat_templates
from lcx.data.special import described
from lcx.errors import UserError, check_sizes, naming
from lcx.multihost import channel
from lcx.multihost.agreement import require_same
from lcx.sampler import check_settings, default_new_tokens, stream
from lcx.text import ids_of, stop_ids, tokenizer_of
from lcx.wording import quantity

# What errors call the flags of the command.
_SETTINGS = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "generate.num_samples", "context_length")
_BROKEN = "\N{REPLACEMENT CHARACTER}"  # the decoder's output for bytes that are not (yet) a complete character
_MAX_SAMPLES = 4096  # are generated together, and each has a cache
_MAX_HELD = 32  # tokens held back while their last character is incomplete; then they are printed as they are
_PATIENCE_S = 3.0  # without a first token; then a line says why
_MAX_CONTEXT = 16  # tokens at the end of the prompt in which to look for the start of a character


@naming({name: f"--{name.rpartition('.')[2]}" for name in _SETTINGS})
def stream_text(
    *,
    checkpoint: str,
    prompt: str,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    rope_scaling: dict[str, Any] | None = None,
    context_length: int | None = None,
    add_bos: bool | None = None,
    chat: bool = False,
    system: str | None = None,
    chat_template: str | None = None,
    adapter: Sequence[str] | None = None,
    format: str | None = None,
    input_projections: str | None = None,
    top_k: int | None = None,
    allowed: str | None = None,
    num_samples: int = 1,
    output: str | None = None,
    overwrite: bool = False,
) -> None:
    """Prints the continuation of a prompt while it is generated, then the speed on stderr.

    With several processes the model is sharded over all their devices, and process 0 prints and writes.

    Args:
      checkpoint: as in lcx.load.
      prompt: the text. "@path" reads it from a file, without the final line break; "@@text" is a prompt that starts
        with "@".
      max_new_tokens: maximum length of the continuation, which ends earlier at a token that ends a document. None: 256,
        or as many as the model's window leaves after the prompt.
      temperature, top_p, seed: as in lcx.generate.
      rope_scaling, context_length: extend the context of the model first, as in lcx.load.
      add_bos: whether to put BOS before the prompt; None: as the tokenizer does.
      chat: the prompt is the user's turn of a conversation, formatted by the chat template that the model was trained
        with. The answer then also ends at the template's end of turn.
      system: with `chat`, the system message.
      chat_template: with `chat`, another template: a .jinja file or a name.
      adapter, input_projections: as in lcx.load.
      format: of the checkpoint, as in lcx.load; None detects it.
      top_k: as in lcx.generate.
      allowed: the characters that may be generated, such as "ACGT"; None: any.
      num_samples: how many continuations, each with random numbers of its own; several are printed one after the other.
      output: a FASTA file to write instead, a record for each continuation, prompt included.
      overwrite: whether an existing output is replaced.

    Raises:
      UserError: a setting is out of range, the prompt file cannot be read, or the checkpoint or tokenizer cannot be
        loaded.
    """
    check_settings(1 if max_new_tokens is None else max_new_tokens, temperature, top_p, seed)
    if not chat and (system is not None or chat_template is not None):
        raise UserError("--system and --chat_template are for conversations: set --chat")
    _check_samples(num_samples, temperature, top_p=top_p, seed=seed, top_k=top_k)
    if output is not None and chat:
        raise UserError(f"--output is {output}, a FASTA file, and the prompt is a chat: leave out --output or --chat")
    inputs = {"--checkpoint": checkpoint, "--prompt": prompt[1:] if prompt.startswith("@") else None}
    with _claim(output, overwrite, num_samples, inputs) as file:
        text, tokenizer = prompt_text(prompt), tokenizer_of(checkpoint, format)
        stops = stop_ids(tokenizer)
        if chat:
            ids, ends = chat_ids(checkpoint, tokenizer, text, system=system, template=chat_template)
            stops = sorted({*stops, *ends})
        else:
            ids = ids_of(tokenizer, text, add_bos=add_bos)
        require_same("the prompt", {"its tokens": str(ids)}, advice="give every process the same prompt and tokenizer")
        say_special_tokens(tokenizer, () if chat else special_tokens(tokenizer, add_bos=add_bos).before)
        mesh = sharding.make_mesh() if channel.count() > 1 else None
        model, params = load(
            checkpoint,
            format=format,
            mesh=mesh,
            rope_scaling=rope_scaling,
            context_length=context_length,
            adapter=adapter,
            input_projections=input_projections,
        )
        check_vocabulary(tokenizer, model.vocab_size)
        columns = stream(
            model,
            params,
            [ids] * num_samples,
            max_new_tokens=default_new_tokens(model, len(ids)) if max_new_tokens is None else max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop_tokens=stops,
            top_k=top_k,
            allowed_tokens=None if allowed is None else allowed_ids(tokenizer, allowed),
        )
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            if channel.index() > 0:
                collections.deque(columns, maxlen=0)  # takes part; process 0 prints
            elif num_samples > 1 or file is not None:
                write_samples(tokenizer, columns, prompt=ids, stops=stops, file=file)
            else:
                show(tokenizer, (int(column[0]) for column in columns), prompt=ids)


def _check_samples(num_samples: int, temperature: float, *, top_p: float, seed: int, top_k: int | None) -> None:
    """Raises UserError for a number of samples that cannot be; warns of settings that greedy choices do not use."""
    check_sizes("generate", num_samples=num_samples)
    if num_samples > _MAX_SAMPLES:
        raise UserError(f"--num_samples is {num_samples}, expected at most {_MAX_SAMPLES}: set several --seed instead")
    if temperature == 0 and num_samples > 1:
        raise UserError(f"--num_samples is {num_samples}, and all would be the same text: set --temperature above 0")
    if temperature == 0 and (top_p != 1 or seed != 0 or top_k is not None):
        name = "--top_p" if top_p != 1 else "--seed" if seed != 0 else "--top_k"
        _say(f"warning: {name} has no effect at temperature 0: set --temperature")


@contextlib.contextmanager
def _claim(
    output: str | None, overwrite: bool, samples: int, inputs: Mapping[str, str | None]
) -> Iterator[Path | None]:
    """Yields the file to write, which is none of the inputs; or None: the output is None, or process 0 writes it."""
    if output is None or channel.index() > 0:
        yield None
        return
    paths.refuse_inputs(output, "--output", inputs)
    with paths.claimed_file(output, "--output", overwrite=overwrite) as file:
        yield file
    _say(f"{output}: {quantity(samples, 'sample')}")


def allowed_ids(tokenizer: Tokenizer, characters: str) -> list[int]:
    """The tokens of some characters.

    Raises:
      UserError: there are none, or a character is not one token.
    """
    if not characters.isprintable():
        raise UserError(
            f"--allowed is {characters!r}, expected printable characters, no line breaks or tabs: change --allowed"
        )
    found = [tokenizer.encode(character).tolist() for character in dict.fromkeys(characters)]
    if not found or any(len(ids) != 1 for ids in found):
        raise UserError(f"--allowed is {characters!r}, expected characters that are one token each: change --allowed")
    return [ids[0] for ids in found]


def write_samples(
    tokenizer: Tokenizer,
    columns: Iterable[Any],
    *,
    prompt: Sequence[int],
    stops: Sequence[int],
    file: Path | None,
) -> None:
    """Prints several continuations, or writes them to a FASTA file, each up to the token that ends it."""
    rows = list[list[int]]()
    for column in columns:  # none is kept: each holds a buffer of the device, some KB for a number
        rows = rows or [[] for _ in column]
        for row, token in zip(rows, column.tolist(), strict=True):
            row.append(token)
    texts = []
    for row in rows:
        end = next((i for i, token in enumerate(row) if token in stops), len(row))
        texts.append(tokenizer.decode([*prompt, *row[:end]]))
    if file is None:
        before = len(tokenizer.decode(list(prompt)))
        for i, text in enumerate(texts):
            print(f">sample{i + 1}\n{text[before:]}", flush=True)
        return
    lines = (f">sample{i + 1} prompt={len(prompt)} tokens\n{text}\n" for i, text in enumerate(texts))
    file.write_text("".join(lines), "utf-8")


def prompt_text(prompt: str) -> str:
    """The text of a prompt: for "@path" the contents of the file without the final line break; for "@@text", "@text".

    Raises:
      UserError: the file cannot be read, or is not UTF-8.
    """
    if prompt.startswith("@@") or not prompt.startswith("@"):
        _check_text(prompt, "--prompt")
        return prompt[1:] if prompt.startswith("@@") else prompt
    path = Path(prompt[1:]).expanduser()
    try:
        if path.is_char_device() or path.is_block_device():  # /dev/zero never ends
            raise OSError(errno.EINVAL, "it is a device")
        if path.is_fifo() and not str(path).startswith(("/dev/", "/proc/")):  # it may have no writer, forever
            raise OSError(errno.EINVAL, "it is a pipe; @/dev/stdin reads one")
        return path.read_text(encoding="utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        found = f"prompt file {path} has {error.reason} at byte {error.start}"
        raise UserError(f"{found}, expected UTF-8 text: convert the file") from None
    except OSError as error:
        found = f"prompt file {path} cannot be read ({error.strerror}), expected a text file"
        raise UserError(f"{found}: change --prompt (@@ for a prompt that starts with @)") from None


def _check_text(text: str, flag: str) -> None:
    """Raises UserError for bytes that are not UTF-8, which Python keeps as characters that no tokenizer encodes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{flag} is not UTF-8 text at character {error.start}: change {flag}") from None


def say_special_tokens(tokenizer: Tokenizer, before: tuple[int, ...]) -> None:
    """Prints on stderr which special tokens are put before the prompt."""
    _say(described(tokenizer, SpecialTokens(before=before), of="prompt"))


def _say(line: str) -> None:
    if channel.index() == 0:
        print(line, file=sys.stderr)


def chat_ids(
    checkpoint: str, tokenizer: Tokenizer, prompt: str, *, system: str | None, template: str | None
) -> tuple[list[int], list[int]]:
    """(ids of the user's turn in the chat template, ids with which the template ends an answer).

    Args:
      template: a .jinja file or a name; None: the template that the checkpoint was trained with, else the tokenizer's.

    Raises:
      UserError: there is no template, or it raises an error for this prompt.
    """
    _check_text(system or "", "--system")
    override = template or _trained_template(checkpoint)
    templates = chat_templates(tokenizer, override, setting="--chat_template")
    return prompt_ids(templates, tokenizer, prompt, system=system), turn_end_ids(templates, tokenizer)


def _trained_template(checkpoint: str) -> str | None:
    """The Dataset.chat_template of the run that wrote an lcx checkpoint; None for other checkpoints."""
    folder = Path(hub.local(checkpoint)).expanduser()
    if (folder / "config.json").is_file() or tokenizer_record(folder) is not None:
        return None
    directory, step = find_step(folder)
    return _find(read_json(directory / str(step), "meta").get("data"), "chat_template")


def _find(value: Any, key: str) -> str | None:
    """The first string under this key in a nested JSON document, or None."""
    if isinstance(value, dict) and isinstance(value.get(key), str):
        return value[key]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((found for item in inner if (found := _find(item, key)) is not None), None)


def show(tokenizer: Tokenizer, ids: Iterable[int], *, prompt: Sequence[int] = ()) -> None:
    """Prints the text of `ids` as they arrive, then the speed on stderr."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # print "?" for a character that the terminal cannot encode
    times = [time.perf_counter()]
    waiting = threading.Timer(_PATIENCE_S, _say, ["compiling the program for this prompt"])
    waiting.daemon = True
    waiting.start()

    def timed() -> Iterator[int]:
        for token in ids:
            waiting.cancel()
            times.append(time.perf_counter())
            yield token

    try:
        for piece in whole_characters(tokenizer, timed(), prompt=prompt):
            print(piece, end="", flush=True)
    finally:
        waiting.cancel()
    print(flush=True)
    print(_speed(times, len(prompt)), file=sys.stderr)


def _speed(times: Sequence[float], prompt_length: int) -> str:
    """The speed in one line. The first two tokens are reported separately, because each includes a compilation."""
    start, first, *later = times
    line = f"{quantity(len(later) + 1, 'token')}; prompt of {prompt_length} and first token {first - start:.2f} s"
    if len(later) < 2:
        return line
    rate = (len(later) - 1) / (later[-1] - later[0])
    return f"{line}, second {later[0] - first:.2f} s, then {rate:.1f} tokens/s"


def whole_characters(
    tokenizer: Tokenizer, ids: Iterable[int], *, prompt: Sequence[int] = ()
) -> Iterator[str]:
    """Yields the text of `ids` in pieces, each as soon as it is final. Joined, the pieces are the whole text.

    A token may end in the middle of a character; its text is held back until the character is complete. The text of a
    token also depends on the token before it (sentencepiece drops the space before the first word of a text). So each
    piece is decoded together with the previous one, and the first with the end of `prompt`.
    """
    context, held = end_of(tokenizer, prompt), list[int]()
    for token in ids:
        held.append(token)
        text = _added(tokenizer, context, held)
        if text and (not text.endswith(_BROKEN) or len(held) >= _MAX_HELD):
            yield text
            context, held = held, []
    text = _added(tokenizer, context, held)
    if text:
        yield text


def _added(tokenizer: Tokenizer, context: list[int], held: list[int]) -> str:
    return tokenizer.decode(context + held)[len(tokenizer.decode(context)) :]


def end_of(tokenizer: Tokenizer, prompt: Sequence[int]) -> list[int]:
    """The shortest end of the prompt, in tokens, that starts at the beginning of a character."""
    ids = [int(token) for token in prompt[-_MAX_CONTEXT:]]
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[-count:])
        if text and not text.startswith(_BROKEN):
            return ids[-count:]
    return ids
