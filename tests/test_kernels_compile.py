"""Every kernel through the real compilers of TPUs and of an H200, none of which need be there.

What only a compiler knows: that a kernel fits into shared memory or VMEM (it refuses those that do not), that nothing
spills, that products run on tensor cores, that no array in the program grows as T x T. `benchmarks/aot.py` records
more of the same. The compilers run in another process under a time limit: one that hangs fails its test.
"""

import concurrent.futures
import multiprocessing
import pathlib
import sys

import jax
import pytest

from kernels_pallas import aot, backends

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "benchmarks"))
from aot import ROWS as ROWS_OF_A_BATCH
from aot import record
from operators import OPERATORS

from lcx.ops import second_order_choice

ALL = ("h200", "v5e", "v5p", "v6e")
KERNELS = {  # operator: targets for which a kernel of ours is what None picks
    "short_conv": ALL,
    "fir_conv_7": ALL,
    "fir_conv_128": ALL,
    "long_conv": ALL,
    "linear_attention": ALL,
    "ssd": ALL,
    "lolcats": ALL,
    "second_order_tiles": ALL,
    "second_order_states": ALL,
    "attention_decay": ALL,
    "attention": ALL[1:],  # cuDNN's own on the H200, which cannot be compiled without it
}
# Of these the forward pass alone is the same kernel as in training, register for register
# (benchmarks/results/aot.json): what holds for the one holds for the other.
SAME_FORWARD = ("short_conv", "fir_conv_7", "fir_conv_128", "long_conv", "linear_attention", "ssd", "lolcats")
# These ask for more VMEM than the 16 MiB that a kernel gets by default on v5e; v5p has the least of it.
MUCH_VMEM = ("long_conv", "second_order_states")
LENGTHS = (2048, 4096)
VMEM = 2**27
SECONDS = 240  # for one program: a hundred times what it takes on a quiet machine


@pytest.fixture(scope="module")
def compiled():
    """(operator, target, T, train=, implementation=) -> its record, made in a process that can be given up."""
    pools = []

    def start():
        context = multiprocessing.get_context("spawn")
        pools.append(concurrent.futures.ProcessPoolExecutor(1, mp_context=context, initializer=as_for_users))

    def facts(name, target, T, *, train=True, implementation=None, work=record):
        if reason := aot.available("h200" if target == "h200" else "tpu"):
            pytest.skip(reason)
        if not pools:
            start()
        job = pools[-1].submit(
            work, name, target, T, train=train, implementation=implementation, bundles=False
        )
        try:
            row = job.result(SECONDS)
        except concurrent.futures.TimeoutError:
            give_up(pools.pop())
            pytest.fail(f"{name} for {target}: the compiler was not done after {SECONDS} s")
        if "error" in row:
            pytest.fail(f"{name} for {target}: {row['error']}")
        assert row["kernels"], f"{name} on {target}: no kernel of ours in the program"
        return row

    yield facts
    for pool in pools:
        give_up(pool)


def as_for_users():
    jax.config.update("jax_disable_most_optimizations", False)
    second_order_choice.LONG = LENGTHS[0]  # but take both forms from a length on that compiles sooner


def least(*args, **kwargs):
    """The record of a program around whose kernels XLA for TPUs optimizes as little as it can: in half the time."""
    little = {"jax_exec_time_optimization_effort": -1.0, "jax_optimization_level": "O1"}
    before = {name: jax.config.values[name] for name in little if name in jax.config.values}  # the first: before 0.12
    try:
        for name in before:
            jax.config.update(name, little[name])
        return record(*args, **kwargs)
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def give_up(pool):
    for process in list(pool._processes.values()):
        process.kill()
    pool.shutdown(wait=False, cancel_futures=True)


SHIFTED = ("short_conv", "fir_conv_7")  # packed rows without products
# Both forms of second-order attention in one program, in which second_order_states_packed is one of the two branches.
EITHER = "second_order_either_packed"


def packed(name):
    """Packed rows, as training has them, mostly by other paths than whole rows."""
    return EITHER if name == "second_order_states" else f"{name}_packed"


# Compiling takes the time here, so whole and packed rows share targets and lengths. Packed rows are the shorter ones,
# with whose memory that of the longer whole rows is compared. No kernel has code of its own for one TPU: each is
# compiled for two of them, of two generations. One test holds all that is known of a program.


@pytest.mark.parametrize("name", KERNELS)
def test_on_an_h200(compiled, name):
    short = compiled(packed(name), "h200", LENGTHS[0])
    registers_and_tensor_cores(short["kernels"], products=name not in SHIFTED)
    both_forms(name, short["kernels"])
    if "h200" not in KERNELS[name]:
        return
    long = compiled(name, "h200", LENGTHS[1])
    programs = [long] if name in SAME_FORWARD else [long, compiled(name, "h200", LENGTHS[0], train=False)]
    for program in programs:
        registers_and_tensor_cores(program["kernels"], products=OPERATORS[name].products)
    memory_is_linear(name, short, long, unseen=0)


def test_the_other_window(compiled):
    kernels = compiled("lolcats_sliding", "h200", LENGTHS[0])["kernels"]
    registers_and_tensor_cores(kernels, products=True)
    compiled("lolcats_sliding", "v5e", LENGTHS[0])  # the one program for TPUs that is optimized as for users


@pytest.mark.skipif(bool(backends.missing("mosaic")), reason="jax < 0.11")
@pytest.mark.parametrize("name", ["fir_conv_128", "ssd", "ssd_packed", "linear_attention"])
def test_through_mosaic_on_an_h200(compiled, name):
    kernels = compiled(name, "h200", LENGTHS[0], implementation="mosaic")["kernels"]
    assert sum(kernel["wgmma"] > 0 for kernel in kernels) >= 2, "forward and backward, by tensor cores"
    assert all("mosaic" in kernel["name"] for kernel in kernels)
    backward = [kernel for kernel in kernels if kernel["name"].startswith("fir_conv_backward")]
    assert all(kernel["spills"] <= 24 for kernel in backward), "measured: 14 instructions"
    nothing_spills([kernel for kernel in kernels if kernel not in backward])


@pytest.mark.parametrize("name", KERNELS)
def test_on_tpus(compiled, name):
    rows, others = ("v6e", "v5p") if name in MUCH_VMEM else ("v5e", "v6e")
    short = compiled(packed(name), others, LENGTHS[0], work=least)
    both_forms(name, short["kernels"])
    long = compiled(name, rows, LENGTHS[1], work=least)
    memory_is_linear(name, short, long, unseen=VMEM)  # what fits into VMEM at the shorter length is not counted there


def registers_and_tensor_cores(kernels, *, products):
    nothing_spills(kernels)
    assert any(kernel["wgmma"] for kernel in kernels) or not products


def both_forms(name, kernels):
    forward = [kernel for kernel in kernels if "forward" in kernel["name"]]
    assert packed(name) != EITHER or len(forward) == 2, (
        "the tiles of one form, and those inside the other's chunks"
    )


def nothing_spills(kernels):
    spilled = {k["name"]: (k["spills"], k["stack_bytes"]) for k in kernels if k["spills"] or k["stack_bytes"]}
    assert not spilled


def memory_is_linear(name, short, long, *, unseen):
    short, long = short["temp_bytes"], long["temp_bytes"]
    assert long <= 2.1 * (short + unseen) + 2**20
    assert long < 2.1 * unseen + 0.5 * pairs(name)


def pairs(name):
    """Bytes of the T x T numbers of every head, at the longer T and in bfloat16."""
    operator = OPERATORS[name]
    T, heads = LENGTHS[1], operator.size.N or operator.size.D
    return 2 * ROWS_OF_A_BATCH * heads * T * T


def temporary(name, implementation):
    """Bytes of a training pass on this machine, at both lengths."""
    operator, out = OPERATORS[name], []
    for T in LENGTHS:
        arrays = operator.structs(operator.small, B=1, T=T, dtype="float32")
        step = jax.jit(operator.gradients(implementation)).lower(arrays, operator.result(arrays)).compile()
        out.append(step.memory_analysis().temp_size_in_bytes)
    return out


@pytest.mark.parametrize("name", OPERATORS)
def test_memory_of_the_xla_form_is_linear(name):
    short, long = temporary(name, "xla")
    assert long <= 2.1 * short + 2**20


def test_the_bound_can_be_broken():
    short, long = temporary("linear_attention", "reference")
    assert long > 3.9 * short
