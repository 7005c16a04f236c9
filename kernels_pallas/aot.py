"""Ahead-of-time compilation for a TPU or an H200 on a machine that has neither, with the compiler's statistics.

    from kernels_pallas import aot

    x = jax.ShapeDtypeStruct((1, 4096, 8, 128), jnp.bfloat16)
    fn = lambda q, k, v: linear_attention(q, k, v)[0]            # `implementation=None` picks the target's kernel
    report = aot.compile_h200(fn, x, x, x)
    report.temp_bytes                                            # temporary memory, without arguments and results
    for kernel in report.kernels:                                # every kernel that XLA or Pallas made
        print(kernel)                                            # registers, spills, shared memory, wgmma, mma
    aot.compile_tpu(fn, x, x, x, chip="v5p").kernels             # raises JaxRuntimeError where VMEM is too small
    aot.tpu_bundles(fn, x, x, x, chip="v5e")                     # {kernel: bundles}, a static model of time; slow

`available("tpu")` and `available("h200")` return None, or the reason why the target cannot be used. The compilers are
wheels in the extra `aot` (libtpu, and jax's CUDA plugin, which contains a PTX assembler). They need no driver and no
device.

A function is traced under a mesh of one target device, so code that looks up the platform of the mesh sees the target.
Arguments are arrays, `jax.ShapeDtypeStruct`s or trees of them; pass options through a closure. To compile a gradient,
pass the function that computes it. Calls to cuDNN cannot be compiled: they need the library and the device.

Sources of the numbers: `temp_bytes` comes from XLA's buffer assignment. On the H200 everything else is read from the
machine code: registers and stack from the cubin's .nv.info, spills as the number of instructions that access local
memory, tensor-core instructions by opcode, and shared memory from XLA's launch dimensions. On TPUs the report has the
scoped VMEM of each kernel; bundles are counted by libtpu's own static utilisation report and approximate the cycles of
one grid step, without DMA waits.
"""

import contextlib
import dataclasses
import functools
import glob
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile

import jax
import jax.export
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kernels_pallas import cubin

# These must be set before jax first looks for plugins. Without the first, jax drops the CUDA plugin on machines without
# a driver. The others keep libtpu from querying a metadata server and let several processes compile at the same time.
ENVIRONMENT = {
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5e-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}

# The device description that XLA's compiler needs, for an H200 SXM: CUDA's device properties and NVIDIA's data sheet.
H200 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: 4800000000000
  device_memory_size: 150754820096
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
"""
# The same for an H100 SXM, which has the same processors and another memory; jax sees so much of its 80 GB.
GPU_MEMORY = {"h200": 150754820096, "h100": 85027979264}
GPU_TARGETS = {
    "h200": H200,
    "h100": H200.replace("H200", "H100")
    .replace("4800000000000", "3350000000000")
    .replace(str(GPU_MEMORY["h200"]), str(GPU_MEMORY["h100"])),
}


@dataclasses.dataclass(frozen=True)
class TpuKernel:
    name: str
    vmem_bytes: (
        int  # scoped: the windows, twice each where they are double buffered, scratch, and spilled registers
    )


@dataclasses.dataclass(frozen=True)
class Report:
    """The statistics of one compilation; bytes are for the whole program on one device."""

    target: str
    argument_bytes: int
    output_bytes: int
    temp_bytes: int
    kernels: tuple[cubin.Kernel | TpuKernel, ...]

    def kernel(self, part: str):
        """The only kernel whose name contains `part`.

        Raises:
          LookupError: none has, or several have.
        """
        found = [kernel for kernel in self.kernels if part in kernel.name]
        if len(found) != 1:
            raise LookupError(f"kernels named *{part}*: {len(found)} of {[k.name for k in self.kernels]}")
        return found[0]


@functools.cache
def available(target: str) -> str | None:
    """None if compiling for `target` ("tpu", "h200" or "h100") is possible, otherwise the reason why not."""
    if target == "tpu" and importlib.util.find_spec("libtpu") is None:
        return "libtpu is not installed (the extra aot)"
    try:
        _devices("v5e" if target == "tpu" else target)
    except Exception as error:  # a plugin that does not load may raise anything
        return f"no compiler for {target}: {str(error).splitlines()[0]} (the extra aot installs it)"
    return None


def tpu_devices(chip: str, shape: str | None = None):
    """Devices of a TPU slice, e.g. ("v5e", "16x16"), from which to build a mesh for `compile_tpu(..., mesh=...)`."""
    return _devices(f"{chip}:{shape}" if shape else chip)


def h200_devices(count: int):
    """Devices of `count` H200s in one host."""
    return gpu_devices("h200", count=count)


def gpu_devices(kind: str, *, count: int, hosts: int = 1):
    """Devices of GPUs of a kind in GPU_TARGETS, `count` in each host."""
    return _devices(f"{kind}:1x{hosts}x{count}")


def compile_tpu(
    fn, *args, chip: str = "v5e", mesh: Mesh | None = None, options: dict | None = None
) -> Report:
    """Compile for v4, v5e, v5p or v6e.

    Args:
      mesh: a mesh of devices from `tpu_devices`; None: one chip. Arguments without a sharding are replicated.
      options: XLA compiler options.

    Raises:
      JaxRuntimeError: libtpu's error, e.g. that a kernel needs more VMEM than available.
    """
    compiled = _compile(fn, args, mesh or _one(chip), options or {})
    kernels, text = [], compiled.as_text()
    for call in re.finditer(r'%(\S+) = .*custom_call_target="tpu_custom_call"', text):
        # Take the first match after the call: line breaks in a kernel's metadata may split the text of the instruction,
        # and the next instruction has the same field.
        used = re.search(r'"used_scoped_memory_configs":\[(.*?)\]', text[call.end() :])
        sizes = re.findall(r'"memory_space":"1".*?"size":"(\d+)"', used[1]) if used else []
        kernels.append(TpuKernel(call[1], sum(map(int, sizes))))
    return _report(chip, compiled, kernels)


def compile_h200(fn, *args, mesh: Mesh | None = None, options: dict | None = None) -> Report:
    """Compile for an NVIDIA H200 (sm_90a).

    Raises:
      JaxRuntimeError: the error of XLA or the PTX assembler, e.g. that a kernel needs too much shared memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        compiled = _compile(fn, args, mesh or _one("h200"), {"xla_dump_to": folder, **(options or {})})
        dynamic = {}
        for path in glob.glob(f"{folder}/*thunk_sequence.txt"):
            with open(path) as file:
                found = re.findall(r"(\S+) grid: .*shared_memory: (\d+)", file.read())
                dynamic.update({name: int(size) for name, size in found})
    # op_name="jit(f)/transpose(jvp(NAME))/pallas_call"; mpmd_map is Mosaic GPU's
    ours = set(
        re.findall(r'custom-call\(.*op_name="[^"]*?([\w.]+)\)*/(?:pallas_call|mpmd_map)', compiled.as_text())
    )
    kernels = [
        dataclasses.replace(
            kernel,
            shared_bytes=kernel.shared_bytes + dynamic.get(kernel.name, 0),
            pallas=any(kernel.name == name or kernel.name.startswith(f"{name}_") for name in ours),
        )
        for kernel in cubin.kernels(compiled.runtime_executable().serialize())
    ]
    return _report("h200", compiled, kernels)


def text(target: str, fn, *args) -> str:
    """The program that XLA runs on a target ("v5p", "h200"), as text (HLO)."""
    return _compile(fn, args, _one(target), {}).as_text()


def tpu_bundles(fn, *args, chip: str = "v5e", timeout: int = 600) -> dict[str, dict[str, int]]:
    """Counts from libtpu's final schedule of each Pallas kernel, per unit: {kernel: {"bundles": n, "MXU": ...}}.

    A bundle is the set of instructions that a core issues in one cycle. Nearly all bundles belong to the body of one
    grid step; both sides of a branch are counted. The other numbers are the slots of each unit in use, summed over the
    bundles. Compilation with the required dump runs in a separate process and is slow (5 to 100 s, sometimes minutes).
    Kernels that are missing from the dump are omitted.

    Raises:
      subprocess.SubprocessError: the process failed or took longer than `timeout` seconds.
    """
    mesh = _one(chip)
    with jax.set_mesh(mesh):
        exported = jax.export.export(jax.jit(fn), platforms=["tpu"])(*jax.tree.map(_replicate(mesh), args))
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/exported", "wb") as file:
            file.write(exported.serialize())
        flags = {
            "dump_to": folder,
            "dump_hlo_text": "false",
            "dump_llo_text": "true",
            "dump_llo_html": "false",
        }
        flags |= {"dump_llo_static_gaps": "true", "emit_annotations": "true", "debug_level": "2"}
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "LIBTPU_INIT_ARGS": " ".join(f"--xla_jf_{name}={value}" for name, value in flags.items()),
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        command = [sys.executable, "-m", "kernels_pallas.aot", f"{folder}/exported", chip]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
        if result.returncode:
            raise subprocess.SubprocessError(f"{chip}: {result.stderr[-2000:]}")
        found = {name: _utilisation(folder, name) for name in json.loads(result.stdout.splitlines()[-1])}
        return {name: used for name, used in found.items() if used is not None}


def _utilisation(folder: str, kernel: str) -> dict[str, int] | None:
    """The counts of one kernel from the dump in `folder`; None if there is no file for it."""
    paths = glob.glob(
        f"{glob.escape(folder)}/*-{glob.escape(kernel)}-*-final_hlo-static-per-bundle-utilization.txt"
    )
    if not paths:
        return None
    with open(paths[0]) as file:
        _, units, _, _, *bundles = file.read().splitlines()
    columns = zip(*(map(int, line.split()) for line in bundles))
    used = {name.strip(): sum(column) for name, column in zip(units.split(","), columns)}
    return {"bundles": len(bundles), **used}


def _compile(fn, args, mesh: Mesh, options: dict):
    with jax.set_mesh(mesh), uncached():
        return jax.jit(fn).lower(*jax.tree.map(_replicate(mesh), args)).compile(compiler_options=options)


@contextlib.contextmanager
def uncached():
    """Disables jax's cache on disk: executables for an absent device cannot be read back."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, float("inf"))
    try:
        yield
    finally:
        jax.config.update(name, before)


def _replicate(mesh: Mesh):
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(x):
        given = x.sharding if isinstance(x, jax.ShapeDtypeStruct) else None
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=given or everywhere)

    return place


def _report(target: str, compiled, kernels) -> Report:
    memory = compiled.memory_analysis()
    return Report(
        target=target,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        kernels=tuple(kernels),
    )


def _one(target: str) -> Mesh:
    # The usual names of mesh axes, for code that looks them up.
    shape, names = (1, 1, 1, 1), ("data", "fsdp", "context", "tensor")
    return Mesh(np.array(_devices(target)[:1]).reshape(shape), names, axis_types=(AxisType.Auto,) * 4)


@functools.cache
def _devices(target: str) -> list:
    """The devices of a topology: a chip in TOPOLOGIES, or for example "v5e:4x4", "h200", "h200:1x1x8"."""
    chip, _, shape = target.partition(":")
    _prepare()
    if chip not in GPU_TARGETS:
        return topologies.get_topology_desc(TOPOLOGIES.get(target, target), platform="tpu").devices
    wanted = {"platform": "cuda", "target_config": GPU_TARGETS[chip], "topology": shape or "1x1x1"}
    try:
        return topologies.get_topology_desc(chip, **wanted).devices
    except NotImplementedError:  # jax looked for plugins before ENVIRONMENT was set, and dropped this one
        plugins = [
            name for name in ("xla_cuda12", "xla_cuda13") if importlib.util.find_spec(f"jax_plugins.{name}")
        ]
        importlib.import_module(f"jax_plugins.{plugins[0]}").initialize()
        return topologies.get_topology_desc(chip, **wanted).devices


def _prepare() -> None:
    has_tpu = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    for name, value in ENVIRONMENT.items():
        if not (has_tpu and name.startswith("TPU_")):
            os.environ.setdefault(name, value)


def _dump_bundles(path: str, chip: str) -> None:
    """Runs in the subprocess of `tpu_bundles`: compiles and prints the names of the kernels."""
    with open(path, "rb") as file:
        exported = jax.export.deserialize(bytearray(file.read()))
    avals = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in exported.in_avals]
    args, _ = jax.tree.unflatten(exported.in_tree, avals)
    print(json.dumps([kernel.name for kernel in compile_tpu(exported.call, *args, chip=chip).kernels]))


if __name__ == "__main__":
    _dump_bundles(*sys.argv[1:])
