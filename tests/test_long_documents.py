"""Questions about long documents: scores by hand, cuts that spare the question, models that know and that do not."""

import importlib.util
import json
import re
import subprocess
import sys

import pytest
from answering import Words, answered_by, copier, silent
from doc_world import write_tokenizer
from tiny_runs import ROOT, tiny_model

from lcx.data import Dataset
from lcx.errors import UserError
from lcx.evals.long_documents import LongDocuments
from lcx.evals.support.documents_qa import chinese, longbench, rows, scores

WORDS = Words()
FILLER = "Nothing happened on that day, and nobody wrote about it. " * 60


@pytest.fixture(scope="module")
def tiny():
    return tiny_model(vocab_size=WORDS.vocab_size, max_position_embeddings=4096), {}


def test_scores_by_hand():
    assert scores.f1("The Eiffel tower!", "an eiffel Tower in Paris") == pytest.approx(2 * 2 / (2 + 4))
    assert scores.f1("", "x") == 0 == scores.f1("the", "the")  # nothing is left of an article
    assert scores.exact("A  dog.", "the dog") == 1 and scores.exact("dogs", "dog") == 0
    assert scores.contains("It was LONDON.", "london") == 1
    classes = ["Number", "Number of people", "City"]
    assert (
        scores.classification("Number of people", "Number of people", classes) == 1
    )  # its part does not count
    assert scores.classification("City or Number", "City", classes) == 0.5
    assert scores.retrieval("Paragraph 3, not 4", "Paragraph 3") == 0.5 and scores.count("none", "3") == 0
    assert scores.code("```python\n# a comment\nx = 1\ny", "x = 1") == 1
    assert scores.code("x = 12", "x = 1") == round(100 * 2 * 5 / 11) / 100


def test_rouge_by_hand():
    pytest.importorskip("rouge_score")
    found = scores.rouge("the cat sat\non a mat", "the cat was\non the mat")
    # 4 of 6 words; pairs: "the cat" of 5; the longest common subsequence: the cat on mat.
    assert found["rouge1"] == pytest.approx(4 / 6) and found["rouge2"] == pytest.approx(1 / 5)
    assert found["rougeL"] == pytest.approx(4 / 6) and set(found) == set(scores.ROUGE)


def written(folder, *lines):
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def questions(folder, count=4):
    return written(
        folder,
        *[
            {
                "document": f"The key of room {i} is {['red', 'blue', 'green', 'grey'][i]}. {FILLER}",
                "question": f"What is the key of room {i}?",
                "answers": ["none of these", ["red", "blue", "green", "grey"][i]],
            }
            for i in range(count)
        ],
    )


def key_of(text):
    room = re.findall(r"key of room (\d)\?", text)[-1]
    found = re.findall(rf"key of room {room} is (\w+)", text)
    return f" It is {found[0]}" if found else " I do not know"


def test_who_reads_the_beginning_knows(monkeypatch, tiny, tmp_path):
    task = LongDocuments(questions(tmp_path), length=400)
    known = answered_by(monkeypatch, key_of, WORDS)
    result = task(*tiny, WORDS)
    assert result["mean"] == 100 and result["notes"][0].startswith("4 of 4 documents were cut")
    assert all(340 <= len(row) <= 400 - 50 for row in known.prompts)
    for row in known.prompts:  # both ends of the document are there, and the whole question
        text = WORDS.decode(row)
        assert text.startswith("Document:\nThe key of room") and re.search(r"room \d\?\n\nAnswer:$", text)
    answered_by(monkeypatch, key_of, WORDS, window=100)
    assert task(*tiny, WORDS)["mean"] == 0
    answered_by(monkeypatch, key_of, WORDS, window=400)
    assert task(*tiny, WORDS)["mean"] == 100
    for solve in (silent, copier):
        answered_by(monkeypatch, solve, WORDS)
        assert task(*tiny, WORDS)["mean"] == 0
    answered_by(monkeypatch, key_of, WORDS)
    strict = LongDocuments(questions(tmp_path), length=400, metric="exact")(*tiny, WORDS)
    f1 = LongDocuments(questions(tmp_path), length=400, metric="f1")(*tiny, WORDS)
    assert strict["mean"] == 0 and f1["mean"] == pytest.approx(100 * 2 / (3 + 1))
    assert "scores 50.0" in LongDocuments(questions(tmp_path)).finding({"a": f1})


def test_longbench_rows(monkeypatch, tiny, tmp_path):
    classes = {"all_classes": ["City", "Date"]}
    path = written(
        tmp_path,
        {"dataset": "hotpotqa", "context": "Passage: x", "input": "Who?", "answers": ["Ada", "Ada L."]},
        {"dataset": "trec", "context": "Q: a\nType: City", "input": "Type:", "answers": ["City"], **classes},
        {"dataset": "passage_count_e", "context": "p p", "input": "", "answers": ["1"], "length": 4000},
    )

    def solve(text):
        return " Ada" if "Who?" in text else " City\nDate" if "Type" in text else "1"

    known = answered_by(monkeypatch, solve, WORDS)
    result = LongDocuments(path, layout="longbench")(*tiny, WORDS)
    assert {cell["task"]: cell["score"] for cell in result["cells"]} == {
        "hotpotqa": 1,
        "trec": 1,
        "passage_count, 4-8k": 1,
    }
    assert result["table"]["all"] == 100 and len(known.prompts) >= 3
    assert (
        longbench.TASKS["qasper"].prompt.count("{context}")
        == 1
        == longbench.TASKS["lcc"].prompt.count("{context}")
    )
    with pytest.raises(UserError, match="row 1: 'duoreader' is not one of LongBench's tasks"):
        rows.read(written(tmp_path, {"dataset": "duoreader"}), "longbench", limit=None)


CHINESE = [  # (answer, expected, F1 and ROUGE-L): words cut by jieba 0.42.1, the formulas by hand
    ("答案是：北京市海淀区。", "北京海淀区", 0.333333, 0.25),
    ("公司2021年总资产为12.5%，GPT-4表现最好", "GPT-4在2021年表现最好，总资产为12.5%", 0.9, 0.416667),
    ("我不知道", "小明毕业于中国科学院", 0, 0),
    (
        "会议认为，要进一步加强对农村公路的养护管理，确保道路安全畅通。",
        "会议要求加强农村公路养护，确保道路畅通",
        0.636364,
        0.615385,
    ),
    ("AT&T和C++、a.b@c.com", "C++ AT&T", 0.444444, 0.153846),
]


def test_scores_of_chinese_are_over_words():
    pytest.importorskip("rjieba")
    pytest.importorskip("rouge_score")
    for answer, expected, f1, rouge_l in CHINESE:
        assert scores.f1_zh(answer, expected) == pytest.approx(f1, abs=1e-6)
        assert scores.rouge_l_zh(answer, expected) == pytest.approx(rouge_l, abs=1e-6)
    assert chinese.words("GPT-4 是OpenAI的") == ["GPT", "-", "4", " ", "是", "OpenAI", "的"]
    assert scores.retrieval("是段落7", "段落7") == 1 and scores.retrieval("段落1或段落7", "段落7") == 0.5


def test_chinese_needs_a_package_and_says_which(monkeypatch):
    monkeypatch.setitem(sys.modules, "rjieba", None)
    with pytest.raises(UserError, match="pip install rjieba"):
        scores.f1_zh("一", "一")


V1 = [  # one row of each kind of score: (task, question, answer)
    ("hotpotqa", "Who lives in the lighthouse?", "Ada Lovelace"),
    ("samsum", "Dialogue: Tim asks for bread", "Nobody has any flour left"),
    ("passage_count", "", "23"),
    ("passage_retrieval_en", "An abstract of paragraph seven", "Paragraph 7"),
    ("lcc", "", "return total"),
    ("trec", "Type of seven:", "City"),
    ("lsht", "新闻：七", "体育"),
    ("passage_retrieval_zh", "关于七", "段落7"),
    ("multifieldqa_zh", "谁住在灯塔里？", "小明祖母"),
    ("vcsum", "", "决定修建新桥梁"),
]


@pytest.mark.parametrize("layout", ["longbench", "longbench_v2", "gov_report"])
def test_every_score_has_its_scale(monkeypatch, tiny, tmp_path, layout):
    """Who knows has 100, who says nothing or repeats the prompt 0, in every kind of task."""
    pytest.importorskip("rouge_score")
    if layout == "longbench":
        missing = importlib.util.find_spec("rjieba") is None  # without it the two tasks that cut words are left out
        chosen = [row for row in V1 if not (missing and longbench.TASKS[row[0]].metric.endswith("_zh"))]
        made = [
            {"dataset": task, "context": f"context of {task}", "input": asked, "answers": [answer]}
            for task, asked, answer in chosen
        ]
        for row in made:
            row["all_classes"] = ["City", "Date"] if row["dataset"] == "trec" else ["体育", "经济"]
        marked = {f"context of {task}": f"\n{answer}\nmore" for task, _, answer in chosen}
        for task, _, answer in chosen:
            if not longbench.TASKS[task].first_line:
                marked[f"context of {task}"] = answer
    elif layout == "longbench_v2":
        choices = {f"choice_{letter}": letter.lower() for letter in "ABCD"}
        made = [{"context": f"text {i}.", "question": "Which?", "answer": "BD"[i], **choices} for i in range(2)]
        marked = {f"text {i}.": f"The correct answer is ({'BD'[i]})" for i in range(2)}
    else:
        made = [{"report": f"report {i}", "summary": f"Ducks swim, letter {'xy'[i]}."} for i in range(2)]
        marked = {f"report {i}": f"Ducks swim, letter {'xy'[i]}." for i in range(2)}
    task = LongDocuments(written(tmp_path, *made), layout=layout)

    def knows(text):
        return next(answer for mark, answer in marked.items() if mark in text)

    for solve, score in ((knows, 1), (silent, 0), (copier, 0)):
        answered_by(monkeypatch, solve, WORDS)
        cells = task(*tiny, WORDS)["cells"]
        found = {f"{cell['task']} {cell['metric']}": cell["score"] for cell in cells}
        if solve is copier and layout == "longbench":  # a similarity of letters, which no two lines lack
            assert found.pop("lcc code") < 0.3
        assert found == dict.fromkeys(found, score)
        assert len(cells) == {"longbench": len(made), "longbench_v2": 1, "gov_report": 4}[layout]


def test_longbench_v2_rows(monkeypatch, tiny, tmp_path):
    row = {
        "context": " A text. ",
        "question": "Which? ",
        "choice_A": "one",
        "choice_B": "two",
        "choice_C": "three",
    }
    row |= {"choice_D": "four", "answer": "C", "difficulty": "hard", "length": "short"}
    path = written(tmp_path, row, {**row, "answer": "A", "difficulty": "easy"})
    known = answered_by(monkeypatch, lambda text: "**The correct answer is (C)**", WORDS)
    result = LongDocuments(path, layout="longbench_v2")(*tiny, WORDS)
    assert result["table"] == {
        "all": 50,
        "easy, accuracy": 0,
        "hard, accuracy": 100,
        "short, accuracy": 50,
    }
    assert WORDS.decode(known.prompts[0]) == (
        "Please read the following text and answer the question below.\n\n<text>\nA text.\n</text>\n\nWhat is the"
        " correct answer to this question: Which?\nChoices:\n(A) one\n(B) two\n(C) three\n(D) four\n\nFormat your"
        ' response as follows: "The correct answer is (insert answer here)".'
    )


def test_summaries(monkeypatch, tiny, tmp_path):
    pytest.importorskip("rouge_score")
    path = written(tmp_path, {"report": FILLER, "summary": "Nothing happened on that day."})
    settings = []

    def solve(text):
        return " Nothing happened."

    known = answered_by(monkeypatch, solve, WORDS)
    monkeypatch.setattr(
        "lcx.evals.support.answers.sampler.generate",
        lambda *args, **given: settings.append(given) or known(*args, **given),
    )
    result = LongDocuments(path, layout="gov_report", document=50)(*tiny, WORDS)
    assert settings[0]["temperature"] == 0.5 and settings[0]["top_p"] == 0.95
    assert settings[0]["max_new_tokens"] == 1000 and len(known.prompts[0]) < 50 + 30
    assert result["table"]["gov_report, rouge1"] == pytest.approx(round(100 * 2 * 2 / (2 + 5), 2))


@pytest.mark.parametrize(
    ("line", "layout", "found"),
    [
        ("[1", "qa", "row 0: JSONDecodeError"),
        ('{"question": "a"}', "qa", "row 1: KeyError"),
        ('{"document": "a", "question": "b", "answers": []}', "qa", "at least one answer"),
        ('{"document": 3, "question": "b", "answers": ["x"]}', "qa", "needs a text"),
        ("3", "longbench", "row 1: AttributeError"),
        ("", "qa", "holds no row"),
    ],
)
def test_files_that_are_no_rows(tmp_path, line, layout, found):
    (tmp_path / "rows.jsonl").write_text(line)
    with pytest.raises(UserError, match=found):
        rows.read(str(tmp_path / "rows.jsonl"), layout, limit=None)


def test_settings_that_cannot_be(tiny, tmp_path):
    for settings, found in (
        ({"layout": "xml"}, "layout is 'xml'"),
        ({"metric": "bleu"}, "metric is 'bleu'"),
        ({"samples": 0}, "samples is 0"),
        ({"model_template": "x"}, "task_template"),
    ):
        with pytest.raises(UserError, match=found):
            LongDocuments("x", **settings)
    with pytest.raises(UserError, match="No such file"):
        LongDocuments("nowhere.jsonl")(*tiny, WORDS)
    with pytest.raises(UserError, match="leaves no room for its document"):
        LongDocuments(questions(tmp_path), length=70)(*tiny, WORDS)
    with pytest.raises(UserError, match="leave no room for a prompt"):
        LongDocuments(questions(tmp_path), length=40)(*tiny, WORDS)


def test_fine_tuning_on_summaries_masks_the_prompt(tmp_path):
    """The prompt is that of the evaluation, both are cut as published, and only the summary and its end have a loss."""
    (tmp_path / "folder").mkdir()
    write_tokenizer(tmp_path / "folder")
    path = written(tmp_path, *({"report": f"{i} {FILLER}", "summary": f"S{i}. " * 9} for i in range(3)))
    out = tmp_path / "conversations.jsonl"
    command = [sys.executable, "scripts/gov_report_data.py", f"--input={path}", f"--tokenizer={tmp_path}/folder"]
    command += [f"--output={out}", "--report_tokens=50", "--summary_tokens=10"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "3 reports with summaries, 3 of them cut" in done.stderr, done.stderr
    dataset = Dataset(
        str(out),
        tokenizer=str(tmp_path / "folder"),
        chat=True,
        chat_template=str(ROOT / "configs" / "extend" / "plain.jinja"),
        eval_fraction=0.0,
        cache_dir=str(tmp_path / "cache"),
    )
    tokenizer = dataset.load_tokenizer()
    ids, mask = next(iter(dataset.documents("train")))
    prompt, _ = rows.prompt(rows.read(path, "gov_report", limit=1)[0], tokenizer, room=10**6, document=50)
    assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
    assert tokenizer.decode(ids[~mask][1:].tolist()) == prompt and prompt.startswith("Read the following article")
    assert tokenizer.decode(ids[mask][:-1].tolist()) == " S0. S0. S0"
