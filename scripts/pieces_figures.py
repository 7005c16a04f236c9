"""Tables of rows in pieces, from the files of benchmarks/pieces.py."""

from figure_text import number, table, with_source

LLAMA = (
    "python benchmarks/pieces.py --letters genome.fna.gz --models llama --lengths 65536,131072,262144 "
    "--whole_until 0 --twice 0"
)
NAMES = {"linear": "Mamba-2", "two_mamba": "2Mamba", "hyena": "StripedHyena 2", "softmax": "softmax", "llama": "Llama"}


def pieces(result: dict) -> str:
    """A row for each T: seconds of a step and the peak of the process, whole and in pieces, of each model."""
    found = {(row["model"], row["T"], row["piece"] is not None): row for row in result["rows"]}
    models = list(dict.fromkeys(row["model"] for row in result["rows"]))
    ways = [(model, cut) for model in models for cut in (False, True)]

    def cell(row: dict | None) -> str:
        return f"{row['seconds']:,.3g} s, {row['peak_resident_mib']:,} MiB" if row else ""

    head = ["T", *(f"{NAMES[model]}, {'in pieces' if cut else 'whole'}" for model, cut in ways)]
    rows = [
        [f"{T:,}", *(cell(found.get((model, T, cut))) for model, cut in ways)]
        for T in sorted({row["T"] for row in result["rows"]})
    ]
    return with_source(result, table(head, rows))


def pieces_llama(result: dict) -> str:
    """Memory alone: the step of the longest row was taken beside other work."""
    head = ["T", "temporaries, MiB", "peak of the process, MiB", "loss"]
    rows = [
        [f"{row['T']:,}", number(row["temporary_mib"]), number(row["peak_resident_mib"]), f"{row['losses'][0]:.4f}"]
        for row in result["rows"]
    ]
    return f"{table(head, rows)}\n\nMade by `{LLAMA}`."
