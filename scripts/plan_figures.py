"""The figures of docs/results/plans.md: steps that were compiled ahead of time, and not run."""

from figure_text import table

from lcx.planning.topology import largest

MILLION_TOKENS_OF_ONE = (
    "python benchmarks/million_tokens.py --topologies h200:1,v5p:2x2x1 --length 8388608 --piece 16384 "
    "--models linearized,two_mamba,hyena"
)


def plans(result: dict) -> str:
    head = ["model", "devices", "rows", "peak of each", "fits", "largest array", "PFLOP a step", "step", "MFU"]
    rows = []
    for row in result["rows"]:
        if row["topology"].endswith(":1"):
            continue  # see one_gpu
        if "error" in row:
            rows.append([row["name"], row["topology"], "", "not compiled", *["-"] * 5])
            continue
        first = row["largest_buffers"][0] if row["largest_buffers"] else None
        mesh = ", ".join(f"{axis} {size}" for axis, size in row["mesh"].items() if size > 1)
        rows.append([
            row["name"],
            f"{row['topology']} ({mesh})",
            str(row["batch_size"]),
            f"{row['peak_bytes'] / 2**30:.1f} of {row['memory_bytes'] / 2**30:.1f} GiB",
            "yes" if row["fits"] else f"**no**; {_wider(row)}",
            f"{first['bytes'] / 2**30:.1f} GiB, {first['what']}" if first else "-",
            f"{row['executed_flops'] / 1e15:,.3g}",
            f"{row['step_seconds']:.2g} s" if row["step_seconds"] else "-",
            f"{row['mfu']:.0%}" if row["mfu"] else "-",
        ])  # fmt: skip
    return f"{table(head, rows)}\n\nMade by `python benchmarks/plan_table.py`."


def _wider(row: dict) -> str:
    """What should hold a step that does not fit."""
    kind = row["topology"].partition(":")[0]
    mesh = " x ".join(f"{axis}={size}" for axis, size in row["would_fit"].items())
    return f"{mesh} should" if mesh else f"no slice of {kind} (at most {largest(kind)} chips) should"


def one_gpu(result: dict) -> str:
    head = ["row", "peak", "of the host's memory", "step", "MFU"]
    rows = [
        [row["name"], f"{row['peak_bytes'] / 2**30:.1f} GiB", f"{row['host_bytes'] / 2**30:.1f} GiB",
         f"{row['step_seconds']:,.0f} s", f"{row['mfu']:.0%}"]
        for row in result["rows"] if row["topology"] == "h200:1"
    ]  # fmt: skip
    return f"{table(head, rows)}\n\nMade by `python benchmarks/plan_table.py`; times are rooflines."


NAMES = {
    "llama": "Llama",
    "linearized": "linearized",
    "two_mamba": "2Mamba",
    "striped_hyena": "StripedHyena 2",
    "hyena": "StripedHyena 2 without attention",
}


def million_tokens(result: dict) -> str:
    head = ["model", "devices", "peak of each", "fits", "sends", "bytes a device sends in a step"]
    rows = []
    for row in result["rows"]:
        if row["piece"]:
            continue  # see million_tokens_of_one
        if "error" in row:
            rows.append([NAMES[row["model"]], row["topology"], "not compiled", *["-"] * 3])
            continue
        sends = dict.fromkeys(part.partition(" sends ")[2] for part in row["sends"][0].split("; ")[1:])
        rows.append([
            f"{NAMES[row['model']]}, {row['model_parameters'] / 1e9:.2f}B",
            row["topology"],
            f"{row['peak_bytes'] / 2**30:.1f} of {row['memory_bytes'] / 2**30:.1f} GiB",
            "yes" if row["fits"] else "**no**",
            "; ".join(sends),
            f"{sum(sent.values()) / 2**30:.1f} GiB" if (sent := row["collective_bytes"]) is not None else "-",
        ])  # fmt: skip
    return f"{table(head, rows)}\n\nMade by `python benchmarks/million_tokens.py`."


def million_tokens_of_one(result: dict) -> str:
    head = ["model", "device", "tokens of the row", "pieces of", "peak", "fits", "PFLOP a step", "step", "MFU"]
    rows = []
    for row in result["rows"]:
        if not row["piece"]:
            continue
        cut = f"{row['piece']:,}"
        if "error" in row:
            rows.append([NAMES[row["model"]], row["topology"], f"{row['T']:,}", cut, "not compiled", *["-"] * 4])
            continue
        rows.append([
            f"{NAMES[row['model']]}, {row['model_parameters'] / 1e9:.2f}B",
            row["topology"],
            f"{row['T']:,}",
            cut,
            f"{row['peak_bytes'] / 2**30:.1f} of {row['memory_bytes'] / 2**30:.1f} GiB",
            "yes" if row["fits"] else "**no**",
            f"{row['executed_flops'] / 1e15:,.3g}",
            f"{row['step_seconds']:,.3g} s",
            f"{row['mfu']:.0%}",
        ])  # fmt: skip
    return f"{table(head, rows)}\n\nMade by `{MILLION_TOKENS_OF_ONE}`; times are rooflines."
