"""Whether learning goes well, told from what it measured."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

Health = Literal["healthy", "collapsed", "diverging", "misjudging"]


class Diagnosis(NamedTuple):
    """How learning goes."""

    health: Health
    """`diverging`: numbers that are not finite, or steps too far. `collapsed`: the policy chooses
    nearly always the same and returns have not risen. `misjudging`: its values are worse than a
    constant. The first of these that holds, or `healthy`."""
    reasons: tuple[str, ...]
    """What speaks for it, and for others that hold too; none where it is healthy."""


def verdict(
    history: Sequence[Mapping[str, Any]],
    *,
    least_entropy: float = 0.02,
    most_kl: float = 0.2,
    least_explained: float = -0.05,
    most_common: float = 0.99,
    window: int = 10,
) -> Diagnosis:
    """What is wrong with a policy that learns, if anything.

    Args:
        history: rows of metrics as `Learner.metrics` makes them, oldest first: with `entropy`,
            `kl`, `explained_variance`, `return`, `kinds` (fractions by name) and
            `gradient_norm`. A number that is missing, None or NaN says nothing, but for a loss or
            a gradient's norm: that is wrong.
        least_entropy: in nats; below it nothing is tried any more.
        most_kl: in nats, from one iteration to the next; beyond it a step was too far.
        least_explained: of the returns' variance, by the values. Those of a state that is always
            the same explain 0, but for rounding.
        most_common: the fraction from which on one kind of choice is said to be the only one.
        window: iterations at the end that are looked at. A policy that is sure of itself has not
            collapsed if its returns have risen: if they are above those of the first iterations,
            and not below the best so far, by more than the standard error of such a difference.

    Returns:
        Healthy, with no reason, for an empty history.
    """
    recent = history[-window:]
    if not recent:
        return Diagnosis("healthy", ())
    risen = _risen(history, window)
    kl, entropy = _mean(recent, "kl"), _mean(recent, "entropy")
    explained = _mean(recent, "explained_variance")
    kind, fraction = _most_common(recent)
    reasons: dict[Health, list[str]] = {"diverging": [], "collapsed": [], "misjudging": []}
    for name in ("loss", "gradient_norm"):
        value = recent[-1].get(name, 0.0)
        if value is None or not math.isfinite(value):
            reasons["diverging"].append(f"the {name} is not finite")
    if kl is not None and kl > most_kl:
        reasons["diverging"].append(
            f"the policy moves by {kl:.3g} nats an iteration, more than {most_kl:.3g}: lower the"
            " rate, or set a target_kl"
        )
    if entropy is not None and entropy < least_entropy and not risen:
        reasons["collapsed"].append(
            f"the entropy is {entropy:.3g} nats, below {least_entropy:.3g}, and returns have"
            " not risen: raise the entropy_weight"
        )
    if fraction > most_common and not risen:
        reasons["collapsed"].append(
            f"{fraction:.1%} of all choices are {kind}, and returns have not risen"
        )
    if explained is not None and explained < least_explained:
        reasons["misjudging"].append(
            f"values explain {explained:.3g} of the returns' variance, less than"
            f" {least_explained:.3g}: raise the value_weight or the rate"
        )
    every = tuple(why for own in reasons.values() for why in own)
    for health, why in reasons.items():
        if why:
            return Diagnosis(health, every)
    return Diagnosis("healthy", ())


def _numbers(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    values = (row.get(name) for row in rows)
    return [float(value) for value in values if value is not None and math.isfinite(value)]


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = _numbers(rows, name)
    return math.fsum(values) / len(values) if values else None


def _risen(rows: Sequence[Mapping[str, Any]], window: int) -> bool:
    values = _numbers(rows, "return")
    size = min(window, len(values) // 2)
    if size < 2:
        return False
    # Windows from the end on, so that the last is whole.
    starts = range(len(values) % size, len(values), size)
    windows = [values[:size], *(values[start : start + size] for start in starts)]
    means = [math.fsum(own) / size for own in windows]
    last = windows[-1]
    spread = math.fsum((value - means[-1]) ** 2 for value in last) / (size - 1)
    error = math.sqrt(2.0 * spread / size)
    return means[-1] - means[0] > error and max(means) - means[-1] <= 2.0 * error


def _most_common(rows: Sequence[Mapping[str, Any]]) -> tuple[str, float]:
    """The kind of choice that was made most often, and its fraction."""
    totals: dict[str, float] = {}
    for row in rows:
        for kind, fraction in (row.get("kinds") or {}).items():
            totals[kind] = totals.get(kind, 0.0) + fraction / len(rows)
    if not totals:
        return "", 0.0
    return max(totals.items(), key=lambda item: item[1])
