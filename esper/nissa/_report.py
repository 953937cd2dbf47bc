"""A report on runs: one HTML page that needs nothing from elsewhere.

Runs are set side by side as arms, one run for each seed. What the runs did not
record, the page says so. Nothing in it depends on a clock: equal runs give
equal bytes.
"""

import dataclasses
import json
import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from esper.nissa._entries import DECISIONS, ROLLBACK, VETO, describe_entry, explain_entry
from esper.nissa._figures import (
    CLASS_COLOURS,
    STAGE_COLOURS,
    Curve,
    SeedHistory,
    colour,
    dashes,
    draw_bar,
    draw_curves,
    draw_region,
    draw_timeline,
)
from esper.nissa._growth import Growth, read_growth
from esper.nissa._interval import half_width
from esper.nissa._record import RunRecord

ACTIVITIES = ("train", "evaluate", "compile", "checkpoint", "record")
"""What time is charged to, in the order of the bars; others follow."""

TIMELINES = 20
"""Runs of an arm whose seeds are drawn; the page says how many more there are."""

_LISTED = {*DECISIONS, VETO, ROLLBACK}
"""The entries that are listed as decisions."""


@dataclasses.dataclass(frozen=True)
class _Arm:
    """The runs of one arm and what they have in common."""

    label: str
    place: int
    runs: tuple[RunRecord, ...]
    growths: tuple[Growth, ...]

    @property
    def measured(self) -> list[RunRecord]:
        """The runs that have metrics."""
        return [run for run in self.runs if run.metrics]

    @property
    def grew(self) -> bool:
        """Whether a seed of any run changed after step 0."""
        return any(growth.grew for growth in self.growths)


def write_report(
    path: Path, arms: Mapping[str, Mapping[str, Sequence[RunRecord]]], *, title: str
) -> None:
    """Write a report, whole or not at all.

    Args:
        path: the page; one that is there is replaced.
        arms: by section and by arm, the runs, one for each seed.
        title: the page's heading.

    Raises:
        OSError: where the disk does not take it.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("esper.nissa", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    runs = [run for section in arms.values() for group in section.values() for run in group]
    page = environment.get_template("report.html.jinja").render(
        title=title,
        runs=len(runs),
        sections=[_section(name, section) for name, section in arms.items()],
        stages=[(stage.name, paint) for stage, paint in STAGE_COLOURS.items()],
        class_colours=CLASS_COLOURS,
        versions=_versions(runs),
        commands=[f"esper replay {shlex.quote(str(run.path))}" for run in runs],
    )
    partial = path.with_name(path.name + ".partial")
    # A path may hold bytes that are no text.
    partial.write_bytes(page.encode("utf-8", "backslashreplace"))
    partial.replace(path)


def _section(name: str, groups: Mapping[str, Sequence[RunRecord]]) -> dict[str, Any]:
    arms = [
        _Arm(label, place, tuple(runs), tuple(read_growth(run) for run in runs))
        for place, (label, runs) in enumerate(groups.items())
    ]
    return {
        "name": name,
        "arms": [
            {"label": arm.label, "colour": colour(arm.place), "dashes": dashes(arm.place)}
            for arm in arms
        ],
        "summary": [_summary(arm) for arm in arms],
        "notes": [note for arm in arms for note in _notes(arm)],
        "curves": _curves(name, arms),
        "timelines": [_timelines(name, arm) for arm in arms],
        "regions": [_regions(name, arm) for arm in arms if arm.grew],
        "times": _times(name, arms),
    }


# Numbers


def _number(value: object) -> float:
    """A measured value; NaN for one that is missing or not finite."""
    number = float(value) if isinstance(value, int | float) else math.nan
    return number if math.isfinite(number) else math.nan


def _spread(values: Sequence[int]) -> str:
    """Median, with least and greatest where they differ."""
    if not values:
        return "–"
    middle = f"{float(np.median(values)):,.10g}"
    low, high = min(values), max(values)
    return middle if low == high else f"{middle} ({low:,}–{high:,})"


def _seed(run: RunRecord) -> str:
    # A network has seeds of its own, so these are called what they are.
    return f"random seed {run.config.get('seed', 'unknown')}"


# Summary


def _summary(arm: _Arm) -> dict[str, Any]:
    last = [run.metrics[-1] for run in arm.measured]
    accuracy = np.array([_number(row["test_accuracy"]) for row in last])
    known = [growth for growth in arm.growths if not growth.trouble]
    row = {
        "label": arm.label,
        "seeds": len(arm.runs),
        "median": "no metrics",
        "mean": "–",
        "parameters": _spread([int(row["parameters"]) for row in last]),
        "kept": _spread([growth.kept for growth in known]),
        "removed": _spread([growth.removed for growth in known]),
    }
    if len(accuracy) == 1:
        row |= {"median": f"{accuracy[0]:.1%}", "mean": "one seed"}
    elif len(accuracy):
        low, high = accuracy.min(), accuracy.max()
        half = 100.0 * float(half_width(accuracy))
        row["median"] = f"{np.median(accuracy):.1%}"
        if low < high:
            row["median"] += f" ({low:.1%}–{high:.1%})"
        row["mean"] = f"{accuracy.mean():.1%} ± {half:.1f}"
    return row


def _notes(arm: _Arm) -> list[str]:
    """What a reader of the arm's numbers must know of its runs."""
    notes: list[str] = []
    if not arm.runs:
        notes.append(f"{arm.label}: no runs.")
    for run, growth in zip(arm.runs, arm.growths, strict=True):
        who = f"{arm.label}, {_seed(run)}"
        if growth.trouble:
            notes.append(f"{who}: {growth.trouble}")
        if not run.metrics:
            notes.append(f"{who}: no metrics yet; it is in no accuracy, curve or time.")
            continue
        back = sum(entry["kind"] == ROLLBACK for entry in run.events)
        if back:
            times = "once" if back == 1 else f"{back:,} times"
            notes.append(f"{who}: was taken back to an earlier step {times}.")
        refused = Counter(
            str(entry.get("rule"))
            for place, entry in enumerate(run.events)
            if entry["kind"] == VETO and place not in run.undone
        )
        if refused:
            told = ", ".join(f"{rule} {count:,}" for rule, count in sorted(refused.items()))
            notes.append(f"{who}: decisions refused, by rule: {told}.")
        last, steps = int(run.metrics[-1]["step"]), run.config.get("steps", 0)
        if last < steps:
            notes.append(f"{who}: its last measurement is of step {last:,} of {steps:,}.")
        gaps = [row["step"] for row in run.metrics[1:] if not _number(row.get("train_loss")) > 0.0]
        if gaps:
            notes.append(
                f"{who}: no positive, finite training loss at step {gaps[0]:,}; the arm's curve"
                " has gaps there."
            )
    return notes


# Curves


def _curves(section: str, arms: Sequence[_Arm]) -> list[dict[str, Any]]:
    drawn: list[dict[str, Any]] = []
    for key, name, log in (
        ("test_accuracy", "Test accuracy", False),
        ("train_loss", "Training loss", True),
    ):
        found = [(arm, curve) for arm in arms if (curve := _curve(arm, key, log)) is not None]
        ends = ", ".join(f"{arm.label} {_end(curve, log)}" for arm, curve in found)
        label = f"{section}: {name.lower()} over steps. At the end: {ends}."
        figure = draw_curves([curve for _, curve in found], log=log, label=label) if found else None
        drawn.append({"name": name, "figure": figure})
    return drawn


def _end(curve: Curve, log: bool) -> str:
    value = float(curve.middle[np.isfinite(curve.middle)][-1])
    return f"{value:.3g}" if log else f"{value:.1%}"


def _curve(arm: _Arm, key: str, log: bool) -> Curve | None:
    """Mean and its interval at the steps that all of the arm's runs measured.

    On a logarithmic axis the mean is of logarithms, and the interval is theirs.
    """
    tables = [{int(row["step"]): _number(row.get(key)) for row in run.metrics}
              for run in arm.measured]  # fmt: skip
    if not tables:
        return None
    steps = sorted(set(tables[0]).intersection(*tables[1:]))
    values = np.array([[table[step] for step in steps] for table in tables])
    if log:
        values = np.log(np.where(values > 0.0, values, np.nan))
    middle = values.mean(axis=0)
    half = half_width(values)
    if not np.isfinite(middle).any():
        return None
    low, high = middle - half, middle + half
    if log:
        # An interval may reach further than numbers do; no loss leaves 1e-100 to 1e100.
        middle, low, high = (np.exp(np.clip(part, -230.0, 230.0)) for part in (middle, low, high))
    return Curve(np.array(steps), middle, low, high, arm.place)


def _timelines(section: str, arm: _Arm) -> dict[str, Any]:
    runs = list(zip(arm.runs, arm.growths, strict=True)) if arm.grew else []
    return {
        "label": arm.label,
        "quiet": _quiet(arm),
        "runs": [_timeline(f"{section}: {arm.label}", *run) for run in runs[:TIMELINES]],
        "more": max(0, len(runs) - TIMELINES),
    }


def _quiet(arm: _Arm) -> str:
    """What to say of an arm in which nothing changed."""
    if not arm.runs:
        return "it has no runs."
    if any(growth.trouble for growth in arm.growths):
        return "what happened to its seeds cannot be told; see the notes above."
    if any(growth.histories for growth in arm.growths):
        return "its kernels are there from step 0, and no seed changes after it."
    return "no seed ever left DORMANT."


def _timeline(who: str, run: RunRecord, growth: Growth) -> dict[str, Any]:
    figure = None
    if growth.histories:
        ends = (span[1] for history in growth.histories for span in history.spans)
        told = "; ".join(_told(history) for history in growth.histories)
        label = f"{who}, {_seed(run)}: stages and alpha of seeds over steps. {told}."
        figure = draw_timeline(growth.histories, end=max(ends, default=0), label=label)
    decisions = [(i, entry) for i, entry in enumerate(run.events) if entry["kind"] in _LISTED]
    return {
        "name": _seed(run),
        "figure": figure,
        "trouble": growth.trouble,
        "decisions": [
            {
                "step": f"{entry['step']:,}",
                "layer": entry.get("layer", "–"),
                "seed": entry.get("seed", "–"),
                "what": describe_entry(entry) + (", taken back" if i in run.undone else ""),
                "kernel": str(entry.get("kernel", ""))[:12],
                "reason": explain_entry(entry),
            }
            for i, entry in decisions
        ],
    }


def _told(history: SeedHistory) -> str:
    stages = ", ".join(f"{stage.name} from {first:,}" for first, _, stage in history.spans)
    return f"Layer {history.layer}, seed {history.seed}: {stages}"


# Regions


def _regions(section: str, arm: _Arm) -> dict[str, Any]:
    """The decision regions of the arm's median run, among those that recorded them."""
    ranked = sorted(
        (run for run in arm.measured if run.regions),
        key=lambda run: _number(run.metrics[-1]["test_accuracy"]),
    )
    if not ranked:
        return {"label": arm.label, "run": "", "figures": []}
    run = ranked[(len(ranked) - 1) // 2]
    who = f"{_seed(run)}, test accuracy {run.accuracy:.1%}"
    about = f"{section}: {arm.label}, {_seed(run)}: probability of class 1 over the plane"
    figures = [
        {"name": name, "figure": draw_region(run.regions[name], label=f"{about}, {name} growth")}
        for name in ("before", "after")
        if name in run.regions
    ]
    return {"label": arm.label, "run": who, "figures": figures}


# Time


def _times(section: str, arms: Sequence[_Arm]) -> dict[str, Any]:
    rows_by_arm = {
        arm.label: [spent for run in arm.measured if (spent := run.metrics[-1].get("seconds"))]
        for arm in arms
    }
    seen = {name for rows in rows_by_arm.values() for row in rows for name in row}
    names = [*(n for n in ACTIVITIES if n in seen), *sorted(seen.difference(ACTIVITIES))]
    means = {
        label: [sum(_number(row.get(name, 0.0)) for row in rows) / len(rows) for name in names]
        for label, rows in rows_by_arm.items()
        if rows
    }
    whole = max((sum(parts) for parts in means.values()), default=0.0)
    return {
        "activities": [{"name": name, "colour": colour(i)} for i, name in enumerate(names)],
        "missing": [label for label in rows_by_arm if label not in means],
        "arms": [
            {
                "label": label,
                "total": f"{sum(parts):,.2f}",
                "parts": [f"{part:,.2f}" for part in parts],
                "figure": draw_bar(
                    parts,
                    whole=whole,
                    label=f"{section}: {label}, seconds: "
                    + ", ".join(f"{n} {p:,.2f}" for n, p in zip(names, parts, strict=True)),
                ),
            }
            for label, parts in means.items()
        ],
    }


# Provenance


def _versions(runs: Sequence[RunRecord]) -> list[tuple[str, int]]:
    """The library versions that runs were made with, and how many runs with each set."""
    counts: dict[str, int] = {}
    for run in runs:
        try:
            found = json.loads((run.path / "run.json").read_bytes())["versions"]
            text = ", ".join(f"{name} {version}" for name, version in sorted(found.items()))
        except (OSError, ValueError, KeyError):
            text = "unknown: their run.json cannot be read or names none"
        counts[text] = counts.get(text, 0) + 1
    return list(counts.items())
