"""Lines of files of questions about long documents, whatever their layout, and prompts that fit."""

import dataclasses
import gzip
import json
import pathlib
from typing import Any

from lcx.data import Tokenizer
from lcx.errors import UserError
from lcx.evals.support.documents_qa import longbench

LAYOUTS = ("longbench", "longbench_v2", "gov_report", "qa")
_PLAIN = longbench.Task("Document:\n{context}\n\nQuestion: {input}\n\nAnswer:", 50, "contains")
_CHOICE = longbench.Task(longbench.V2_PROMPT, 128, "choice")
_SUMMARY = longbench.Task(
    "Read the following article and then summarize it.\n{context}\nNow summarize the above article.\nSummary:",
    1000,
    "rouge",
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One question.

    Attributes:
      answers: all expected answers, any of which counts.
      group: the task or the difficulty and length to which it belongs, in tables.
      classes: of a classification.
    """

    context: str
    question: str
    answers: list[str]
    task: longbench.Task
    group: str
    classes: list[str] = dataclasses.field(default_factory=list)


def read(path: str, layout: str, *, limit: int | None) -> list[Row]:
    """The first rows of a file of JSON lines, or of one JSON list; compressed or not.

    Raises:
      UserError: it cannot be read, a row lacks a field, or a task is unknown.
    """
    place, number = pathlib.Path(path).expanduser(), 0
    rows: list[Row] = []
    try:
        data = place.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
        stripped = text.lstrip()
        lines = json.loads(text) if stripped.startswith("[") else filter(str.strip, text.splitlines())
        for number, line in enumerate(lines, start=1):  # noqa: B007 (the message names it)
            if limit is not None and len(rows) >= limit:
                break
            rows.append(_row(json.loads(line) if isinstance(line, str) else line, layout, place.name.split(".")[0]))
    except UserError as error:
        raise UserError(f"{path}, row {number}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; change LongDocuments.file") from None
    except (ValueError, LookupError, TypeError, AttributeError, EOFError) as error:
        raise UserError(
            f"{path}, row {number}: {type(error).__name__}: {error}; expected the layout {layout!r}: change"
            " LongDocuments.layout or file"
        ) from None
    if not rows:
        raise UserError(f"{path} holds no row; change LongDocuments.file")
    return rows


def _row(row: dict[str, Any], layout: str, stem: str) -> Row:
    if layout == "longbench":
        name = str(row.get("dataset") or stem).removesuffix("_e")
        even = stem.endswith("_e") or str(row.get("dataset")).endswith("_e")
        if name not in longbench.TASKS:
            raise UserError(
                f"{name!r} is not one of LongBench's tasks, expected {', '.join(longbench.TASKS)}: change"
                " LongDocuments.file"
            )
        answers = [str(answer) for answer in row["answers"]]
        classes = [str(one) for one in row.get("all_classes") or ()]
        group = f"{name}, {_words(row['length'])}" if even and "length" in row else name
        found = Row(row["context"], row["input"], answers, longbench.TASKS[name], group, classes)
    elif layout == "longbench_v2":
        choices = "".join(f"\n({letter}) {str(row[f'choice_{letter}']).strip()}" for letter in "ABCD")
        question = f"{row['question'].strip()}\nChoices:{choices}"
        group = f"{row.get('difficulty', 'all')}, {row.get('length', 'all')}"
        found = Row(row["context"].strip(), question, [row["answer"]], _CHOICE, group)
    elif layout == "gov_report":
        found = Row(row["report"], "", [row["summary"]], _SUMMARY, "gov_report")
    else:
        answers = row["answers"] if "answers" in row else [row["answer"]]
        text = row["document"] if "document" in row else row["context"]
        asked = row["question"] if "question" in row else row["input"]
        found = Row(text, asked, [str(answer) for answer in answers], _PLAIN, "qa")
    if not found.answers or not all(isinstance(one, str) for one in (found.context, found.question)):
        raise ValueError("a row needs a text, a question and at least one answer")
    return found


def _words(length: int) -> str:
    """The class of lengths by which LongBench-E, whose files have as many rows of each, gives its scores."""
    return "0-4k" if length < 4000 else "4-8k" if length < 8000 else "8k+"


def prompt(row: Row, tokenizer: Tokenizer, *, room: int, document: int | None) -> tuple[str, int]:
    """(the prompt, the tokens that were cut from the middle of its document); the question is never cut.

    Args:
      room: the most tokens of the prompt.
      document: the most tokens of the document, which is then cut at its end, as published for GovReport; None: no
        limit of its own.

    Raises:
      UserError: the question alone does not fit.
    """
    ids = tokenizer.encode(row.context).tolist()
    context, cut = row.context, 0
    if document is not None and len(ids) > document:
        cut = len(ids) - document
        ids = ids[:document]
        context = tokenizer.decode(ids)
    text = row.task.prompt.replace("{input}", row.question).replace("{context}", context, 1)
    over = len(tokenizer.encode(text)) - room
    kept = len(ids)
    while over > 0:
        kept -= over
        if kept < 2:
            raise UserError(
                f"a question of {len(tokenizer.encode(row.question))} tokens leaves no room for its document in {room}"
                " tokens: raise LongDocuments.length"
            )
        first = kept // 2
        context = tokenizer.decode(ids[:first]) + tokenizer.decode(ids[len(ids) - (kept - first) :])
        text = row.task.prompt.replace("{input}", row.question).replace("{context}", context, 1)
        over = len(tokenizer.encode(text)) - room
    return text, cut + len(ids) - kept
