"""Score the variants of a VCF file (or a table) with a model of DNA, and write a table and an annotated VCF file.

Examples:
  python -m lcx.variants --checkpoint=path/to/evo2_7b.pt --fasta=genome.fa --variants=calls.vcf.gz --output=scores.tsv
  python -m lcx.variants --checkpoint=path/to/evo2_7b.pt --fasta=genome.fa.bgz --variants=calls.vcf \\
      --output=scores.tsv --annotated=scored.vcf --window=8192 --both_strands

A score is log p(window with the alternative) - log p(window with the reference) in nats; both windows have the same
length. What cannot be scored is listed with the reason and counted. Results are written while the command runs
(OUTPUT.partial), and the same command continues where it was stopped.
"""

import sys

from lcx import config
from lcx.config.common_flags import add_loading, add_sequences


def main(argv=None) -> int:
    parser = config.parser(__doc__, gin=False, imports=True)
    add_loading(parser)
    parser.add_argument(
        "--fasta", required=True, metavar="PATH", help="the reference: a FASTA file, a glob or a folder"
    )
    parser.add_argument(
        "--variants",
        required=True,
        metavar="FILE",
        help="a VCF file, or a table with the columns chrom, pos, ref, alt and perhaps label (1: damaging)",
    )
    parser.add_argument("--output", required=True, metavar="FILE.tsv", help="the table to write, a row per alternative")
    parser.add_argument(
        "--annotated", metavar="FILE.vcf", help="also write the lines of the VCF file with LCX_SCORE in INFO"
    )
    add_sequences(parser, regions="score only the variants in these regions")
    parser.add_argument(
        "--strict", action="store_true", help="stop, before scoring, if a variant cannot be scored"
    )
    return config.run(parser, "lcx.genomes:score_variants", argv)


if __name__ == "__main__":
    sys.exit(main())
