"""What must be believed for a verdict to hold, and what its runs leave open."""

from collections.abc import Iterator, Sequence

from esper.tolaria.comparison._design import Design
from esper.tolaria.comparison._interval import RESAMPLES
from esper.tolaria.comparison._numbers import part_text
from esper.tolaria.comparison._outcome import Outcome
from esper.tolaria.comparison._pair import Pair
from esper.tolaria.comparison._refusals import FLOPS_TOLERANCE


def assumptions(design: Design) -> Iterator[str]:
    """What every verdict by a design rests on."""
    same = {
        "steps": "the same number of optimiser steps",
        "flops": "the treatment's training FLOPs, which are counted and not timed, within"
        f" {part_text(FLOPS_TOLERANCE)} or one step",
    }[design.budget]
    yield f"Every run of a control had {same}."
    if design.task_by_seed:
        yield (
            "Runs are paired by their seed, which sets data, the host's shape, the first weights"
            " and the batches. All are drawn from one family: nothing is said of others."
        )
    else:
        yield (
            "Runs are paired by their seed, which sets the first weights and the batches. Seeds"
            " are all that varies: nothing is said of other tasks, data or hosts."
        )
    yield (
        "The sign-flip test takes a difference to be as likely d as -d where an arm changes"
        " nothing. It is exact up to 16 seeds and drawn at random beyond."
    )
    family = (
        "There is one control, so p-values need no correction"
        if len(design.controls) == 1
        else f"p-values are corrected over the {len(design.controls)} controls by Holm's procedure"
    )
    yield (
        f'{family}: the probability of one false "better" or "worse" is at most'
        f' {design.alpha:g}, and so is that of one false "equivalent". Other budgets and metrics'
        " are families of their own."
    )
    yield (
        f"Intervals are BCa bootstrap intervals of the mean ({RESAMPLES:,} samples, widened for"
        " few seeds), each for one pair alone. In simulations with 6 to 20 seeds, those of 95 %"
        " cover 91 to 95 % of the time where differences are normal, skewed or tied, and more where"
        " most of them are 0."
    )
    yield (
        "Power takes the differences as normal and their spread in these runs as the true one,"
        " which few seeds know roughly."
    )
    yield (
        f"A difference of {design.smallest_effect:g} in {design.metric} is the smallest that"
        " matters: the design says so, and no data do."
    )


def caveats(design: Design, outcomes: Sequence[Outcome], pairs: Sequence[Pair]) -> Iterator[str]:
    """What these runs in particular leave open."""
    if design.controls_left_out:
        yield (
            f"The design has no {', '.join(design.controls_left_out)}: this is no evidence that"
            " growth, or deciding when to grow, is what helps."
        )
    settings = [outcome.setting for outcome in outcomes]
    if any(setting.task_digest is None for setting in settings):
        yield (
            "The runs did not record the digest of their task: that their data were the same is"
            " taken from the task's name."
        )
    if any(setting.host_sites is None for setting in settings):
        yield "The runs did not record their host: that it was the same is taken from the task."
    if any(outcome.training_flops is None for outcome in outcomes):
        yield "Some runs did not count their training FLOPs, so arms cannot be compared in cost."
    for what, field in (("Recipes", "recipe"), ("Library versions", "versions")):
        tables = [dict(getattr(setting, field)) for setting in settings]
        names = sorted({name for table in tables for name in table})
        for name in names:
            values = sorted({str(table.get(name, "none")) for table in tables})
            if len(values) > 1:
                yield f"{what} differ between runs: {name} is {' or '.join(values)}."
    treated = [outcome for outcome in outcomes if outcome.arm == design.treatment]
    if idle := [outcome.seed for outcome in treated if not outcome.grafted]:
        yield (
            f"{design.treatment} grafted nothing with {len(idle)} of its {len(treated)} seeds:"
            " there it is the host alone, and its differences are those of the controls."
        )
    if outcomes and (gone := [o for o in outcomes if o.rollbacks]):
        arms = sorted({outcome.arm for outcome in gone})
        yield (
            f"{len(gone)} of {len(outcomes)} runs went back after a fault, as their ledgers"
            f" record, and are judged by where they ended: of {', '.join(arms)}. Steps that were"
            " taken back are counted neither as steps nor in training FLOPs."
        )
    for pair in pairs:
        if pair.degenerate:
            yield (
                f"Beside {pair.control} all differences are the same, so the bootstrap has nothing"
                " to vary: the interval is that one value. A task that both arms have solved, or"
                " neither can, tells them not apart."
            )
