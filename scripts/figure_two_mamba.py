"""The texts of docs_figures.py about 2Mamba."""

from figure_text import number, table, with_source


def decoding(result: dict) -> str:
    """Tokens a second and bytes of the cache of each mixer, by the tokens before."""
    names = {"two_mamba": "2Mamba", "two_mamba_e": "2Mamba-E", "mamba2": "Mamba-2", "softmax": "softmax"}
    cells = {(row["context"], row["mixer"]): row for row in result["rows"]}
    rows = [
        [f"{length:,}"]
        + [
            f"{cells[length, name]['tokens_per_second']:.0f}, {cells[length, name]['cache_bytes'] / 1e6:.3g} MB"
            for name in names
        ]
        for length in sorted({length for length, _ in cells})
    ]
    return table(["Tokens before", *(f"{name}: tokens/s, cache" for name in names.values())], rows)


def second_order_forms(result: dict) -> str:
    """Tokens a CPU second of the quadratic and the chunked form with a decay that forgets nothing, heads of 64."""
    seconds = {
        (row["T"], row["form"]): row["seconds"]
        for row in result["records"]
        if (row["H"], row["decay"]) == (64, "slow")
    }
    lengths = sorted({length for length, _ in seconds})
    rows = [
        [f"{length:,}", *(number(length / seconds[length, form]) for form in ("tiles", "states", "default"))]
        for length in lengths
    ]
    return with_source(result, table(["T", "quadratic", "chunked", "what lcx picks"], rows))


def ablations(result: dict) -> str:
    """For each figure: its losses beside those of the paper, which pairs of runs have its order, the picture."""
    spread = 2 * result["noise"]
    opening = (
        f"Two runs count as different if their losses are more than {spread:.3f} apart: twice the standard deviation "
        "of the difference of two models with one seed, taken from the six models with three seeds."
    )
    every = {
        (pair["paper"], pair["ours"]): pair["verdict"] for figure in result["figures"] for pair in figure["pairs"]
    }
    counts = [list(every.values()).count(name) for name in ("holds", "reversed", "open")]
    total = (
        f"Of {len(every)} pairs of runs of which the paper has both losses, {counts[0]} have its order here, "
        f"{counts[1]} the reversed one, and {counts[2]} are too close to tell."
    )
    if missing := result["missing"]:
        total += f" {len(missing)} of {len(result['runs']) + len(missing)} runs have not been made yet."
    picture = "![Differences of two losses here and in the paper](../img/two_mamba_orders.svg)"
    return "\n\n".join([opening, total, picture, *(_figure(figure, spread) for figure in result["figures"])])


def _figure(figure: dict, spread: float) -> str:
    rows = [
        [line["label"], f"{line['loss']:.3f}", "" if line["paper"] is None else f"{line['paper']:.3f}"]
        for line in figure["lines"]
    ]
    picture = f"![{figure['title']}](../img/two_mamba_ablation_{figure['name']}.svg)"
    name = f"### {figure['title']}"
    return "\n\n".join(
        [name, table(["", "here", f"in the paper, graph {figure['graph']}"], rows), _order(figure, spread), picture]
    )


def _order(figure: dict, spread: float) -> str:
    """One sentence: what of the paper's order is there."""
    by = {name: [pair for pair in figure["pairs"] if pair["verdict"] == name] for name in ("holds", "reversed", "open")}
    if not figure["pairs"]:
        return "The paper has no losses of these at one size."
    parts = [f"{len(by['holds'])} in the paper's order"]
    if by["reversed"]:
        which = "; ".join(f"“{pair['higher']}” is before “{pair['lower']}”" for pair in by["reversed"])
        parts.append(f"{len(by['reversed'])} reversed ({which})")
    if by["open"]:
        parts.append(f"{len(by['open'])} less than {spread:.3f} apart")
    count = len(figure["pairs"])
    return f"Of {count} pairs: {', '.join(parts)}." if count > 1 else f"The pair is {_alone(by, spread)}."


def _alone(by: dict[str, list[dict]], spread: float) -> str:
    if by["open"]:
        return f"less than {spread:.3f} apart"
    return "in the paper's order" if by["holds"] else "in the reversed order"
