"""A plan as one JSON object, and as text for a terminal."""

from typing import Any

from jax.sharding import Mesh

from lcx import parameters
from lcx.planning import cpu_speed, roofline, topology
from lcx.planning.buffers import Buffer, largest
from lcx.planning.compiled import Step, mesh_of
from lcx.planning.topology import Topology
from lcx.trainer import Trainer
from lcx.training import division
from lcx.training.run import trained_sizes

CPU = (
    "what libraries take for products on several threads is 32 MiB, the most that was measured for small models "
    "(benchmarks/plan_errors.py)",
)
MEMORY = (
    "the peak is that of one training step: loading the model, evaluation and saving are not counted",
    "the compiler's arguments, results and temporary arrays are all counted as alive at the same time",
)


def plan(
    step: Step, trainer: Trainer, place: Topology, longest: int | None, notes: list[str]
) -> dict[str, Any]:
    """The keys are stable; a value that cannot be known is None. Bytes are of each device, FLOPs of all together."""
    mesh = mesh_of(trainer, place)
    chip = place.chip or cpu_speed.measured(mesh.size, step.run.model.dtype)
    work = roofline.work(step, trainer, dict(mesh.shape), chip)
    time = roofline.time_of(work, chip, mesh.size)
    copies = work.host_bytes > 0 or step.memory.host > 0
    resting = roofline.assumptions(chip, measured=place.chip is None, devices=mesh.size, copies=copies)
    assumptions = [
        *MEMORY,
        *(resting if time else ()),
        *([roofline.LOOPS] if work.estimated else ()),
    ]
    return {
        "topology": place.name,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        **_settings(step, trainer, mesh),
        "parameter_bytes": step.memory.parameters,
        "optimizer_bytes": step.memory.optimizer,
        "batch_bytes": step.memory.batch,
        "activation_bytes": step.memory.rest,
        "runtime_bytes": step.memory.runtime,
        "peak_bytes": step.memory.peak,
        "host_bytes": step.memory.host,
        "host_copy_bytes": None if step.program is None else work.host_bytes,
        "host_memory_bytes": place.host_memory,
        "memory_bytes": place.memory,
        "fits": place.fits(step.memory.peak, step.memory.host),
        "largest_buffers": [_buffer(buffer) for buffer in largest(step, trainer, mesh)],
        "model_flops": work.model_flops,
        "executed_flops": work.executed_flops,
        "collective_bytes": work.collective_bytes,
        **_times(work, time, trainer, place, mesh.size),
        "largest_seq_len": longest,
        "compile_seconds": step.compile_seconds,
        "assumptions": assumptions,
        "notes": [*notes, *division.remarks(trainer, mesh), *(CPU if place.chip is None else ())],
    }


def _settings(step: Step, trainer: Trainer, mesh: Mesh) -> dict[str, Any]:
    return {
        "seq_len": trainer.seq_len,
        "batch_size": trainer.batch_size,
        "accumulation": division.micro_batches(trainer, mesh),
        "remat": step.run.model.remat,
        "steps": trainer.steps,
        "tokens": trainer.batch_size * trainer.seq_len * trainer.steps,
        "model_parameters": parameters.num_params(step.run.model),
        "trained_parameters": sum(trained_sizes(step.run).values()),
    }


def _times(
    work: roofline.Work, time: roofline.Time | None, trainer: Trainer, place: Topology, devices: int
) -> dict[str, float | None]:
    if time is None:
        return dict.fromkeys(_TIME_KEYS)
    seconds = time.total
    peak = devices * place.chip.flops if place.chip else None  # as in training, no MFU without a data sheet
    values = (
        seconds,
        time.overlapped,
        time.compute,
        time.memory,
        time.links,
        time.host,
        None if work.model_flops is None or peak is None else work.model_flops / seconds / peak,
        trainer.batch_size * trainer.seq_len / seconds,
        seconds * trainer.steps / 86400,
        seconds * trainer.steps * devices / 3600,
    )
    return dict(zip(_TIME_KEYS, values, strict=True))


_TIME_KEYS = (
    *("step_seconds", "step_seconds_overlapped", "compute_seconds", "memory_seconds", "link_seconds", "host_seconds"),
    *("mfu", "tokens_per_second", "days", "device_hours"),
)


def _buffer(buffer: Buffer) -> dict[str, Any]:
    return {
        "bytes": buffer.nbytes,
        "dtype": buffer.dtype,
        "shape": list(buffer.shape),
        "what": buffer.what,
        "where": buffer.where,
        "setting": buffer.setting,
    }


def text(plan: dict[str, Any]) -> str:
    """The plan in lines."""
    lines = [
        f"{plan['topology']}, {topology.shape_text(plan['mesh'])}: {plan['batch_size']} rows of {plan['seq_len']} "
        f"tokens, accumulation {plan['accumulation']}, remat {plan['remat']}, {plan['steps']} steps",
        f"model       {plan['model_parameters']:,} parameters, {plan['trained_parameters']:,} train",
        "",
        "memory of each device",
        *(f"  {name:<34}{size(plan[key]):>12}" for name, key in _MEMORY_LINES),
        f"  {'peak':<34}{size(plan['peak_bytes']):>12}{_verdict(plan)}",
    ]
    if plan["host_bytes"]:
        lines.append(f"  {'beside it, in memory of the host':<34}{size(plan['host_bytes']):>12}{_host_verdict(plan)}")
    if plan["largest_seq_len"] is not None:
        lines.append(f"  the longest rows that fit: {plan['largest_seq_len']:,} tokens (within a sixteenth)")
    lines += [
        "",
        "largest arrays of each device" if plan["largest_buffers"] else "(not compiled: it does not fit)",
    ]
    for buffer in plan["largest_buffers"]:
        shape = f"{buffer['dtype']}[{','.join(map(str, buffer['shape']))}]"
        lines.append(f"  {size(buffer['bytes']):>12}  {buffer['what']}: {shape} {buffer['where']}".rstrip())
        lines.append(f"{'':16}smaller with {buffer['setting']}")
    lines += ["", "one step", *_work_lines(plan), "", "assumptions"]
    return "\n".join([*lines, *(f"  - {line}" for line in (*plan["assumptions"], *plan["notes"]))])


_MEMORY_LINES = (
    ("parameters", "parameter_bytes"),
    ("optimizer state", "optimizer_bytes"),
    ("batch", "batch_bytes"),
    ("activations, gradients, temporary", "activation_bytes"),
    ("libraries", "runtime_bytes"),
)


_TIMES = {"products": "compute", "memory": "memory", "links": "link", "copies to the host": "host"}


def _verdict(plan: dict[str, Any]) -> str:
    return _share(plan["peak_bytes"], plan["memory_bytes"])


def _host_verdict(plan: dict[str, Any]) -> str:
    return _share(plan["host_bytes"], plan["host_memory_bytes"])


def _share(needed: int, memory: int | None) -> str:
    if memory is None:
        return ""
    return f"  {needed / memory:.0%} of {size(memory)}: {'fits' if needed <= memory else 'does NOT fit'}"


def _work_lines(plan: dict[str, Any]) -> list[str]:
    flops = plan["model_flops"]
    lines = [
        f"  model FLOPs {'unknown' if flops is None else f'{flops:.3e}'}, executed {plan['executed_flops']:.3e}"
    ]
    sent = plan["collective_bytes"]
    if sent is not None:
        moved = ", ".join(f"{axes} {size(number)}" for axes, number in sent.items()) or "nothing"
        lines.append(f"  each device sends over {moved}" if sent else "  nothing is sent between devices")
    if plan["host_copy_bytes"]:
        lines.append(f"  each device copies to the host's memory and back {size(plan['host_copy_bytes'])}")
    if plan["step_seconds"] is None:
        return lines
    shown = {name: plan[f"{key}_seconds"] for name, key in _TIMES.items() if key != "host" or plan["host_seconds"]}
    parts = ", ".join(f"{name} {seconds:.3g}" for name, seconds in shown.items())
    mfu = "" if plan["mfu"] is None else f", MFU {plan['mfu']:.0%}"
    return [
        *lines,
        f"  estimated {plan['step_seconds']:.3g} s ({parts} s){mfu}, {plan['tokens_per_second']:,.0f} tokens/s",
        f"  the run: {plan['days']:.3g} days, {plan['device_hours']:,.1f} device-hours for {plan['tokens']:,} tokens",
    ]


def size(nbytes: float) -> str:
    """`12.3 GB`, with powers of 1024 and their common names."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:,.2f} GiB"
