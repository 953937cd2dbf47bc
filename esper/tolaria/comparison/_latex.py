"""A verdict as a table for a paper."""

from collections.abc import Sequence

from esper.tolaria.comparison._numbers import (
    count_text,
    difference_text,
    interval_text,
    metric_name,
    p_text,
    unit,
    value_text,
)
from esper.tolaria.comparison._pair import Pair, Word
from esper.tolaria.comparison._verdict import Verdict

_ESCAPES = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedblright{}",
    "–": "--",
    "−": "$-$",
}
_COLUMNS = 7


def latex(text: str) -> str:
    """Text as LaTeX sets it; a line break becomes a space.

    Letters that a font does not have are LaTeX's to complain of.
    """
    return "".join(_ESCAPES.get(letter, letter) for letter in " ".join(text.split()))


def table_tex(verdicts: Sequence[Verdict]) -> bytes:
    r"""The tables, one for each budget, to be taken in by \\input; they need booktabs alone."""
    lines = [
        r"% Needs \usepackage{booktabs}; take it in by \input.",
        *(line for i, verdict in enumerate(verdicts) for line in _tabular(verdict, after=i > 0)),
    ]
    return ("\n".join(lines) + "\n").encode()


def _tabular(verdict: Verdict, *, after: bool) -> list[str]:
    design = verdict.design
    metric = design.metric
    budget = {"steps": "equal steps", "flops": "equal training FLOPs"}[design.budget]
    head = [
        "arm", f"{metric_name(metric)}, mean", "least to greatest", "parameters",
        f"difference, {unit(metric)}", "corrected $p$", "verdict",
    ]  # fmt: skip
    seeds = f"{len(design.seeds)} seeds, {100.0 * (1.0 - design.alpha):g} % intervals"
    return [
        *([r"\par\bigskip"] if after else []),
        rf"% {_comment(design.treatment)} at {budget}",
        r"\begin{tabular}{@{}lrrrrrl@{}}",
        r"\toprule",
        rf"\multicolumn{{{_COLUMNS}}}{{@{{}}l@{{}}}}{{{latex(f'{budget}, {seeds}')}}} \\",
        r"\midrule",
        # The heads are Esper's own text, and one of them has mathematics.
        " & ".join(head) + r" \\",
        r"\midrule",
        *_rows(verdict),
        r"\bottomrule",
        r"\end{tabular}",
    ]


def _comment(text: str) -> str:
    return " ".join(text.split())


def _rows(verdict: Verdict) -> list[str]:
    metric = verdict.design.metric
    pairs = {pair.control: pair for pair in verdict.pairs}
    rows: list[str] = []
    for arm in verdict.arms:
        spread = f"{value_text(arm.least, metric)} to {value_text(arm.greatest, metric)}"
        cells = [
            arm.arm,
            value_text(arm.mean, metric),
            spread,
            count_text(arm.parameters),
            *_beside(verdict, pairs.get(arm.arm), arm.arm),
        ]
        rows.append(" & ".join(latex(cell) for cell in cells) + r" \\")
    return rows


def _beside(verdict: Verdict, pair: Pair | None, arm: str) -> tuple[str, str, str]:
    metric = verdict.design.metric
    if pair is None:
        treatment = "treatment" if arm == verdict.design.treatment else ""
        return "", "", "no verdict" if verdict.refused else treatment
    interval = interval_text(pair.low, pair.high, metric)
    word = "equivalent" if pair.word is Word.EQUIVALENT else pair.word.value
    difference = f"{difference_text(pair.mean, metric)} ({interval})"
    return difference.replace("-", "−"), p_text(pair.p_holm), word
