"""HTML: one page without scripts or outside files, readable on a phone and in dark mode."""

import html
from collections.abc import Iterable, Sequence
from typing import Any

_TEXT, _LONG = (
    ' class="text"',
    ' class="long"',
)  # a cell with words, with so many that they need several lines
_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #222; --soft: #5c5f66; --line: #ddd; --stripe: #f6f7f9;
  --accent: #0072b2; --bad: #d55e00; }
@media (prefers-color-scheme: dark) {
  :root { --page: #1b1d21; --ink: #e8e8ea; --soft: #a9acb3; --line: #3a3d44; --stripe: #24272c; --accent: #56b4e9;
    --bad: #ff8a4a; }
}
* { box-sizing: border-box; }
body { background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; margin: 0 auto;
  max-width: 1000px; padding: 1.5rem; overflow-wrap: break-word; -webkit-text-size-adjust: 100%; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .7rem; }
.lead { font-size: 1.08rem; border-left: 4px solid var(--accent); padding-left: 1rem; margin: 0 0 1.5rem; }
.lead p { margin: 0 0 .6rem; }
.soft { color: var(--soft); font-size: .92rem; }
figure { margin: 0 0 1rem; }
img { max-width: 100%; height: auto; display: block; }
.wide { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 0; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; white-space: nowrap; color: var(--soft); padding-bottom: .3rem; }
th, td { padding: .35rem .8rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child { text-align: left; padding-left: 0; position: sticky; left: 0; background: var(--page);
  white-space: normal; min-width: 7.5rem; max-width: 16rem; overflow-wrap: anywhere; }
.text { text-align: left; }
td.long { text-align: left; white-space: normal; min-width: 11.5rem; max-width: 26rem; overflow-wrap: anywhere; }
tbody tr:nth-child(even) > * { background: var(--stripe); }
details { margin-top: .6rem; color: var(--soft); font-size: .92rem; }
summary { cursor: pointer; }
.failed { border-left: 4px solid var(--bad); padding-left: 1rem; }
.failed h2 { margin-top: 0; }
@media (max-width: 640px) {
  body { padding: 1rem; }
  h1 { font-size: 1.4rem; }
  .lead { padding-left: .8rem; font-size: 1rem; }
  th, td { padding: .35rem .6rem; }
  th:first-child { max-width: 9rem; }
}
"""


def page(title: str, sections: Iterable[str]) -> str:
    """The whole page as text."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{esc(title)}</title>"
    )
    body = f"<h1>{esc(title)}</h1>{''.join(sections)}"
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head><body>{body}</body></html>\n'


def lead(paragraphs: Sequence[str]) -> str:
    """The opening of a page: plain text, a paragraph each."""
    return f'<div class="lead">{"".join(f"<p>{esc(text)}</p>" for text in paragraphs)}</div>\n'


def section(title: str, body: str) -> str:
    """A section of a page; `body` is HTML."""
    return f"<section><h2>{esc(title)}</h2>{body}</section>\n"


def notes(texts: Iterable[str]) -> str:
    """Remarks below a plot: plain text, a paragraph each."""
    return "".join(f'<p class="soft">{esc(text)}</p>' for text in texts)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "") -> str:
    """An HTML table. Text is left-aligned, numbers right-aligned; the first cell of a row is its header."""
    words = [bool(rows) and all(isinstance(row[i], str) for row in rows) for i in range(len(head))]
    top = "".join(
        f'<th scope="col"{_TEXT * word}>{esc(name)}</th>' for name, word in zip(head, words, strict=True)
    )
    lines = []
    for first, *rest in rows:
        cells = "".join(f"<td{_kind(value)}>{esc(_cell(value))}</td>" for value in rest)
        lines.append(f'<tr><th scope="row">{esc(str(first))}</th>{cells}</tr>')
    title = f"<caption>{esc(caption)}</caption>" if caption else ""
    body = f"<thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="wide"><table>{title}{body}</table></div>'


def _kind(value: Any) -> str:
    return "" if not isinstance(value, str) else _LONG if len(value) > 24 else _TEXT


def _cell(value: Any) -> str:
    return (value or "–") if isinstance(value, str) else number(value)


def number(value: Any) -> str:
    """A number as tables show it."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"


def spoken(name: str) -> str:
    """`loss_by_position` -> `Loss by position`."""
    words = name.replace("_", " ")
    return words[:1].upper() + words[1:]


def esc(text: str) -> str:
    return html.escape(text, quote=True)
