"""Embed sequences of any length: activations at named points of a model, pooled or at every position, into a file.

Examples:
  python -m lcx.embed --checkpoint=path/to/evo2_7b.pt --fasta=genes.fa --layers=blocks.28.mlp.l3 --output=genes.parquet
  python -m lcx.embed --checkpoint=path/to/evo2_7b.pt --fasta=genome.fa --layers=20,26.mlp --output=genome.zarr \\
      --window=8192 --overlap=4096 --both_strands
  python -m lcx.embed --checkpoint=path/to/hf_folder --dataset=texts.jsonl --layers=-1 --pool=last --output=texts.npz

A point is layers.N (the residual stream after layer N, counted from 0; -1 is the last), layers.N.input,
layers.N.after_mixer, layers.N.mixer, layers.N.mlp, any module inside such as layers.N.mlp.down_proj, embed or
final_norm; names of vortex and transformers work too. A long sequence is read in pieces of which each continues from
the state of the previous one: memory stays flat, and the result does not depend on the size of the pieces.
"""

import argparse
import sys

from lcx import config
from lcx.config.common_flags import add_loading


def add_texts(parser: argparse.ArgumentParser) -> None:
    """How the files of --dataset are read: settings of lcx.data.Dataset."""
    explained = "with --dataset: jsonl, csv, ... (default: detected)"
    parser.add_argument("--dataset_format", metavar="FORMAT", help=explained)
    parser.add_argument(
        "--text_field", metavar="NAME", help="with --dataset: field of an object, column of a table (default: text)"
    )
    parser.add_argument("--separator", metavar="TEXT", help="with --dataset: splits text files into documents")
    parser.add_argument(
        "--on_bad_line",
        choices=("error", "skip"),
        help="with --dataset: what a row that cannot be read is (default: an error); skipped ones are counted",
    )


def main(argv=None) -> int:
    parser = config.parser(__doc__, gin=False, imports=True)
    add_loading(parser)
    parser.add_argument("--fasta", metavar="PATH", help="sequences: a FASTA file, a glob or a folder")
    parser.add_argument("--regions", metavar="FILE.bed", help="with --fasta: embed these regions, not whole records")
    parser.add_argument("--dataset", metavar="PATH", help="texts instead: a file, glob or folder that training accepts")
    add_texts(parser)
    parser.add_argument("--layers", required=True, metavar="NAMES", help="points, separated by commas")
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="what to write: a name that ends in .parquet, .npz or .zarr"
    )
    parser.add_argument(
        "--pool", choices=("mean", "last", "max", "none"), help="over the tokens (default: mean); none: every position"
    )
    parser.add_argument("--window", type=int, metavar="N", help="embed windows of N tokens (default: whole sequences)")
    parser.add_argument("--overlap", type=int, metavar="N", help="tokens that consecutive windows share (default: 0)")
    parser.add_argument("--piece_length", type=int, metavar="N", help="tokens per forward pass (default: 16384)")
    parser.add_argument(
        "--both_strands",
        action="store_true",
        help="with --fasta: the mean of a sequence and its reverse complement",
    )
    parser.add_argument(
        "--keep_case", action="store_true", help="with --fasta: leave lower-case letters as they are"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return config.run(parser, "lcx.embedding_files:embed_file", argv)


if __name__ == "__main__":
    sys.exit(main())
