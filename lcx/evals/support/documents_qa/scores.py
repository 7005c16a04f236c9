"""Scores of an answer against one expected answer, in [0, 1], as in LongBench; the caller takes the best of several."""

import collections
import difflib
import functools
import re
import string
from collections.abc import Sequence

from lcx.errors import UserError
from lcx.evals.support.documents_qa import chinese

_WORDS = chinese.Words()
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def normalized(text: str) -> str:
    """Lower case, without punctuation and articles, white space as single spaces (SQuAD's normalization)."""
    text = "".join(character for character in text.lower() if character not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(prediction: str, expected: str) -> float:
    """The F1 of the two bags of words."""
    return _f1(normalized(prediction).split(), normalized(expected).split())


def f1_zh(prediction: str, expected: str) -> float:
    """The F1 of the two bags of Chinese words."""
    return _f1(chinese.normalized(prediction), chinese.normalized(expected))


def _f1(words: list[str], wanted: list[str]) -> float:
    same = sum((collections.Counter(words) & collections.Counter(wanted)).values())
    return 2 * same / (len(words) + len(wanted)) if same else 0.0


def exact(prediction: str, expected: str) -> float:
    """1 if both are equal after normalization."""
    return float(normalized(prediction) == normalized(expected))


def contains(prediction: str, expected: str) -> float:
    """1 if the expected answer occurs in the prediction, regardless of case."""
    return float(expected.lower() in prediction.lower())


def classification(prediction: str, expected: str, classes: Sequence[str]) -> float:
    """1 over the number of classes that the prediction names, if the expected one is among them."""
    named = [name for name in classes if name in prediction]
    named = [name for name in named if not (name in expected and name != expected)]
    return 1.0 / len(named) if expected in named else 0.0


def retrieval(prediction: str, expected: str) -> float:
    """The share of the numbers in the prediction that are that of the expected "Paragraph N" or "段落N"."""
    found = re.search(r"(?:Paragraph |段落)(\d+)", expected)
    return count(prediction, found[1] if found else expected)


def count(prediction: str, expected: str) -> float:
    """The share of the numbers in the prediction that are the expected one."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(str(expected)) / len(numbers) if numbers else 0.0


def code(prediction: str, expected: str) -> float:
    """The similarity of the first line that is no comment and no fence: difflib's ratio, rounded as by fuzzywuzzy."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((one for one in lines if not any(mark in one for mark in ("`", "#", "//"))), "")
    return round(100 * difflib.SequenceMatcher(None, line, expected).ratio()) / 100


@functools.cache
def _scorer(names: tuple[str, ...], **settings):
    try:
        from rouge_score import rouge_scorer
    except ImportError:
        raise UserError(
            "ROUGE needs the package rouge-score, which is not installed: pip install rouge-score"
        ) from None
    return rouge_scorer.RougeScorer(list(names), **settings)


def rouge(prediction: str, expected: str) -> dict[str, float]:
    """The F1 of ROUGE-1, -2, -L and -Lsum by the package rouge-score, with stemming; sentences are lines for Lsum."""
    found = _scorer(ROUGE, use_stemmer=True).score(expected, prediction)
    return {name: score.fmeasure for name, score in found.items()}


def rouge_l(prediction: str, expected: str) -> float:
    return rouge(prediction, expected)["rougeL"]


def rouge_l_zh(prediction: str, expected: str) -> float:
    """The F1 of ROUGE-L over Chinese words, by the same package."""
    return _scorer(("rougeL",), tokenizer=_WORDS).score(expected, prediction)["rougeL"].fmeasure
