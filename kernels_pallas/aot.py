"""Compile for a TPU or an H200 on a machine that has neither, and read what the compiler says.

    from kernels_pallas import aot

    x = jax.ShapeDtypeStruct((1, 4096, 8, 128), jnp.bfloat16)
    fn = lambda q, k, v: linear_attention(q, k, v)[0]            # `implementation=None` picks the target's kernel
    report = aot.compile_h200(fn, x, x, x)
    report.temp_bytes                                            # what it needs beside arguments and results
    for kernel in report.kernels:                                # every kernel that XLA or Pallas made
        print(kernel)                                            # registers, spills, shared memory, wgmma, mma
    aot.compile_tpu(fn, x, x, x, chip="v5p").kernels             # raises JaxRuntimeError where VMEM is too small
    aot.tpu_bundles(fn, x, x, x, chip="v5e")                     # {kernel: bundles}, a static model of time; slow

`available("tpu")`, `available("h200")` give None, or the reason why they cannot be used: the compilers are the wheels
of the extra `aot` (libtpu, and jax's CUDA plugin, which holds a PTX assembler). No driver and no device is needed.

A function is traced under a mesh of one device of the target, so whatever asks the mesh for its platform sees the
target's. Arguments are arrays or `jax.ShapeDtypeStruct`s, or trees of them; options go into a closure. For a gradient,
compile the function that takes it. Calls of cuDNN cannot be compiled: they need the library and the device.

What the numbers are: `temp_bytes` as XLA's buffer assignment has it. On the H200 everything else is read from the
machine code: registers and stack from the cubin's .nv.info, spills as the instructions that touch local memory,
tensor-core instructions by opcode, shared memory from XLA's launch dimensions. On TPU the scoped VMEM of each kernel,
and bundles as libtpu's own static utilisation report counts them: about cycles of one grid step, without DMA waits.
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

# Read when jax first looks for plugins. Without the first, jax drops the CUDA plugin where there is no driver; the
# others keep libtpu from asking a metadata server for a machine's TPUs, and let several processes compile at once.
ENVIRONMENT = {
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5e-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}

# What XLA's compiler asks about a device, for an H200 SXM: CUDA's device properties and NVIDIA's data sheet.
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


@dataclasses.dataclass(frozen=True)
class TpuKernel:
    name: str
    vmem_bytes: (
        int  # scoped: the windows, twice each where they are double buffered, scratch, and spilled registers
    )


@dataclasses.dataclass(frozen=True)
class Report:
    """What one compilation says; bytes for the whole program on one device."""

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
    """None if `target` ("tpu" or "h200") can be compiled for, else why not."""
    if target == "tpu" and importlib.util.find_spec("libtpu") is None:
        return "libtpu is not installed (the extra aot)"
    try:
        _devices("v5e" if target == "tpu" else target)
    except Exception as error:  # a plugin that does not load may raise anything
        return f"no compiler for {target}: {str(error).splitlines()[0]} (the extra aot installs it)"
    return None


def tpu_devices(chip: str, shape: str | None = None):
    """Devices of a TPU slice, e.g. ("v5e", "16x16"), for a mesh of one's own: `compile_tpu(..., mesh=...)`."""
    return _devices(f"{chip}:{shape}" if shape else chip)


def h200_devices(count: int):
    """Devices of `count` H200s in one host."""
    return _devices(f"h200:1x1x{count}")


def compile_tpu(
    fn, *args, chip: str = "v5e", mesh: Mesh | None = None, options: dict | None = None
) -> Report:
    """Compile for v4, v5e, v5p or v6e.

    Args:
      mesh: of devices of `tpu_devices`, in place of one chip. Arguments without a sharding are then on all of them.
      options: XLA compiler options.

    Raises:
      JaxRuntimeError: what libtpu says, e.g. that a kernel needs more VMEM than there is.
    """
    compiled = _compile(fn, args, mesh or _one(chip), options or {})
    kernels, text = [], compiled.as_text()
    for call in re.finditer(r'%(\S+) = .*custom_call_target="tpu_custom_call"', text):
        # What follows may be cut by line breaks in a kernel's own notes; the next instruction has this field again.
        used = re.search(r'"used_scoped_memory_configs":\[(.*?)\]', text[call.end() :])
        sizes = re.findall(r'"memory_space":"1".*?"size":"(\d+)"', used[1]) if used else []
        kernels.append(TpuKernel(call[1], sum(map(int, sizes))))
    return _report(chip, compiled, kernels)


def compile_h200(fn, *args, mesh: Mesh | None = None, options: dict | None = None) -> Report:
    """Compile for an NVIDIA H200 (sm_90a).

    Raises:
      JaxRuntimeError: what XLA or the PTX assembler says, e.g. that a kernel needs more shared memory than there is.
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


def tpu_bundles(fn, *args, chip: str = "v5e", timeout: int = 600) -> dict[str, dict[str, int]]:
    """What libtpu's final schedule of each Pallas kernel holds, per unit: {kernel: {"bundles": n, "MXU": ...}}.

    A bundle is what a core issues in one cycle, and nearly all of them are the body of one grid step; where the code
    branches, those of both sides count. The other numbers are the slots of each unit that are used, summed over the
    bundles. The dump that this reads makes libtpu slow (a process of its own, 5 to 100 s, or minutes); a kernel that
    is not in it is left out.

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
    """None where there is no such file."""
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
    with jax.set_mesh(mesh), _uncached():
        return jax.jit(fn).lower(*jax.tree.map(_replicate(mesh), args)).compile(compiler_options=options)


@contextlib.contextmanager
def _uncached():
    """Keep what is compiled out of jax's cache on disk: without the device it cannot be read back."""
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
    # Named as the axes of a mesh often are, for code that looks for one of them.
    shape, names = (1, 1, 1, 1), ("data", "fsdp", "context", "tensor")
    return Mesh(np.array(_devices(target)[:1]).reshape(shape), names, axis_types=(AxisType.Auto,) * 4)


@functools.cache
def _devices(target: str) -> list:
    """Those of the topology `target`: a chip in TOPOLOGIES, "v5e:4x4", "h200", "h200:1x1x8"."""
    chip, _, shape = target.partition(":")
    _prepare()
    if chip != "h200":
        return topologies.get_topology_desc(TOPOLOGIES.get(target, target), platform="tpu").devices
    wanted = {"platform": "cuda", "target_config": H200, "topology": shape or "1x1x1"}
    try:
        return topologies.get_topology_desc(chip, **wanted).devices
    except NotImplementedError:  # jax dropped the plugin: it looked for it before the environment was set
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
    """In the process of `tpu_bundles`: compile, print the names of the kernels."""
    with open(path, "rb") as file:
        exported = jax.export.deserialize(file.read())
    avals = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in exported.in_avals]
    args, _ = jax.tree.unflatten(exported.in_tree, avals)
    print(json.dumps([kernel.name for kernel in compile_tpu(exported.call, *args, chip=chip).kernels]))


if __name__ == "__main__":
    _dump_bundles(*sys.argv[1:])
