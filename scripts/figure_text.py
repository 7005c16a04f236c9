"""How measured results are told on the pages: tables, numbers, and the line that says where they come from."""


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]).replace(
        " --- ", "---"
    )


def number(x: float | None) -> str:
    """Two or three digits that mean something."""
    if x is None:
        return ""
    return f"{float(f'{x:.3g}'):,.0f}" if x >= 20 else f"{x:.2g}"


def ratio(x: float) -> str:
    """Of a peer's time over ours, told alike in both directions."""
    return f"{x:.2f}x" + (" (slower)" if x < 0.995 else "")


def source(result: dict) -> str:
    """The line below a table: where, with what, and when it was measured."""
    named = {side.partition(",")[0]: [] for side in result["threads"]}  # a peer with two kinds of pages is named once
    for side, given in result["threads"].items():
        named[side.partition(",")[0]].append(_threads(given))
    threads = ", ".join(f"{side} {' or '.join(given)}" for side, given in named.items())
    versions = result["versions"]
    packages = ", ".join(
        f"{name} {versions[name]}" for name in ("jax", "torch", "transformers") if name in versions
    )
    machine, watch = result["machine"], result["watch"]
    each = any("pages" in given for given in result["threads"].values())  # each side says its own
    pages = f"; memory in pages of {machine['malloc_pages']}" if "malloc_pages" in machine and not each else ""
    return (
        f"Measured on {machine['cpu']}; other processes used {watch['other_cpu_seconds']} CPU seconds during "
        f"{watch['seconds']} s; threads: {threads}{pages}; {packages}; commit {machine['commit']}, {result['created']}."
    )


def _threads(given: dict) -> str:
    devices = given.get("devices", 1)
    more = [f"{devices} devices"] if devices > 1 else []
    more += [f"pages of {given['pages']}"] if "pages" in given else []
    return f"{given.get('threads', '?')}" + (f" ({', '.join(more)})" if more else "")


def with_source(result: dict, text: str) -> str:
    return f"{text}\n\n{source(result)}"
