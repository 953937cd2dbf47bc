"""A verdict as a command prints it."""

import io

from rich.console import Console
from rich.table import Table
from rich.text import Text

from esper.tolaria.comparison._numbers import (
    count_text,
    difference_text,
    flops_text,
    interval_text,
    p_text,
    part_text,
    seconds_text,
    size_text,
    unit,
    value_text,
)
from esper.tolaria.comparison._pair import Word
from esper.tolaria.comparison._statement import findings, heading, summary, times
from esper.tolaria.comparison._verdict import Verdict

WIDTH = 100
"""Columns."""


def describe(verdict: Verdict) -> str:
    """A verdict as plain text of at most 100 columns, ending with a newline.

    First what was found, then the arms and the pairs as tables, then what it rests on. Where the
    verdict is refused there are no tables: the reasons are all there is.
    """
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None, highlight=False)

    def say(text: str, prefix: str = "") -> None:
        indent = " " * len(prefix)
        lines = Text(text).wrap(console, WIDTH - len(prefix), overflow="fold")
        for i, line in enumerate(lines):
            console.print(Text(indent if i else prefix) + line)

    say(heading(verdict))
    say(summary(verdict))
    console.print()
    for finding in findings(verdict):
        say(finding, "- ")
    if not verdict.refused:
        console.print()
        console.print(_arms(verdict))
        console.print()
        console.print(_pairs(verdict))
        console.print()
        say(times(verdict))
    for title, texts in (("This rests on:", verdict.assumptions), ("Beware:", verdict.caveats)):
        if texts and not verdict.refused:
            console.print()
            console.print(title)
            for text in texts:
                say(text, "- ")
    file = console.file
    assert isinstance(file, io.StringIO)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), collapse_padding=True)
    table.add_column(columns[0], overflow="fold", min_width=8)
    for column in columns[1:]:
        table.add_column(column, justify="right", overflow="fold")
    return table


def _arms(verdict: Verdict) -> Table:
    metric = verdict.design.metric
    table = _table("arm", "runs", "mean", "middle half", "least", "greatest", "params", "FLOPs",
                   "kept", "s")  # fmt: skip
    for arm in verdict.arms:
        spread = (arm.mean, arm.interquartile_mean, arm.least, arm.greatest)
        table.add_row(
            Text(arm.arm),
            str(arm.runs),
            *(value_text(value, metric) for value in spread),
            count_text(arm.parameters),
            flops_text(arm.training_flops),
            count_text(arm.kept),
            seconds_text(arm.seconds),
        )
    return table


def _pairs(verdict: Verdict) -> Table:
    design = verdict.design
    metric = design.metric
    level = f"{100.0 * (1.0 - design.alpha):g} %"
    table = _table(
        "beside",
        f"mean, {unit(metric)}",
        f"{level} interval",
        "corrected p",
        f"power for {size_text(design.smallest_effect, metric)}",
    )
    table.add_column("word")
    for pair in verdict.pairs:
        table.add_row(
            Text(pair.control),
            difference_text(pair.mean, metric),
            interval_text(pair.low, pair.high, metric),
            p_text(pair.p_holm),
            part_text(pair.power),
            "equivalent" if pair.word is Word.EQUIVALENT else pair.word.value,
        )
    return table
