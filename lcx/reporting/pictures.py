"""Plots in four versions, for wide and narrow screens, light and dark, of which the browser shows the one that fits."""

import base64
import dataclasses
import io
import sys
import textwrap
from collections.abc import Callable
from typing import Any

from lcx.reporting.pages import esc

Draw = Callable[[Any], None]  # draws on matplotlib axes
NARROW = 640  # pixels; a screen up to this width shows the narrow version
_WIDE_SIZE, _NARROW_SIZE = (
    (9.0, 4.4),
    (3.72, 3.3),
)  # inches of 96 pixels; the narrow one fits a screen of 390 pixels
_DPI = 144  # of PNG files


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A plot as HTML, and the files to write next to the page, {name: contents}."""

    html: str
    files: dict[str, bytes]


def drawn(name: str, draw: Draw, alt: str) -> Drawn:
    """A plot in all versions. If drawing fails, the HTML is a note with the reason."""
    try:
        versions = [
            (narrow, dark, picture(draw, dark=dark, narrow=narrow, form="svg"))
            for narrow in (True, False)
            for dark in (True, False)
        ]
        png = picture(draw)
    except Exception as error:  # the report is still useful without one plot
        print(f"warning: no plot of {name}: {type(error).__name__}: {error}", file=sys.stderr)
        return Drawn(f"<p>No plot: {esc(str(error))}</p>", {})
    sources = ""
    for narrow, dark, svg in versions[:-1]:
        media = [f"(max-width: {NARROW}px)"] * narrow + ["(prefers-color-scheme: dark)"] * dark
        sources += f'<source media="{" and ".join(media)}" srcset="{_data(svg)}">'
    image = f'<img src="{_data(versions[-1][2])}" alt="{esc(alt)}">'
    stem = "".join(c if c.isalnum() else "_" for c in name)
    return Drawn(f"<figure><picture>{sources}{image}</picture></figure>", {f"{stem}.png": png})


def _data(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def picture(draw: Draw, *, dark: bool = False, narrow: bool = False, form: str = "png") -> bytes:
    """A file ("png" or "svg") as bytes, of what `draw` puts on matplotlib axes; the same bytes every time."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from lcx.evals.support import figures

    with matplotlib.rc_context({**figures.theme(dark=dark, narrow=narrow), "svg.hashsalt": "lcx"}):
        figure = Figure(figsize=_NARROW_SIZE if narrow else _WIDE_SIZE, dpi=_DPI, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        draw(axes)
        title = axes.get_title(loc="left")
        axes.set_title("\n".join(textwrap.wrap(title, 44 if narrow else 92)))
        out = io.BytesIO()
        figure.savefig(out, format=form, metadata={"Date": None} if form == "svg" else None)
    return out.getvalue()
