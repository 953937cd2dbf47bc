"""The figures of a comparison, drawn once for a file and once for a page.

Each function gives a matplotlib figure. Arms are told apart by colour and by dashes or markers,
and their names stand beside them. Intervals of curves are t-intervals over seeds.
"""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from esper.nissa import colour, dashes, half_width
from esper.tolaria.comparison._numbers import metric_name, unit
from esper.tolaria.comparison._outcome import Outcome
from esper.tolaria.comparison._render import INK
from esper.tolaria.comparison._verdict import Verdict

_MARKERS = "osD^vP*Xh<>"
_LETTERS = 24
"""Longer names are cut; the page has them whole."""
_POINTS = 400
"""Points of a curve, where runs were not measured at the same places."""


def draw_differences(verdict: Verdict) -> Figure:
    """Treatment minus control: each seed, the mean, and its interval."""
    design = verdict.design
    count = max(1, len(verdict.pairs))
    figure, axes = _figure(6.6, 0.9 + 0.55 * count)
    scale = 100.0 if design.metric == "test_accuracy" else 1.0
    margin = scale * design.smallest_effect
    axes.axvspan(-margin, margin, color=INK, alpha=0.12, linewidth=0)
    axes.axvline(0.0, color=INK, linewidth=0.8)
    for i, pair in enumerate(verdict.pairs):
        row = -float(i)
        # Seeds that differ alike would lie on each other.
        places = row - np.linspace(0.12, 0.32, len(pair.differences))
        paint = colour(_place(verdict, pair.control))
        axes.plot(
            scale * np.array(pair.differences), places, "o",
            color=paint, markersize=3.0, alpha=0.6, markeredgewidth=0,
        )  # fmt: skip
        mean = scale * pair.mean
        ends = (scale * pair.low, scale * pair.high)
        axes.plot(ends, (row, row), color=INK, linewidth=1.6, solid_capstyle="butt")
        axes.plot([mean], [row], "D", color=paint, markersize=6.0, markeredgewidth=0)
    axes.set_yticks([-float(i) for i in range(len(verdict.pairs))],
                    [_label(pair.control) for pair in verdict.pairs])  # fmt: skip
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(0.6 - count, 0.4)
    beside = f"{_label(design.treatment).strip()} minus control"
    axes.set_xlabel(f"{beside}, {metric_name(design.metric)} in {unit(design.metric)}")
    return figure


def draw_steps(verdict: Verdict, outcomes: Sequence[Outcome]) -> Figure:
    """Test accuracy over steps: mean over seeds and its 95 % interval."""
    figure, axes = _figure(6.6, 3.6)
    _curves(axes, verdict, outcomes, lambda run: [float(step) for step in run.curve.steps])
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    return figure


def draw_flops(verdict: Verdict, outcomes: Sequence[Outcome]) -> Figure | None:
    """Test accuracy over training FLOPs; None where no arm's runs counted them all."""
    figure, axes = _figure(6.6, 3.6)
    counted = _curves(axes, verdict, outcomes, lambda run: list(run.curve.flops))
    axes.set_xlabel("training FLOPs, cumulative")
    return figure if counted else None


def draw_parameters(verdict: Verdict, outcomes: Sequence[Outcome]) -> Figure:
    """Test accuracy at the end over parameters, a mark for each run."""
    figure, axes = _figure(6.6, 3.6)
    for arm in verdict.design.arms:
        place = _place(verdict, arm)
        at = [(run.parameters, run.test_accuracy) for run in _runs(verdict, outcomes, arm)]
        points = [(x, y) for x, y in at if x is not None and y is not None]
        if points:
            axes.plot(
                *zip(*points, strict=True), _MARKERS[place % len(_MARKERS)], color=colour(place),
                markersize=5.0, alpha=0.75, markeredgewidth=0, label=_label(arm),
            )  # fmt: skip
    axes.set_xlabel("parameters at the end")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    _accuracies(axes)
    return figure


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(True)
    axes.set_axisbelow(True)
    return figure, axes


def _accuracies(axes: Axes) -> None:
    """Accuracies upwards, and the arms' names beside the axes."""
    axes.set_ylabel("test accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    handles, labels = axes.get_legend_handles_labels()
    figure = axes.get_figure()
    if handles and figure is not None:
        figure.legend(handles, labels, loc="outside right upper", frameon=False)


def _label(arm: str) -> str:
    """A name as a figure has room for it."""
    short = arm if len(arm) <= _LETTERS else f"{arm[: _LETTERS - 1]}…"
    # Matplotlib leaves labels out that begin with an underscore.
    return f" {short}" if short.startswith("_") else short


def _place(verdict: Verdict, arm: str) -> int:
    return verdict.design.arms.index(arm)


def _runs(verdict: Verdict, outcomes: Sequence[Outcome], arm: str) -> list[Outcome]:
    found = [o for o in outcomes if o.arm == arm and o.budget == verdict.design.budget]
    return sorted(found, key=lambda o: (o.seed, o.folder))


def _curves(
    axes: Axes,
    verdict: Verdict,
    outcomes: Sequence[Outcome],
    along: Callable[[Outcome], Sequence[float | None]],
) -> int:
    """Draw the arms whose runs were all measured along an axis; how many there are."""
    drawn = 0
    for arm in verdict.design.arms:
        runs = _runs(verdict, outcomes, arm)
        lines = [line for run in runs if (line := _line(run, along(run))) is not None]
        if not lines or len(lines) < len(runs):
            continue
        low, high = max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines)
        if low > high:
            continue
        shared = lines[0][0]
        if any(not np.array_equal(x, shared) for x, _ in lines):
            shared = np.linspace(low, high, _POINTS)
        values = np.array([np.interp(shared, x, y) for x, y in lines])
        middle, half = values.mean(axis=0), half_width(values)
        place = _place(verdict, arm)
        if len(lines) > 1:
            band = (np.clip(middle - half, 0.0, 1.0), np.clip(middle + half, 0.0, 1.0))
            axes.fill_between(shared, *band, color=colour(place), alpha=0.16, linewidth=0)
        (drawn_line,) = axes.plot(
            shared, middle, color=colour(place), linewidth=1.5, label=_label(arm)
        )
        if dashes(place):
            drawn_line.set_dashes(dashes(place))
        drawn += 1
    _accuracies(axes)
    return drawn


def _line(run: Outcome, along: Sequence[float | None]) -> tuple[np.ndarray, np.ndarray] | None:
    """A run's accuracies along an axis; None where a place is not known."""
    pairs = [(x, y) for x, y in zip(along, run.curve.test_accuracy, strict=True) if y is not None]
    if not pairs or any(x is None for x, _ in pairs):
        return None
    x, y = np.array(pairs, dtype=np.float64).T
    return x, y
