"""The chat templates of a tokenizer: which files they are read from, which one applies, and their variables.

The rules are those of transformers. `chat_template` in `tokenizer_config.json` is a template or a list of named
templates. If `chat_template.jinja` (the default template) or `additional_chat_templates/NAME.jinja` exist in the same
folder, they replace all of those.
"""

import dataclasses
import datetime
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from lcx import small_files
from lcx.data.chat_sandbox import Program, RenderError, Spans
from lcx.data.tokenizers import Tokenizer
from lcx.errors import UserError

DEFAULT, TOOL_USE = "default", "tool_use"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_REASONING = (
    "reasoning_content",
    "thinking",
    "reasoning",
)  # names of a message's reasoning; templates read the first or the second


@functools.cache
def _now() -> datetime.datetime:
    """The current time as templates see it: fixed for the process, so that no two renderings differ because of it."""
    return datetime.datetime.now()


@functools.lru_cache(maxsize=32)
def _program(source: str) -> Program:
    return Program(source, now=_now())


@dataclasses.dataclass(frozen=True)
class ChatTemplates:
    """The templates of one tokenizer.

    Attributes:
      templates: (name, text) pairs; a single template is called "default".
      special_tokens: (name, text) pairs that every template can use, such as ("bos_token", "<s>").
      place: where they were read from, for error messages.
      setting: the name of the setting that chooses another template, for error messages.
    """

    templates: tuple[tuple[str, str], ...]
    special_tokens: tuple[tuple[str, str], ...] = ()
    place: str = "the tokenizer"
    setting: str = "Dataset.chat_template"

    def __bool__(self) -> bool:
        return bool(self.templates)

    def choose(self, tools: Any = None) -> str:
        """The source of the template that applies: with tools, "tool_use" if it exists; else the default."""
        known = dict(self.templates)
        if not known:
            raise UserError(
                f"{self.place} has no chat template (chat_template in tokenizer_config.json, or chat_template.jinja);"
                f" set {self.setting} to a .jinja file"
            )
        name = TOOL_USE if tools is not None and TOOL_USE in known else DEFAULT
        if name not in known:
            raise UserError(
                f"{self.place} has several chat templates and none is the default: set {self.setting} to one of"
                f" {', '.join(sorted(known))}"
            )
        return known[name]

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: Any = None,
        add_generation_prompt: bool = False,
        variables: dict[str, Any] | None = None,
    ) -> tuple[str, Spans]:
        """(text of a conversation, character ranges of its generation blocks).

        The text equals that of transformers' `apply_chat_template(messages, tools=tools, ..., **variables,
        tokenize=False)`: null fields are dropped, and the reasoning of a message is available under all names that
        templates use.

        Raises:
          RenderError: the template fails or refuses these messages.
        """
        given = {
            **dict(self.special_tokens),
            **(variables or {}),
            "messages": [_with_reasoning({k: v for k, v in m.items() if v is not None}) for m in messages],
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        return self.program(tools).render(given)

    def program(self, tools: Any = None) -> Program:
        """The compiled template. Raises RenderError if it cannot be compiled."""
        return _program(self.choose(tools))

    def identity(self) -> str:
        """A hash of everything that affects the rendered text."""
        whole = json.dumps([self.templates, self.special_tokens])
        return hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    found = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


def chat_templates(
    tokenizer: Tokenizer, override: str | None = None, *, setting: str = "Dataset.chat_template"
) -> ChatTemplates:
    """The templates of a tokenizer, possibly none.

    Args:
      override: the path of a template, or the name of one of the tokenizer's own, to use for every conversation.
      setting: the name of the setting that gave `override`, for error messages.

    Raises:
      UserError: a file is damaged, or `override` is neither a file nor a name.
    """
    path = getattr(tokenizer, "path", None)
    folder = Path(path).parent if path is not None else None
    config = _read_object(folder / "tokenizer_config.json") if folder is not None else {}
    special = _special_tokens(tokenizer, config, folder)
    own = {} if folder is None else _in_files(folder) or _in_config(config, folder)
    place = str(folder or "the tokenizer")
    if override is not None:
        text = own[override] if override in own else _read_override(override, own, setting)
        return ChatTemplates(((DEFAULT, text),), special, override, setting)
    return ChatTemplates(tuple(sorted(own.items())), special, place, setting)


def _in_files(folder: Path) -> dict[str, str]:
    found = {}
    if (folder / "chat_template.jinja").is_file():
        found[DEFAULT] = _read_text(folder / "chat_template.jinja")
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        if file.is_file():
            found[file.name.removesuffix(".jinja")] = _read_text(file)
    return found


def _in_config(config: dict[str, Any], folder: Path) -> dict[str, str]:
    value = config.get("chat_template")
    if value is None:
        return {}
    if isinstance(value, str):
        return {DEFAULT: value}
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        value = {str(item.get("name", "")): item.get("template") for item in value}
    if isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(text, str) for name, text in value.items()
    ):
        return value
    raise UserError(
        f"{folder / 'tokenizer_config.json'}: chat_template is {json.dumps(value)[:60]}, expected a text or a list of"
        ' {"name": ..., "template": ...}; restore the file, or set Dataset.chat_template to a .jinja file'
    )


def _special_tokens(
    tokenizer: Tokenizer, config: dict[str, Any], folder: Path | None
) -> tuple[tuple[str, str], ...]:
    """(name, text) of the special tokens, as transformers passes them to a template."""
    if folder is None:
        return ()
    texts = getattr(tokenizer, "special_texts", None)
    if texts is None:
        texts = _stated_tokens(tokenizer, config, folder)
    order = [*_SPECIAL, *sorted(set(texts) - set(_SPECIAL))]
    return tuple((name, texts[name]) for name in order if isinstance(texts.get(name), str))


def _stated_tokens(tokenizer: Tokenizer, config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The special tokens that the files next to a sentencepiece model state, else its own."""
    stated = {name: value for name, value in config.items() if name.endswith("_token")}
    if isinstance(config.get("extra_special_tokens"), dict):
        stated |= config["extra_special_tokens"]
    if "added_tokens_decoder" not in config:  # then read the file of older transformers releases
        older = _read_object(folder / "special_tokens_map.json")
        stated |= {name: value for name, value in older.items() if name.endswith("_token")}
    piece = getattr(tokenizer, "piece", None)  # a sentencepiece model defines its own special tokens
    if piece is not None:
        own = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        stated = {name: piece(i) for name, i in own.items() if i is not None} | stated
    return {name: value.get("content") if isinstance(value, dict) else value for name, value in stated.items()}


def _read_override(override: str, own: dict[str, str], setting: str) -> str:
    path = Path(override).expanduser()
    if not path.is_file():
        named = f", nor one of the tokenizer's templates ({', '.join(sorted(own))})" if own else ""
        raise UserError(f"{setting}={override!r} is not a file{named}; give the path of a .jinja file")
    return _read_text(path)


def _read_text(path: Path) -> str:
    try:
        return small_files.read_text(path)
    except (OSError, ValueError) as error:
        raise UserError(f"chat template {path} cannot be read ({error}); restore it as UTF-8 text") from error


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(small_files.read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON ({error}); restore the file") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is a {type(value).__name__}, expected a JSON object; restore the file")
    return value


def explain(error: RenderError, templates: ChatTemplates, place: str) -> UserError:
    """The error for a template that cannot render a row of the data."""
    return UserError(
        f"{place}: the chat template of {templates.place} cannot render this conversation: {error};"
        " correct the row, or set Dataset.chat_template to another template (Dataset.chat=False reads no conversations)"
    )
