"""Several seeds of one network, trained side by side: `python -m experiments.bench.seeds`.

A comparison trains each of its arms with many seeds. Here are four ways to train the steps of all
of them, on the tasks that Esper compares by default, with the programs of its jax runs:

- "one by one": a call for each step of each seed, as any loop does it;
- "steps in a call": a call for each seed, a loop of steps in it (`lax.scan`), as Esper's runs do
  where a network has long been as it is;
- "seeds in a call": a call for each step, a loop over seeds in it (`lax.map`);
- "vmap": a call for each step of all seeds, batched.

A run must be the same whatever else is trained beside it, or it could not be replayed by itself. So
each way's losses are held against those of "one by one", bit by bit.
"""

import dataclasses
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esper.tolaria import load_task, make_config
from esper.tolaria._jax_programs import build_program
from esper.tolaria._trainee import Rates
from esper.tolaria.tasks import make_loader
from experiments.bench._command import Benchmark, run
from experiments.bench._paired import Call, Sampling, contest
from experiments.bench._results import Check, Results

WAYS = ("steps in a call", "seeds in a call", "vmap")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The work; there is no target."""

    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    tasks: tuple[str, ...] = ("spirals", "digits")
    seeds: int = 16
    steps: int = 64
    learning_rate: float = 0.01


def stack(trees: list[Any]) -> Any:
    """Trees of arrays as one."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


class Work:
    """The steps of all seeds, from the same beginning in each call; losses `[seeds, steps]`."""

    def __init__(self, task: str, settings: Settings) -> None:
        from esper.tolaria._jax_trainee import JaxTrainee

        data, self.steps = load_task(task), settings.steps
        config = make_config(task=task, backend="jax")
        self.rates = [Rates(settings.learning_rate, {})] * settings.steps
        self.trainees = [
            JaxTrainee(data, seed=seed, seeds_per_layer=config.seeds_per_layer, blend=config.blend)
            for seed in range(settings.seeds)
        ]
        self.held = [own.hold() for own in self.trainees]
        loaders = [
            make_loader(data, batch_size=config.batch_size, seed=seed)
            for seed in range(settings.seeds)
        ]
        self.batches = [[own.batch(i) for i in range(settings.steps)] for own in loaders]
        first = self.trainees[0]
        one: Any = build_program(first._key("step", first._now.plan))
        examples = first._data.step(self.batches[0][0])
        self.data = (examples.x, examples.y)
        chosen = None if examples.indices is None else 0
        over = (0, (), (), None, None, None, None, chosen, None, None)
        self.vmapped = jax.jit(jax.vmap(one, in_axes=over))
        self.mapped = jax.jit(partial(self._mapped, one))
        self.rate = jnp.asarray(np.array([settings.learning_rate], np.float32))
        self.hosts = stack([held.host for held in self.held])

    @staticmethod
    def _mapped(
        one: Any, host: Any, trained: Any, fossils: Any, live: Any, rest: Any,
        x: Any, y: Any, indices: Any, rates: Any, keys: Any,
    ) -> Any:  # fmt: skip
        def of_seed(own: Any) -> Any:
            return one(own[0], trained, fossils, live, rest, x, y, own[1], rates, keys)

        return jax.lax.map(of_seed, (host, indices))

    def one_by_one(self) -> Any:
        """A call for each step of each seed."""
        losses = []
        for own, held, batches in zip(self.trainees, self.held, self.batches, strict=True):
            own.take_back(held)
            losses.append(own.train(batches.__getitem__, self.rates, 0, lambda *_: False))
        return losses

    def steps_in_a_call(self) -> Any:
        """A call for each seed."""
        losses = []
        for own, held, batches in zip(self.trainees, self.held, self.batches, strict=True):
            own.take_back(held)
            losses.append(own.steps(batches, self.rates, 0))
        return losses

    def together(self, program: Any) -> Any:
        """A call for each step."""
        hosts, losses = self.hosts, []
        for i in range(self.steps):
            drawn = [batches[i] for batches in self.batches]
            indices = None if drawn[0] is None else np.stack([np.asarray(own) for own in drawn])
            arguments = (hosts, (), (), None, None, *self.data, indices, self.rate, None)
            hosts, _, _, _, loss = program(*arguments)
            losses.append(loss)
        return losses

    def calls(self) -> Mapping[str, Call]:
        """Of all ways."""
        return {
            "one by one": self.one_by_one,
            "again": self.one_by_one,
            "steps in a call": self.steps_in_a_call,
            "seeds in a call": partial(self.together, self.mapped),
            "vmap": partial(self.together, self.vmapped),
        }


def table(losses: Any, *, seeds_last: bool) -> np.ndarray:
    """Losses `[seeds, steps]`."""
    found = np.stack([np.concatenate([np.ravel(one) for one in row]) for row in losses])
    return found.T if seeds_last else found


def compare_seeds(results: Results, settings: Settings, task: str) -> None:
    """One task."""
    name = f"{task}, {settings.seeds} seeds × {settings.steps} steps"
    if not results.wants(name):
        return
    work = Work(task, settings)
    calls = work.calls()
    expected = table(calls["one by one"](), seeds_last=False)
    calls["steps in a call"]()  # the first time it is held against single steps
    for way in WAYS:
        found = table(jax.device_get(calls[way]()), seeds_last=way != "steps in a call")
        share, most = float((found == expected).mean()), float(np.abs(found - expected).max())
        equal = "all" if share == 1.0 else f"{share:.0%}; differences up to {most:.2g}"
        told = f"{name}: {way}: losses that are equal to the last bit"
        if way == "vmap":
            results.notes.append(f"{told}: {equal}.")
        else:
            results.checks.append(Check(told, "all", equal))
    rows = contest(name, dict.fromkeys(WAYS), work.calls, settings.sampling, jax.block_until_ready)
    count = settings.seeds * settings.steps
    for row in rows:
        extra = {
            "µs a step and seed": row.candidate.microseconds / count,
            "one by one": row.reference.microseconds / count,
        }
        results.rows.append(dataclasses.replace(row, extra=extra))


def measure(settings: Settings, only: str = "") -> Results:
    """All tasks."""
    results = Results(only=only)
    for task in settings.tasks:
        compare_seeds(results, settings, task)
    return results


BENCHMARK = Benchmark(
    name="seeds",
    doc=__doc__,
    settings=Settings,
    measure=measure,
    title="Training steps of several seeds: median of paired ratios (interquartile range)",
    names=("one by one", "the way"),
    quick=10,
    standard=Sampling(rounds=40, builds=1),
)


if __name__ == "__main__":
    sys.exit(run(BENCHMARK))
