"""The 13 tasks of RULER version 1, and the samples of each."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from lcx.data import Tokenizer
from lcx.errors import UserError
from lcx.evals.support.ruler import questions
from lcx.evals.support.ruler.fitting import Budget, Draft, Measure, fitted, largest
from lcx.evals.support.ruler.frequent import (
    CommonWords,
    CommonWordsDrafts,
    FrequentWords,
    FrequentWordsDrafts,
)
from lcx.evals.support.ruler.lengths import Lengths
from lcx.evals.support.ruler.needles import NeedleDrafts, Needles
from lcx.evals.support.ruler.questions import QuestionDrafts, Questions
from lcx.evals.support.ruler.tracking import Tracking, TrackingDrafts

VERSION = "RULER v1 (NVIDIA/RULER main before its deprecation, now branch rulerv1-ns)"
SEED = 42
PLAIN = "{task_template}"

TASKS: dict[str, Any] = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", value_kind="uuids"),
    "niah_multikey_1": Needles("essay", keys=4),
    "niah_multikey_2": Needles("needle"),
    "niah_multikey_3": Needles("needle", key_kind="uuids", value_kind="uuids"),
    "niah_multivalue": Needles("essay", values=4),
    "niah_multiquery": Needles("essay", queries=4),
    "vt": Tracking(),
    "cwe": CommonWords(),
    "fwe": FrequentWords(),
    "qa_1": Questions("squad"),
    "qa_2": Questions("hotpotqa"),
}
ESSAY = tuple(n for n, task in TASKS.items() if isinstance(task, Needles) and task.haystack == "essay")
OFFLINE = tuple(n for n, t in TASKS.items() if n not in ESSAY and not isinstance(t, Questions))


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sample, with the fields of RULER's files.

    Attributes:
      input: the prompt.
      outputs: the expected answers.
      length: tokens of the input, of the answer's start and of the answer that will be generated.
      answer_prefix: the start of the answer, which follows the prompt and belongs to what the model reads.
    """

    index: int
    input: str
    outputs: list[str]
    length: int
    answer_prefix: str

    def to_json(self) -> dict[str, Any]:
        """The sample as a line of RULER's validation.jsonl."""
        return {**dataclasses.asdict(self), "length_w_model_temp": self.length}


@dataclasses.dataclass(frozen=True)
class Material:
    """What the tasks are made of beyond this package.

    Attributes:
      essay: the text in which needles are hidden.
      squad, hotpotqa: files of questions in these layouts.
      english_words: RULER's file of more words for cwe.
    """

    essay: str | None = None
    squad: str | None = None
    hotpotqa: str | None = None
    english_words: str | None = None


def samples(
    name: str,
    *,
    tokenizer: Tokenizer,
    length: int,
    count: int = 500,
    seed: int = SEED,
    material: Material = Material(),
    model_template: str = PLAIN,
    reserved: int = 0,
    lengths: Lengths | None = None,
) -> Iterator[Sample]:
    """The first `count` samples of a task, one after the other.

    Args:
      length: the most tokens of a prompt and its answer.
      seed: RULER's is 42.
      model_template: text around the prompt, as RULER's model templates: the prompt replaces {task_template}, and the
        start of the answer follows the whole.
      reserved: tokens of the length that something else needs, such as BOS.
      lengths: counts tokens; None: a new one. Shared, it remembers what it has counted.

    Raises:
      UserError: an unknown task, material that is missing, or a length that is too short.
    """
    if name not in TASKS:
        raise UserError(f"Ruler.tasks names {name!r}, expected some of {', '.join(TASKS)}")
    if model_template.count(PLAIN) != 1:
        raise UserError(f"Ruler.model_template is {model_template!r}, expected {PLAIN} once in it")
    task, counter = TASKS[name], lengths or Lengths(tokenizer)
    if not counter.whole("The quick brown fox jumps over the lazy dog."):
        raise UserError("the tokenizer gives no token for a text, so lengths cannot be measured: change the tokenizer")
    before, after = model_template.split(PLAIN)
    frame = (before, after)
    budget = Budget(length - reserved, task.answer_tokens, name)
    if isinstance(task, Needles):
        drafts = _needles(task, counter, budget, length, count, seed, frame, material.essay)
    elif isinstance(task, Tracking):
        drafts = _tracking(task, counter, budget, length, count, seed, frame)
    elif isinstance(task, CommonWords):
        drafts = _common(task, counter, budget, length, count, seed, frame, material.english_words)
    elif isinstance(task, FrequentWords):
        drafts = _frequent(task, counter, budget, length, count, seed, frame)
    else:
        drafts = _questions(task, counter, budget, count, seed, frame, getattr(material, task.layout))
    for index, (draft, tokens) in enumerate(drafts):
        prompt = draft.text.removesuffix(draft.answer)
        yield Sample(index, prompt, draft.outputs, tokens + task.answer_tokens, draft.answer)


Drafts = Iterator[tuple[Draft, int]]
Frame = tuple[str, str]


def _repeated(
    make: Callable[[int], Draft],
    measure: Measure,
    budget: Budget,
    count: int,
    *,
    size: int,
    step: int,
    least: int,
) -> Drafts:
    for _ in range(count):
        yield fitted(make, measure, budget, size=size, step=step, least=least)


def _needles(
    task: Needles,
    counter: Lengths,
    budget: Budget,
    length: int,
    count: int,
    seed: int,
    frame: Frame,
    essay: str | None,
) -> Drafts:
    if task.haystack == "essay" and not (essay and essay.strip()):
        raise UserError(f"RULER {budget.task} hides its needles in essays: set Ruler.essays to a text file")
    make = NeedleDrafts(task, counter, seed=seed, frame=frame, essay=essay)
    measure, step = Measure(counter), task.step(length)
    size = largest(make, measure, budget, step=step, probe=step)
    yield from _repeated(make, measure, budget, count, size=size, step=step, least=task.count)


def _tracking(
    task: Tracking, counter: Lengths, budget: Budget, length: int, count: int, seed: int, frame: Frame
) -> Drafts:
    make = TrackingDrafts(task, counter, seed=seed, frame=frame, budget=budget)
    measure, step, least = Measure(counter), task.step(length), task.hops + 1
    searched = dataclasses.replace(budget, answer=budget.answer + make.example_tokens)
    size = largest(make.searched, measure, searched, step=step, probe=step)
    yield from _repeated(make, Measure(counter), budget, count, size=size, step=step, least=least)


def _common(
    task: CommonWords,
    counter: Lengths,
    budget: Budget,
    length: int,
    count: int,
    seed: int,
    frame: Frame,
    english_words: str | None,
) -> Drafts:
    make = CommonWordsDrafts(
        task, counter, seed=seed, frame=frame, length=length, english_words=english_words
    )
    measure, step = Measure(counter), task.step(length)
    size = largest(
        make, measure, budget, step=step, probe=4096, estimate=lambda each: int(budget.length // each) * 2
    )
    yield from _repeated(make, measure, budget, count, size=size, step=step, least=task.common + 1)


def _frequent(
    task: FrequentWords, counter: Lengths, budget: Budget, length: int, count: int, seed: int, frame: Frame
) -> Drafts:
    make = FrequentWordsDrafts(task, counter, seed=seed, frame=frame, length=length)
    measure, step, size = Measure(counter), task.step(length), length // task.letters
    while measure(make(size)) < budget.length:  # RULER's search: the last size whose prompt alone fits
        size += step
    size -= step
    for _ in range(count):
        make.new_vocabulary()
        yield fitted(make, measure, budget, size=size, step=step, least=1)


def _questions(
    task: Questions, counter: Lengths, budget: Budget, count: int, seed: int, frame: Frame, path: str | None
) -> Drafts:
    if path is None:
        raise UserError(
            f"RULER {budget.task} asks questions of a data set: set Ruler.{task.layout} to a file in its layout"
        )
    corpus = questions.read(path, task.layout)
    if count > len(corpus.questions):
        raise UserError(
            f"RULER {budget.task}: {path} holds {len(corpus.questions)} questions, expected {count}: lower"
            " Ruler.samples"
        )
    make, measure, step = (
        QuestionDrafts(corpus, counter, seed=seed, frame=frame),
        Measure(counter),
        task.step(0),
    )
    size = largest(make, measure, budget, step=step, probe=step)
    for index in range(count):
        make.index = index
        yield fitted(make, measure, budget, size=max(size, make.least), step=step, least=make.least)
