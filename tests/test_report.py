"""The report: well-formed and self-contained, whatever the results hold; the plots' colours, lines and labels."""

import base64
import html
import html.parser
import json
import re

import pytest

from lcx import report
from lcx.checkpoint import model_json
from lcx.errors import UserError
from lcx.evals.loss_by_position import LossByPosition, doubling
from lcx.evals.passkey import Passkey
from lcx.evals.perplexity import Perplexity
from lcx.reporting import differences, pictures

VOID = {"meta", "img", "source", "br", "link"}


class Page(html.parser.HTMLParser):
    """Collects what a page holds and fails on tags that do not nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tables, self.headings, self.pictures, self.words = [], [], [], [], []
        self.urls, self.tags = [], set()
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        values = dict(attrs)
        self.urls += [values[name] for name in ("src", "srcset", "href", "data", "action") if name in values]
        if tag == "img":
            self.pictures.append(values)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1].append(data)
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)


def facts(rope="default", **more):
    kind = rope.split()[0]
    return {
        "rope": rope,
        "rope_type": kind,
        "window": 1024,
        "original_window": 256,
        "num_params": 803_000,
        **more,
    }


def by_position(rope, losses):
    """A result of LossByPosition whose loss at 0-128, 128-256, ... is given."""

    def bucket(start, end):
        which = next(i for i, (_, stop) in enumerate(doubling(1024, 128)) if start < stop)
        return {"start": start, "end": end, "nll": losses[which], "standard_error": 0.02, "tokens": 9}

    buckets = [bucket(*edges) for edges in doubling(1024, 128)]
    return {
        "definition": f"how {rope} was measured",
        "summary": "losses",
        "table": {f"{b['start']}-{b['end']}": b["nll"] for b in buckets},
        "model": facts(rope),
        "unit": "nats per byte",
        "lengths": [
            {"length": 1024, "buckets": buckets, "curve": [bucket(*e) for e in doubling(1024, 8, 4)]}
        ],
        "evaluation": model_json.to_json(LossByPosition()),
    }


def perplexities(rope, values):
    return {
        "definition": "sliding",
        "summary": "ppl",
        "table": {f"window {w}": v for w, v in values.items()},
        "model": facts(rope),
        "unit": "per byte",
        "windows": [{"window": w, "perplexity": v} for w, v in values.items()],
        "evaluation": model_json.to_json(Perplexity()),
    }


def passkeys(rope, rates):
    rows = [
        {"k": 30 * (i + 1), "rate": rate, "wilson_low": max(0, rate - 0.2), "wilson_high": min(1, rate + 0.2)}
        for i, rate in enumerate(rates)
    ]
    common = {
        "definition": "passkey",
        "summary": "found",
        "table": {"k_max (tokens)": 300},
        "model": facts(rope),
    }
    return common | {
        "k_max": 300,
        "threshold": 0.2,
        "distances": rows,
        "evaluation": model_json.to_json(Passkey()),
    }


def write_run(folder, name, evaluations, **more):
    folder.mkdir()
    run = {
        "name": name,
        "checkpoint": f"runs/{name}",
        "model": facts(),
        "evaluations": evaluations,
        "errors": {},
    }
    (folder / "results.json").write_text(json.dumps(run | more))
    return str(folder)


@pytest.fixture
def runs(tmp_path):
    losses = {
        "unscaled": ("default", [1.4, 1.24, 2.0, 3.2]),
        "PI x4": ("linear x4", [2.9] * 4),
        "YaRN x4": ("yarn x4", [1.57, 1.55, 1.62, 1.6]),
        "YaRN x4, tuned": ("yarn x4", [1.43, 1.27, 1.35, 1.3]),
    }
    return [
        write_run(tmp_path / f"run{i}", name, {"loss_by_position": by_position(*made)})
        for i, (name, made) in enumerate(losses.items())
    ]


@pytest.fixture
def blank(monkeypatch):
    """Empty pictures, where a test is about something else: drawing costs most of the time of a report."""
    monkeypatch.setattr(pictures, "picture", lambda draw, **kind: b"\x89PNG")


def test_an_evaluation_without_any_result_is_reported(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    results = {"name": "run", "evaluations": {}, "errors": {"passkey": "too short"}}
    (path / "results.json").write_text(json.dumps(results))
    text = report.build(results=[str(path)], output=str(tmp_path / "out")).read_text()
    assert "“run” is evaluated, but no evaluation has a result." in text and "1 evaluation failed: see below." in text


def test_the_page_is_well_formed_and_self_contained(runs, tmp_path):
    path = report.build(results=runs, output=str(tmp_path / "out"), title="A <b>title</b>")
    text = path.read_text()
    page = Page(text)
    assert "script" not in page.tags and "link" not in page.tags and not re.search(r"https?:|url\(", text)
    assert len(set(page.urls)) == 4  # wide and narrow, light and dark
    assert all(url.startswith("data:image/svg+xml;base64,") for url in page.urls)
    widths = [
        re.search(rb'width="([\d.]+)pt"', base64.b64decode(url.partition(",")[2]))[1] for url in page.urls
    ]
    assert [round(float(width) / 72, 2) for width in widths] == [3.72, 3.72, 9, 9]  # 3.72 in are 358 pixels
    assert all(picture["alt"] for picture in page.pictures)
    assert page.headings == ["A <b>title</b>", "Loss by position", "Models", "Origin"]
    assert "prefers-color-scheme: dark" in text
    assert (tmp_path / "out" / "loss_by_position.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["loss_by_position.png", "report.html"]


@pytest.mark.usefixtures("blank")
def test_the_table_holds_the_numbers(runs, tmp_path):
    page = Page(report.build(results=runs, output=str(tmp_path / "out")).read_text())
    table = page.tables[0]
    assert table[0] == ["model", "0-128", "128-256", "256-512", "512-1024"]
    assert table[1] == ["unscaled", "1.400", "1.240", "2.000", "3.200"]
    assert [row[0] for row in table[1:]] == ["unscaled", "PI x4", "YaRN x4", "YaRN x4, tuned"]
    assert all(len(row) == len(rows[0]) for rows in page.tables for row in rows)
    assert page.tables[1][1][:4] == ["unscaled", "803,000", "default", "256"]
    assert any("how linear x4 was measured" in words for words in page.words)


def axes_of(task, results):
    """What the task draws, on real axes."""
    drawn = []

    def draw(axes):
        task.plot(axes, results)
        drawn.append(axes)

    assert report.picture(draw).startswith(b"\x89PNG")
    return drawn[0]


def test_the_wall_plot(runs):
    found = report.labelled([report.read_results(run) for run in runs])
    results = {label: run["evaluations"]["loss_by_position"] for label, run in found.items()}
    axes = axes_of(LossByPosition(), results)
    title = axes.get_title(loc="left")
    assert title == "At positions 512–1024: unscaled 3.20, YaRN x4, tuned 1.30 nats per byte"
    assert axes.get_ylabel() == "loss (nats per byte)" and "tokens" in axes.get_xlabel()
    assert axes.get_xscale() == "log"
    assert [line.get_xdata()[0] for line in axes.lines if len(set(line.get_xdata())) == 1] == [256]
    assert any("trained window: 256" in note.get_text() for note in axes.texts)
    # From top to bottom as the lines end, and outside of the data.
    legend = axes.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [
        "unscaled",
        "PI x4",
        "YaRN x4",
        "YaRN x4, tuned",
    ]
    assert legend.get_window_extent().x0 > axes.get_window_extent().x1
    curves = {line.get_label(): line for line in axes.lines}
    assert curves["YaRN x4"].get_color() == curves["YaRN x4, tuned"].get_color()
    assert curves["YaRN x4"].get_linestyle() == "--" and curves["YaRN x4, tuned"].get_linestyle() == "-"
    assert (
        max(curves["unscaled"].get_ydata()) == pytest.approx(3.2)
        and min(curves["unscaled"].get_xdata()) >= 32
    )


# ------------------------------------------------------------------------------------------------ training curves


@pytest.mark.usefixtures("blank")
def test_training_curves_of_workdirs(runs, tmp_path):
    work = tmp_path / "pretrain"
    work.mkdir()
    lines = [{"step": s, "loss": 5 / s, "tokens_per_second": 900.0} for s in (1, 2, 4, 8)]
    text = "\n".join(
        json.dumps(line) for line in [*lines, {"step": 4, "loss": 1.0}, {"step": 8, "eval_loss": 0.7}]
    )
    (work / "metrics.jsonl").write_text(text + '\n{"step": 9, "lo')  # cut short by a kill
    ladder = tmp_path / "ladder"
    for stage in ("512/round_0", "512/round_1"):
        (ladder / stage).mkdir(parents=True)
        (ladder / stage / "metrics.jsonl").write_text(
            '{"step": 1, "loss": "NaN"}\n{"step": 2, "loss": 2.5}\n'
        )
    curves = report.read_curves(str(work)) | report.read_curves(str(ladder))
    assert list(curves) == ["pretrain", "ladder/512/round_0", "ladder/512/round_1"]
    assert [(line["step"], line["loss"]) for line in curves["pretrain"]] == [
        (1, 5),
        (2, 2.5),
        (4, 1),
        (8, 0.625),
    ]
    page = Page(
        report.build(results=runs, output=str(tmp_path / "out"), workdir=[str(work), str(ladder)]).read_text()
    )
    assert page.headings[2] == "Training" and (tmp_path / "out" / "training_loss.png").is_file()
    assert page.tables[1][1] == ["pretrain", "8", "0.625", "0.700", "900.000"]
    with pytest.raises(UserError, match="no metrics.jsonl .*--workdir"):
        report.read_curves(str(tmp_path / "out"))
    (tmp_path / "out" / "metrics.jsonl").write_text('{"step"')
    with pytest.raises(UserError, match="metrics.jsonl has no line of a step.*--workdir"):
        report.read_curves(str(tmp_path / "out"))


# ------------------------------------------------------------------------------------------------ odd inputs


def test_a_training_run_has_the_name_and_colour_of_its_model(runs, tmp_path, monkeypatch):
    work = tmp_path / "work"
    work.mkdir()
    (work / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    made = {"loss_by_position": by_position("linear x4", [1.0] * 4)}
    tuned = write_run(tmp_path / "t", "tuned", made, checkpoint=str(work), model=facts("linear x4"))
    drawn = []
    plain = pictures.picture
    monkeypatch.setattr(
        pictures, "picture", lambda draw, **kind: plain(lambda a: (draw(a), drawn.append(a)), **kind)
    )
    page = Page(
        report.build(results=[*runs, tuned], output=str(tmp_path / "out"), workdir=[str(work)]).read_text()
    )
    assert page.tables[1][1][:3] == ["tuned", "2", "1.000"]
    wall, curve = drawn[0], drawn[5]
    colour = next(line.get_color() for line in wall.lines if line.get_label() == "tuned")
    assert [line.get_color() for line in curve.lines] == [colour]


@pytest.mark.usefixtures("blank")
def test_names_are_text_and_may_come_twice(tmp_path):
    nasty = '<script>alert("1")</script>'
    made = by_position("default", [1.0, 1, 1, 1])
    folders = [write_run(tmp_path / n, nasty, {"loss_by_position": made}) for n in ("a", "b")]
    page = Page(report.build(results=folders, output=str(tmp_path / "out")).read_text())
    assert "script" not in page.tags
    assert [row[0] for row in page.tables[0][1:]] == [nasty, f"{nasty} (2)"]


def test_results_that_differ_in_what_they_hold(tmp_path):
    """Other buckets, another task, a task that failed, one whose class is gone: the rest is shown all the same."""
    short = by_position("default", [1.0, 2.0, 3.0, 4.0])
    short["table"] = {"0-100": 1.0}
    gone = {"definition": "?", "summary": "?", "table": {"score": 0.5}, "model": facts(), "evaluation": None}
    other = gone | {"evaluation": {"class": "somebody.elses:Task"}}
    folders = [
        write_run(tmp_path / "a", "a", {"loss_by_position": by_position("yarn x4", [1.0] * 4), "mine": gone}),
        write_run(
            tmp_path / "b",
            "b",
            {"loss_by_position": short, "theirs": other},
            errors={"passkey": "<too short>"},
        ),
    ]
    page = Page(report.build(results=folders, output=str(tmp_path / "out")).read_text())
    assert page.headings == ["Evaluation", "Failed", "Loss by position", "Mine", "Theirs", "Models", "Origin"]
    assert page.tables[0][0] == ["model", "0-128", "128-256", "256-512", "512-1024", "0-100"]
    assert page.tables[0][2] == ["b", *["–"] * 4, "1.000"]
    assert len(page.pictures) == 1 and any("No plot" in words for words in page.words)
    assert any("<too short>" in words for words in page.words)


def test_bad_input_is_one_line(runs, tmp_path):
    with pytest.raises(UserError, match="nothing to report: set --results .* --workdir"):
        report.build(output=str(tmp_path / "out"))
    with pytest.raises(UserError, match="no results.json at .*lcx.evaluate"):
        report.build(results=[str(tmp_path)], output=str(tmp_path / "out"))
    (tmp_path / "results.json").write_text('{"name": "cut sho')
    with pytest.raises(UserError, match="not a readable evaluation result"):
        report.build(results=[str(tmp_path)], output=str(tmp_path / "out"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to .*--output"):
        report.build(results=runs, output=str(tmp_path / "file" / "out"))


@pytest.mark.usefixtures("blank")
def test_command_line(runs, tmp_path, capsys):
    arguments = [
        "--results",
        *runs[:2],
        f"--results={runs[2]}",
        f"--output={tmp_path / 'out'}",
        "--title=Mine",
    ]
    assert report.main(arguments) == 0
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert page.headings[0] == "Mine" and len(page.tables[0]) == 4
    assert report.main([*arguments[:-2], arguments[-2]]) == 2  # not without asking
    assert "exists: choose another --output, or replace it with --overwrite" in capsys.readouterr().err
    assert report.main([*arguments[:-1], "--title=Other", "--overwrite"]) == 0
    assert Page((tmp_path / "out" / "report.html").read_text()).headings[0] == "Other"
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "loss_by_position.png").write_text("somebody's")
    with pytest.raises(UserError, match=r"loss_by_position.png exists"):
        report.build(results=runs, output=str(tmp_path / "plots"))
    assert [file.name for file in (tmp_path / "plots").iterdir()] == ["loss_by_position.png"]
    assert report.main(["--results", str(tmp_path / "nowhere"), f"--output={tmp_path / 'o'}"]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: no results.json")


# ------------------------------------------------------------------------------------------------ words


def opening(path):
    """The paragraphs at the top of a page."""
    return re.findall(
        r"<p>(.*?)</p>", html.unescape(re.search(r'class="lead">(.*?)</div>', path.read_text())[1])
    )


@pytest.mark.usefixtures("blank")
def test_the_first_sentence_says_what_was_compared_and_found(runs, tmp_path):
    first, remarks = opening(report.build(results=runs, output=str(tmp_path / "out")))
    assert first == (
        "4 models are compared by loss by position: at positions 512–1024, “YaRN x4, tuned” has the lowest loss,"
        " 1.30 ± 0.04 nats per byte; “unscaled” has the highest, 3.20 ± 0.04 nats per byte. Within the window of"
        " pretraining, at positions 128–256, “unscaled” has the lowest loss, 1.24 ± 0.04 nats per byte"
        " (“YaRN x4, tuned” cannot be told apart from it); “YaRN x4, tuned” has 1.27 ± 0.04; “PI x4” has the highest,"
        " 2.90 ± 0.04 nats per byte."
    )
    assert (
        "95% interval" in remarks and "not measured in the same way every time" in remarks
    )  # by_position words it by model


def test_the_winner_at_length_shows_its_price_within_the_window(tmp_path):
    found = LossByPosition().finding(
        {"base": by_position("default", [1.4, 1.2, 2.0, 3.2]), "long": by_position("yarn x4", [1.5, 1.5, 1.5, 1.4]),
         "pi": by_position("linear x4", [2.0, 2.0, 2.0, 2.0])}
    )  # fmt: skip
    assert "“long” has the lowest loss, 1.40" in found and "“base” has the lowest loss, 1.20" in found
    assert found.index("“long” has 1.50 ± 0.04") > found.index("Within the window")


def test_differences_within_the_uncertainty_are_no_finding():
    close = {name: by_position("default", [1.0, 1.0, 1.0, last]) for name, last in (("a", 1.5), ("b", 1.54))}
    found = LossByPosition().finding(close)
    assert found.startswith(
        "at positions 512–1024, no difference in loss is established (within the uncertainty)"
    )
    assert "cannot be told apart" not in found and "lowest" not in found
    one = by_position("default", [1.0, 1.0, 1.0, 1.5])
    for entry in one["lengths"]:
        for bucket in entry["buckets"]:
            bucket["standard_error"] = None
    assert "the uncertainty is not known" in LossByPosition().finding({"a": one, "b": close["b"]})


def test_passkeys_of_two_models_differ_prompt_by_prompt():
    """The same prompts at the same distances; without the answers one by one, as older files, there is no row."""

    def runs(*found):
        made = {}
        for name, answers in zip("ab", found):
            result = passkeys("default", [0.0] * len(answers))
            for row, own in zip(result["distances"], answers):
                row["scores"] = own
            made[name] = {"evaluations": {"passkey": result}}
        return made

    row, *more = differences.found(runs([[1, 1], [0, 0]], [[1, 1], [1, 0]]))
    assert (row["difference"], row["samples"], row["found"], more) == ("+25 %", 4, "no", [])
    assert not list(differences.found(runs([[1, 1]], [[1, 1], [1, 0]])))
    assert not list(differences.found(runs([[], []], [[], []])))


def test_one_model_by_itself():
    result = by_position("default", [1.4, 1.24, 2.0, 3.2])
    result["model"]["window"] = 256
    assert LossByPosition().finding({"a": result}) == (
        "1.24 ± 0.04 nats per byte at positions 128–256, the last of its window of 256 tokens, and 3.20 ± 0.04 at"
        " 512–1024, beyond it: worse by 1.96"
    )
    result["model"]["window"] = 1024
    assert (
        LossByPosition()
        .finding({"a": result})
        .endswith("nothing was measured beyond its window of 1024 tokens")
    )
    ppl = perplexities("default", {64: 2.0, 256: 40.0})
    ppl["windows"][1]["standard_error"] = 0.01
    assert Perplexity().finding({"a": ppl}) == (
        "2.00 with a window of 64, 40.00 ± 0.78 with a window of 256 (per byte)"
    )


def test_other_tokens_are_not_compared():
    one, other = (by_position("default", [1.0] * 4) | {"tokenizer_id": name} for name in "xy")
    assert "cannot be compared" in LossByPosition().finding({"a": one, "b": other})
    assert "cannot be compared" not in LossByPosition().finding({"a": one, "b": one})


def write_log(folder, losses, held_out=()):
    folder.mkdir()
    lines = [{"step": step, "loss": loss} for step, loss in losses]
    lines += [{"step": step, "eval_loss": loss} for step, loss in held_out]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


@pytest.mark.usefixtures("blank")
def test_a_single_training_run(tmp_path):
    losses = [(step, 1 + 100 / step) for step in range(100, 121)]
    work = write_log(tmp_path / "run", losses, held_out=[(110, 1.8), (120, 1.9)])
    path = report.build(workdir=[work], output=str(tmp_path / "out"))
    page = Page(path.read_text())
    assert page.headings == ["Training", "Training"] and page.tables[0][1][:4] == [
        "run",
        "120",
        "1.833",
        "1.900",
    ]
    assert opening(path) == [
        "One training run: over steps 100 to 120 of “run”, the loss went from 2.000 to 1.837 ± 0.005 (spread of its"
        " last 2 log lines); on held-out data it is 1.900 at step 120, after a lower 1.800 at step 110."
    ]
    with pytest.raises(UserError, match="--workdir names .*/run/ twice, expected different folders"):
        report.build(workdir=[f"{work}/", work], output=str(tmp_path / "both"))
    for title in ("two\nlines", " "):
        with pytest.raises(UserError, match="--title is .*, expected one line of text"):
            report.build(workdir=[work], output=str(tmp_path / "both"), title=title)
    (tmp_path / "other").mkdir()
    again = write_log(tmp_path / "other" / "run", losses, held_out=[(110, 1.8), (120, 1.9)])
    twice = opening(report.build(workdir=[work, again], output=str(tmp_path / "both")))
    assert twice[0].startswith(
        "2 training runs are compared: the last losses are: “run” 1.900 on held-out data"
    )
    assert "“run (2)”" in twice[0]
    bad = write_log(tmp_path / "bad", [(1, "NaN"), (2, 2.0)])
    assert (
        "1 logged loss is not finite"
        in opening(report.build(workdir=[bad], output=str(tmp_path / "o")))[0]
    )
