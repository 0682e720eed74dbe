"""What the figures share: their style, users' words in any script, and PNG.

Figures are objects of their own, without pyplot's global state. The colours are Okabe and
Ito's, which colour-blind readers tell apart.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.text import Text

BLUE, ORANGE, GREY, BLACK = "#0072B2", "#D55E00", "#9a9a9a", "#222222"
TITLE: dict[str, Any] = {"loc": "left", "fontsize": 11, "fontweight": "bold"}
_DPI = 150
_FONTS = ("DejaVu Sans", "Noto Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans Arabic",
          "Noto Sans Devanagari", "WenQuanYi Zen Hei", "Arial Unicode MS")  # fmt: skip


def png(figure: Figure) -> bytes:
    """Return a figure as PNG, the same bytes for the same figure."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A script that no installed font has is drawn as boxes; the page shows the text itself.
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font")
        # The software's version in the file's metadata would change its bytes.
        figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def shorten(text: str, width: int) -> str:
    """Return one line of at most ``width`` characters."""
    line = "".join(char if char.isprintable() else " " for char in " ".join(text.split()))
    return line if len(line) <= width else line[: width - 1].rstrip() + "…"


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches that arranges itself."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def legend_below(axes: Any) -> None:
    """Put one entry per label below the figure, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))
    axes.figure.legend(
        entries.values(), entries.keys(), loc="outside lower left", ncols=4, frameon=False,
        fontsize=9,
    )  # fmt: skip


def thin_ticks(axes: Any, most: int = 15) -> None:
    """Keep every n-th tick so that no more than ``most`` are left."""
    ticks = axes.get_xticks()
    if len(ticks) > most:
        axes.set_xticks(ticks[:: -(-len(ticks) // most)])


def tidy(axes: Any) -> None:
    """Take away what isn't data: two of four borders; the grid goes behind."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)


def as_they_are(texts: Sequence[Text]) -> None:
    """Show users' words as they are: no mathtext between dollars, and fonts for their script."""
    for text in texts:
        text.set_parse_math(False)
        text.set_fontfamily(list(_installed_fonts()))


@lru_cache(maxsize=1)
def _installed_fonts() -> tuple[str, ...]:
    """Fonts with many scripts that this machine has; naming another one logs a complaint."""
    installed = {font.name for font in fontManager.ttflist}
    return tuple(name for name in _FONTS if name in installed)
