"""The report of a comparison: one HTML page that needs nothing from elsewhere."""

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from esper.nissa import colour
from esper.tolaria.comparison._numbers import (
    count_text,
    difference_text,
    flops_text,
    interval_text,
    metric_name,
    p_text,
    part_text,
    seconds_text,
    unit,
    value_text,
)
from esper.tolaria.comparison._pair import Word
from esper.tolaria.comparison._render import Drawing
from esper.tolaria.comparison._statement import findings, heading, summary, times
from esper.tolaria.comparison._verdict import Verdict

_TITLES = {
    "differences": "Paired differences",
    "accuracy-steps": "Accuracy over steps",
    "accuracy-flops": "Accuracy over training FLOPs",
    "accuracy-parameters": "Accuracy over parameters",
}


def page(
    verdicts: Sequence[Verdict], drawings: Mapping[tuple[str, str], Drawing], name: str
) -> bytes:
    """The page, with what was found at its top.

    Args:
        drawings: by budget and by the figure's name.
        name: of the comparison.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("esper.tolaria.comparison", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("comparison.html.jinja").render(
        title=f"Comparison: {name}",
        sections=[_section(verdict, drawings) for verdict in verdicts],
    )
    # A path may hold bytes that are no text.
    return text.encode("utf-8", "backslashreplace")


def _section(verdict: Verdict, drawings: Mapping[tuple[str, str], Drawing]) -> dict[str, Any]:
    design = verdict.design
    figures = [
        {
            "title": title,
            "name": name,
            "image": drawing.image(f"{heading(verdict)}: {_alt(verdict, name)}"),
        }
        for name, title in _TITLES.items()
        if (drawing := drawings.get((design.budget, name))) is not None
    ]
    return {
        "refused": verdict.refused,
        "heading": heading(verdict),
        "summary": summary(verdict),
        "findings": list(findings(verdict)),
        "times": times(verdict),
        "assumptions": verdict.assumptions,
        "caveats": verdict.caveats,
        "metric": metric_name(design.metric),
        "unit": unit(design.metric),
        "level": f"{100.0 * (1.0 - design.alpha):g} %",
        "margin": f"{design.smallest_effect:g}",
        "treatment": design.treatment,
        "seeds": ", ".join(str(seed) for seed in design.seeds),
        "arms": _arms(verdict),
        "pairs": _pairs(verdict),
        "figures": figures,
    }


def _alt(verdict: Verdict, name: str) -> str:
    if name == "differences":
        return " ".join(findings(verdict))
    metric = "test_accuracy"
    ends = ", ".join(f"{arm.arm} {value_text(arm.mean, metric)}" for arm in verdict.arms)
    if verdict.design.metric != metric:
        ends = ", ".join(arm.arm for arm in verdict.arms)
    return f"{_TITLES[name].lower()}, means at the end: {ends}."


def _arms(verdict: Verdict) -> list[dict[str, Any]]:
    design = verdict.design
    rows: list[dict[str, Any]] = []
    for arm in verdict.arms:
        spread = (arm.mean, arm.median, arm.interquartile_mean, arm.least, arm.greatest)
        counts = (arm.parameters, arm.steps)
        ends = (arm.kept, arm.removed, arm.compilations)
        rows.append(
            {
                "name": arm.arm,
                "word": "",
                "colour": colour(design.arms.index(arm.arm)),
                "cells": [
                    str(arm.runs),
                    *(value_text(value, design.metric) for value in spread),
                    *(count_text(value) for value in counts),
                    flops_text(arm.training_flops),
                    *(count_text(value) for value in ends),
                    seconds_text(arm.seconds),
                ],
            }
        )
    return rows


def _pairs(verdict: Verdict) -> list[dict[str, Any]]:
    metric = verdict.design.metric
    return [
        {
            "name": pair.control,
            "colour": colour(verdict.design.arms.index(pair.control)),
            "word": "equivalent" if pair.word is Word.EQUIVALENT else pair.word.value,
            "cells": [
                difference_text(pair.mean, metric),
                difference_text(pair.median, metric),
                interval_text(pair.low, pair.high, metric),
                p_text(pair.p),
                p_text(pair.p_holm),
                p_text(pair.p_equivalent_holm),
                "–" if pair.d_z is None else f"{pair.d_z:.2f}",
                part_text(pair.superiority),
                part_text(pair.power),
                difference_text(pair.minimal_effect, metric).removeprefix("+"),
                count_text(pair.seeds_needed) if pair.seeds_needed else "more than 100,000",
            ],
        }
        for pair in verdict.pairs
    ]
