"""Reading what compilers say: our reader of machine code against NVIDIA's disassembler; the environment and the meshes
that they need."""

import importlib.util
import pathlib
import re
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pallas_triton

from kernels_pallas import aot, cubin
from lcx import sharding
from lcx.config import environment
from lcx.layers import Linear
from lcx.model import Stage, abstract_params, llama
from lcx.ops.second_order_attention import second_order_attention
from lcx.planning import program, traffic

A, B = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1024, 512), (512, 1024)))


def product(a, b, *, num_warps):
    """[1024, 512] x [512, 1024] in tiles of 128 x 256: float32 sums that 8 warps can hold, and fewer cannot."""

    def kernel(a, b, out):
        def add(i, total):
            return total + jnp.dot(
                a[:, pl.ds(i * 64, 64)], b[pl.ds(i * 64, 64)], preferred_element_type=jnp.float32
            )

        out[...] = jax.lax.fori_loop(0, 8, add, jnp.zeros((128, 256), jnp.float32)).astype(out.dtype)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16),
        grid=(8, 4),
        in_specs=[
            pl.BlockSpec((128, 512), lambda i, j: (i, 0)),
            pl.BlockSpec((512, 256), lambda i, j: (0, j)),
        ],
        out_specs=pl.BlockSpec((128, 256), lambda i, j: (i, j)),
        compiler_params=pallas_triton.CompilerParams(num_warps=num_warps, num_stages=2),
        name="product",
    )(a, b)


@pytest.fixture
def h200():
    if reason := aot.available("h200"):
        pytest.skip(reason)


def nvdisasm() -> pathlib.Path:
    """Of the wheel nvidia-cuda-nvdisasm."""
    spec = importlib.util.find_spec("nvidia")
    folders = [pathlib.Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    found = [path for folder in folders for path in folder.glob("*/bin/nvdisasm")]
    return found[0] if found else pytest.skip("nvdisasm is not installed (the extra aot)")


@pytest.mark.parametrize("num_warps, holds", [(8, True), (2, False)])
def test_machine_code_against_the_disassembler(h200, tmp_path, monkeypatch, num_warps, holds):
    tool, read = nvdisasm(), cubin._cubin

    def keep(elf):
        (tmp_path / "kernel.cubin").write_bytes(elf)
        return read(elf)

    monkeypatch.setattr(cubin, "_cubin", keep)
    kernel = aot.compile_h200(lambda a, b: product(a, b, num_warps=num_warps), A, B).kernel("product")
    command = [tool, "-g", "-hex", tmp_path / "kernel.cubin"]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([A-Z][A-Z0-9]+)", code)
    assert len(names) > 300
    assert kernel.spills == names.count("LDL") + names.count("STL")
    assert (kernel.wgmma, kernel.mma) == (names.count("HGMMA"), names.count("HMMA"))
    assert (
        holds == (kernel.spills == 0) == (kernel.stack_bytes == 0) == (kernel.wgmma > 0) == (kernel.mma == 0)
    )
    used = max(int(number) for number in re.findall(r"\bR(\d+)\b", code))
    assert used < kernel.registers <= 255


def test_shared_memory(h200):
    # Two stages of 128 x 64 and 64 x 256 in bfloat16, and 1 KiB that CUDA reserves in every block.
    kernel = aot.compile_h200(lambda a, b: product(a, b, num_warps=8), A, B).kernel("product")
    assert kernel.shared_bytes == 2 * 2 * (128 * 64 + 64 * 256) + 1024


def test_bytes_of_a_program(h200):
    report = aot.compile_h200(
        lambda x: jnp.sin(x) @ jnp.cos(x).T, jax.ShapeDtypeStruct((512, 256), jnp.float32)
    )
    assert (report.argument_bytes, report.output_bytes) == (4 * 512 * 256, 4 * 512 * 512)


@pytest.mark.skipif(
    jax.__version_info__ >= (0, 11),
    reason="XLA of jax 0.11 keeps what 2 to 3 of these blocks hold; of seven of StripedHyena 2 it needs half as before",
)
def test_a_pattern_of_blocks_is_recomputed_block_by_block(h200):
    """Four blocks in a pattern need about the memory of one, and not of four."""

    def temporary(pattern):
        sizes = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 1024, "num_layers": 8}
        model = llama(**sizes, num_heads=4, num_kv_heads=4, max_position_embeddings=2048, remat="full")
        stage = Stage(model.stages[0].pattern * pattern, 8 // pattern)
        model = model.clone(stages=(stage,), parent=None)

        def loss(params, tokens):
            return model.apply({"params": params}, tokens, segment_ids=jnp.ones_like(tokens)).sum()

        tokens = jax.ShapeDtypeStruct((1, 2048), jnp.int32)
        return aot.compile_h200(jax.grad(loss), abstract_params(model), tokens).temp_bytes

    assert temporary(4) < 1.3 * temporary(1)


@pytest.mark.parametrize("chip", ["h200", "v5p"])
def test_the_inputs_of_blocks_wait_in_the_memory_of_the_host(chip):
    if reason := aot.available("h200" if chip == "h200" else "tpu"):
        pytest.skip(reason)
    sizes = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 32, "num_layers": 3, "num_heads": 4}
    model = llama(**sizes, num_kv_heads=4, max_position_embeddings=128, remat="host")
    tokens = jax.ShapeDtypeStruct((1, 128), jnp.int32)
    gradient = jax.grad(lambda p, x: model.apply({"params": p}, x).sum())
    compiled = program.parse(aot.text(chip, gradient, abstract_params(model), tokens))
    inputs = [x for run in compiled.runs() for x in run.instruction.results if x.shape == (3, 1, 128, 48)]
    assert inputs and all(x.on_host for x in inputs)
    assert traffic.host_bytes(compiled) == 2 * 4 * 3 * 128 * 48, "each is written there once and read once"


def test_second_order_tiles_change_whole_rows_in_place(h200):
    """Nothing as large as the gradient of a row is copied, or chosen anew, in a step of the loops over tiles."""
    B, T, N, H = 2, 256, 2, 128
    x, decay = jax.ShapeDtypeStruct((B, T, N, H), jnp.bfloat16), jax.ShapeDtypeStruct((B, T, N), jnp.float32)

    def loss(*x):
        options = {"log_decay": x[3], "implementation": "xla", "form": "tiles"}
        return jnp.sum(second_order_attention(*x[:3], **options)[0].astype(jnp.float32))

    text = aot.text("h200", jax.grad(loss, (0, 1, 2, 3)), x, x, x, decay)
    loops, whole = text[: text.index("\nENTRY")], rf"f32\[{B},{N},1,{T},1,{H}\]\S* "
    assert re.search(whole + "dynamic-update-slice", loops)
    assert not re.findall(whole + r"(?:copy|select)\(.*", loops)


def test_projections_in_fp8_are_products_in_fp8(h200):
    """Forward and both gradients: the factors that the compiler multiplies are e4m3 and e5m2."""
    linear = Linear((256,), (128, 3), ("embed", "channels", None), fp8=True)

    def gradients(params, x):
        return jax.value_and_grad(lambda p, x: jnp.sum(linear.apply({"params": p}, x) ** 2), argnums=(0, 1))(params, x)

    kernel, scales, x = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((256, 128, 3), (2,), (2, 512, 256)))
    text = aot.text("h200", gradients, {"kernel": kernel, "fp8_scales": scales}, x)
    factors = re.findall(r" dot\(%(\S+), %(\S+)\)", text)
    kinds = [{re.search(rf"%{re.escape(name)} = (\w+)\[", text)[1] for name in pair} for pair in factors]
    assert sorted(kinds, key=len) == [{"f8e4m3fn"}, {"f8e4m3fn", "f8e5m2"}, {"f8e4m3fn", "f8e5m2"}]


def test_tracing_sees_the_target():
    seen = []
    for target, compile_for in (("tpu", aot.compile_tpu), ("h200", aot.compile_h200)):
        if reason := aot.available(target):
            pytest.skip(reason)
        compile_for(lambda x: seen.append(jax.sharding.get_abstract_mesh().abstract_device) or x + 1, A)
    assert [(device.platform, device.device_kind) for device in seen] == [
        ("tpu", "TPU v5 lite"),
        ("gpu", "NVIDIA H200"),
    ]


def test_too_much_vmem():
    if reason := aot.available("tpu"):
        pytest.skip(reason)

    def double(x):
        body = lambda x, out: out.__setitem__(..., x[...] * 2)  # noqa: E731
        return pl.pallas_call(body, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), name="double")(x)

    size = lambda n: jax.ShapeDtypeStruct((n, 1024), jnp.float32)  # noqa: E731
    assert aot.compile_tpu(double, size(1024)).kernel("double").vmem_bytes >= 2 * 4 * 1024 * 1024
    with pytest.raises(jax.errors.JaxRuntimeError, match="(?i)vmem"):
        aot.compile_tpu(double, size(8192))


def test_snappy():
    # Each kind of element, from the format's description: 5 letters, then copies with one and two bytes of offset.
    data = bytes([14, 4 << 2]) + b"abcde" + bytes([(4 - 4) << 2 | 1, 5, (5 - 1) << 2 | 2, 1, 0])
    assert cubin.snappy(data) == b"abcde" + b"abcd" + b"ddddd"
    long = np.random.default_rng(0).integers(0, 256, 300, np.uint8).tobytes()
    assert cubin.snappy(bytes([0xAC, 0x02, 61 << 2]) + (299).to_bytes(2, "little") + long) == long


@pytest.mark.parametrize(
    "installed, devices, expected", [(True, [], "cpu"), (True, ["/dev/nvidia0"], None), (False, [], None)]
)
def test_compilers_alone_are_no_accelerator(monkeypatch, installed, devices, expected):
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: installed or None)
    monkeypatch.setattr(environment.glob, "glob", lambda pattern: devices if "nvidia" in pattern else [])
    environment.setup_jax()
    assert environment.os.environ.get("JAX_PLATFORMS") == expected


@pytest.mark.parametrize(("chip", "slice_shape", "sizes"), [("v6e", "8x8", (16, 4)), ("v5p", "4x4x4", (4, 16))])
def test_meshes_of_parts_of_a_torus(chip, slice_shape, sizes):
    """jax refuses 16 x 4 on 8 x 8 chips, since an axis of the torus has to be divided, but on v5e."""
    if missing := aot.available("tpu"):
        pytest.skip(missing)
    devices = list(np.ravel(aot.tpu_devices(chip, slice_shape)))
    mesh = sharding.make_mesh(fsdp=sizes[0], context=sizes[1], devices=devices)
    assert mesh.devices.shape == (1, *sizes, 1) and len(set(mesh.devices.flat)) == 64
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
