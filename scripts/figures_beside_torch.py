"""The figures of training steps and of generation beside transformers on torch."""

from figure_text import number, ratio, table, with_source


def training(result: dict) -> str:
    head = [
        "model",
        "",
        "T",
        "rows",
        "lcx, tokens/s",
        "transformers, tokens/s",
        "speed over it",
        "least to most",
    ]
    rows = [
        [
            *(row.get("model", "base"), row.get("dtype", "float32"), str(row["T"]), str(row["batch"])),
            *(number(row[f"{side}_tokens_per_second"]) for side in ("lcx", "torch")),
            ratio(row["speed_ratio_median"]),
            " to ".join(f"{x:.2f}" for x in row["speed_ratio_min_max"]),
        ]
        for row in result["speed"]
    ]
    text = f"{table(head, rows)}\n\n{slower_steps(result)}"
    if memory := result.get("memory"):
        ours, peer = (side["step_mib"] / 1024 for side in memory["sides"])
        text += f"\n\nPeak memory of a step at T = {memory['T']}: {ours:.2f} GiB against {peer:.2f} GiB "
        text += f"({memory['ratio']:.2f}x)."
    return with_source(result, text)


def slower_steps(result: dict) -> str:
    """Which cases of a training step take longer than with torch."""
    behind = [
        f"`{row.get('model', 'base')}` in {row.get('dtype', 'float32')} at {row['T']}"
        for row in result["speed"]
        if row["speed_ratio_median"] < 0.995
    ]
    return f"Slower than torch: {', '.join(behind)}." if behind else "No case is slower than torch."


def training_range(result: dict) -> str:
    """The lowest and the highest speed of all cases."""
    found = [row["speed_ratio_median"] for row in result["speed"]]
    return f"{ratio(min(found))} to {max(found):.2f}x"


def training_line(result: dict) -> str:
    said: dict[str, list[str]] = {}
    for row in result["speed"]:
        if row.get("model", "base") == "base":
            told = f"{ratio(row['speed_ratio_median'])} at {row['T']}"
            said.setdefault(row.get("dtype", "float32"), []).append(told)
    speeds = "; ".join(f"{dtype} {', '.join(told)} tokens" for dtype, told in said.items())
    speeds += "".join(  # other models only where they are behind
        f"; `{row['model']}` in {row['dtype']} {ratio(row['speed_ratio_median'])}"
        for row in result["speed"]
        if row.get("model", "base") != "base" and row["speed_ratio_median"] < 0.995
    )
    memory = result.get("memory")
    return f"speed: {speeds}" + (f"; {memory['ratio']:.2f}x the memory at {memory['T']}" if memory else "")


def generation(result: dict) -> str:
    head = ["context", "rows", "", "first token, speed", "lcx, tokens/s", "transformers, tokens/s"]
    head.append(f"speed, {result['new_tokens'] + 1} tokens in all")
    sides = ("lcx", "transformers")
    rows = [
        [
            *(str(row["context"]), str(row["rows"]), row["dtype"], ratio(row["prefill_speed"]["median"])),
            *(number(rate) if (rate := row["decode_tokens_per_second"][side]) else "" for side in sides),
            ratio(row["whole_speed"]["median"]),
        ]
        for row in sorted(
            result["rows"], key=lambda row: (row["dtype"] != "float32", row["rows"], row["context"])
        )
    ]
    said = []
    for key, what in (("prefill_speed", "The first token"), ("whole_speed", "All tokens together")):
        behind = sum(row[key]["median"] < 0.995 for row in result["rows"])
        said.append(f"{what} took longer than with transformers in {behind} of {len(rows)} cases.")
    return with_source(result, f"{table(head, rows)}\n\n{' '.join(said)}")
