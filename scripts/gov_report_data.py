"""Turns GovReport into conversations, to fine-tune on summaries with the loss of the prompt masked.

    python scripts/gov_report_data.py --input=train.jsonl --tokenizer=/path/to/hf_folder --output=gov_report.jsonl

Each row of the input has `report` and `summary`, as in the layout 'gov_report' of `LongDocuments`. The prompt is that
of the evaluation; a report is cut to its first 15000 tokens and a summary to its first 1000, as published.
`configs/extend/gov_report.gin` trains on the output.
"""

import argparse
import json
import sys

from lcx.data import load_tokenizer
from lcx.errors import UserError
from lcx.evals.support.documents_qa import rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", required=True, metavar="FILE")
    parser.add_argument("--tokenizer", required=True, metavar="PATH")
    parser.add_argument("--output", required=True, metavar="FILE")
    parser.add_argument("--report_tokens", type=int, default=15000)
    parser.add_argument("--summary_tokens", type=int, default=1000)
    args = parser.parse_args()
    try:
        tokenizer = load_tokenizer(args.tokenizer)
        found = rows.read(args.input, "gov_report", limit=None)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    cut = 0
    with open(args.output, "w", encoding="utf-8") as file:
        for row in found:
            prompt, lost = rows.prompt(row, tokenizer, room=sys.maxsize, document=args.report_tokens)
            ids = tokenizer.encode(row.answers[0]).tolist()
            summary = (
                tokenizer.decode(ids[: args.summary_tokens])
                if len(ids) > args.summary_tokens
                else row.answers[0]
            )
            cut += lost > 0 or len(ids) > args.summary_tokens
            turns = [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": f" {summary.strip()}"},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    print(f"{args.output}: {len(found)} reports with summaries, {cut} of them cut", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
