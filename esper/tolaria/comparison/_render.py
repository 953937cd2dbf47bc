"""Figures as bytes: equal data give equal bytes, and no figure says when it was drawn."""

import base64
import dataclasses
import io
import warnings
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

INK = "#1c1e21"
"""Of lines and letters that have no meaning of their own."""

_SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "esper",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "text.usetex": False,
    "text.color": INK,
    "font.size": 8.5,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.2,
    "grid.linewidth": 0.5,
}
_DOTS = 200
"""Per inch of a PNG."""

_PAGE_STYLE = (
    "<style>svg { color: #1c1e21 }"
    " @media (prefers-color-scheme: dark) { svg { color: #e4e6e9 } }</style>"
)


@dataclasses.dataclass(frozen=True)
class Drawing:
    """One figure in the forms that it is needed in."""

    svg: bytes
    png: bytes

    def image(self, label: str) -> Markup:
        """An `<img>` that holds the figure, in the page's colours.

        An image's ids and styles stay its own, and it is told whether the page is dark.

        Args:
            label: what the figure says, for those who do not see it.
        """
        text = self.svg.decode().replace(INK, "currentColor")
        begin = text.index(">", text.index("<svg")) + 1
        data = base64.b64encode((text[:begin] + _PAGE_STYLE + text[begin:]).encode()).decode()
        return Markup('<img alt="{}" src="data:image/svg+xml;base64,{}">').format(label, data)


def render(draw: Callable[[], Figure | None]) -> Drawing | None:
    """Draw a figure; None where there is nothing to draw."""
    with mpl.rc_context(_SETTINGS), warnings.catch_warnings():
        # Names may be in any script; a PNG shows a box where the font has no such letter.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure = draw()
        if figure is None:
            return None
        svg, png = io.BytesIO(), io.BytesIO()
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(svg, format="svg", transparent=True, metadata=nothing)
        figure.savefig(png, format="png", dpi=_DOTS, metadata={"Software": None})
    return Drawing(svg.getvalue(), png.getvalue())
