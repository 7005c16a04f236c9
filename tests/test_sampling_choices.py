"""top-k against transformers' warper, allowed letters, several samples."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import lcx
from lcx import model as model_lib
from lcx.data import ByteTokenizer
from lcx.errors import UserError
from lcx.generate import main
from lcx.ops import sampling
from lcx.striped_hyena import striped_hyena
from lcx.terminal import write_samples


def test_top_k_is_that_of_transformers():
    logits_process = pytest.importorskip("transformers.generation.logits_process")
    logits = np.random.default_rng(0).standard_normal((5, 40)).astype(np.float32)
    logits[1, 7] = logits[1, 3]
    for k in (1, 3, 40, 100):
        expected = logits_process.TopKLogitsWarper(k)(None, torch.tensor(logits)).numpy()
        np.testing.assert_array_equal(sampling.likeliest(jnp.asarray(logits), k), expected)


@pytest.fixture(scope="module")
def evo2(tmp_path_factory):
    model = striped_hyena(
        pattern="SDH*", hidden_size=32, intermediate_size=32, num_heads=2, se_groups=2, mr_groups=2,
        max_position_embeddings=128, init_length=128,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("evo2") / "m"
    lcx.save(folder, model, model_lib.init_params(model, jax.random.key(0)), format="savanna")
    return folder


def test_only_allowed_letters_many_times(evo2, tmp_path, capsys):
    words = [f"--checkpoint={evo2}", "--prompt=ACGT", "--temperature=1", "--max_new_tokens=30", "--allowed=ACGT"]
    assert main([*words, "--num_samples=3", "--top_k=3", "--top_p=0.9", f"--output={tmp_path}/s.fa"]) == 0
    lines = (tmp_path / "s.fa").read_text().splitlines()
    assert [line.split()[0] for line in lines[::2]] == [">sample1", ">sample2", ">sample3"]
    assert all(line.startswith("ACGT") and len(line) == 34 and set(line) == set("ACGT") for line in lines[1::2])
    assert len(set(lines[1::2])) == 3
    assert main([*words, "--num_samples=3", "--top_k=3", "--top_p=0.9"]) == 0
    assert capsys.readouterr().out.splitlines()[1::2] == [line[4:] for line in lines[1::2]]
    assert main([*words, f"--output={tmp_path}/s.fa"]) == 2
    assert main([*words[:-1], "--allowed="]) == 2 and main([*words[:-1], "--allowed=AC\n"]) == 2
    assert main([*words, "--num_samples=0"]) == 2 and main([*words, "--top_k=0"]) == 2
    capsys.readouterr()
    for flags, says in {
        ("--num_samples=0",): "--num_samples is 0, expected at least 1: change --num_samples",
        ("--num_samples=1000000000",): "--num_samples is 1000000000, expected at most 4096",
        ("--num_samples=3", "--temperature=0"): "--num_samples is 3, and all would be the same text",
        ("--max_new_tokens=-1",): "--max_new_tokens is -1, expected an integer >= 1: change --max_new_tokens",
        ("--temperature=nan",): "--temperature is nan",
    }.items():
        assert main([*words, *flags]) == 2
        assert says in capsys.readouterr().err


def test_samples_keep_numbers_and_no_arrays(tmp_path):
    """100,000 letters are as many buffers of a device otherwise."""
    made = []

    def columns():
        for letters in (b"AC", b"CG", b"GT", b"TA"):
            assert all(array() is None for array in made[:-1])
            column = np.frombuffer(letters, np.uint8).astype(np.int32)
            made.append(weakref.ref(column))
            yield column

    tokenizer = ByteTokenizer(bos_id=None, eos_id=0)
    write_samples(tokenizer, columns(), prompt=[78], stops=[0], file=tmp_path / "s.fa")
    assert (tmp_path / "s.fa").read_text().splitlines()[1::2] == ["NACGT", "NCGTA"]


def test_settings_are_checked(evo2):
    model, params = lcx.load(evo2)
    for settings, message in (
        ({"top_k": 0}, "top_k is 0"),
        ({"allowed_tokens": []}, r"allowed_tokens is \[\]"),
        ({"allowed_tokens": [600]}, "expected ids from 0 to 511"),
    ):
        with pytest.raises(UserError, match=message):
            lcx.generate(model, params, [[65]], max_new_tokens=2, **settings)
