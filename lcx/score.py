"""Score sequences with a model of DNA: the log-likelihood of every record, and the probabilities of every letter.

Examples:
  python -m lcx.score --checkpoint=path/to/evo2_7b.pt --fasta=genes.fa --output=scores.tsv
  python -m lcx.score --checkpoint=path/to/evo2_7b.pt --fasta=genome.fa --regions=exons.bed --output=scores.tsv \\
      --per_position=letters.parquet --tag='|d__Bacteria;p__Pseudomonadota|'

Sequences longer than the window are scored with overlapping windows, every letter once. The table has the sum and the
mean of log p in nats; --per_position adds log p, the entropy and the probabilities of A, C, G and T at every letter.
"""

import sys

from lcx import config
from lcx.config.common_flags import add_loading, add_sequences


def main(argv=None) -> int:
    parser = config.parser(__doc__, gin=False, imports=True)
    add_loading(parser)
    parser.add_argument("--fasta", required=True, metavar="PATH", help="a FASTA file, a glob or a folder")
    parser.add_argument("--output", required=True, metavar="FILE.tsv", help="the table to write, a row per sequence")
    parser.add_argument("--per_position", metavar="FILE.parquet", help="also write a row per letter")
    parser.add_argument(
        "--stride", type=int, metavar="N", help="tokens between the starts of windows (default: half a window)"
    )
    add_sequences(parser, regions="score these regions instead of whole records")
    return config.run(parser, "lcx.genomes:score_sequences", argv)


if __name__ == "__main__":
    sys.exit(main())
