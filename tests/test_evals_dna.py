"""Sequence likelihoods and variant effects against log-softmax of the model's logits, one sequence at a time."""

import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcx
from lcx.data import ByteTokenizer
from lcx.errors import UserError
from lcx.evals import dna
from lcx.evals.intervals import auroc
from lcx.evals.sequence_likelihood import SequenceLikelihood
from lcx.evals.variant_effects import VariantEffects, read_variants
from lcx.model import init_params, llama

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
    assert dna.reverse_complement("AACGR") == "YCGTT"
    assert dna.reverse_complement(dna.reverse_complement(text)) == text


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

    def score(text, start, change):
        window = text[start : start + 64]
        return (
            log_likelihoods(*tiny, change[start : start + 64]).sum() - log_likelihoods(*tiny, window).sum()
        ).item()

    one = "ACGTNNACGGT"
    expected = [
        score(LONG, at - 1 - 32, LONG[: at - 1] + flip + LONG[at:]),
        score(LONG, at - 1 - 32, LONG[: at - 1] + LONG[at - 1] + "GG" + LONG[at:]),
        score(LONG, 300 - 64, LONG[:299]),
        score(one, 0, "AT" + one[3:]),
    ]
    np.testing.assert_allclose([row["score"] for row in result["variants"]], expected, rtol=1e-4, atol=1e-4)
    assert result["auroc"] is None
    json.dumps(result, allow_nan=False)


def test_labels_give_the_area_under_the_curve(tiny, fasta, tmp_path):
    rows = [f"long,{i},{LONG[i - 1]},{'A' if LONG[i - 1] != 'A' else 'C'},{i % 2}" for i in range(100, 120)]
    path = tmp_path / "v.csv"
    path.write_text("chrom,pos,ref,alt,label\n" + "\n".join(rows))
    result = VariantEffects(fasta, str(path), window=32)(*tiny, DNA)
    ones, zeros = ([-row["score"] for row in result["variants"] if row["label"] == label] for label in (1, 0))
    wins = np.mean([[(a > b) + (a == b) / 2 for b in zeros] for a in ones])
    assert result["auroc"] == pytest.approx(wins)
    assert auroc([1, 0], [1.0, 1.0]) == 0.5 and auroc([1, 1], [0.0, 1.0]) is None


@pytest.mark.parametrize(
    "text, message",
    [
        ("chrom,pos,ref\nlong,1,A", "alt is missing"),
        ("chrom,pos,ref,alt\nlong,one,A,C", "line 2"),
        (f"chrom,pos,ref,alt\nlong,1,{'A' if LONG[0] != 'A' else 'C'},G", "same assembly"),
        ("chrom,pos,ref,alt\nlong,9999,A,C", "nothing"),
        ("chrom,pos,ref,alt\nchr1,1,A,C", "names no record"),
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
