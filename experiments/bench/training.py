"""What Tolaria's loop costs: `python -m experiments.bench.training`.

Runs are whole: `start_run`, with its ledger, its measurements and its checkpoints on the disk. In
the middle of each, at its hooks, the framework's own loop trains the same host on the same batches
for as many steps, twice over, so that what is compared is interleaved; and anew in several builds,
because where a network lies in memory is a part of its speed. The first steps of both are
checked to have the same losses. Four comparisons and figures for each backend and network:

- "no boundaries": the loop by itself, dormant; boundaries are so rare that the median leaves them
  out.
- "boundaries": at the default rate, with a controller that decides nothing, measurements and
  ledger, after thousands of steps, when jax trains several in a call where it can. Both loops
  evaluate the network on held-out data, at the same steps, so that both come back to training with
  caches that hold something else; the time that it takes is left out of the ratio, and stands
  beside it by itself. Checkpoints are left to a measurement of their own.
- "boundaries, a kernel": the same with a kernel at alpha 1, whose health is measured and recorded,
  against the bare steps of that network.
- "graft": the longest time between the ends of two steps, from the decision to the end of the ramp,
  without what evaluation takes, in step times: for a graft like one that this process has seen, and
  for the first of its kind, for which jax compiles. A step's time is the median over several equal
  runs, so that what comes by chance falls out and what comes every time stays.

Then a network whose checkpoint is 8 MB: how long the loop stands still for it, what it costs in all
on this one core, what it would cost if nothing were done in the background, and what it takes
to hold the network at a boundary.

`--cpu-clock` is of the first comparison; all others go by the wall clock.
"""

import dataclasses
import gc
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.bench._command import Benchmark, run
from experiments.bench._paired import Sampling
from experiments.bench._results import Check, Figure, Results, Row, Timing

STEPS = "no boundaries"
BOUNDARIES = "boundaries"
KERNEL = "boundaries, a kernel"
GRAFT = "graft"

_COMPARED = 50
"""Most steps after which losses are compared; roundings grow apart in more."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The work, and the targets."""

    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    backends: tuple[str, ...] = ("jax", "torch")
    mlp: tuple[int, ...] = (128, 512, 256, 6)
    image: int = 16
    widths: tuple[int, ...] = (8, 16)
    batch: int = 64
    examples: int = 2_048
    """Of the training part; the other parts have an eighth of it each."""
    stretch: int = 250
    """Steps of one timing without boundaries."""
    decide_every: int = 50
    window: int = 200
    """Steps of one timing with boundaries."""
    still: int = 6_000
    """Steps before the first of them."""
    grafts: int = 5
    """Equal runs with a graft, after the first."""
    ramp_steps: int = 100
    large: tuple[int, ...] = (256, 1024, 384, 6)
    """An MLP with 8 MB of parameters and moments."""
    saves: int = 15
    seed: int = 0
    steps_target: float = 1.01
    boundaries_target: float = 1.03
    blocked_target: float = 25.0
    """Milliseconds."""
    stall_target: float = 3.0
    """Step times."""


class Place(NamedTuple):
    """Where runs are written."""

    folder: Path
    library: Path


@contextmanager
def _place() -> Iterator[Place]:
    with tempfile.TemporaryDirectory() as folder:
        yield Place(Path(folder), Path(folder) / "library")


class Turns:
    """Gives the bare loops their turns, and keeps the times: `[rounds, (bare, again, Tolaria)]`.

    Args:
        bare: two loops.
        steps: of one timing.
        warmup: rounds that are not kept.
    """

    def __init__(self, bare: tuple[Any, Any], steps: int, sampling: Sampling, warmup: int) -> None:
        self._bare = bare
        self._steps = steps
        self._left = -warmup
        self._rounds = sampling.rounds
        self._sampling = sampling
        self._clock = time.perf_counter if sampling.clock == "wall" else time.process_time
        self._began: float | None = None
        self._evaluated = 0.0
        self.seconds: list[tuple[float, float, float]] = []
        self.evaluations: list[float] = []

    def over(self) -> bool:
        """Whether all rounds were taken."""
        return len(self.seconds) >= self._rounds

    def turn(self, step: int, evaluated: float = 0.0) -> None:
        """At the end of Tolaria's share of a round, all of whose steps are before `step`."""
        now = self._clock()
        taken, spent = now - (self._began or now), evaluated - self._evaluated
        first = step - self._steps
        times = [0.0, 0.0]
        for i in (0, 1) if self._left % 2 else (1, 0):
            began, before = self._clock(), self._bare[i].evaluated
            self._bare[i](first, step)
            times[i] = self._clock() - began - (self._bare[i].evaluated - before)
        if self._began is not None:
            self._left += 1
            if self._left > 0:
                self.seconds.append((times[0], times[1], taken - spent))
                self.evaluations.append(spent)
                self._shorten(sum(times) + taken)
        self._evaluated = evaluated
        self._began = self._clock()

    def _shorten(self, seconds: float) -> None:
        """After the first round: keep within the budget of time."""
        if len(self.seconds) == 1:
            affordable = int(self._sampling.budget / seconds)
            self._rounds = min(self._rounds, max(self._sampling.least, affordable))


def row_of(turns: Sequence[Turns], name: str, target: float, steps: int) -> Row:
    """What was found in all builds."""
    seconds = np.array([times for own in turns for times in own.seconds])
    bare, again, ours = (_timing(column, seconds[:, 0], steps) for column in seconds.T)
    return Row(name, target, steps, bare, again, ours, rounds=len(seconds))


def _shared_out(sampling: Sampling) -> Sampling:
    """What is measured of each build: where a network lies in memory is a part of its speed."""
    return dataclasses.replace(
        sampling,
        rounds=math.ceil(sampling.rounds / sampling.builds),
        least=math.ceil(sampling.least / sampling.builds),
        budget=sampling.budget / sampling.builds,
    )


def _timing(seconds: np.ndarray, reference: np.ndarray, steps: int) -> Timing:
    low, middle, high = (float(q) for q in np.quantile(seconds / reference, (0.25, 0.5, 0.75)))
    return Timing(float(np.median(seconds)) / steps * 1e6, middle, (low, high))


@contextmanager
def _without_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _train(path: Path, config: Any, task: Any, **hooks: Any) -> None:
    """A run from its beginning until its hooks have seen enough."""
    from esper.errors import Interrupted
    from esper.tolaria import Hooks, start_run

    with suppress(Interrupted), _without_collection():
        start_run(path, config, task=task, hooks=Hooks(**hooks))


def compare_steps(results: Results, settings: Settings, backend: str, work: Any, name: str) -> None:
    """The loop by itself."""
    from experiments.bench._training_loops import bare_loop, configure, make_data

    task, sampling = (
        make_data(work, settings.examples, settings.seed),
        _shared_out(settings.sampling),
    )
    every = settings.stretch
    compared = min(_COMPARED, every)
    steps = every * (sampling.rounds + sampling.warmup + 2)
    values = {
        "controller": "none",
        "decide_every": 10 * every,
        "checkpoint_every": 10 * every * (steps // every),
    }
    losses: dict[str, float] = {}

    def build() -> Turns:
        with _place() as place:
            config = configure(backend, work, place.library, steps=steps, **values)
            bare = bare_loop(task, config), bare_loop(task, config)
            turns = Turns(bare, every, sampling, sampling.warmup)

            def on_step(step: int, loss: Any) -> None:
                if step + 1 == compared:
                    losses["bare"] = bare_loop(task, config)(0, compared)
                    losses["Tolaria"] = float(loss)
                if (step + 1) % every == 0:
                    float(loss)  # waits for the device
                    turns.turn(step + 1)

            _train(place.folder / "run", config, task, stop=turns.over, on_step=on_step)
        return turns

    turns = [build() for _ in range(sampling.builds)]
    results.rows.append(row_of(turns, name, settings.steps_target, every))
    same = math.isclose(losses["bare"], losses["Tolaria"], rel_tol=1e-3)
    title = f"{name}: loss of step {compared} as the bare loop's"
    results.checks.append(Check(title, "yes", "yes" if same else f"no, {losses}"))


def compare_boundaries(
    results: Results, settings: Settings, backend: str, work: Any, name: str, *, kernel: bool
) -> None:
    """The loop with all that a run does."""
    from esper.tolaria._grow import compile_kernels
    from esper.urza import Library
    from experiments.bench._training_loops import bare_loop, configure, make_data, steps_alone

    task = make_data(work, settings.examples, settings.seed)
    # What evaluation takes is known by the wall clock alone.
    sampling = _shared_out(dataclasses.replace(settings.sampling, clock="wall"))
    every, warmup, judged = settings.window, min(2, sampling.warmup), settings.decide_every
    # Torch trains as it did from the first step on.
    still = settings.still if backend == "jax" else 0
    steps = still + every * (sampling.rounds + warmup + 3)
    steps += -steps % settings.decide_every
    rhythm = {"decide_every": settings.decide_every, "checkpoint_every": steps}

    def build() -> Turns:
        with _place() as place:
            config = configure(
                backend, work, place.library,
                steps=steps, controller="random", graft_probability=0.0, **rhythm,
            )  # fmt: skip
            bare: tuple[Any, Any]
            if kernel:
                library = Library(place.library)
                ((site, (kernel_id,)),) = compile_kernels(config, library, task=task).items()
                graft = {"site": site, "seed": 0, "kernel": kernel_id}
                config = config.model_copy(update={"controller": "none"})
                values = config.model_dump() | {"controller": "none", "initial_grafts": [graft]}
                config = type(config).model_validate(values)
                artifact = library.get(kernel_id)
                bare = (
                    steps_alone(task, config, artifact, judged),
                    steps_alone(task, config, artifact, judged),
                )
                library.close()
            else:
                bare = bare_loop(task, config, judged), bare_loop(task, config, judged)
            turns = Turns(bare, every, sampling, warmup)

            def on_boundary(row: Mapping[str, Any]) -> None:
                if row["step"] > still and row["step"] % every == 0:
                    turns.turn(row["step"], row["seconds"].get("evaluate", 0.0))

            _train(place.folder / "run", config, task, stop=turns.over, on_boundary=on_boundary)
        return turns

    turns = [build() for _ in range(sampling.builds)]
    results.rows.append(row_of(turns, name, settings.boundaries_target, every))
    spent = [seconds for own in turns for seconds in own.evaluations]
    evaluation = float(np.median(spent)) * settings.decide_every / every
    boundary = f"{name}: evaluation of {2 * len(task.validation)} examples at each boundary"
    results.figures.append(Figure(boundary, evaluation * 1e3, "ms"))


def measure_graft(results: Results, settings: Settings, backend: str, work: Any, name: str) -> None:
    """The longest wait of a run in which a kernel comes in."""
    from experiments.bench._training_loops import configure, make_data

    task = make_data(work, settings.examples, settings.seed)
    decision, runs = 2 * settings.decide_every, list[np.ndarray]()
    window = slice(decision, decision + 20 + settings.ramp_steps + 1)
    steps = window.stop + settings.decide_every
    schedule = [{"step": decision, "action": "graft", "site": work.host.grow_at[0]}]
    with _place() as place:
        config = configure(
            backend, work, place.library,
            steps=steps, controller="fixed", schedule_of_grafts=schedule,
            ramp_steps=settings.ramp_steps, decide_every=settings.decide_every,
            checkpoint_every=settings.decide_every * 100,
            # Another than in the other comparisons, so that no program is there at first.
            seeds_per_layer=3,
        )  # fmt: skip
        for i in range(settings.grafts + 1):
            runs.append(_gaps(place.folder / f"run-{i}", config, task))
    step = float(np.median(np.median(runs[1:], axis=0)[window]))
    for what, gaps, target in (
        ("first of its kind", runs[0], None),
        ("like one before", np.median(runs[1:], axis=0), settings.stall_target),
    ):
        longest = float(gaps[window].max())
        results.figures += [
            Figure(f"{name}, {what}: longest gap", longest / step, "steps", target),
            Figure(f"{name}, {what}: longest gap", longest * 1e3, "ms"),
        ]
    at = int(np.argmax(np.median(runs[1:], axis=0)[window]))
    results.notes.append(
        f"{name}: a step takes {step * 1e3:.3g} ms; decided before step {decision}, grafted 20"
        f" steps later; the longest gap of a graft like one before is that of step {decision + at}."
    )


def _gaps(path: Path, config: Any, task: Any) -> np.ndarray:
    """Seconds `[steps]` from the end of one step to that of the next, without evaluation."""
    ends, evaluated = np.zeros(config.steps), np.zeros(config.steps + 1)

    def on_step(step: int, loss: Any) -> None:
        float(loss)  # waits for the device
        ends[step] = time.perf_counter()

    def on_boundary(row: Mapping[str, Any]) -> None:
        evaluated[row["step"] :] = row["seconds"].get("evaluate", 0.0)

    _train(path, config, task, on_step=on_step, on_boundary=on_boundary)
    return np.diff(ends, prepend=ends[:1]) - np.diff(evaluated, prepend=0.0)[: config.steps]


def measure_checkpoint(results: Results, settings: Settings, backend: str) -> None:
    """One large checkpoint, and holding the network."""
    name = f"{backend} 8 MB"
    if not results.wants(name):
        return
    from esper.checkpoints import CheckpointWriter, save_checkpoint
    from esper.tolaria import Rates, make_trainee
    from esper.tolaria.tasks import make_loader
    from experiments.bench._training_loops import arrays_of, configure, make_data, mlp

    work = mlp(settings.large, settings.batch)
    task = make_data(work, settings.examples, settings.seed)
    taken: dict[str, list[float]] = {}
    with _place() as place, _without_collection():
        config = configure(backend, work, place.library, controller="none")
        trainee, loader = make_trainee(task, config), make_loader(task, batch_size=64, seed=0)
        rates, now = Rates(config.learning_rate, {}), 0

        def timed(what: str, call: Callable[[], Any]) -> Any:
            began = time.perf_counter()
            result = call()
            taken.setdefault(what, []).append(time.perf_counter() - began)
            return result

        def step() -> None:
            nonlocal now
            float(trainee.step(loader.batch(now), rates, now))
            now += 1

        for _ in range(20):
            step()
        size = sum(leaf.nbytes for leaf in arrays_of(trainee.snapshot()))
        with CheckpointWriter(place.folder / "background") as writer:
            for i in range(settings.saves):
                for _ in range(10):
                    timed("step", step)
                timed("hold", trainee.hold)
                began = time.perf_counter()
                timed("blocked", lambda i=i: writer.save(i, trainee.snapshot(), {}))
                for _ in range(50):
                    step()
                writer.wait()
                taken.setdefault("in all", []).append(time.perf_counter() - began)
        path = place.folder / "foreground"
        for i in range(settings.saves):
            timed("synchronous", lambda i=i: save_checkpoint(path, i, trainee.snapshot(), {}))
    median = {what: float(np.median(times)) * 1e3 for what, times in taken.items()}
    low, high = (float(q) * 1e3 for q in np.quantile(taken["blocked"], (0.25, 0.75)))
    results.notes.append(
        f"{name}: {size / 1e6:.2f} MB; a step takes {median['step']:.3g} ms; the loop stood still"
        f" for {low:.3g} to {high:.3g} ms in the middle half of the checkpoints."
    )
    results.figures += [
        Figure(f"{name}: loop blocked", median["blocked"], "ms", settings.blocked_target),
        Figure(f"{name}: in all on one core", median["in all"] - 50 * median["step"], "ms"),
        Figure(f"{name}: the same, synchronous", median["synchronous"], "ms"),
        Figure(f"{name}: hold", median["hold"], "ms"),
    ]


def measure(settings: Settings, only: str = "") -> Results:
    """Both backends and both networks, and the large one."""
    from experiments.bench._training_loops import conv, mlp

    results = Results(only=only)
    works = (
        mlp(settings.mlp, settings.batch),
        conv(settings.image, settings.widths, settings.batch),
    )
    for backend in settings.backends:
        for work in works:
            name = f"{backend} {work.name}"
            if results.wants(own := f"{name}: {STEPS}"):
                compare_steps(results, settings, backend, work, own)
            for what, kernel in ((BOUNDARIES, False), (KERNEL, True)):
                if results.wants(own := f"{name}: {what}"):
                    compare_boundaries(results, settings, backend, work, own, kernel=kernel)
            if results.wants(own := f"{name}: {GRAFT}"):
                measure_graft(results, settings, backend, work, own)
        measure_checkpoint(results, settings, backend)
    return results


BENCHMARK = Benchmark(
    name="training",
    doc=__doc__,
    settings=Settings,
    measure=measure,
    title="Tolaria's loop against the bare one: µs a step, median of paired ratios",
    names=("bare", "Tolaria"),
    packages=("esper-morphogenetic", "numpy", "jax", "jaxlib", "optax", "torch"),
)


if __name__ == "__main__":
    sys.exit(run(BENCHMARK))
