"""Variants of a sequence: read from VCF or a table line by line, and the windows of letters around them."""

import csv
import dataclasses
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from lcx.data.nucleotides import IUPAC
from lcx.data.readers import streams
from lcx.errors import UserError
from lcx.evals.support.dna import named
from lcx.evals.support.letters import Letters

_COLUMNS = ("chrom", "pos", "ref", "alt")
_LONGEST_CELL = 1 << 24


@dataclasses.dataclass(frozen=True)
class Variant:
    """A variant as in VCF: `ref` at the 1-based position `pos` of record `chrom` is replaced by `alt`.

    `label` is 1 if the variant is damaging, 0 if not, None if unknown. `id` is "." if the file gives none.
    """

    chrom: str
    pos: int
    ref: str
    alt: str
    label: int | None = None
    id: str = "."

    def __str__(self) -> str:
        return f"{self.chrom}:{self.pos}:{self.ref}>{self.alt}"


class Obstacle(NamedTuple):
    """Why a variant cannot be scored: a word for counts and VCF fields, and a sentence."""

    kind: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a file of variants: its text, and the variants that it describes, one per alternative.

    `variants` is empty for a line of a header, whose text the annotated file repeats.
    """

    text: str
    variants: tuple[Variant, ...] = ()


def read_variants(path: str) -> Iterator[Variant]:
    """The variants of `read_lines`."""
    return (variant for line in read_lines(path) for variant in line.variants)


def read_lines(path: str) -> Iterator[Line]:
    """The lines of a VCF file or of a table with a header, with their variants; several alternatives give several.

    In a table, quotes enclose a cell as in CSV; in a VCF file they have no meaning. The file may be compressed.

    Raises:
      UserError: the file does not exist or has no header, a column is missing, or a line cannot be parsed.
    """
    lines = _lines(path)
    for _, text in lines:
        if text.startswith("##"):
            yield Line(text)
            continue
        is_vcf = text.startswith("#CHROM")
        delimiter = "\t" if "\t" in text else ","
        header = [name.strip().lower().lstrip("#") for name in next(csv.reader([text], delimiter=delimiter))]
        if missing := [name for name in _COLUMNS if name not in header]:
            raise UserError(
                f"{path} has the columns {str(header)[:200]}, expected {', '.join(_COLUMNS)}: {missing[0]} is missing"
            )
        yield Line(text)
        break
    else:
        raise UserError(f"{path} holds no variant: change VariantEffects.variants")
    rows = ((n, text, text.split("\t")) for n, text in lines) if is_vcf else _table(path, lines, delimiter)
    for number, text, cells in rows:
        row = dict(zip(header, (cell.strip() for cell in cells)))
        yield Line(text, tuple(_variants(row, f"{path}, line {number}", header)))


def is_vcf(path: str) -> bool:
    """Whether the header is that of VCF."""
    return any(line.text.startswith("#CHROM") for line in _head(path))


def _head(path: str) -> Iterator[Line]:
    for line in read_lines(path):
        yield line
        if not line.text.startswith("##"):
            return


def _table(
    path: str, lines: Iterator[tuple[int, str]], delimiter: str
) -> Iterator[tuple[int, str, list[str]]]:
    csv.field_size_limit(_LONGEST_CELL)
    read_so_far, texts = [1], list[str]()

    def read() -> Iterator[str]:
        for number, text in lines:
            read_so_far[0] = number
            texts.append(text)
            yield f"{text}\n"

    reader = csv.reader(read(), delimiter=delimiter, strict=True)
    try:
        for cells in reader:
            yield read_so_far[0], "\n".join(texts), cells
            texts.clear()
    except csv.Error as error:
        place = f"{path}, line {read_so_far[0]}"
        raise UserError(f"{place}: {error}; correct it, or change VariantEffects.variants") from None


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """(line number, line) of a file, without empty lines. Bytes that are not UTF-8 survive a round trip."""
    with named("VariantEffects.variants"):
        for number, (line, _) in enumerate(streams.lines(path), start=1):
            if b"\0" in line:
                raise UserError(f"{path}, line {number} holds a zero byte: it is not text (VariantEffects.variants)")
            text = line.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape").rstrip("\r\n")
            if text.strip():
                yield number, text


def _variants(row: Mapping[str, str], place: str, header: list[str]) -> list[Variant]:
    try:
        label = row.get("label", "")
        if label not in ("", ".", "0", "1") or not (row["pos"].isascii() and row["pos"].isdecimal()):
            raise ValueError
        known = int(label) if label in ("0", "1") else None
        name = row.get("id", "") or "."
        return [
            Variant(row["chrom"], int(row["pos"]), row["ref"], alt.strip(), known, name)
            for alt in row["alt"].split(",")
        ]
    except (KeyError, ValueError):
        raise UserError(
            f"{place}: {str(list(row.values()))[:200]}, expected {str(header)[:200]}, with a whole number for pos (and"
            " 0 or 1 for label, if there is one)"
        ) from None


def obstacle(
    variant: Variant, contigs: Mapping[str, Letters], *, letters: int, sequences: str
) -> Obstacle | None:
    """The reason why a variant cannot be scored in windows of `letters` letters, or None."""
    if variant.alt in ("", "."):
        return Obstacle("no_alternative", "it has no alternative allele")
    if variant.alt == "*":
        return Obstacle("overlapping_deletion", "alt * marks a deletion that another line describes")
    if not variant.ref or not IUPAC.issuperset(variant.ref + variant.alt):
        return Obstacle("not_plain", "it is not a plain sequence: expected letters of nucleotides for ref and alt")
    if variant.chrom not in contigs:
        known = ", ".join(list(contigs)[:5])
        return Obstacle("unknown_contig", f"its chrom is not a record of {sequences}, which has {known}: change chrom")
    text, at = contigs[variant.chrom], variant.pos - 1
    found = text[at : at + len(variant.ref)] if at >= 0 else ""
    if found.upper() != variant.ref.upper():
        return Obstacle(
            "other_reference",
            f"{sequences} has {found[:40] or 'nothing'!r} there, expected ref {variant.ref[:40]!r}: positions count"
            " from 1; is it the same assembly?",
        )
    length = _length(variant, text, letters)
    if max(len(variant.ref), len(variant.alt)) > length - length // 2:
        reason = f"it is longer than half the window of {length} letters: raise VariantEffects.window"
        return Obstacle("too_long", reason)
    return None


def windows_around(variant: Variant, text: Letters, *, letters: int) -> tuple[str, str]:
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


def _length(variant: Variant, text: Letters, letters: int) -> int:
    return min(letters, len(text), len(text) + len(variant.alt) - len(variant.ref))


def _start(at: int, length: int, total: int) -> int:
    return max(0, min(at - length // 2, total - length))
