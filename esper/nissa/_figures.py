"""The figures of a report, as SVG to be put into an HTML page.

Each function draws with matplotlib and returns an `<svg>` element that needs
nothing from elsewhere. Lines and letters of no meaning of their own take the
page's text colour, so that one figure serves a light and a dark page. No text
from a run is drawn: names of arms stand in the page, where they can wrap.
"""

import dataclasses
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree as ET

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import (
    LogLocator,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
    StrMethodFormatter,
)

from esper_functional import SeedLifecycleState

BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, VERMILION, YELLOW = "#56B4E9", "#D55E00", "#F0E442"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, YELLOW)
"""The colours of Okabe and Ito (2008), which the colour-blind can tell apart, without black."""

DASHES = ((), (5.0, 2.0), (1.5, 1.5), (6.0, 2.0, 1.5, 2.0))
"""On and off lengths, in points: lines differ by more than their colour."""

STAGE_COLOURS: dict[SeedLifecycleState, str] = {
    SeedLifecycleState.DORMANT: "",
    SeedLifecycleState.LOADING: ORANGE,
    SeedLifecycleState.ACTIVE: SKY,
    SeedLifecycleState.ERROR_RECOVERY: VERMILION,
    SeedLifecycleState.FOSSILIZED: GREEN,
}
"""The page's text colour, faintly, where empty."""

CLASS_COLOURS = (BLUE, "#f5f5f5", VERMILION)
"""From class 0 over indifference to class 1."""

_INK = "#808080"
"""Becomes the page's text colour."""
_MARK_OPACITY = 0.55
_POINTS = 500
"""More points of a line than this are thinned out."""

_SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "esper",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "text.usetex": False,
    "text.color": _INK,
    "font.size": 8.0,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _INK,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
}
_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


@dataclasses.dataclass(frozen=True)
class Curve:
    """A line and its band over steps; NaN leaves a gap."""

    steps: np.ndarray
    middle: np.ndarray
    low: np.ndarray
    """Equal to `middle` where there is no band."""
    high: np.ndarray
    place: int
    """Which arm of the section: its colour and dashes."""


@dataclasses.dataclass(frozen=True)
class SeedHistory:
    """What became of one seed."""

    layer: int
    seed: int
    spans: tuple[tuple[int, int, SeedLifecycleState], ...]
    """First step, the step after the last, and the stage between them."""
    alpha: tuple[tuple[int, float], ...]
    """Corners of alpha over steps; NaN while no kernel runs."""


def colour(place: int) -> str:
    """The colour of the arm at `place`."""
    return PALETTE[place % len(PALETTE)]


def dashes(place: int) -> tuple[float, ...]:
    """The dashes of the arm at `place`; empty for a line without gaps."""
    return DASHES[(place + place // len(PALETTE)) % len(DASHES)]


def draw_curves(curves: Sequence[Curve], *, log: bool, label: str) -> Markup:
    """Lines over steps with their bands.

    Args:
        log: a logarithmic axis; otherwise values are parts of 1, shown in percent.
        label: what the figure says, for those who do not see it.
    """
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(4.4, 2.8))
        axes = figure.add_axes((0.12, 0.15, 0.82, 0.81))
        axes.grid(True)
        axes.set_axisbelow(True)
        for curve in curves:
            keep = _thinned(len(curve.steps))
            steps, middle = curve.steps[keep], curve.middle[keep]
            paint = colour(curve.place)
            low, high = curve.low[keep], curve.high[keep]
            if (low < high).any():
                axes.fill_between(steps, low, high, color=paint, alpha=0.16, linewidth=0.6)
            (line,) = axes.plot(steps, middle, color=paint, linewidth=1.4)
            if dashes(curve.place):
                line.set_dashes(dashes(curve.place))
        axes.set_xlabel("step")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlim(0, max(1, *(int(curve.steps[-1]) for curve in curves)))
        lowest = min(float(np.nanmin(curve.middle)) for curve in curves)
        highest = max(float(np.nanmax(curve.middle)) for curve in curves)
        if log:
            axes.set_yscale("log")
            # The band of two or three seeds can span more decades than all the lines.
            low, high = lowest / 4.0, highest * 2.0
            axes.set_ylim(low, high)
            subs = (1.0,) if high > 100.0 * low else (1.0, 2.0, 5.0)
            axes.yaxis.set_major_locator(LogLocator(subs=subs))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(max(0.0, lowest - 0.08), 1.02)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        return _svg(figure, label)


def draw_timeline(histories: Sequence[SeedHistory], *, end: int, label: str) -> Markup:
    """Stages of seeds over the steps from 0 to `end`, a row each, alpha drawn over them."""
    above, below, row = 0.05, 0.42, 0.46
    height = above + below + row * len(histories)
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(8.6, height))
        axes = figure.add_axes((0.105, below / height, 0.875, row * len(histories) / height))
        thick = 0.74
        for i, history in enumerate(histories):
            foot = -i - thick / 2
            for first, last, stage in history.spans:
                paint = STAGE_COLOURS[stage]
                axes.broken_barh(
                    [(first, last - first)],
                    (foot, thick),
                    facecolor=paint or _INK,
                    alpha=_MARK_OPACITY if paint else 0.12,
                    linewidth=0,
                )
            if history.alpha:
                steps, alpha = np.asarray(history.alpha, dtype=np.float64).T
                line = foot + thick * (0.06 + 0.88 * alpha)
                axes.plot(steps, line, color=_INK, linewidth=1.3, solid_joinstyle="round")
        names = [f"layer {history.layer}, seed {history.seed}" for history in histories]
        axes.set_yticks([-float(i) for i in range(len(histories))], names)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_ylim(-len(histories) + 0.5, 0.5)
        axes.set_xlim(0, max(end, 1))
        axes.set_xlabel("step")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        return _svg(figure, label)


def draw_region(grid: np.ndarray, *, label: str) -> Markup:
    """The probability of class 1 over the square of ±1.1, `[rows from below, columns]`."""
    colours = LinearSegmentedColormap.from_list("classes", CLASS_COLOURS)
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(3.0, 3.0))
        axes = figure.add_axes((0.12, 0.1, 0.86, 0.86))
        axes.imshow(
            np.asarray(grid, dtype=np.float64),
            origin="lower",
            extent=(-1.1, 1.1, -1.1, 1.1),
            cmap=colours,
            vmin=0.0,
            vmax=1.0,
            interpolation="none",
        )
        axes.set_xticks((-1, 0, 1))
        axes.set_yticks((-1, 0, 1))
        return _svg(figure, label)


def draw_bar(parts: Sequence[float], *, whole: float, label: str) -> Markup:
    """A stacked bar, its parts coloured by place; `whole` would fill the width."""
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(6.0, 0.28))
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.set_axis_off()
        left = 0.0
        for place, part in enumerate(parts):
            axes.broken_barh([(left, part)], (0.0, 1.0), facecolor=colour(place), linewidth=0)
            left += part
        axes.set_xlim(0.0, whole if whole > 0.0 else 1.0)
        axes.set_ylim(0.0, 1.0)
        return _svg(figure, label)


def _thinned(count: int) -> np.ndarray:
    if count <= _POINTS:
        return np.arange(count)
    return np.unique(np.linspace(0, count - 1, _POINTS).round().astype(np.int64))


def _svg(figure: Figure, label: str) -> Markup:
    """The figure as an element for an HTML page, which knows SVG without being told its name.

    Matplotlib's file has a style sheet that would reach the whole page, and the
    same ids in each file: the one goes, the others become the figure's own.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata=_METADATA)
    own = hashlib.sha256(buffer.getvalue() + label.encode("utf-8", "replace")).hexdigest()[:8]
    root = ET.fromstring(buffer.getvalue())
    for element in list(root.iter()):
        for child in list(element):
            if _local(child.tag) in ("metadata", "style"):
                element.remove(child)
    values = [value for element in root.iter() for value in element.attrib.values()]
    names = {found[1]: "" for value in values if (found := _REFERENCE.search(value))}
    names = {name: f"f{own}-{i}" for i, name in enumerate(names)}
    for element in root.iter():
        element.tag = _local(element.tag)
        attributes = {_local(name): value for name, value in element.attrib.items()}
        element.attrib.clear()
        for name, value in attributes.items():
            if name == "id" and value in names:
                element.set(name, names[value])
            elif name != "id":
                element.set(name, _for_the_page(value, names))
        if element.tag not in ("text", "tspan"):
            element.text = None
        element.tail = None
    for name in ("version", "width", "height"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-label", label)
    return Markup(ET.tostring(root, encoding="unicode"))


_REFERENCE = re.compile(r"(?:^|url\()#([\w-]+)\)?$")
_FONT = re.compile(r"font: ([0-9.]+px) [^;]*|font-size: ([0-9.]+px); font-family: [^;]*")
"""As newer and older versions of matplotlib write it."""


def _local(name: str) -> str:
    """A name without its namespace."""
    return name.rpartition("}")[2]


def _for_the_page(value: str, names: Mapping[str, str]) -> str:
    """An attribute with the figure's own ids, the page's colour and the page's font."""
    value = _REFERENCE.sub(lambda found: found[0].replace(found[1], names[found[1]]), value)
    value = _FONT.sub(lambda found: f"font-size: {found[1] or found[2]}", value)
    return value.replace(_INK, "currentColor")
