"""How the policy that comes with Esper was made: `python -m experiments.studies.policy`.

A policy learns in the gym by PPO from nothing, its limits are measured, and it is held against
other controllers in equal episodes: in the families of tasks that it was trained in, and in five
that it never saw. The folder of results holds the policy itself, and the course of its training.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from esper.tamiyo.learning import Recipe, make, quick_recipe
from esper.tamiyo.policy import save_policy
from experiments.studies._study import Found, Study, Table, run

POLICY = "policy.safetensors"
TRAINING = "training"


@dataclasses.dataclass(frozen=True)
class Settings:
    """The recipe, and how long it is judged."""

    seeds: int = 32
    """Episodes of each family and arm."""
    quick: bool = False


def measure(settings: Settings, out: Path) -> Found:
    """Make a policy, and say what it was found to do."""
    recipe = quick_recipe() if settings.quick else Recipe()
    recipe = dataclasses.replace(recipe, evaluated=settings.seeds)
    loaded = make(recipe, out / TRAINING, told=_told)
    save_policy(out / POLICY, loaded)
    lines = (out / TRAINING / "metrics.jsonl").read_text().splitlines()
    return found_of(loaded.card, [json.loads(line) for line in lines])


def found_of(card: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Found:
    """What a policy's card and the rows of its training say."""
    training, effects = card["training"], card["effects"]
    note = (
        f"After {training['steps']:,} steps of the gym the critic explains"
        f" {training['explained_variance']:.0%} of the variance of returns. Of"
        f" {effects['decisions']:,} decisions whose effect was measured, a fifth were held out:"
        f" what was said of them has a calibration error of {effects['calibration_error']:.3f}, and"
        f" correlates with what was measured by {effects['correlation']:.2f}."
    )
    numbers = {"card": card, "training": rows}
    return Found(numbers, judged_table(card["judged"]), draw(rows, card), (note,))


def judged_table(judged: Sequence[Mapping[str, Any]]) -> Table:
    """Mean returns with their 95 % intervals by family and arm, and the policy's lead."""
    rows = [
        (
            row["family"],
            row["arm"],
            f"{row['mean']:+.2f} ± {row['half']:.2f}",
            "" if row["arm"] == "learned" else f"{row['lead']:+.2f} ± {row['lead_half']:.2f}",
        )
        for row in judged
    ]
    return Table(("family", "arm", "return", "lead of the policy"), tuple(rows))


def draw(rows: Sequence[Mapping[str, Any]], card: Mapping[str, Any]) -> Figure:
    """The course of training, and the reliability of what is said of effects."""
    figure = Figure(figsize=(8.0, 4.8), layout="constrained")
    axes = figure.subplots(2, 2)
    steps = [row["iteration"] + 1 for row in rows]
    for place, (name, label) in zip(
        axes.flat,
        (
            ("return", "return of an episode"),
            ("explained_variance", "explained variance"),
            ("entropy", "entropy in nats"),
        ),
        strict=False,
    ):
        place.plot(steps, [row[name] for row in rows])
        place.set_xlabel("iteration")
        place.set_ylabel(label)
    curve, place = card["effects"]["reliability"], axes[1, 1]
    pairs = [(s, t) for s, t in zip(curve["said"], curve["true"], strict=True) if s is not None]
    place.plot([0, 1], [0, 1], ":", color="0.5")
    place.plot([s for s, _ in pairs], [t for _, t in pairs], "o-")
    place.set_xlabel("probability of a good effect, as said")
    place.set_ylabel("how often it was")
    return figure


def _told(row: Mapping[str, Any]) -> None:
    print(f"iteration {row['iteration'] + 1}: return {row['return']:.3f}", file=sys.stderr)


STUDY = Study(
    name="policy",
    doc=__doc__,
    full=Settings(),
    quick=Settings(seeds=2, quick=True),
    measure=measure,
)

if __name__ == "__main__":
    sys.exit(run(STUDY))
