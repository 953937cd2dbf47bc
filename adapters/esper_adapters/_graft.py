"""What a grafted layer of a JAX model holds, whichever framework the model is of."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from esper_functional import Blend, Grafted, Live, Plan, Run, host_call, run_site


class Blending(NamedTuple):
    """What decides how one layer's kernels are blended; see `esper_functional.Live`."""

    host_weight: Any
    weights: Any
    errors: Any


class Shadow(NamedTuple):
    """One layer's blend weights while one kernel of the model, which incubates, is at alpha 1."""

    host_weight: Any
    weights: Any


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """The static part of a grafted layer."""

    where: str
    """The layer, for messages."""
    runs: tuple[Run, ...]
    seeds: tuple[int, ...]
    """The seed of each run."""
    shadowed: tuple[int | None, ...]
    """For each incubating kernel of the model, which run of this layer it is, or None."""
    blend: Blend
    isolate: bool
    contain: bool

    def shadow(self, nth: int) -> "Anatomy":
        """In which the nth incubating kernel of the model runs."""
        own = self.shadowed[nth]
        if own is None:
            return self
        runs = list(self.runs)
        runs[own] = dataclasses.replace(runs[own], incubating=False)
        return dataclasses.replace(self, runs=tuple(runs))


class Graft(NamedTuple):
    """All that a layer needs to become a grafted one."""

    anatomy: Anatomy
    kernels: Mapping[int, Any]
    """Parameters by seed."""
    blending: Blending
    shadows: tuple[Shadow, ...]


def plan_grafts(
    planned: Plan, live: Live | None, places: Sequence[tuple[int, int]]
) -> dict[str, Graft]:
    """The graft of each layer that has one.

    Args:
        places: (layer, seed) of every running seed, in plan order.
    """
    if live is None:
        return {}
    incubating = planned.incubating
    grafts: dict[str, Graft] = {}
    first = busy = 0
    for name, runs in planned.sites:
        if not runs:
            continue
        own = slice(first, first + len(runs))
        seeds = tuple(seed for _, seed in places[own])
        shadowed = tuple(i - first if own.start <= i < own.stop else None for i in incubating)
        grafts[name] = Graft(
            Anatomy(
                f"layer {name!r}",
                runs,
                seeds,
                shadowed,
                planned.blend,
                planned.isolate,
                planned.contain,
            ),
            dict(zip(seeds, live.params[own], strict=True)),
            Blending(live.host_weights[busy], live.weights[own], live.errors[own]),
            tuple(Shadow(s.host_weights[busy], s.weights[own]) for s in live.shadows),
        )
        first += len(runs)
        busy += 1
    return grafts


def run_graft(
    anatomy: Anatomy,
    kernels: Mapping[int, Any],
    blending: Blending,
    result: Any,
    args: Sequence[Any],
    options: Mapping[str, Any],
) -> Any:
    """What a grafted layer returns, for what its host returned for `args` and `options`."""
    call = host_call(anatomy.where, result, args, options)
    grafted: Grafted = run_site(
        anatomy.runs,
        [kernels[seed] for seed in anatomy.seeds],
        *blending,
        call.h,
        call.x,
        blend=anatomy.blend,
        isolate=anatomy.isolate,
        contain=anatomy.contain,
        where=anatomy.where,
    )
    return call.exchange(grafted.output)
