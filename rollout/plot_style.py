"""How every picture looks: size, type, colours and titles. Needs matplotlib when a picture is drawn, and not before.

Invariants:
- A picture is as wide as a page of text (`WIDTH`), so its type is readable where a README shows it.
- A title says what was found. What is drawn stands under it, in small type, with unit, count or error.
- Two series of one panel differ in colour and in marker or dash. The colours are told apart by colour-blind eyes too
  (M. Okabe and K. Ito, Color Universal Design).
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..files import whole_file

BLUE, ORANGE, GREEN, PINK, SKY, GOLD, BLACK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#B8860B", "#222222"
GREY, SOFT = "#8A8F98", "#59626D"
COLOURS = (BLUE, ORANGE, GREEN, PINK, BLACK, SKY, GOLD)
_MARKERS = "osD^vPX"
_DASHES = ("-", "--", ":", "-.")
WIDTH = 8.3
"""Inches. At DPI a picture has twice the pixels of a README's column, for dense screens."""
DPI = 200
_STYLE: Any = {
    "font.size": 8.5, "axes.labelsize": 8.5, "axes.titlesize": 9.5, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "legend.fontsize": 8, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": SOFT, "xtick.color": SOFT, "ytick.color": SOFT, "axes.labelcolor": BLACK, "text.color": BLACK,
    "axes.grid": True, "grid.color": "#E3E6EA", "grid.linewidth": 0.7, "axes.axisbelow": True, "lines.linewidth": 1.6,
    "lines.markersize": 4.5, "errorbar.capsize": 2.0, "figure.facecolor": "white", "savefig.facecolor": "white",
}  # fmt: skip


def series(i: int) -> dict[str, Any]:
    """Colour, marker and dash of series i; no two of the first 28 are alike."""
    return {"color": COLOURS[i % len(COLOURS)], "marker": _MARKERS[i % len(_MARKERS)],
            "linestyle": _DASHES[i // len(COLOURS) % len(_DASHES)]}  # fmt: skip


@contextmanager
def picture(
    path: str | os.PathLike[str], rows: int, columns: int, height: float, detail: str = "", **options: Any
) -> Iterator[Any]:
    """Yields the axes of a figure, as `Figure.subplots` gives them with `squeeze=False`; the PNG is written when the block ends.

    Args:
        height: inches.
        detail: what holds for all panels; it stands at the foot.
        options: of `Figure.subplots`.

    Raises:
        StorageError: the picture could not be written; what was there before stays.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context(_STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, wspace=0.03, hspace=0.03)
        figure = Figure(figsize=(WIDTH, height), layout=layout)
        yield figure.subplots(rows, columns, squeeze=False, **options)
        if detail:
            figure.supxlabel("\n".join(textwrap.wrap(detail, 130)), fontsize=7.5, color=SOFT, x=0.01, ha="left")
        with whole_file(path) as temporary:
            figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})


def head(axes: Any, finding: str, what: str, width: int = 46) -> None:
    """The title of a panel: what was found, and under it what is drawn. `width`: characters of a line; a line's end stays."""
    small = textwrap.wrap(what, int(width * 1.35))
    lines = [part for line in finding.split("\n") for part in textwrap.wrap(line, width)]
    axes.set_title("\n".join(lines), loc="left", fontweight="bold", pad=5 + 11 * len(small))
    axes.annotate("\n".join(small), (0, 1), (0, 4), xycoords="axes fraction", textcoords="offset points", fontsize=8, color=SOFT,
                  va="bottom", annotation_clip=False)  # fmt: skip


def at_least_zero(axes: Any, values: Sequence[float], above: float = 1.15) -> None:
    """A y axis from zero to a little above the largest value."""
    axes.set_ylim(0, max([value for value in values if value == value], default=1.0) * above or 1.0)
