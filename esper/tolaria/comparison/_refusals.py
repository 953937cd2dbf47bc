"""Why there is no verdict: what the runs lack, before a number of theirs is compared."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from esper.tolaria.comparison._design import Design
from esper.tolaria.comparison._numbers import part_text
from esper.tolaria.comparison._outcome import Outcome
from esper.tolaria.comparison._sign_flip import fewest_pairs

FLOPS_TOLERANCE = 0.02
"""Relative difference of training FLOPs up to which a control's budget equals its treatment's. Less
than a step of the control is equal too: of a short run, one may be more than that."""


def refusals(design: Design, outcomes: Sequence[Outcome]) -> list[str]:
    """Every reason, in plain words, not to judge these outcomes by this design.

    Args:
        outcomes: of the design's arms under its budget, and nothing else.
    """
    found = [*_missing(design, outcomes), *_repeated(outcomes)]
    found += [*_unfinished(outcomes), *_values(design, outcomes), *_settings(design, outcomes)]
    found += _growth(design, outcomes)
    found += _steps(outcomes) if design.budget == "steps" else _flops(design, outcomes)
    fewest = fewest_pairs(design.level)
    if len(design.seeds) < fewest:
        controls = "1 control" if len(design.controls) == 1 else f"{len(design.controls)} controls"
        found.append(
            f"too few seeds: with {len(design.seeds)} no sign-flip test gives a p-value below"
            f" {2.0 / 2 ** len(design.seeds):.2g}, and {controls} at alpha"
            f" {design.alpha:g} take {design.level:.2g} (Holm); expected at least {fewest} seeds"
        )
    return found


def _numbers(values: Iterable[int]) -> str:
    return ", ".join(str(value) for value in sorted(values))


def _missing(design: Design, outcomes: Sequence[Outcome]) -> Iterator[str]:
    wanted = set(design.seeds)
    for arm in design.arms:
        seeds = {outcome.seed for outcome in outcomes if outcome.arm == arm}
        if not seeds:
            yield (
                f"the arm {arm!r} is missing: expected its runs with the seeds"
                f" {_numbers(wanted)} under equal {design.budget}, got none; run it"
            )
        elif wanted - seeds:
            yield (
                f"the seeds are not paired: {arm!r} lacks {_numbers(wanted - seeds)} of"
                f" {_numbers(wanted)}; run them"
            )
        if seeds - wanted:
            yield (
                f"the seeds are not those of the design: {arm!r} has {_numbers(seeds - wanted)}"
                f" beside {_numbers(wanted)}, and seeds chosen afterwards show nothing; judge by a"
                " design that names all that were run"
            )


def _repeated(outcomes: Sequence[Outcome]) -> Iterator[str]:
    for name, count in sorted(Counter(outcome.name for outcome in outcomes).items()):
        if count > 1:
            folders = sorted(outcome.folder for outcome in outcomes if outcome.name == name)
            yield (
                f"{name} has {count} outcomes ({', '.join(folders)}), expected one; decide before"
                " looking at them which one counts"
            )
    for folder, count in sorted(Counter(outcome.folder for outcome in outcomes).items()):
        names = {outcome.name for outcome in outcomes if outcome.folder == folder}
        if count > 1 and len(names) > 1:
            yield (
                f"the run {folder} stands for {' and for '.join(sorted(names))}; expected a run of"
                " its own for each"
            )


def _unfinished(outcomes: Sequence[Outcome]) -> Iterator[str]:
    for outcome in outcomes:
        if outcome.diverged_at is not None:
            yield (
                f"{outcome.name} diverged: its loss at step {outcome.diverged_at:,} is not finite,"
                f" and no rollback in its ledger takes that back ({outcome.folder}); leaving it out"
                " would favour its arm, so change what makes it diverge and run all arms again"
            )
        if outcome.setting.branched:
            yield (
                f"{outcome.name} was branched off another run ({outcome.folder}), so its arm is not"
                " all that is different; expected a run from step 0, so make one"
            )
        if not outcome.ended:
            yield (
                f"{outcome.name} did not end: expected its ledger to say so, and its last"
                f" measurement is of step {outcome.steps:,} of {outcome.setting.planned_steps:,};"
                f" go on with esper grow --resume {outcome.folder}"
            )


def _values(design: Design, outcomes: Sequence[Outcome]) -> Iterator[str]:
    most = 1.0 if design.metric == "test_accuracy" else math.inf
    for outcome in outcomes:
        value = getattr(outcome, design.metric)
        if value is None or not math.isfinite(value):
            yield (
                f"{outcome.name} has no finite {design.metric} at its end, got {value}"
                f" ({outcome.folder}); run it again, and if it diverges change the design"
            )
        elif not 0.0 <= value <= most:
            yield (
                f"{outcome.name} has a {design.metric} of {value}, expected one from 0 to {most:g}"
                f" ({outcome.folder}); its measurements are damaged, so run it again"
            )


def _growth(design: Design, outcomes: Sequence[Outcome]) -> Iterator[str]:
    treated = [outcome for outcome in outcomes if outcome.arm == design.treatment]
    if treated and not any(outcome.grafted for outcome in treated):
        yield (
            f"{design.treatment!r} grafted nothing with any of its {len(treated)} seeds, so there"
            " is no growth to judge; give it more steps, a harder task, or a trigger that fires"
            " (the ledgers record vetoes)"
        )


_ALIKE = (
    ("task", "the task"),
    ("task_digest", "the digest of the task"),
    ("backend", "the backend"),
    ("host_sites", "the host's layers"),
    ("host_parameters", "the host's parameters"),
)


_OF_SEED = ("task", "task_digest", "host_sites", "host_parameters")
"""Of those, what a seed may have of its own where it draws its task."""


def _settings(design: Design, outcomes: Sequence[Outcome]) -> Iterator[str]:
    for field, what in _ALIKE:
        alone = design.task_by_seed and field in _OF_SEED
        for seed in design.seeds if alone else (None,):
            groups: dict[object, list[Outcome]] = {}
            for outcome in outcomes:
                if seed in (None, outcome.seed):
                    groups.setdefault(getattr(outcome.setting, field), []).append(outcome)
            if len(groups) > 1:
                where = "in all runs" if seed is None else f"in all runs of seed {seed}"
                yield (
                    f"the arms do not match: expected {what} to be the same {where}, got"
                    f" {_told(groups)}"
                )


def _told(groups: dict[object, list[Outcome]]) -> str:
    parts: list[str] = []
    for value, members in sorted(groups.items(), key=lambda item: (-len(item[1]), str(item[0]))):
        text = "none recorded" if value is None else str(value)
        if isinstance(value, tuple):
            text = ", ".join(value)
        names = sorted(member.name for member in members)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        parts.append(f"{text[:60]} ({'; '.join(names[:3])}{more})")
    return " against ".join(parts) + "; run the arms that differ again"


def _steps(outcomes: Sequence[Outcome]) -> Iterator[str]:
    groups: dict[object, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.steps, []).append(outcome)
    if len(groups) > 1:
        yield f"the arms do not match: expected equal steps, got {_told(groups)}"


def _flops(design: Design, outcomes: Sequence[Outcome]) -> Iterator[str]:
    unknown = sorted(outcome.name for outcome in outcomes if outcome.training_flops is None)
    if unknown:
        others = " and others" if len(unknown) > 3 else ""
        yield (
            "the arms cannot be matched: expected equal training FLOPs, and"
            f" {'; '.join(unknown[:3])}{others} did not count theirs; run them again with an Esper"
            " that does, or judge under equal steps"
        )
        return
    wanted = {o.seed: o.training_flops or 0.0 for o in outcomes if o.arm == design.treatment}
    for control in design.controls:
        apart = [
            (_apart(outcome.training_flops or 0.0, wanted[outcome.seed]), outcome)
            for outcome in outcomes
            if outcome.arm == control and outcome.seed in wanted
        ]
        far = [
            (ratio, outcome)
            for ratio, outcome in apart
            if not ratio <= FLOPS_TOLERANCE
            and not ratio * wanted[outcome.seed] <= _step_flops(outcome)
        ]
        if far:
            _, worst = max(far, key=lambda item: (item[0], item[1].seed))
            yield (
                f"the arms do not match: expected the training FLOPs of {control!r} within"
                f" {part_text(FLOPS_TOLERANCE)} or one step of those of {design.treatment!r}, got"
                f" {len(far)} of {len(apart)} runs further away (seed {worst.seed}:"
                f" {worst.training_flops:.6g} beside {wanted[worst.seed]:.6g}); give them other"
                " steps"
            )


def _step_flops(outcome: Outcome) -> float:
    """Of the dearest step that a run took, by the means between its measurements; 0 if unknown.

    What is grafted at a measurement runs from the second step after it, so that the first one is
    not counted.
    """
    curve = outcome.curve
    points = [(s, f) for s, f in zip(curve.steps, curve.flops, strict=True) if f is not None]
    slopes = [
        (flops - before) / max(1, step - first - 1)
        for (first, before), (step, flops) in pairwise(points)
        if step > first
    ]
    return max((own for own in slopes if math.isfinite(own)), default=0.0)


def _apart(got: float, wanted: float) -> float:
    """Relative difference; without end where it is of nothing, or not finite."""
    ratio = abs(got - wanted) / wanted if wanted > 0.0 else math.inf
    return ratio if math.isfinite(ratio) else math.inf
