"""The figure of benchmarks/evaluation.py: what an evaluation costs beside a plain forward pass."""

from figure_text import number, table, with_source


def evaluation(result: dict) -> str:
    rows = [
        [row["evaluation"], *(number(row[key]) for key in ("plain_us_per_token", "us_per_token"))]
        + [f"{row['over_plain']['median']:.2f}"]
        for row in result["rows"]
    ]
    head = ["evaluation", "plain pass, µs a token", "evaluation, µs a token", "time over a plain pass"]
    seconds = number(result["passkey_320_trials_s"])
    passkey = f"A passkey of 320 trials, up to {result['length']} tokens: {seconds} s."
    return with_source(result, f"{table(head, rows)}\n\n{passkey}")


def ruler_samples(result: dict) -> str:
    longest = max(row["length"] for row in result["rows"])
    tasks = len({row["task"] for row in result["rows"]})
    lengths = len({row["length"] for row in result["rows"]})
    processes = result["threads"]["lcx"]["processes"]
    made = (
        f"The {result['samples']:,} samples of {tasks} tasks at {lengths} lengths up to {longest:,} tokens, with the "
        f"tokenizer of Llama 2, take {number(result['seconds'])} s with {processes} processes."
    )
    return with_source(result, made)
