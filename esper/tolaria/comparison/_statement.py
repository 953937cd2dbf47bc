"""A verdict in sentences: exactly what was found and what was not."""

from collections.abc import Iterator

from esper.tolaria.comparison._numbers import (
    difference_text,
    interval_text,
    metric_name,
    p_text,
    part_text,
    seconds_text,
    size_text,
)
from esper.tolaria.comparison._pair import Pair, Word
from esper.tolaria.comparison._power import MOST_PAIRS, WANTED_POWER
from esper.tolaria.comparison._verdict import Verdict

_BESIDE = {
    Word.BETTER: "better than",
    Word.WORSE: "worse than",
    Word.EQUIVALENT: "equivalent to",
    Word.UNDECIDED: "undecided against",
}


def heading(verdict: Verdict) -> str:
    """What was compared, in one line."""
    design = verdict.design
    budget = {"steps": "equal steps", "flops": "equal training FLOPs"}[design.budget]
    return (
        f"{design.treatment} at {budget}, {len(design.seeds)} seeds, {metric_name(design.metric)}"
    )


def summary(verdict: Verdict) -> str:
    """The words of all pairs in one sentence; "No verdict" where it is refused."""
    if verdict.refused:
        return "No verdict: these runs do not allow one."
    metric = verdict.design.metric
    parts: list[str] = []
    for word, beside in _BESIDE.items():
        names = [pair.control for pair in verdict.pairs if pair.word is word]
        if names:
            within = ""
            if word is Word.EQUIVALENT:
                within = f" within {size_text(verdict.design.smallest_effect, metric)}"
            parts.append(f"{beside} {', '.join(names)}{within}")
    return f"{verdict.design.treatment} is {'; '.join(parts)}."


def findings(verdict: Verdict) -> Iterator[str]:
    """A paragraph for each pair; the reasons where the verdict is refused."""
    if verdict.refused:
        yield from verdict.refusals
        return
    for pair in verdict.pairs:
        yield f"{_found(verdict, pair)} {_left_open(verdict, pair)}".strip()


def times(verdict: Verdict) -> str:
    """Wall time by arm, which is not judged."""
    parts = [f"{arm.arm} {seconds_text(arm.seconds)} s" for arm in verdict.arms if arm.seconds]
    if not parts:
        return "No wall times are recorded."
    return (
        f"Median wall time of a run, which depends on the machine and is not judged:"
        f" {', '.join(parts)}."
    )


def _found(verdict: Verdict, pair: Pair) -> str:
    design = verdict.design
    metric = design.metric
    beside = f"{_BESIDE[pair.word][0].upper()}{_BESIDE[pair.word][1:]} {pair.control}"
    if pair.word is Word.EQUIVALENT:
        beside += f" within {size_text(design.smallest_effect, metric)}"
    unit = " points" if metric == "test_accuracy" else ""
    effect = "" if pair.d_z is None else f"; d_z {pair.d_z:.2f}"
    return (
        f"{beside}: {metric_name(metric)} differs by {difference_text(pair.mean, metric)}{unit} in"
        f" the mean of {len(pair.differences)} pairs ({100.0 * (1.0 - design.alpha):g} % interval"
        f" {interval_text(pair.low, pair.high, metric)}; p {p_text(pair.p)}, corrected"
        f" {p_text(pair.p_holm)}{effect}; better in {part_text(pair.superiority)} of seeds, ties"
        " half)."
    )


def _left_open(verdict: Verdict, pair: Pair) -> str:
    design = verdict.design
    metric, margin = design.metric, design.smallest_effect
    matters = size_text(margin, metric)
    inner = (
        f"{100.0 * (1.0 - 2.0 * design.alpha):g} % interval"
        f" {interval_text(pair.inner_low, pair.inner_high, metric)}, corrected p of equivalence"
        f" {p_text(pair.p_equivalent_holm)}"
    )
    if pair.word is Word.EQUIVALENT:
        return f"A difference below {matters} is not excluded ({inner})."
    if pair.word is not Word.UNDECIDED:
        least = min(abs(pair.low), abs(pair.high))
        if least >= margin:
            return ""
        return f"That the difference reaches {matters}, which would matter, is not shown."
    if pair.seeds_needed is None:
        needed = f"more than {MOST_PAIRS:,}"
    else:
        needed = f"about {pair.seeds_needed:,}"
    chance = f"A difference of {matters} had a chance of {part_text(pair.power)} to be found"
    if pair.power < WANTED_POWER:
        chance += f"; for {part_text(WANTED_POWER)} {needed} seeds are needed"
    return (
        f"Neither a difference nor equivalence within {matters} is shown ({inner}). {chance}; with"
        f" these seeds {size_text(pair.minimal_effect, metric)} has {part_text(WANTED_POWER)}."
    )
