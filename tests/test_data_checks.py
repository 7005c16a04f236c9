"""Quality checks against brute force and against documents made to fail one check each."""

import subprocess
import sys

import numpy as np
import pytest
from own_output import own_lines

from lcx.data import ByteTokenizer, Dataset, check_documents, is_truncated, repetition
from lcx.data.markers import MarkerCounter

TOKENIZER = ByteTokenizer()


def brute_force_repetition(tokens, window):
    shares = [
        float(np.mean(tokens[i : i + window] == tokens[i + window : i + 2 * window]))
        for i in range(len(tokens) - 2 * window + 1)
    ]
    return max(shares, default=0.0)


@pytest.mark.parametrize("window", [1, 2, 7, 50])
@pytest.mark.parametrize("alphabet", [2, 4, 200])
def test_repetition_equals_brute_force(window, alphabet):
    rng = np.random.default_rng(window * alphabet)
    for length in [0, 1, 2 * window - 1, 2 * window, 2 * window + 1, 300, 777]:
        tokens = rng.integers(0, alphabet, length)
        if length > 250:  # a repeated passage in the middle, with some noise
            tokens[100:250] = np.resize(tokens[100 : 100 + window], 150)
            noise = rng.random(150) < 0.15
            tokens[100:250][noise] = rng.integers(0, alphabet, noise.sum())
        assert repetition(tokens, window=window) == pytest.approx(
            brute_force_repetition(tokens, window), abs=1e-12
        )


def document(text):
    return TOKENIZER.encode(text)


def sentences(count, seed=0):
    rng = np.random.default_rng(seed)
    words = ["".join(chr(97 + c) for c in rng.integers(0, 26, 6)) for _ in range(400)]
    return " ".join(" ".join(rng.choice(words, 8)) + "." for _ in range(count))


def test_each_problem_is_counted_and_the_first_ten_are_shown():
    good = [(f"good{i}", document(sentences(40, i))) for i in range(3)]
    repetitive = [
        (f"loop{i}", document(sentences(10, i) + "abcde" * 200 + sentences(10, i))) for i in range(4)
    ]
    short = [(f"short{i}", document("Too short.")) for i in range(9)]
    cut = [("cut", document(sentences(40) + " and then the"))]
    both = [("both", document("short and cut"))]
    report = check_documents([*good, *repetitive, *short, *cut, *both], tokenizer=TOKENIZER, min_length=1000)
    assert report.counts == {"too short": 10, "repetitive": 4, "truncated": 2}
    assert (report.num_documents, report.num_flagged, report.ok) == (18, 15, False)
    assert [issue.document for issue in report.issues] == [f"loop{i}" for i in range(4)] + [
        f"short{i}" for i in range(6)
    ]
    assert "10 too short, 4 repetitive, 2 truncated" in str(report) and str(report).count("\n") == 10
    assert check_documents(good, tokenizer=TOKENIZER, min_length=1000).ok


def test_threshold_is_exclusive():
    rng = np.random.default_rng(0)
    tokens = rng.permutation(1000)[:100]
    tokens[50:90] = tokens[:40]  # 40 of 50: exactly 0.8
    assert repetition(tokens) == 0.8

    class Numbers:
        def decode(self, ids):
            return "."

    arguments = {"tokenizer": Numbers(), "min_length": 1}
    assert check_documents([("a", tokens)], **arguments).ok
    tokens[90] = tokens[40]
    assert not check_documents([("a", tokens)], **arguments).ok


@pytest.mark.parametrize(
    ("text", "cut"), [("End.", 0), ("End!", 0), ("End?", 0), ("End\n", 0), ("En", 1), ("End,", 1)]
)
def test_truncation_looks_at_the_end(text, cut):
    assert is_truncated(document("Some text. " + text), tokenizer=TOKENIZER) == bool(cut)
    assert is_truncated(np.append(document(text), 257), tokenizer=TOKENIZER) == bool(cut)  # EOS is no text


ENDS_WELL = [
    'He said "yes."', "\u201cYes!\u201d", "Yes.)", "(Yes.)]", "\u2018Yes.\u2019 ", "Ja.\u00ab", "\u201eJa.\u201c",
    "**End.**", "_End?_", "`x`.", "He waited\u2026", 'It was "nice". ', "a\u00a0!", "x = 1\n```", "~~~\nx\n~~~ ",
    "\u597d\u3002", "\u300c\u597d\u3002\u300d", "\u597d\uff01", "\u597d\uff1f\uff09", "\u0639\u0631\u0628\u061f",
    "\u0627\u0631\u062f\u0648\u06d4", "\u0939\u093f\u0928\u094d\u0926\u0940\u0964", "Yes.[12]", "Yes.\u00b9",
    "<b>Yes.</b><br>", "Yes.\u27e9", "Yes.\ufeff", "Yes.\u200b", "No.\u2014", "Yes.<|eot_id|>", 'Yes.&quot;',
]  # fmt: skip
CUT = [
    "He said",
    'He said "yes"',
    "and,",
    "(and",
    "```\nx = 1",
    "\u597d\uff0c",
    "end;",
    "",
    "x```",
    "the \u201c",
    "a.b",
    "the [12]",
    "a</p>",
    "a<|eot_id|>",
]


@pytest.mark.parametrize(("text", "well"), [*((t, True) for t in ENDS_WELL), *((t, False) for t in CUT)])
def test_a_sentence_may_end_in_what_closes(text, well):
    assert is_truncated(document("Some. " + text if text else text), tokenizer=TOKENIZER) != well


def test_real_stories_are_rarely_cut(reference, tmp_path):
    """Of them 23 end in the middle of a sentence; by the full stop alone it would be some hundred."""
    source = str(reference / "data" / "text" / "tinystories_train_2MiB.txt")
    report = Dataset(source, separator="<|endoftext|>", cache_dir=str(tmp_path)).check(min_length=1)
    assert report.counts["truncated"] == 23 and not report.markers


@pytest.mark.parametrize(
    "marker", ["<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "<|EndOfDoc|>", "<eod>", "<|return|>"]
)
def test_markers_in_the_text_are_reported(tmp_path, caplog, marker):
    (tmp_path / "a.txt").write_text(f"One story.\n{marker}\nTwo.\n{marker}\n")
    (tmp_path / "b.txt").write_text("A < b, and <b>c</b>.\n")
    joined = Dataset(str(tmp_path / "*.txt"), cache_dir=str(tmp_path / "cache"))
    report = joined.check(min_length=1)
    assert report.markers == ((marker, 1),) and not report.ok
    assert f"{marker!r} in 1 document; set Dataset.separator" in str(report)
    divided = Dataset(str(tmp_path / "*.txt"), separator=marker, cache_dir=str(tmp_path / "cache"))
    assert divided.check(min_length=1).ok
    joined.open()
    said = [line for line in caplog.messages if "markers of" in line]  # once, although it was opened twice
    assert len(said) == 1 and f"{marker!r} in 1 document; set Dataset.separator" in said[0]


def test_the_tokenizers_own_end_is_a_marker():
    counter = MarkerCounter(eos_id=7)
    counter.add("One. <done> Two.", np.array([1, 7, 2]))
    counter.add("[1] a <b> <|x|> <endless> <|endX", np.array([1, 2]))
    assert counter.counts == {"EOS token 7": 1}


def test_from_the_command_line(tmp_path):
    (tmp_path / "a.txt").write_text(sentences(300))
    command = [sys.executable, "-m", "lcx.data"]
    environment = {"LCX_CACHE": str(tmp_path / "cache"), "PATH": ""}

    def run(name, *arguments):
        source = f"--source={tmp_path / name}"
        return subprocess.run([*command, source, *arguments], capture_output=True, text=True, env=environment)

    good = run("a.txt")
    assert good.returncode == 0 and good.stdout.startswith("1 document, 0 with a problem")
    short = run("a.txt", "--min_length=1000000")
    assert short.returncode == 1 and "1 too short" in short.stdout
    typo = run("b.txt")
    assert typo.returncode == 2 and len(own_lines(typo.stderr)) == 1 and "did you mean" in typo.stderr


def test_real_novels(reference, tmp_path):
    source = str(reference / "data" / "text" / "novels" / "*.txt")
    report = Dataset(source, cache_dir=str(tmp_path)).check()
    assert report.num_documents == 12 and report.counts["too short"] == 0
