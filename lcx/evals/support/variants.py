"""Variants of a sequence: read from VCF or a table, and the windows of letters around them."""

import csv
import dataclasses
from collections.abc import Iterator, Mapping

from lcx.data.readers import streams
from lcx.errors import UserError
from lcx.evals.support.dna import naming

_COLUMNS = ("chrom", "pos", "ref", "alt")


@dataclasses.dataclass(frozen=True)
class Variant:
    """A variant as in VCF: `ref` at the 1-based position `pos` of record `chrom` is replaced by `alt`.

    `label` is 1 if the variant is damaging, 0 if not, None if unknown.
    """

    chrom: str
    pos: int
    ref: str
    alt: str
    label: int | None = None

    def __str__(self) -> str:
        return f"{self.chrom}:{self.pos}:{self.ref}>{self.alt}"


def read_variants(path: str) -> Iterator[Variant]:
    """The variants of a VCF file or of a table with a header. A line with several alternatives gives several variants.

    In a table, quotes enclose a cell as in CSV; in a VCF file they have no meaning. The file may be compressed.

    Raises:
      UserError: the file does not exist or has no variants, a column is missing, or a line cannot be parsed.
    """
    lines = _lines(path)
    number, first = next(lines, (0, ""))
    if not first:
        raise UserError(f"{path} holds no variant: change VariantEffects.variants")
    delimiter = "\t" if "\t" in first else ","
    header = [name.strip().lower().lstrip("#") for name in next(csv.reader([first], delimiter=delimiter))]
    missing = [name for name in _COLUMNS if name not in header]
    if missing:
        raise UserError(
            f"{path} has the columns {str(header)[:200]}, expected {', '.join(_COLUMNS)}: {missing[0]} is missing"
        )
    is_vcf = first.startswith("#CHROM")
    rows = ((n, line.split("\t")) for n, line in lines) if is_vcf else _table(path, lines, delimiter)
    for number, cells in rows:
        row = dict(zip(header, (cell.strip() for cell in cells)))
        yield from _variants(row, f"{path}, line {number}", header)


def _table(path: str, lines: Iterator[tuple[int, str]], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    numbered = list(lines)
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader([f"{text}\n" for _, text in numbered], delimiter=delimiter, strict=True)
    try:
        for cells in reader:
            yield numbered[reader.line_num - 1][0], cells
    except csv.Error as error:
        place = f"{path}, line {numbered[max(0, reader.line_num - 1)][0]}"
        raise UserError(f"{place}: {error}; correct it, or change VariantEffects.variants") from None


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """(line number, line) of a file, without VCF comments (##) and empty lines."""
    with naming("VariantEffects.variants"):
        for number, (line, _) in enumerate(streams.lines(path), start=1):
            text = streams.decode(line, f"{path}, line {number}").rstrip("\r\n")
            if text.strip() and not text.startswith("##"):
                yield number, text


def _variants(row: Mapping[str, str], place: str, header: list[str]) -> list[Variant]:
    try:
        label = row.get("label", "")
        if label not in ("", ".", "0", "1") or not row["pos"].isdecimal():
            raise ValueError
        return [
            Variant(
                row["chrom"], int(row["pos"]), row["ref"], alt, int(label) if label in ("0", "1") else None
            )
            for alt in row["alt"].split(",")
        ]
    except (KeyError, ValueError):
        raise UserError(
            f"{place}: {str(list(row.values()))[:200]}, expected {str(header)[:200]}, with a whole number for pos (and"
            " 0 or 1 for label, if there is one)"
        ) from None


def obstacle(variant: Variant, contigs: Mapping[str, str], *, letters: int, sequences: str) -> str | None:
    """The reason why a variant cannot be scored in windows of `letters` letters, or None."""
    if variant.alt in ("", "."):
        return "it has no alternative allele"
    if variant.alt == "*":
        return "alt * marks a deletion that another line describes"
    if not (variant.ref.isalpha() and variant.alt.isalpha()):
        return "it is not a plain sequence: expected letters for ref and alt"
    if variant.chrom not in contigs:
        return f"its chrom is not a record of {sequences}, which has {', '.join(list(contigs)[:5])}: change chrom"
    text, at = contigs[variant.chrom], variant.pos - 1
    found = text[at : at + len(variant.ref)] if at >= 0 else ""
    if found.upper() != variant.ref.upper():
        return (
            f"{sequences} has {found[:40] or 'nothing'!r} there, expected ref {variant.ref[:40]!r}: positions count"
            " from 1; is it the same assembly?"
        )
    length = _length(variant, text, letters)
    if max(len(variant.ref), len(variant.alt)) > length - length // 2:
        return f"it is longer than half the window of {length} letters: raise VariantEffects.window"
    return None


def windows_around(variant: Variant, text: str, *, letters: int) -> tuple[str, str]:
    """(window with ref, window with alt), both with `letters` letters, or as many as the shorter sequence has.

    The variant starts in the middle of both windows, which start at the same letter. Near an end of the sequence each
    window shifts to stay inside its own sequence; near the right end the two may then start at different letters.
    """
    at, length = variant.pos - 1, _length(variant, text, letters)
    after = at + len(variant.ref)
    start = _start(at, length, len(text))
    ref = text[start : start + length]
    start = _start(at, length, len(text) + len(variant.alt) - len(variant.ref))
    return ref, (text[start:at] + variant.alt + text[after : after + length])[:length]


def _length(variant: Variant, text: str, letters: int) -> int:
    return min(letters, len(text), len(text) + len(variant.alt) - len(variant.ref))


def _start(at: int, length: int, total: int) -> int:
    return max(0, min(at - length // 2, total - length))
