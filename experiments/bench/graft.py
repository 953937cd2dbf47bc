"""How long a graft holds a training loop up: `python -m experiments.bench.graft`.

A transformer trains, a kernel is asked for, and some steps later it is grafted and
ramped up. Each step is timed by itself, from before the graft to after it, with the
program that comes compiled

- in the background while the seed is LOADING, and swapped in at a step's boundary,
- in the foreground, at the swap,
- by plain `jax.jit`, when it is first called,

and, for comparison, in a loop of the same length without any graft. Times are given
in multiples of the median step before the graft. The stall is the longest step from
the request to the end, the swap's own among them.

This benchmark is not pinned to one core: the compiler is to have the other one.
`--rounds` is how often each kind of graft is made; the clock is the wall's, whatever
is asked for, because a stall is time in which nothing is done.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import numpy as np

from esper.execution import PlannedPrograms, count_compilations
from esper_functional import (
    Event,
    EventKind,
    Kernel,
    Live,
    Plan,
    SeedState,
    advance,
    apply_event,
    gather,
    init_seeds,
    plan,
    reweigh,
)
from experiments.bench._command import Benchmark, run
from experiments.bench._networks import (
    Host,
    TransformerShape,
    feed_forward_rows,
    make_kernels,
    make_transformer,
)
from experiments.bench._paired import Sampling
from experiments.bench._results import Check, Figure, Results
from experiments.bench._steps import planned, sgd_with


@dataclasses.dataclass(frozen=True)
class Settings:
    """The work, and the target of the design (§8)."""

    lives: int = 5
    """How often each kind of graft is made."""
    shape: TransformerShape = dataclasses.field(
        default_factory=lambda: TransformerShape(blocks=4, length=32, batch=16)
    )
    seeds_per_layer: int = 4
    rank: int = 16
    steps_before: int = 100
    loading_steps: int = 400
    """From the request to the swap: long enough for the compiler."""
    steps_after: int = 100
    ramp_steps: int = 100
    learning_rate: float = 0.01
    seed: int = 0
    target: float = 3.0


Step = Callable[..., Any]


class Programs:
    """One way to come by the program of a plan; here, the foreground's."""

    def __init__(self, build: Callable[[Plan], Step]) -> None:
        self.planned = PlannedPrograms(build, warm_up=True)

    def expect(self, coming: Plan, *args: Any) -> None:
        """Told which program will be needed, and for what arguments."""

    def get(self, current: Plan, *args: Any) -> Step:
        """The program, ready to call."""
        return self.planned.get(current, *args)

    def is_ready(self, current: Plan, *args: Any) -> bool:
        """Whether `get` would not wait."""
        return self.planned.ready(current, *args)


class BackgroundPrograms(Programs):
    """Compiles what is expected while the loop goes on."""

    def expect(self, coming: Plan, *args: Any) -> None:
        """Begins to compile."""
        self.planned.prepare(coming, *args)


class JitPrograms(Programs):
    """`jax.jit` with the plan as a static argument."""

    def __init__(self, build: Callable[[Plan], Step]) -> None:
        super().__init__(build)
        self._jitted = jax.jit(lambda plan, *args: build(plan)(*args), static_argnums=0)

    def get(self, current: Plan, *args: Any) -> Step:
        """What compiles when it is called."""
        return partial(self._jitted, current)


WAYS: dict[str, type[Programs]] = {
    "in the background": BackgroundPrograms,
    "in the foreground": Programs,
    "by jax.jit": JitPrograms,
}


@dataclasses.dataclass
class Loop:
    """A training loop over one network with one seed of interest."""

    settings: Settings
    host: Host
    kernels: dict[int, Kernel]
    programs: Programs
    x: jax.Array
    target: jax.Array
    seeds: SeedState
    params: Any
    plan: Plan
    live: Live | None
    trained: tuple[Any, ...]
    program: Step
    now: int = 0

    @property
    def row(self) -> int:
        """The site that grows."""
        return feed_forward_rows(self.settings.shape, 2)[-1]

    def event(self, kind: EventKind, value: float = 0.0, span: int = 0) -> Event:
        """An event of the seed that grows."""
        return Event(self.now, self.row, 0, kind, value=value, span=span)

    def request(self) -> None:
        """The seed goes LOADING, and the program to come is made known."""
        self.seeds = apply_event(self.seeds, self.event(EventKind.LOAD))
        active = apply_event(self.seeds, self.event(EventKind.ACTIVATE))
        coming = plan(active, self.kernels, self.host.sites)
        self.programs.expect(coming, *self.arguments(gather(active, self.kernels, coming)))

    def arguments(self, live: Live | None) -> tuple[Any, ...]:
        """Of a step with this live part."""
        trained = () if live is None else live.params
        own = None if live is None else dataclasses.replace(live, params=())
        return (self.params, trained), own, self.x, self.target

    def swap(self) -> None:
        """Plan and gather anew, and go on with another program."""
        kernels = dict(self.kernels)
        if self.trained:
            kernels[0] = Kernel(kernels[0].program, self.trained[0])
        self.kernels = kernels
        self.plan = plan(self.seeds, kernels, self.host.sites)
        gathered = gather(self.seeds, kernels, self.plan)
        self.program = self.programs.get(self.plan, *self.arguments(gathered))
        self.trained = () if gathered is None else gathered.params
        self.live = None if gathered is None else dataclasses.replace(gathered, params=())

    def graft(self) -> None:
        """The kernel begins to work, and its ramp begins."""
        self.seeds = apply_event(self.seeds, self.event(EventKind.ACTIVATE))
        ramp = self.event(EventKind.RAMP, value=1.0, span=self.settings.ramp_steps)
        self.seeds = apply_event(self.seeds, ramp)
        self.swap()

    def fossilise(self) -> None:
        """The kernel is frozen where it stands."""
        self.seeds = apply_event(self.seeds, self.event(EventKind.FOSSILIZE))
        self.swap()

    def step(self) -> None:
        """One training step, to its end, alphas brought to their values."""
        self.now += 1
        if self.live is not None:
            self.seeds = advance(self.seeds, self.now)
            self.live = reweigh(self.live, self.seeds, self.plan)
        given = (self.params, self.trained), self.live, self.x, self.target
        (self.params, self.trained), errors, _ = jax.block_until_ready(self.program(*given))
        if self.live is not None:
            self.live = dataclasses.replace(self.live, errors=errors)


def make_host(settings: Settings) -> Host:
    """A transformer."""
    return make_transformer(settings.shape, settings.seed)


def make_programs(settings: Settings, host: Host, way: type[Programs]) -> Programs:
    """No program yet."""

    def build(planned_for: Plan) -> Step:
        return sgd_with(planned(host.net, planned_for), settings.learning_rate)

    return way(build)


def make_loop(settings: Settings, host: Host, programs: Programs) -> Loop:
    """A dormant network, its program compiled and run once."""
    shape = settings.shape
    size = (2, shape.batch, shape.length, shape.features)
    x, target = jax.random.normal(jax.random.key(settings.seed + 1), size)
    kernels = make_kernels("low rank", 1, shape.features, settings.rank, settings.seed)
    seeds = init_seeds(len(host.sites), settings.seeds_per_layer)
    dormant = plan(seeds, kernels, host.sites)
    program = programs.get(dormant, (host.params, ()), None, x, target)
    loop = Loop(
        settings, host, kernels, programs, x, target, seeds, host.params, dormant, None, (), program
    )
    loop.step()
    return loop


@contextmanager
def timed(times: list[float]) -> Iterator[None]:
    """Append the seconds of a `with` block."""
    start = time.perf_counter()
    yield
    times.append(time.perf_counter() - start)


def live_once(settings: Settings, way: type[Programs], graft: bool) -> tuple[list[float], bool]:
    """Seconds of every step, and whether the program was there when it was needed."""
    host = make_host(settings)
    loop = make_loop(settings, host, make_programs(settings, host, way))
    times: list[float] = []
    ready = False
    swap_at = settings.steps_before + settings.loading_steps
    for step in range(swap_at + settings.steps_after):
        if graft and step == swap_at:
            coming = apply_event(loop.seeds, loop.event(EventKind.ACTIVATE))
            active = plan(coming, loop.kernels, loop.host.sites)
            live = gather(coming, loop.kernels, active)
            ready = loop.programs.is_ready(active, *loop.arguments(live))
        with timed(times):
            if graft and step == settings.steps_before:
                loop.request()
            if graft and step == swap_at:
                loop.graft()
            loop.step()
    loop.programs.planned.close()
    return times, ready


def measure_stalls(results: Results, settings: Settings, name: str, way: type[Programs]) -> None:
    """Every life of one kind, in multiples of its own median step."""
    graft = name != "no graft"
    start, swap_at = settings.steps_before, settings.steps_before + settings.loading_steps
    worst: list[float] = []
    swaps: list[float] = []
    loading: list[float] = []
    medians: list[float] = []
    in_time = 0
    for _ in range(settings.lives):
        times, ready = live_once(settings, way, graft)
        in_time += ready
        steps = np.array(times)
        median = float(np.median(steps[:start]))
        medians.append(median)
        worst.append(float(steps[start:].max()) / median)
        swaps.append(float(steps[swap_at]) / median)
        loading.append(float(np.median(steps[start:swap_at])) / median)
    background = way is BackgroundPrograms and graft
    target = settings.target if background else None
    steps = "steps"
    results.figures += [
        Figure(f"{name}: median step before", float(np.median(medians)) * 1e3, "ms"),
        Figure(f"{name}: longest step, median of lives", float(np.median(worst)), steps, target),
        Figure(f"{name}: longest step, worst life", max(worst), steps),
        Figure(f"{name}: the swap's step, median of lives", float(np.median(swaps)), steps),
        Figure(f"{name}: the swap's step, worst life", max(swaps), steps, target),
        Figure(f"{name}: median step while loading", float(np.median(loading)), steps),
    ]
    if background:
        found = f"{in_time} of {settings.lives}"
        expected = f"{settings.lives} of {settings.lives}"
        results.checks.append(Check(f"{name}: compiled before the swap", expected, found))


def count_programs(results: Results, settings: Settings) -> None:
    """Programs that XLA compiles in a seed's life, and in a second one."""
    host = make_host(settings)
    # What jax compiles to make arrays is compiled here.
    make_loop(settings, host, make_programs(settings, host, Programs)).programs.planned.close()
    programs = make_programs(settings, host, BackgroundPrograms)

    def live() -> None:
        loop = make_loop(settings, host, programs)
        loop.request()
        loop.graft()
        for _ in range(settings.ramp_steps):
            loop.step()
        loop.fossilise()
        loop.step()

    for life, expected in (("a first life", "3"), ("a second life", "0")):
        with count_compilations() as count:
            live()
        name = f"programs compiled in {life}: load, {settings.ramp_steps}-step ramp, fossilise"
        results.checks.append(Check(name, expected, str(count())))
    programs.planned.close()


def measure(settings: Settings, only: str = "") -> Results:
    """The stalls of all kinds of graft, and what is compiled."""
    results = Results(only=only)
    if results.wants("programs compiled"):
        count_programs(results, settings)
    for name, way in {"no graft": Programs, **WAYS}.items():
        if results.wants(name):
            measure_stalls(results, settings, name, way)
    return results


BENCHMARK = Benchmark(
    name="graft",
    doc=__doc__,
    settings=lambda sampling: Settings(lives=sampling.rounds),
    measure=measure,
    quick=2,
    standard=Sampling(rounds=5),
    pinned=False,
)


if __name__ == "__main__":
    sys.exit(run(BENCHMARK))
