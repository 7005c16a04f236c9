"""Conversations: rows with `messages`, rendered with a chat template, with a loss on the assistant's turns.

If the template marks these turns (`{% generation %}`), the loss mask equals that of transformers'
`apply_chat_template(..., return_assistant_tokens_mask=True)`. Most templates do not; the conversation is then rendered
twice more for each assistant turn: up to the turn with the generation prompt, and up to and including the turn. The
text that the second adds to the first is what the model has to generate. The first must be a prefix of the second, and
the second a prefix of the whole conversation: a template that renders earlier turns differently once later turns follow
is refused, because the position of the turn would be a guess.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from lcx.data import chat_templates
from lcx.data.chat_sandbox import RenderError, Spans
from lcx.data.notices import say_once
from lcx.data.readers import Rendered
from lcx.data.tokenizers import Tokenizer
from lcx.errors import UserError

LOSSES = ("assistant", "all")
_FIELDS = ("messages", "conversations")
COLUMNS = (*_FIELDS, "system", "tools", "functions", "chat_template_kwargs")  # fields that are read
# ShareGPT's role names. Its function calls have no unique equivalent, so they are not supported.
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "model": "assistant", "system": "system", "tool": "tool",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ChatReader:
    """Turns rows into conversations.

    Attributes:
      wanted: True: every row must be a conversation. None: rows with `messages` (or `conversations`) are.
      loss: "assistant" for a loss on the assistant's turns, "all" for a loss on every token.
    """

    templates: chat_templates.ChatTemplates
    wanted: bool | None = None
    loss: str = "assistant"

    def identity(self) -> dict[str, Any] | None:
        """The settings that affect the tokens, for a fingerprint; None if there is no template to render with."""
        if not self.templates:
            return None
        return {"template": self.templates.identity(), "loss": self.loss, "wanted": self.wanted}

    def finds(self, row: Mapping[str, Any], text_field: str, place: str) -> bool:
        """Whether a row is a conversation. Raises UserError for one that also has a text, unless `wanted` is set."""
        field = _field(row)
        if self.wanted:
            if field is None:
                raise UserError(
                    f"{place} has fields {sorted(map(str, row))[:8]}, expected 'messages' (Dataset.chat=True reads"
                    " conversations); set Dataset.chat=False for text"
                )
            return True
        if field is None or not _looks_like_messages(row[field]):
            return False
        if isinstance(row.get(text_field), str) and row[text_field]:
            raise UserError(
                f"{place} has both {field!r} and {text_field!r}: set Dataset.chat=True to read the conversation, or"
                " Dataset.chat=False to read the text"
            )
        return True

    def is_row(self, record: Mapping[str, Any]) -> bool:
        """Whether a JSON object that is the only one in its file is a conversation."""
        field = _field(record)
        return field is not None and _looks_like_messages(record[field])

    def finds_column(self, names: Iterable[str]) -> bool:
        """Whether a table with these columns may hold conversations."""
        return bool(self.wanted) or not set(_FIELDS).isdisjoint(names)

    def render(self, row: Mapping[str, Any], place: str) -> Rendered:
        """Renders the conversation of a row; the text is empty for a row without messages.

        Raises:
          UserError: the messages are malformed, or the template cannot render them.
        """
        messages = read_messages(row, place)
        if not messages:
            return Rendered("", ())
        tools, variables = _tools(row, place), _variables(row, place)
        try:
            rendered = self._render(messages, tools, variables, place)
        except RenderError as error:
            raise chat_templates.explain(error, self.templates, place) from None
        _check_parts(messages, rendered.text, place)
        return rendered

    def _render(self, messages: list[dict], tools: Any, variables: dict, place: str) -> Rendered:
        text, spans = self.templates.render(messages, tools=tools, variables=variables)
        if self.templates.program(tools).reads_clock:
            say_once(
                f"the chat template of {self.templates.place} may write the date on which the text is tokenized"
            )
        if self.loss == "all":
            return Rendered(text, None)
        if self.templates.program(tools).marks_generation:
            return Rendered(text, spans, marked=True)
        return Rendered(text, self._assistant_spans(messages, text, tools, variables, place))

    def _assistant_spans(
        self, messages: list[dict], whole: str, tools: Any, variables: dict, place: str
    ) -> Spans:
        """The character range of each assistant turn, found by rendering the conversation up to it and including it."""
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, _ = self.templates.render(
                messages[:number], tools=tools, variables=variables, add_generation_prompt=True
            )
            through = whole
            if number + 1 < len(messages):
                through, _ = self.templates.render(messages[: number + 1], tools=tools, variables=variables)
            if not (through.startswith(before) and whole.startswith(through)):
                raise UserError(
                    f"{place}: the chat template of {self.templates.place} writes message {number + 1} (assistant)"
                    " differently with and without what follows it, so where it begins and ends is not certain; set"
                    " Dataset.chat_template to a template with {% generation %} blocks around the assistant's"
                    " turns, or Dataset.chat_loss='all'"
                )
            spans.append((len(before), len(through)))
        return tuple(spans)


def reader(
    tokenizer: Tokenizer, *, wanted: bool | None = None, template: str | None = None, loss: str = "assistant"
) -> ChatReader | None:
    """The reader for a tokenizer's chat template; None if `wanted` is False.

    Raises:
      UserError: the template is damaged; or `wanted` is True, and there is none.
    """
    if wanted is False:
        return None
    templates = chat_templates.chat_templates(tokenizer, template)
    if wanted and not templates:
        templates.choose()  # raises before any file is read
    try:
        for _, text in templates.templates if wanted or template else ():
            chat_templates._program(text)
    except RenderError as error:
        raise UserError(
            f"the chat template of {templates.place} is damaged: {error}; restore it, or set Dataset.chat_template"
        ) from None
    return ChatReader(templates, wanted, loss)


# ------------------------------------------------------------------------------------------------ rows


def _field(row: Mapping[str, Any]) -> str | None:
    return next((name for name in _FIELDS if name in row), None)


def _looks_like_messages(value: Any) -> bool:
    """Whether a value is a list of objects with a role, an empty list or null (an empty conversation)."""
    if value is None or value == []:
        return True
    first = value[0] if isinstance(value, list) else None
    return isinstance(first, dict) and bool({"role", "from"} & first.keys())


def read_messages(row: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
    """The messages of a row as [{"role": ..., "content": ...}, ...], also from ShareGPT's format.

    Raises:
      UserError: the messages have another structure.
    """
    field = _field(row)
    value = None if field is None else row[field]
    if value is None:
        return []
    if not isinstance(value, list):
        raise UserError(
            f"{place}: {field!r} is a {type(value).__name__}, expected a list of messages; correct the row, or set"
            " Dataset.chat=False"
        )
    messages = [_message(item, f"{place}, message {i}") for i, item in enumerate(value, start=1)]
    system = row.get("system")
    if field == "conversations" and isinstance(system, str) and system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": plain(system)})
    return messages


def _message(item: Any, place: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise UserError(
            f'{place} is a {type(item).__name__}, expected an object such as {{"role": "user", "content": ...}};'
            " correct the row"
        )
    message = plain(item)
    if "role" not in message and "from" in message:
        message = _from_sharegpt(message, place)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise UserError(
            f"{place}: 'role' is {role!r:.40}, expected user, assistant, system or tool; correct the row"
        )
    if isinstance(content, list):
        for part in content:
            _check_part(part, place)
    elif content is not None and not isinstance(content, str):
        raise UserError(
            f"{place}: 'content' is a {type(content).__name__}, expected text or a list of text parts; correct the row"
        )
    return message


def _check_part(part: Any, place: str) -> None:
    if (
        not isinstance(part, dict)
        or part.get("type", "text") != "text"
        or not isinstance(part.get("text"), str)
    ):
        found = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise UserError(
            f"{place}: 'content' has a part of type {found!r:.40}, expected"
            ' {"type": "text", "text": ...}: the models read only text; remove the row'
        )


def _check_parts(messages: list[dict[str, Any]], text: str, place: str) -> None:
    """Raises UserError if the template wrote a list of parts as Python prints a list, instead of their text."""
    if any(isinstance(m.get("content"), list) and str(m["content"]) in text for m in messages):
        raise UserError(
            f"{place}: 'content' is a list of parts, and the chat template writes it as Python prints a list; join the"
            " parts into one text, or set Dataset.chat_template to a template that reads them"
        )


def _from_sharegpt(message: dict[str, Any], place: str) -> dict[str, Any]:
    name = message["from"]
    known = isinstance(name, str) and name in _ROLES
    if not known or not isinstance(message.get("value"), str | type(None)):
        raise UserError(
            f"{place}: 'from' is {name!r:.40} and 'value' a {type(message.get('value')).__name__}, expected one of"
            f" {', '.join(_ROLES)} and a text; write it as 'role' and 'content'"
        )
    rest = {k: v for k, v in message.items() if k not in ("from", "value")}
    return {"role": _ROLES[name], "content": message.get("value"), **rest}


def _tools(row: Mapping[str, Any], place: str) -> list[dict[str, Any]] | None:
    """The field `tools`: a list of JSON schemas, or a string that contains such a list as JSON."""
    value = row.get("tools")
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError):
            value = 0
    if value is not None and not (isinstance(value, list) and all(isinstance(tool, dict) for tool in value)):
        raise UserError(f"{place}: 'tools' is not a list of JSON schemas; correct the row")
    return plain(value)


def _variables(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The other variables that a row passes to its template: `functions` and those in `chat_template_kwargs`."""
    more = row.get("chat_template_kwargs")
    if more is not None and not isinstance(more, dict):
        raise UserError(
            f"{place}: 'chat_template_kwargs' is a {type(more).__name__}, expected an object; correct the row"
        )
    variables = dict(plain(more or {}))
    if row.get("functions") is not None:
        variables.setdefault("functions", plain(row["functions"]))
    return variables


def plain(value: Any) -> Any:
    """`value` with JSON types only, as transformers passes it to a template; unpaired surrogates are replaced."""
    if isinstance(value, str):
        if value.isascii():
            return value
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return f"<{type(value).__name__}>"


# ------------------------------------------------------------------------------------------------ tokens


def prompt_ids(
    templates: chat_templates.ChatTemplates, tokenizer: Tokenizer, prompt: str, *, system: str | None = None
) -> list[int]:
    """The ids that ask for an answer to `prompt`: the rendered template with the generation prompt, and nothing else.

    Raises:
      UserError: there is no template, or it cannot render these messages.
    """
    messages = [{"role": "system", "content": plain(system)}] if system is not None else []
    messages.append({"role": "user", "content": plain(prompt)})
    try:
        text, _ = templates.render(messages, add_generation_prompt=True)
    except RenderError as error:
        raise UserError(
            f"the chat template of {templates.place} cannot render the prompt: {error}; change the prompt, or set"
            f" {templates.setting}"
        ) from None
    return tokenizer.encode(text).tolist()


def turn_end_ids(templates: chat_templates.ChatTemplates, tokenizer: Tokenizer) -> list[int]:
    """The special token that the template writes right after an answer, or [] if it writes none.

    A model trained on this template generates it to end its turn, even if generation_config.json names other tokens.
    """
    answer = "An answer."
    messages = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": answer}]
    try:
        text, _ = templates.render(messages)
    except RenderError:
        return []
    start, found, rest = text.rpartition(answer)
    if not found:  # the template rewrites the answer
        return []
    before = tokenizer.encode(start + answer).tolist()
    whole = tokenizer.encode(start + answer + rest)[: len(before) + 1].tolist()
    # Alone, a token such as sentencepiece's space is decoded to nothing too, so it is decoded with those before it.
    adds_nothing = whole[:-1] == before and tokenizer.decode(whole) == tokenizer.decode(before)
    return whole[-1:] if adds_nothing else []


def loss_mask(
    offsets: Int[np.ndarray, "tokens 2"], spans: Spans | None, *, marked: bool
) -> Bool[np.ndarray, " tokens"]:
    """Which tokens have a loss: those that overlap a span.

    One character can be several tokens, all with the same offsets. If it is the last of a span that the template marks
    (`marked`), only the first of these tokens is in the mask, as in transformers.

    Args:
      offsets: [tokens, 2] index of the first character of each token, and of the one after its last.
    """
    mask = np.zeros(len(offsets), bool)
    if spans is None:
        return ~mask
    begin, end = offsets[:, 0], offsets[:, 1]
    for start, stop in spans:
        inside = np.flatnonzero((begin < stop) & (end > start) & (end > begin))
        if not len(inside):
            continue
        at_end = inside[end[inside] >= stop]
        last = at_end[0] if marked and len(at_end) else inside[-1]
        mask[inside[0] : last + 1] = True
    return mask
