"""Numbers as text, the same in all that a comparison puts out."""

import math

from esper.tolaria.comparison._design import Metric

MISSING = "–"


def value_text(value: float | None, metric: Metric) -> str:
    """A value of the metric: accuracies in per cent."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{100.0 * value:.2f} %" if metric == "test_accuracy" else f"{value:.4g}"


def difference_text(value: float, metric: Metric) -> str:
    """A difference with its sign: of accuracies in percentage points."""
    text = f"{100.0 * value:+.2f}" if metric == "test_accuracy" else f"{value:+.4g}"
    return "0" + text[2:] if float(text) == 0.0 else text


def interval_text(low: float, high: float, metric: Metric) -> str:
    """Two differences."""
    return f"{difference_text(low, metric)} to {difference_text(high, metric)}"


def size_text(value: float, metric: Metric) -> str:
    """The size of an effect, with its unit."""
    if metric == "test_accuracy":
        points = f"{100.0 * value:.3g}"
        return f"{points} {'point' if points == '1' else 'points'}"
    return f"{value:.3g}"


def unit(metric: Metric) -> str:
    """What differences are in."""
    return {"test_accuracy": "percentage points", "test_loss": "loss", "reward": "reward"}[metric]


def count_text(value: float | None) -> str:
    """A count or a median of counts."""
    return MISSING if value is None else f"{value:,.10g}"


def flops_text(value: float | None) -> str:
    """FLOPs, to three digits."""
    return MISSING if value is None else f"{value:.3g}"


def seconds_text(value: float | None) -> str:
    """Seconds of wall time."""
    return MISSING if value is None else f"{value:,.1f}"


def part_text(value: float) -> str:
    """A part of 1 in per cent."""
    return f"{100.0 * value:.0f} %"


def p_text(value: float) -> str:
    """A p-value; never 0, which none is."""
    return f"{value:.4f}" if value >= 0.0001 else f"{value:.1e}"


def metric_name(metric: Metric) -> str:
    """The metric in words."""
    names = {"test_accuracy": "test accuracy", "test_loss": "test loss", "reward": "reward"}
    return names[metric]
