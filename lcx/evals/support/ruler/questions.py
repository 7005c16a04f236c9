"""qa_1 and qa_2: a question about one or more paragraphs, which stand among other paragraphs of the same data set."""

import dataclasses
import functools
import gzip
import json
import pathlib
import random
from typing import Any

from lcx.errors import UserError
from lcx.evals.support.ruler.fitting import Draft
from lcx.evals.support.ruler.lengths import Lengths

_ASK = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
_TASK = f"{_ASK}\n\nThe following are given documents."
_QUESTION = f"\n\n{_ASK}\n\nQuestion: {{query}}"
_ANSWER = " Answer:"


@dataclasses.dataclass(frozen=True)
class Questions:
    """The settings of a QA task: the layout of its file, "squad" or "hotpotqa"."""

    layout: str

    answer_tokens = 32

    def step(self, length: int) -> int:
        return 10


@dataclasses.dataclass(frozen=True)
class Question:
    """A question, its answers, the documents that hold them, and documents of the same article."""

    query: str
    answers: list[str]
    documents: list[int]
    related: list[int]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """All questions of a file, and its documents in sorted order."""

    questions: list[Question]
    documents: list[str]


@functools.lru_cache(maxsize=4)
def read(path: str, layout: str) -> Corpus:
    """The questions of a file in the layout of SQuAD (1.1 or 2.0) or of HotpotQA's distractor setting.

    Raises:
      UserError: it cannot be read, has another layout, or has no question with an answer.
    """
    field = "squad" if layout == "squad" else "hotpotqa"
    place = pathlib.Path(path).expanduser()
    try:
        raw = gzip.decompress(place.read_bytes()) if place.suffix == ".gz" else place.read_bytes()
        data = json.loads(raw)
        corpus = _squad(data) if layout == "squad" else _hotpotqa(data)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; change Ruler.{field}") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is not in the layout of {layout} ({why}); change Ruler.{field}") from None
    if not corpus.questions:
        raise UserError(f"{path} holds no question with an answer; change Ruler.{field}")
    return corpus


def _squad(data: Any) -> Corpus:
    articles = [article["paragraphs"] for article in data["data"]]
    documents = sorted({paragraph["context"] for article in articles for paragraph in article})
    number = {text: i for i, text in enumerate(documents)}
    questions = []
    for article in articles:
        own = [number[paragraph["context"]] for paragraph in article]
        for paragraph in article:
            here = number[paragraph["context"]]
            for asked in paragraph["qas"]:
                answers = [answer["text"] for answer in asked["answers"]]
                if asked.get("is_impossible") or not answers:
                    continue
                related = [i for i in own if i != here]
                questions.append(Question(asked["question"], answers, [here], related))
    return Corpus(questions, documents)


def _hotpotqa(data: Any) -> Corpus:
    texts = [[f"{title}\n{''.join(sentences)}" for title, sentences in one["context"]] for one in data]
    documents = sorted({text for own in texts for text in own})
    number = {text: i for i, text in enumerate(documents)}
    questions = [
        Question(one["question"], [one["answer"]], [number[text] for text in own], [])
        for one, own in zip(data, texts, strict=True)
    ]
    return Corpus(questions, documents)


class QuestionDrafts:
    """Drafts of a QA task by the number of documents, for the question `index`."""

    def __init__(self, corpus: Corpus, lengths: Lengths, *, seed: int, frame: tuple[str, str]):
        self._corpus, self._lengths, self._seed, self._frame = corpus, lengths, seed, frame
        self._random = random.Random(seed)
        self.index = 0

    @property
    def least(self) -> int:
        """The documents without which the question has no answer."""
        return len(self._question.documents)

    @property
    def _question(self) -> Question:
        return self._corpus.questions[self.index]

    def __call__(self, size: int) -> Draft:
        question = self._question
        chosen = self._chosen(question, size)
        random.Random(self._seed).shuffle(chosen)
        texts = [f"Document {i}:\n{self._corpus.documents[one]}" for i, one in enumerate(chosen, start=1)]
        before, after = self._frame
        end = f"{_QUESTION.format(query=question.query)}{after}{_ANSWER}"
        tokens = self._lengths.whole(before + _TASK) + self._lengths.piece(end)
        tokens += self._lengths.total(f"\n\nDocument {i}:" for i in range(1, len(chosen) + 1))
        tokens += self._lengths.total(f"\n{self._corpus.documents[one]}" for one in chosen)
        context = "\n\n".join(texts)
        return Draft(f"{before}{_TASK}\n\n{context}{end}", _ANSWER, question.answers, tokens)

    def _chosen(self, question: Question, size: int) -> list[int]:
        """The numbers of so many documents: the question's own, related ones, then any."""
        own, related, everything = question.documents, question.related, len(self._corpus.documents)
        if size >= everything:  # there are no more: they come again
            return [i % everything for i in range(max(size, everything))]
        missing = max(0, size - len(own))
        if missing <= len(related):
            return own + self._random.sample(related, missing)
        known = {*own, *related}
        others = [i for i in range(everything) if i not in known]
        return own + related + self._random.sample(others, max(0, missing - len(related)))
