"""Scores of genomes as files: tables, annotated VCF, regions, tags, strands, and runs that were interrupted."""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcx
from lcx import model as model_lib
from lcx.data import ByteTokenizer
from lcx.data.nucleotides import reverse_complement
from lcx.errors import UserError
from lcx.evals.sequence_likelihood import SequenceLikelihood
from lcx.evals.support import variant_scores
from lcx.evals.variant_effects import VariantEffects
from lcx.locks import LOCK, only_writer
from lcx.score import main as score_main
from lcx.variants import main as variants_main

DNA = ByteTokenizer(bos_id=None, eos_id=0, vocab_size=512)
rng = np.random.default_rng(1)
LONG = "".join(rng.choice(list("ACGT"), 700))
NEXT = dict(zip("ACGT", "CGTA", strict=True))


@pytest.fixture(scope="module")
def tiny():
    model = model_lib.llama(
        vocab_size=512, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=2, max_position_embeddings=128
    )
    return model, jax.tree.map(lambda x: x * 3, model_lib.init_params(model, jax.random.key(0)))


@pytest.fixture
def genome(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("g.fa").write_text(f">long words\n{LONG}\n>short\n{LONG[:20]}\n")
    lines = [
        "##fileformat=VCFv4.2",
        '##INFO=<ID=LCX_SCORE,Number=A,Type=Float,Description="an older one">',
        "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO",
    ]
    for i in range(100):
        at = 20 + 6 * i
        ref = LONG[at - 1]
        alt = {0: NEXT[ref], 1: f"{NEXT[ref]},{ref}GG", 2: f"*,{NEXT[ref]}", 3: "<DEL>"}[i % 4]
        info = "." if i % 2 else "LCX_SCORE=1;N=caf\udce9"
        lines.append(f"long\t{at}\trs{i}\t{ref}\t{alt}\t.\tPASS\t{info}")
    lines += ["other\t1\t.\tA\tC\t.\t.\t.", f"long\t5\t.\t{NEXT[LONG[4]]}\tA\t.\t.\t.", "long\t7\tx\tA\t.\t.\t.\t."]
    pathlib.Path("v.vcf").write_bytes("".join(f"{x}\n" for x in lines).encode("utf-8", "surrogateescape"))
    return tmp_path


def run(tiny, **settings):
    fields = {"variants": "v.vcf", "window": 32, "output": "out.tsv", **settings}
    return VariantEffects("g.fa", **fields)(*tiny, DNA)


def log_p(model, params, text):
    ids = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    logits = lcx.logits(model, params, jnp.asarray(np.pad(ids, (0, 128 - len(ids)))[None]))[0]
    return np.asarray(jax.nn.log_softmax(logits))[np.arange(len(ids) - 1), ids[1:]]


def test_the_table_and_the_annotated_file(tiny, genome):
    result = run(tiny, annotated="new.vcf")
    rows = list(variant_scores.read_table("out.tsv"))
    assert [row["id"] for row in rows[:4]] == ["rs0", "rs1", "rs1", "rs2"] and len(rows) == 153
    assert result["not_scored_counts"] == {
        "overlapping_deletion": 25, "not_plain": 25, "unknown_contig": 1, "other_reference": 1, "no_alternative": 1,
    }  # fmt: skip
    assert "53 of 153 variants are not scored: no_alternative 1, not_plain 25" in result["notes"][0]
    scores = [float(row["score"]) for row in rows if row["score"]]
    assert scores == pytest.approx([row["score"] for row in result["variants"]]) and len(scores) == 100
    at = 20 - 1
    ref = LONG[at - 16 : at + 16]
    alt = ref[:16] + NEXT[ref[16]] + ref[17:]
    assert scores[0] == pytest.approx(log_p(*tiny, alt).sum() - log_p(*tiny, ref).sum(), abs=1e-4)

    old = pathlib.Path("v.vcf").read_bytes().splitlines()
    new = pathlib.Path("new.vcf").read_bytes().splitlines()
    assert new[0] == old[0] and new[1].startswith(b"##INFO=<ID=LCX_SCORE,Number=A") and b"older" not in new[1]
    assert new[3] == old[2] and len(new) == len(old) + 1  # two definitions for one
    fields = [line.split(b"\t") for line in new[4:]]
    assert [f[:7] for f in fields] == [line.split(b"\t")[:7] for line in old[3:]]
    assert fields[0][7] == b"N=caf\xe9;LCX_SCORE=%.9g" % scores[0]
    assert fields[1][7] == b"LCX_SCORE=%.9g,%.9g" % tuple(scores[1:3])
    assert fields[2][7] == b"N=caf\xe9;LCX_SCORE=.,%.9g;LCX_NOT_SCORED=overlapping_deletion,." % scores[3]
    assert fields[3][7] == b"LCX_SCORE=.;LCX_NOT_SCORED=not_plain"
    json.dumps(result, allow_nan=False)


class Killed(Exception):
    pass


def test_an_interrupted_run_continues(tiny, genome, monkeypatch):
    monkeypatch.setattr(variant_scores.VariantScorer, "chunk", 16)
    run(tiny, annotated="whole.vcf", output="whole.tsv")
    calls, original = [], variant_scores.VariantScorer.scores

    def fail_later(self, variants):
        calls.append(0)
        if len(calls) == 4:
            raise Killed
        return original(self, variants)

    monkeypatch.setattr(variant_scores.VariantScorer, "scores", fail_later)
    with pytest.raises(Killed):
        run(tiny, annotated="new.vcf")
    assert not os.path.exists("out.tsv") and len(pathlib.Path("out.tsv.partial").read_text().splitlines()) > 40
    with open("out.tsv.partial", "a") as file:  # what a kill in the middle of a write leaves
        file.write("half a li")
    with pytest.raises(UserError, match=r"out.tsv.partial is of a run with window 32, and here it is 64"):
        run(tiny, annotated="new.vcf", window=64)
    other = jax.tree.map(lambda x: x + 1, tiny[1])
    with pytest.raises(UserError, match="is of a run with model"):
        run((tiny[0], other), annotated="new.vcf")
    for name in ("out.tsv", "new.vcf"):
        lock = only_writer(f"{name}{LOCK}", of="x", setting="y")
        with lock, pytest.raises(UserError, match=f"^{name} is being written by another process"):
            run(tiny, annotated="new.vcf")
    calls[:] = [0] * 10
    result = run(tiny, annotated="new.vcf")
    assert len(calls) - 10 < 8, "the chunks before are not scored again"
    for made, whole in (("out.tsv", "whole.tsv"), ("new.vcf", "whole.vcf")):
        assert pathlib.Path(made).read_bytes() == pathlib.Path(whole).read_bytes()
    assert result["table"]["variants"] == 100
    assert sorted(os.listdir()) == ["g.fa", "new.vcf", "out.tsv", "v.vcf", "whole.tsv", "whole.vcf"]
    with pytest.raises(UserError, match="there already"):
        run(tiny)
    run(tiny, overwrite=True)
    with pytest.raises(UserError, match="has the columns"):  # and leaves nothing behind, which it would continue
        run(tiny, variants="g.fa", output="other.tsv")
    assert not list(pathlib.Path().glob("other.tsv*"))


def test_strict_regions_and_strands(tiny, genome):
    with pytest.raises(UserError, match=r"53 of 153 variants of v.vcf cannot be scored; the first is long:32:.>\*"):
        run(tiny, strict=True)
    assert not os.path.exists("out.tsv.partial")
    pathlib.Path("r.bed").write_text("track x\nlong\t19\t20\nlong\t0\t3\tname\nlong 25 26\n#x\n")
    chosen = run(tiny, strict=True, regions="r.bed", both_strands=True)
    assert [row["id"] for row in chosen["variants"]] == ["rs0", "rs1", "rs1"]
    assert chosen["not_scored_counts"] == {"outside_regions": 150}
    ref, at = LONG[25 - 16 : 25 + 16], 16
    alt = ref[:at] + NEXT[ref[at]] + ref[at + 1 :]
    strands = [(ref, alt), tuple(map(reverse_complement, (ref, alt)))]
    expected = np.mean([log_p(*tiny, b).sum() - log_p(*tiny, a).sum() for a, b in strands])
    assert chosen["variants"][1]["score"] == pytest.approx(expected, abs=1e-4)
    tagged = run(tiny, output=None, regions="r.bed", tag="|x|", window=35)  # 3 tokens of tag, 32 letters
    expected = log_p(*tiny, f"|x|{alt}").sum() - log_p(*tiny, f"|x|{ref}").sum()
    # The difference of two sums near -939, which float32 holds to 6e-5.
    assert tagged["variants"][1]["score"] == pytest.approx(expected, abs=2.5e-4)
    for text, message in (("long\t5", "expected a record"), ("long\t5\t4", "line 1"), ("#x\n", "no region")):
        pathlib.Path("r.bed").write_text(text)
        with pytest.raises(UserError, match=message):
            run(tiny, output=None, regions="r.bed")


def test_an_annotated_file_needs_no_table(tiny, genome):
    run(tiny, output=None, annotated="only.vcf")
    assert pathlib.Path("only.vcf").read_bytes().count(b"LCX_SCORE=") == 103
    assert sorted(os.listdir()) == ["g.fa", "only.vcf", "v.vcf"]


def test_a_table_has_nothing_to_annotate(tiny, genome):
    pathlib.Path("v.vcf").write_text(f"chrom,pos,ref,alt\nlong,9,{LONG[8]},{NEXT[LONG[8]]}\n")
    with pytest.raises(UserError, match="expected a VCF file to annotate"):
        run(tiny, annotated="new.vcf")
    pathlib.Path("v.vcf").write_text(f"#CHROM\tPOS\tID\tREF\tALT\nlong\t9\t.\t{LONG[8]}\t{NEXT[LONG[8]]}\n")
    with pytest.raises(UserError, match="expected INFO as the 8th"):
        run(tiny, annotated="new.vcf")


def test_every_letter_has_its_probabilities(tiny, genome):
    pq = pytest.importorskip("pyarrow.parquet")
    settings = {"window": 64, "stride": 40, "both_strands": True, "tokens_per_batch": 64}
    result = SequenceLikelihood("g.fa", per_position="p.parquet", **settings)(*tiny, DNA)
    plain = SequenceLikelihood("g.fa", **settings)(*tiny, DNA)
    for row, same in zip(result["sequences"], plain["sequences"], strict=True):
        assert row == {**same, "log_likelihood": pytest.approx(same["log_likelihood"], rel=1e-5),
                       "mean_log_likelihood": pytest.approx(same["mean_log_likelihood"], rel=1e-5)}  # fmt: skip
    rows = pq.read_table("p.parquet").to_pylist()
    assert len(rows) == 2 * (699 + 19) and not os.path.exists("p.parquet.partial")
    forward = [row for row in rows if row["record"] == "g.fa:long" and row["strand"] == "+"]
    assert [row["position"] for row in forward] == list(range(2, 701))
    assert "".join(row["letter"] for row in forward) == LONG[1:]
    backward = [row for row in rows if row["record"] == "g.fa:short" and row["strand"] == "-"]
    assert [row["position"] for row in backward] == list(range(19, 0, -1))
    assert "".join(row["letter"] for row in backward) == reverse_complement(LONG[:20])[1:]
    ids = np.frombuffer(LONG[40:104].encode(), np.uint8).astype(np.int32)  # the second window
    log_probabilities = jax.nn.log_softmax(lcx.logits(*tiny, jnp.asarray(ids[None]))[0])
    for offset in (23, 40, 62):  # scores letters from 64 on
        row, expected = forward[40 + offset], np.asarray(log_probabilities[offset], np.float64)
        assert row["position"] == 40 + offset + 2
        assert row["log_probability"] == pytest.approx(expected[ids[offset + 1]], abs=1e-4)
        assert row["entropy"] == pytest.approx(-(np.exp(expected) * expected).sum(), abs=1e-4)
        assert [row[x] for x in "ACGT"] == pytest.approx(np.exp(expected[[65, 67, 71, 84]]), rel=1e-3)


def test_a_tag_conditions_every_window_and_is_not_scored(tiny, genome):
    tag = "|d__Bacteria|"
    result = SequenceLikelihood("g.fa", tag=tag, window=64, stride=32)(*tiny, DNA)["sequences"]
    n = len(tag)
    assert [row["scored"] for row in result] == [700, 20]
    assert result[1]["log_likelihood"] == pytest.approx(log_p(*tiny, tag + LONG[:20])[n - 1 :].sum(), rel=1e-5)
    # The tag is repeated, so a window holds 64 - n letters after it; its first one begins with the tag itself.
    total, seen = 0.0, 0
    for begin in range(0, 700 + n, 32):
        letters = (tag + LONG)[begin : begin + 64 - n]
        text = letters if begin == 0 else tag + letters
        end = min(begin + 64 - n, 700 + n) - n
        if end > seen:
            total += log_p(*tiny, text)[-(end - seen) :].sum()
            seen = end
    assert result[0]["log_likelihood"] == pytest.approx(total, rel=1e-5)


def test_regions_are_scored_instead_of_records(tiny, genome):
    pathlib.Path("r.bed").write_text("long\t100\t160\texon\nshort\t0\t20\n")
    rows = SequenceLikelihood("g.fa", regions="r.bed")(*tiny, DNA)["sequences"]
    assert [(row["name"], row["length"]) for row in rows] == [("exon", 60), ("short:0-20", 20)]
    assert rows[0]["log_likelihood"] == pytest.approx(log_p(*tiny, LONG[100:160]).sum(), rel=1e-5)
    pathlib.Path("r.bed").write_text("short\t0\t21\n")
    with pytest.raises(UserError, match="has a region of 'short', which has 20 letters"):
        SequenceLikelihood("g.fa", regions="r.bed")(*tiny, DNA)


def test_the_commands(genome, reference, capsys):
    import torch

    load_file = pytest.importorskip("safetensors.torch").load_file
    state = load_file(reference / "reference" / "evo2" / "tiny_a_vortex_weights.safetensors")
    for name in ("embedding_layer.weight", "unembed.weight"):
        state[name] *= 0
    torch.save(state, "flat.pt")
    genomes = reference / "cases" / "genomes"
    common = ["--checkpoint=flat.pt", "--window=256"]
    words = [*common, f"--fasta={genomes / 'ref.fa'}", f"--variants={genomes / 'indels.vcf'}", "--output=o.tsv"]
    assert variants_main([*words, "--annotated=o.vcf", "--strict", "--both_strands"]) == 0
    assert [float(row["score"]) for row in variant_scores.read_table("o.tsv")] == [0] * 6
    assert variants_main(words) == 2 and "there already" in capsys.readouterr().err
    assert variants_main([*words[:-1], "--output=o.vcf"]) == 2 and "ends in .tsv" in capsys.readouterr().err
    words = [*common, f"--fasta={genomes / 'cr_only.fa'}", "--output=s.tsv"]
    with only_writer(f"s.tsv{LOCK}", of="x", setting="y"):
        assert score_main(words) == 2 and "s.tsv is being written by" in capsys.readouterr().err
    before = {*os.listdir()}
    assert score_main(words) == 0 and {*os.listdir()} == before | {"s.tsv"}
    assert score_main(words) == 2 and "s.tsv is there already" in capsys.readouterr().err
    header, row = (line.split("\t") for line in pathlib.Path("s.tsv").read_text().splitlines())
    found = dict(zip(header, row, strict=True))
    assert found["name"] == "cr_only.fa:chr1" and found["scored"] == "1999"
    assert float(found["mean_log_likelihood"]) == pytest.approx(-np.log(512), rel=1e-6)
    assert score_main([*common, f"--fasta={genomes / 'two_refs'}", "--output=s.tsv"]) == 2
