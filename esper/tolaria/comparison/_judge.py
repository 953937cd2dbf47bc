"""From a design and the outcomes of its runs to a verdict."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from esper.tolaria.comparison._arms import summarise
from esper.tolaria.comparison._assumptions import assumptions, caveats
from esper.tolaria.comparison._design import Design
from esper.tolaria.comparison._differences import compare_pair
from esper.tolaria.comparison._holm import holm
from esper.tolaria.comparison._numbers import part_text
from esper.tolaria.comparison._outcome import Outcome
from esper.tolaria.comparison._pair import Pair, Word
from esper.tolaria.comparison._power import MOST_PAIRS, WANTED_POWER
from esper.tolaria.comparison._refusals import refusals
from esper.tolaria.comparison._verdict import Verdict


def judge(design: Design, outcomes: Iterable[Outcome]) -> Verdict:
    """Judge a treatment beside its controls, or say why it cannot be judged.

    A treatment is *better* (or *worse*) than a control where the sign-flip test, corrected over
    the controls by Holm's procedure, is at most alpha and the interval lies on one side of 0;
    *equivalent* where the test of equivalence, corrected likewise, is at most alpha and the inner
    interval lies within the smallest effect of interest; else *undecided*. Asking for both, test
    and interval, makes no more false claims than the test alone.

    It is refused where runs are missing, unpaired, unfinished, twice there or not comparable, where
    a metric is not finite, where so few seeds can show nothing at all, and where every pair is
    undecided and none had a fair chance (power 0.8) to show the smallest effect of interest.

    Args:
        design: what was set out to be found.
        outcomes: of its arms under its budget; those of other arms and budgets are passed over.
    """
    taken = [o for o in outcomes if o.budget == design.budget and o.arm in design.arms]
    taken.sort(key=lambda o: (design.arms.index(o.arm), o.seed, o.folder))
    arms = tuple(
        summarise(arm, runs, design.metric)
        for arm in design.arms
        if (runs := [o for o in taken if o.arm == arm])
    )
    reasons = refusals(design, taken)
    pairs: tuple[Pair, ...] = ()
    if not reasons:
        pairs = _pairs(design, taken)
        reasons = _hopeless(design, pairs)
    return Verdict(
        design=design,
        refusals=tuple(reasons),
        pairs=() if reasons else pairs,
        arms=arms,
        assumptions=tuple(assumptions(design)),
        caveats=tuple(caveats(design, taken, () if reasons else pairs)),
    )


def _pairs(design: Design, outcomes: Sequence[Outcome]) -> tuple[Pair, ...]:
    values = {(o.arm, o.seed): float(getattr(o, design.metric)) for o in outcomes}

    def of(arm: str) -> list[float]:
        return [values[arm, seed] for seed in design.seeds]

    found = [compare_pair(design, arm, of(design.treatment), of(arm)) for arm in design.controls]
    differ = holm(np.array([pair.p for pair in found]))
    equal = holm(np.array([pair.p_equivalent for pair in found]))
    return tuple(
        _with_word(
            design,
            dataclasses.replace(pair, p_holm=float(differ[i]), p_equivalent_holm=float(equal[i])),
        )
        for i, pair in enumerate(found)
    )


def _with_word(design: Design, pair: Pair) -> Pair:
    word = Word.UNDECIDED
    if pair.p_holm <= design.alpha and (pair.low > 0.0 or pair.high < 0.0):
        # The interval may lie on one side of 0 and the mean is in it.
        word = Word.BETTER if design.direction * pair.mean > 0.0 else Word.WORSE
    elif pair.p_equivalent_holm <= design.alpha and (
        -design.smallest_effect < pair.inner_low and pair.inner_high < design.smallest_effect
    ):
        word = Word.EQUIVALENT
    return dataclasses.replace(pair, word=word)


def _hopeless(design: Design, pairs: Sequence[Pair]) -> list[str]:
    if any(pair.word is not Word.UNDECIDED or pair.power >= WANTED_POWER for pair in pairs):
        return []
    parts = [
        f"{pair.control} (spread {pair.spread:.3g}, power {pair.power:.2f}, about"
        f" {f'{MOST_PAIRS:,} and more' if pair.seeds_needed is None else f'{pair.seeds_needed:,}'}"
        " seeds needed)"
        for pair in pairs
    ]
    reason = (
        f"too few seeds to decide anything: with {len(design.seeds)} of them, and the spread of"
        f" paired differences, a difference in {design.metric} of {design.smallest_effect:g} would"
        f" have been missed more often than {part_text(1.0 - WANTED_POWER)} of the time beside"
        f" every control: {'; '.join(parts)}; run more seeds, or set out to find a larger effect"
    )
    return [reason]
