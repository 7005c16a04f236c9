"""Sequence likelihoods and variant effects against log-softmax of the model's logits, one sequence at a time."""

import gzip
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcx
from lcx.data import ByteTokenizer
from lcx.data.nucleotides import reverse_complement
from lcx.errors import UserError
from lcx.evals.sequence_likelihood import SequenceLikelihood
from lcx.evals.support import dna, shared_prefixes
from lcx.evals.support.intervals import auroc
from lcx.evals.support.variants import Variant, read_variants, windows_around
from lcx.evals.variant_effects import VariantEffects
from lcx.model import init_params, llama
from lcx.striped_hyena import striped_hyena

DNA = ByteTokenizer(bos_id=None, eos_id=0, vocab_size=512)
rng = np.random.default_rng(0)
LONG = "".join(rng.choice(list("ACGT"), 300))
FASTA = f">one first\nACGTnnac\nGGT\n>empty\n>single\nA\n>long\n{LONG}\n"


@pytest.fixture(scope="module")
def tiny():
    model = llama(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=48,
        num_layers=1,
        num_heads=2,
        max_position_embeddings=128,
    )
    return model, jax.tree.map(lambda x: x * 3, init_params(model, jax.random.key(0)))


@pytest.fixture
def fasta(tmp_path):
    path = tmp_path / "some.fa"
    path.write_text(FASTA)
    return str(path)


def log_likelihoods(model, params, text, bos=None):
    """log p of each letter after the first token."""
    ids = np.array(([] if bos is None else [bos]) + list(text.encode()), np.int32)
    logits = lcx.logits(model, params, jnp.asarray(np.pad(ids, (0, 128 - len(ids)))[None]))[0]
    return np.asarray(jax.nn.log_softmax(logits))[np.arange(len(ids) - 1), ids[1:]]


def test_every_record_has_its_likelihood(tiny, fasta):
    result = SequenceLikelihood(fasta)(*tiny, DNA)
    rows = {row["name"].split(":")[1]: row for row in result["sequences"]}
    assert list(rows) == ["one", "empty", "single", "long"]
    expected = log_likelihoods(*tiny, "ACGTNNACGGT")
    assert rows["one"]["log_likelihood"] == pytest.approx(expected.sum(), rel=1e-5)
    assert rows["one"]["mean_log_likelihood"] == pytest.approx(expected.mean(), rel=1e-5)
    assert rows["one"] | {"log_likelihood": 0, "mean_log_likelihood": 0, "name": ""} == {
        "name": "", "length": 11, "scored": 10, "log_likelihood": 0, "mean_log_likelihood": 0,
        "ambiguous": 2, "lower_case": 4,
    }  # fmt: skip
    for name, length in (("empty", 0), ("single", 1)):
        assert rows[name]["log_likelihood"] is None and rows[name]["length"] == length
    # 300 letters through windows of 128, half overlapping: each letter once, with at least 64 before it.
    pieces = [log_likelihoods(*tiny, LONG[i : i + 128]) for i in (0, 64, 128, 192)]
    new = [pieces[0], *(piece[63:] for piece in pieces[1:3]), pieces[3][63:]]
    assert rows["long"]["scored"] == 299
    assert rows["long"]["log_likelihood"] == pytest.approx(np.concatenate(new).sum(), rel=1e-5)
    json.dumps(result, allow_nan=False)
    assert not any("expected DNA" in note for note in result["notes"])
    pathlib.Path(fasta).write_text(">protein\nMKVLLEFYWHR\n" + FASTA)
    notes = SequenceLikelihood(fasta)(*tiny, DNA)["notes"]
    assert any("are most of 1 of 5 sequences" in note and "protein" in note for note in notes)


def test_bos_lower_case_and_both_strands(tiny, fasta):
    with_bos = ByteTokenizer(vocab_size=512)
    rows = SequenceLikelihood(fasta, upper_case=False, both_strands=True)(*tiny, with_bos)["sequences"]
    forward = log_likelihoods(*tiny, "ACGTnnacGGT", bos=256)
    backward = log_likelihoods(*tiny, "ACCgtnnACGT", bos=256)
    assert rows[0]["scored"] == 11
    assert rows[0]["log_likelihood"] == pytest.approx((forward.sum() + backward.sum()) / 2, rel=1e-5)
    assert rows[2]["log_likelihood"] == pytest.approx(
        (log_likelihoods(*tiny, "A", bos=256) + log_likelihoods(*tiny, "T", bos=256)).item() / 2, rel=1e-5
    )


def test_reverse_complement_is_its_own_inverse():
    text = "ACGTRYKMSWBDHVNacgtn*"
    assert reverse_complement("AACGR") == "YCGTT"
    assert reverse_complement(reverse_complement(text)) == text


def test_variants(tiny, fasta, tmp_path):
    """A substitution, an insertion, a deletion; near the ends and in the middle; two alternatives in one line."""
    at = 150
    flip = {"A": "C", "C": "A", "G": "T", "T": "G"}[LONG[at - 1]]
    lines = [
        "##fileformat=VCFv4.2",
        "#CHROM\tPOS\tID\tREF\tALT",
        f"long\t{at}\t.\t{LONG[at - 1]}\t{flip},{LONG[at - 1]}GG",
        f"long\t299\t.\t{LONG[298:300]}\t{LONG[298]}",
        "one\t2\t.\tCG\tT",
    ]
    path = tmp_path / "v.vcf.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    result = VariantEffects(fasta, str(path), window=64)(*tiny, DNA)

    def score(text, start, change, start_of_change=None, length=64):
        ref = text[start : start + length]
        start = start if start_of_change is None else start_of_change
        alt = change[start : start + length]
        assert len(ref) == len(alt)
        return (log_likelihoods(*tiny, alt).sum() - log_likelihoods(*tiny, ref).sum()).item()

    one = "ACGTNNACGGT"
    expected = [
        score(LONG, at - 1 - 32, LONG[: at - 1] + flip + LONG[at:]),
        score(LONG, at - 1 - 32, LONG[: at - 1] + LONG[at - 1] + "GG" + LONG[at:]),
        score(LONG, 300 - 64, LONG[:299], 299 - 64),
        score(one, 0, "AT" + one[3:], length=10),
    ]
    np.testing.assert_allclose([row["score"] for row in result["variants"]], expected, rtol=1e-4, atol=1e-4)
    assert result["auroc"] is None
    json.dumps(result, allow_nan=False)


def test_what_variants_share_is_computed_once(tmp_path, monkeypatch):
    """Rows that begin alike, by twos and by fours, give the log p of whole rows; so do variants on both strands."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "se_groups": 4, "mr_groups": 4}
    model = striped_hyena(pattern="SDH*", vocab_size=512, max_position_embeddings=512, **sizes)
    params = jax.tree.map(lambda x: x * 2, init_params(model, jax.random.key(0)))
    text = "".join(rng.choice(list("ACGT"), 700))
    fasta, variants = tmp_path / "g.fa", tmp_path / "v.csv"
    fasta.write_text(f">c\n{text}\n")
    table = [(at, text[at - 1], alt) for at in (300, 301, 10) for alt in "ACGT" if alt != text[at - 1]]
    table += [(350, text[349], text[349] + "GG"), (360, text[359:364], text[359])]
    variants.write_text("chrom,pos,ref,alt\n" + "".join(f"c,{at},{ref},{alt}\n" for at, ref, alt in table))
    shapes = []
    whole = shared_prefixes._shapes
    monkeypatch.setattr(shared_prefixes, "_shapes", lambda *args: shapes.append(whole(*args)) or shapes[-1])
    effects = VariantEffects(str(fasta), str(variants), window=300, both_strands=True, tokens_per_batch=1800)
    found = effects(model, params, DNA)["variants"]
    assert shapes and shared_prefixes.cut(model, params, 300) == 128
    monkeypatch.setattr(shared_prefixes, "cut", lambda *args: 0)
    expected = effects(model, params, DNA)["variants"]
    names = "log_likelihood_ref", "score"
    (sums, whole_sums), (scores, whole_scores) = (
        [np.array([row[name] for row in rows]) for rows in (found, expected)] for name in names
    )
    np.testing.assert_allclose(sums, whole_sums, rtol=2e-7)
    np.testing.assert_allclose(scores, whole_scores, rtol=0, atol=2e-7 * np.abs(sums).max())  # differences of such sums
    assert len(shapes) == 1


def test_labels_give_the_area_under_the_curve(tiny, fasta, tmp_path):
    rows = [f"long,{i},{LONG[i - 1]},{'A' if LONG[i - 1] != 'A' else 'C'},{i % 2}" for i in range(100, 120)]
    path = tmp_path / "v.csv"
    path.write_text("chrom,pos,ref,alt,label\n" + "\n".join(rows))
    result = VariantEffects(fasta, str(path), window=32)(*tiny, DNA)
    ones, zeros = ([-row["score"] for row in result["variants"] if row["label"] == label] for label in (1, 0))
    wins = np.mean([[(a > b) + (a == b) / 2 for b in zeros] for a in ones])
    assert result["auroc"] == pytest.approx(wins)
    assert auroc([1, 0], [1.0, 1.0]) == 0.5 and auroc([1, 1], [0.0, 1.0]) is None


def test_both_windows_are_equally_long_and_hold_the_variant():
    """At every place of a sequence: parts of the two sequences, as near to the middle as their ends allow."""
    text = LONG[:41]
    for at in range(41):
        for ref_length, alt_length in ((1, 1), (1, 6), (6, 1), (4, 2)):
            ref, alt = text[at : at + ref_length], "N" * alt_length
            changed = text[:at] + alt + text[at + ref_length :]
            for letters in (16, 40, 64):
                if len(ref) < ref_length:
                    continue
                windows = windows_around(Variant("c", at + 1, ref, alt), text, letters=letters)
                length = min(letters, len(text), len(changed))
                assert [len(window) for window in windows] == [length] * 2
                assert windows[0] in text and windows[1] in changed and alt in windows[1]
                for window, whole, edited in ((windows[0], text, ref_length), (windows[1], changed, alt_length)):
                    start = whole.index(window)
                    assert start <= at and at + edited <= start + length
                    assert start == at - length // 2 or start in (0, len(whole) - length)


@pytest.fixture(scope="module")
def flat(tiny):
    """A model to which all tokens are alike: a score is then 0 if and only if both windows have as many letters."""
    return tiny[0], jax.tree.map(jnp.zeros_like, tiny[1])


def test_a_flat_model_scores_every_variant_0(flat, reference):
    genomes = reference / "cases" / "genomes"
    gene = VariantEffects(str(genomes / "short_gene.fa"), str(genomes / "short_gene.vcf"), window=1024)(*flat, DNA)
    assert [row["score"] for row in gene["variants"]] == [0, 0, 0]
    indels = VariantEffects(str(genomes / "ref.fa"), str(genomes / "indels.vcf"), window=256)(*flat, DNA)
    assert [row["score"] for row in indels["variants"]] == [0] * 6
    assert [row["log_likelihood_ref"] for row in indels["variants"]] == pytest.approx([-255 * np.log(512)] * 6)


def test_genomes_that_were_read_wrongly(flat, reference):
    genomes = reference / "cases" / "genomes"
    assert list(map(len, dna.read_contigs(str(genomes / "cr_only.fa"), owner="x").values())) == [2000]
    assert len(list(read_variants(str(genomes / "quote_info.vcf")))) == 4
    ref = str(genomes / "ref.fa")
    for name, skipped in (
        ("star.vcf", {"chr1:500:T>*": "another line describes"}),
        ("symbolic.vcf", {"chr1:500:T><DEL>": "not a plain sequence"}),
        ("one_bad_ref.vcf", {"chr1:500:A>T": "has 'T' there, expected ref 'A'"}),
    ):
        result = VariantEffects(ref, str(genomes / name), window=64)(*flat, DNA)
        assert {"chr1:400:T>A", "chr1:600:A>C"} <= {row["variant"] for row in result["variants"]}
        assert len(result["variants"]) == (3 if name == "star.vcf" else 2)
        assert {one["variant"] for one in result["not_scored"]} == set(skipped)
        assert all(skipped[one["variant"]] in one["reason"] for one in result["not_scored"])
        assert "; 1 not scored, the first is chr1:500" in result["summary"]
        assert result["table"]["not scored"] == 1
        json.dumps(result, allow_nan=False)
    with pytest.raises(UserError, match="two records named 'chr1', in a.fa and b.fa"):
        VariantEffects(str(genomes / "two_refs"), str(genomes / "star.vcf"))(*flat, DNA)
    everything = SequenceLikelihood(str(genomes / "two_refs"))(*flat, DNA)  # which needs no unique names
    assert [row["name"] for row in everything["sequences"]] == ["a.fa:chr1", "b.fa:chr1"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("chrom,pos,ref\nlong,1,A", "alt is missing"),
        ("chrom,pos,ref,alt\nlong,one,A,C", "line 2"),
        ("##x\n\nchrom,pos,ref,alt,label\nlong,1,A,C,2", "line 4.*0 or 1"),
        ("chrom,pos,ref,alt\nlong,-1,A,C", "line 2"),
        ("chrom,pos,ref,alt\nlong,0,A,C", "nothing"),
        ("chrom,pos,ref,alt\nlong", "line 2"),
        ('chrom,pos,ref,alt\nlong,1,"A,C', "line 2: unexpected end"),
        ("chrom\tpos\tref\talt\nlong\t1\tA\t.", "no alternative"),
        (f"chrom,pos,ref,alt\nlong,1,{LONG[0]},]long:9]A", "expected letters"),
        (f"chrom,pos,ref,alt\nlong,1,{LONG[0]},{'A' * 17}", "longer than half the window of 32"),
        (f"chrom,pos,ref,alt\nsingle,1,A,\nlong,1,{LONG[0]},", "that can be scored; the first is single:1:A>"),
        (f"chrom,pos,ref,alt\nlong,1,{'A' if LONG[0] != 'A' else 'C'},G", "same assembly"),
        ("chrom,pos,ref,alt\nlong,9999,A,C", "nothing"),
        ("chrom,pos,ref,alt\nchr1,1,A,C", "its chrom is not a record"),
        (f"chrom,pos,ref,alt\nlong,1,{LONG[0]},<DEL>", "expected letters"),
        ("", "holds no variant"),
        ("##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\n", "holds no variant"),
    ],
)
def test_bad_variants_are_refused(tiny, fasta, tmp_path, text, message):
    path = tmp_path / "v.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        VariantEffects(fasta, str(path), window=32)(*tiny, DNA)


def test_bad_inputs_are_refused(tiny, fasta, tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        list(read_variants(str(tmp_path / "absent.vcf")))
    (tmp_path / "twice.fa").write_text(">a\nA\n>a\nC\n")
    with pytest.raises(UserError, match="2 records named"):
        SequenceLikelihood(str(tmp_path / "twice.fa"))(*tiny, DNA)
    with pytest.raises(UserError, match="no tokenizer"):
        SequenceLikelihood(fasta)(*tiny, None)
    with pytest.raises(UserError, match="stride"):
        SequenceLikelihood(fasta, window=8, stride=8)
