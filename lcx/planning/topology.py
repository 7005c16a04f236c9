"""Devices by name: "v5p:4x4x4", "v5e:16x16", "v6e:4x4", "h200:8", "h100:16", "cpu:2"; and their data sheets."""

import contextlib
import dataclasses
import math
import os
import re
from typing import Any

import jax
import numpy as np

from kernels_pallas import aot
from lcx.config import plugins
from lcx.errors import UserError, first_line
from lcx.planning import silence
from lcx.wording import quantity

EXAMPLES = "v5e:16x16, v5p:4x4x4, v6e:4x4, h100:8, h200:8 or cpu:2"


@dataclasses.dataclass(frozen=True)
class Host:
    """The machine that devices are in.

    Attributes:
      link: bytes/s between its memory and each device, in one direction.
      memory: bytes of it.
      devices: how many it has.
    """

    link: float
    memory: int
    devices: int


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device, from its vendor's data sheet.

    Attributes:
      name: what it is called.
      memory: bytes that a program of jax can use.
      flops: dense bfloat16 products, FLOP/s.
      bandwidth: of its memory, bytes/s.
      link: bytes/s that it sends along one axis of the mesh, to devices near it.
      far: the same to devices beyond `near`.
      near: devices that share the fast links; 0: all.
      host: the machine that it is in; None for CPUs, which are that machine.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    link: float
    far: float
    near: int = 0
    host: Host | None = None


# TPUs: cloud.google.com/tpu/docs, and both directions of one torus axis (jax-ml.github.io/scaling-book). The memory is
# what libtpu leaves to a program. GPUs: NVIDIA's data sheets, NVLink in one direction within a host of 8, and a network
# of 400 Gbit/s per GPU between hosts; jax takes 75% of the memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
# Hosts. TPUs: the memory of Google's machines (the same pages; ct5p-hightpu-4t), the links of the scaling book. GPUs:
# PCIe 5.0 x16, and the memory of a DGX H100 or H200.
_DGX = Host(64e9, 2 * 10**12, 8)
TPUS = {
    "v5e": Chip("TPU v5e", int(15.75 * 2**30), 197e12, 819e9, 90e9, 90e9, host=Host(15e9, 512 * 2**30, 8)),
    "v5p": Chip("TPU v5p", int(95.74 * 2**30), 459e12, 2765e9, 180e9, 180e9, host=Host(15e9, 448 * 10**9, 4)),
    "v6e": Chip("TPU v6e", int(31.25 * 2**30), 918e12, 1640e9, 180e9, 180e9, host=Host(32e9, 1536 * 2**30, 8)),
}
GPUS = {
    "h100": Chip("NVIDIA H100 SXM", aot.GPU_MEMORY["h100"], 989e12, 3350e9, 450e9, 50e9, near=8, host=_DGX),
    "h200": Chip("NVIDIA H200", aot.GPU_MEMORY["h200"], 989e12, 4800e9, 450e9, 50e9, near=8, host=_DGX),
}


_MOST_TPUS = {"v5e": 256, "v5p": 8960, "v6e": 256}  # of a pod
_MOST_CPUS, _MOST_GPUS = 4096, 1 << 16  # more would take minutes only to be described


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
      name: as it was asked for.
      chip: their data sheet; None for CPUs, of which only the memory is planned.
      devices: jax's devices, real ones for CPUs and descriptions for others.
      memory: bytes of each device; of CPUs an equal part of this machine's memory; None if unknown.
    """

    name: str
    chip: Chip | None
    devices: Any
    memory: int | None

    @property
    def host_memory(self) -> int | None:
        """Bytes of the host's memory for each device; None if unknown, and for CPUs, which have no other.

        A TPU has its part of a whole host's, as the machines with fewer chips do. GPUs share that of a whole server.
        """
        if self.chip is None or self.chip.host is None:
            return None
        most = self.chip.host.devices
        return self.chip.host.memory // (min(np.size(self.devices), most) if self.chip.near else most)

    def fits(self, peak: int, host: int) -> bool | None:
        """Whether so many bytes fit a device and its part of the host's memory; None if its memory is unknown."""
        if self.memory is None:
            return None
        return peak <= self.memory and (self.host_memory is None or host <= self.host_memory)

    def needed(self, peak: int, host: int) -> int:
        """`peak`, or what is as large a part of the device's memory as `host` is of the host's, if that is more."""
        if self.memory is None or self.host_memory is None:
            return peak
        return max(peak, -(-host * self.memory // self.host_memory))


def find(name: str) -> Topology:
    """The devices of a topology.

    Raises:
      UserError: an unknown name or shape, or the compiler for it is not installed.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    kind = found[1] if found else ""
    if found is None or kind not in (*TPUS, *GPUS, "cpu"):
        raise UserError(f"--topology is {name!r}, expected a kind and a number of devices such as {EXAMPLES}")
    sizes = [int(size) for size in found[2].split("x")]
    if kind in TPUS:
        most = largest(kind)
        if not 0 < math.prod(sizes) <= most:
            raise UserError(f"--topology is {name!r}, expected a slice of 1 to {most} chips, as in {EXAMPLES}")
        return Topology(name, TPUS[kind], _tpus(name), TPUS[kind].memory)
    if len(sizes) > 1 or not sizes[0]:
        raise UserError(f"--topology is {name!r}, expected a number of devices such as {kind}:8")
    if sizes[0] > (most := largest(kind)):
        raise UserError(f"--topology is {name!r}, expected at most {most} devices of this kind")
    if kind == "cpu":
        devices = _cpus(sizes[0])
        return Topology(name, None, devices, _host_memory(len(devices)))
    chip = GPUS[kind]
    return Topology(name, chip, _gpus(name, kind, sizes[0], chip.near), int(chip.memory * _gpu_fraction()))


def largest(kind: str) -> int:
    """The most devices of a kind that one topology may have: of TPUs, the chips of a pod."""
    return _MOST_TPUS.get(kind, _MOST_CPUS if kind == "cpu" else _MOST_GPUS)


def _tpus(name: str) -> Any:
    _check_compiler("tpu")
    try:
        return aot.tpu_devices(*name.split(":"))
    except Exception as error:  # libtpu's own message names what it knows
        raise UserError(
            f"--topology is {name!r}, which libtpu does not know ({first_line(error)}): choose the shape of a slice "
            "that exists, such as v5e:4x4, v5p:2x2x2 or v6e:4x4"
        ) from error


def _gpus(name: str, kind: str, count: int, host: int) -> Any:
    _check_compiler(kind)
    if count > host and count % host:
        raise UserError(f"--topology is {name!r}, expected up to {host} GPUs or whole hosts of {host}")
    return aot.gpu_devices(kind, hosts=max(1, count // host), count=min(count, host))


def _check_compiler(target: str) -> None:
    plugins.show()
    with silence.quiet():
        reason = aot.available(target)
    if reason is not None:
        raise UserError(f"--topology: {reason}; install lcx[aot] (Linux on x86), or plan for cpu:N")


def _cpus(count: int) -> Any:
    with contextlib.suppress(RuntimeError):  # jax has started already
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(
            f"--topology=cpu:{count}: this process has {quantity(len(devices), 'CPU device')}; set "
            f"JAX_NUM_CPU_DEVICES={count}"
        )
    return devices[:count]


def _host_memory(count: int) -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // count
    except (AttributeError, ValueError, OSError):
        return None


def _gpu_fraction() -> float:
    try:
        return float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75"))
    except ValueError:
        return 0.75


def shape_text(mesh_shape: dict[str, int]) -> str:
    """`fsdp=8 x tensor=2`, without axes of one device."""
    return " x ".join(f"{axis}={size}" for axis, size in mesh_shape.items() if size > 1) or "one device"


def spans_hosts(chip: Chip, span: int) -> bool:
    """Whether a group of devices that lie `span` apart in the mesh leaves its host. One of TPUs never does."""
    return bool(chip.near) and span > chip.near


def count(mesh_shape: dict[str, int]) -> int:
    return math.prod(mesh_shape.values())
