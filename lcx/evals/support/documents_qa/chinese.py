"""The Chinese tasks of LongBench v1: prompts, lengths of answers, and scores over words instead of characters.

Chinese has no spaces. The published scores cut a text into words with jieba; here its port to Rust, rjieba, does, with
the same dictionary and model. Its one difference, runs of Latin letters with signs in them, is undone by `words`.
"""

import re
import string

from lcx.errors import UserError
from lcx.evals.support.documents_qa.task import Task

TASKS = {
    "multifieldqa_zh": Task(
        "阅读以下文字并用中文简短回答：\n\n{context}\n\n现在请基于上面的文章回答下面的问题，只告诉我答案，"
        "不要输出任何其他字词。\n\n问题：{input}\n回答：",
        64,
        "f1_zh",
    ),
    "dureader": Task(
        "请基于给定的文章回答下述问题。\n\n文章：{context}\n\n请基于上述文章回答下面的问题。\n\n问题：{input}\n回答：",
        128,
        "rouge_l_zh",
    ),
    "vcsum": Task(
        "下面有一段会议记录，请你阅读后，写一段总结，总结会议的内容。\n会议记录：\n{context}\n\n会议总结：",
        512,
        "rouge_l_zh",
    ),
    "lsht": Task(
        "请判断给定新闻的类别，下面是一些例子。\n\n{context}\n{input}", 64, "classification", first_line=True
    ),
    "passage_retrieval_zh": Task(
        "以下是若干段落文字，以及其中一个段落的摘要。请确定给定的摘要出自哪一段。\n\n{context}\n\n下面是一个摘要"
        '\n\n{input}\n\n请输入摘要所属段落的编号。答案格式必须是"段落1"，"段落2"等格式\n\n答案是：',
        32,
        "retrieval",
    ),
}

_SIGNS = frozenset(
    string.punctuation
    + "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､"
    + "、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏"
)
_LATIN = re.compile(r"[a-zA-Z0-9+#&._%\-]+")  # what jieba sends to its model with the Chinese around it
_PART = re.compile(r"[a-zA-Z0-9]+(?:\.\d+)?%?|.", re.DOTALL)
_WHOLE = {"AT&T", "c#", "C#", "c++", "C++"}  # jieba's dictionary has these alone


def words(text: str) -> list[str]:
    """The words of a text, spaces and signs included, as jieba cuts it in its accurate mode."""
    try:
        import rjieba
    except ImportError:
        raise UserError(
            "LongBench's Chinese tasks need the package rjieba, which is not installed: pip install rjieba"
        ) from None
    found = []
    for word in rjieba.cut(text):
        found += _PART.findall(word) if _LATIN.fullmatch(word) and word not in _WHOLE else [word]
    return found


def normalized(text: str) -> list[str]:
    """The words in lower case, without punctuation and white space."""
    kept = ("".join(c for c in word.lower() if c not in _SIGNS and not c.isspace()) for word in words(text))
    return [word for word in kept if word]


class Words:
    """A tokenizer for the package rouge-score, whose own drops all but Latin letters and digits."""

    def tokenize(self, text: str) -> list[str]:
        return [word for word in words(text) if not word.isspace()]
