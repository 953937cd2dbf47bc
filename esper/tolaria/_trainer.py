"""The training loop of a growing network.

Steps are the optimiser's; between some of them lie decision boundaries, where
losses are read, seeds are judged, and all that has happened is recorded. Seeds
change at boundaries, at the end of their loading time and at the end of their
incubation, and nowhere else. Nothing depends on a clock: a run is a function of its
configuration.

At each boundary the run is held in memory as it is. Where training diverges before
the next one, parameters, moments, seeds, random numbers and the data's cursor go back
to that together, and training goes on from there.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from esper.cache import KernelCache
from esper.checkpoints import CheckpointWriter, checkpoint_steps, tree_digest
from esper.errors import Interrupted
from esper.nissa import MeasurementsDigest
from esper.oona import Bus, InProcessBus, Topic
from esper.tamiyo import (
    Action,
    Closing,
    Controller,
    Decision,
    Guard,
    Observation,
    Probe,
    Remarking,
    SiteNorms,
    Veto,
    Worth,
    probe_follows,
)
from esper.tamiyo.graph import FOLLOWED, MOST_ROWS
from esper.tolaria._clock import Clock
from esper.tolaria._config import GrowConfig
from esper.tolaria._course import Course
from esper.tolaria._divergence import REMEDIES, given_up, trouble_in, trouble_of
from esper.tolaria._grower import Grower
from esper.tolaria._hooks import Hooks
from esper.tolaria._journal import Journal
from esper.tolaria._ledger import Ledger
from esper.tolaria._rates import rate_table
from esper.tolaria._run_folder import RunFolder
from esper.tolaria._trainee import Evaluation, Place, Rates, Trainee
from esper.tolaria.tasks import Batch, Loader, Task
from esper.tolaria.worth import removal_costs
from esper.urza import KernelRecord, Library
from esper_functional import Event, EventKind, state_digest

FLOPS_PER_STEP = 3
"""Forward passes that a training step counts as: the backward pass is two (Kaplan et al., 2020)."""


_MOST_STEPS = 1_000
"""Steps that are trained one by one before it is asked again whether several may be at once."""


class _Held(NamedTuple):
    """The run right after a boundary."""

    step: int
    trainee: Any
    course: dict[str, Any]
    lines: int


class Trainer:
    """One run, from its step to its last.

    Args:
        folder: where it is recorded.
        trainee: the host on its backend.
        controller: None trains without growing.
        guard: refuses what its rules do not allow.
        library: where kernels are.
        kernels: those of them that were read.
        candidates: kernels to choose from, by layer row.
        ledger: open at the run's step.
        bus: measurements and events are published on it.
        hooks: what the user wants called.
        measured: of the measurements so far.
    """

    def __init__(
        self,
        *,
        folder: RunFolder,
        task: Task,
        trainee: Trainee,
        loader: Loader,
        controller: Controller | None,
        guard: Guard,
        library: Library,
        kernels: KernelCache,
        candidates: Mapping[int, list[KernelRecord]],
        ledger: Ledger,
        bus: Bus | None = None,
        hooks: Hooks | None = None,
        clock: Clock | None = None,
        measured: MeasurementsDigest | None = None,
    ) -> None:
        self._folder = folder
        self._config: GrowConfig = folder.config
        self._task = task
        self._trainee = trainee
        self._loader = loader
        self._controller = controller
        self._guard = guard
        self._candidates = candidates
        self._ledger = ledger
        self._bus = bus or InProcessBus()
        self._hooks = hooks or Hooks()
        self._journal = Journal(ledger, self._bus, self._hooks.on_entry)
        self._clock = clock or Clock()
        self._measured = measured or MeasurementsDigest()
        self._writer = CheckpointWriter(folder.checkpoints)
        self._restored = False
        self._losses: list[Any] = []
        self._held: _Held | None = None
        self._host_cost = trainee.cost()
        self._last = self._config.steps
        """The step at which the run ends: known when its budget of FLOPs is used up."""
        self._ended = False
        self._asked = False
        self._course = Course()
        self._grower = Grower(
            trainee=trainee,
            journal=self._journal,
            library=library,
            kernels=kernels,
            config=self._config,
            course=self._course,
            probe=self._probe,
        )
        config = self._config
        self._table = rate_table(
            config.schedule, config.learning_rate, steps=config.steps, warmup=config.warmup_steps
        ).tolist()
        self._examples = config.batch_size or len(task.train)
        self.regions: dict[str, np.ndarray] = {}
        """Probability of class 1 over a grid, before and after growth."""

    def run(self, start: int = 0) -> None:
        """Train from `start` to the end; `restore` first, where there is a checkpoint.

        Raises:
            Interrupted: when asked to stop, with a checkpoint of that step.
            DivergedError: where training diverges however often it is taken back.
            CheckpointError: where one could not be written.
        """
        try:
            self._run(start)
        finally:
            if isinstance(self._controller, Closing):
                self._controller.close()
            self._ledger.close()
            self._writer.close()

    def _run(self, start: int) -> None:
        config = self._config
        if not self._restored:
            for graft in config.initial_grafts:
                layer = self._trainee.sites.index(graft.site)
                self._grower.graft_at_once(layer, graft.seed, graft.kernel)
        step, past = start, self._held.step if self._held is not None else -1
        self._asked = self._hooks.stop()
        while True:
            if self._asked and step < self._last:
                self._save_as_it_is(step)
                raise Interrupted(
                    f"stopped before step {step}; go on with --resume {self._folder.path}"
                )
            if (step % config.decide_every == 0 or step == self._last) and step != past:
                cause = self._boundary(step, save=start < step < self._last)
                if cause is not None:
                    step = past = self._take_back(step, cause)
                    continue
                past = step
            if step == self._last or self._ended:
                break
            step = self._stretch(step)
        self._finish(step)

    def _stretch(self, step: int) -> int:
        """Train to the next boundary, or until something asks to be looked at."""
        config, course, trainee = self._config, self._course, self._trainee
        end = min(self._last, step - step % config.decide_every + config.decide_every)
        if self._grower.next_due() == step:
            with self._clock.charge("compile"):
                self._grower.go_on(step)
        due = self._grower.next_due()
        end = end if due is None else min(end, due)
        trainee.advance(step)
        flops, on_step, losses = self._step_flops(), self._hooks.on_step, self._losses
        budget = config.max_training_flops
        if budget is not None and course.flops + (end - step) * flops > budget:
            self._last = end = step + max(0, int((budget - course.flops) // flops))
        rates, first = self._rates(step, end), step
        ramping = bool(np.asarray(trainee.seeds.ramp_span).any())
        with self._clock.charge("train"):
            while step < end and not self._asked:
                count = 1 if ramping or on_step is not None else trainee.at_once
                if 1 < count <= end - step:
                    batches = [self._batch(one) for one in range(step, step + count)]
                    own = rates[step - first : step - first + count]
                    losses += trainee.steps(batches, own, step)
                    step += count
                    self._asked = step < self._last and self._hooks.stop()
                else:
                    if ramping:
                        trainee.advance(step)
                    until = min(end, step + (1 if ramping else _MOST_STEPS))
                    own = rates[step - first : until - first]
                    taken = trainee.train(self._batch, own, step, self._after)
                    losses += taken
                    step += len(taken)
        course.flops += (step - first) * flops
        return step

    def _after(self, step: int, loss: Any) -> bool:
        """What is done after each single step; returns whether to stop."""
        if self._hooks.on_step is not None:
            self._hooks.on_step(step, loss)
        self._asked = step + 1 < self._last and self._hooks.stop()
        return self._asked

    def _batch(self, step: int) -> np.ndarray | Batch | None:
        return self._loader.batch(step + self._course.offset)

    def _rates(self, first: int, last: int) -> list[Rates]:
        """Of the steps from `first` to before `last`; of equal steps the same object."""
        warming, scale, rates = self._warming(first), self._course.rate_scale, list[Rates]()
        for step in range(first, last):
            rate = self._table[step] * scale
            if warming or not rates or rates[-1].host != rate:
                rates.append(Rates(rate, self._warmth(warming, step)))
            else:
                rates.append(rates[-1])
        return rates

    def _step_flops(self) -> float:
        """Of a training step, as the network is."""
        cost = self._trainee.cost()
        incubating = int(np.asarray(self._trainee.seeds.incubating).sum())
        return FLOPS_PER_STEP * self._examples * cost.flops * (1 + incubating)

    def _warming(self, step: int) -> dict[int, int]:
        """When the kernels were grafted whose learning rates still rise, by slot."""
        span = self._config.kernel_warmup_steps
        return {
            slot: graft.born
            for slot, graft in self._course.grafts.items()
            if graft.born is not None and graft.born + span > step
        }

    def _warmth(self, warming: Mapping[int, int], step: int) -> dict[int, float]:
        if not warming:
            return {}
        rate, span = self._table[step] * self._course.rate_scale, self._config.kernel_warmup_steps
        return {slot: rate * min(1.0, (step - born + 1) / span) for slot, born in warming.items()}

    # Boundaries.

    def _boundary(self, step: int, *, save: bool) -> str | None:
        """Look at what was trained, and let the network grow.

        Args:
            save: whether a checkpoint may be due.

        Returns:
            Why training counts as diverged, and nothing is changed or recorded; else None.
        """
        course, config = self._course, self._config
        with self._clock.charge("train"):
            # Waiting for the device is training time, not measuring time.
            losses = self._trainee.read_losses(self._losses)
        # A fault of the machine does not come again: what is recorded of it is followed.
        cause = self._ledger.recorded_rollback(step) or trouble_in(
            losses, step - len(losses), first_loss=course.first_loss, factor=config.divergence
        )
        if cause is not None:
            return cause
        saved = None
        if save and step % config.checkpoint_every == 0:
            with self._clock.charge("checkpoint"):
                saved = self._saved(step)
        self._trainee.advance(step)
        faults = self._trainee.absorb(step)
        with self._clock.charge("evaluate"):
            validation = self._trainee.evaluate("validation")
            test = self._trainee.evaluate("test")
        cause = trouble_of(validation.loss)
        if cause is not None:
            return cause
        with self._clock.charge("record"):
            self._grower.absorbed(faults)
        self._losses = []
        train_loss = float(np.mean(losses, dtype=np.float64)) if len(losses) else math.nan
        if course.first_loss is None and len(losses):
            course.first_loss = train_loss
        if course.best_validation is None:
            course.first_validation = validation.loss
        course.attempts = 0
        self._observe_health(step, validation)
        if self._controller is not None and len(losses) and step < self._last:
            self._decide(step, losses, train_loss, validation)
        self._publish(step, train_loss, validation, test)
        self._judge_progress(validation.loss)
        if saved is not None and not self._ended:
            with self._clock.charge("checkpoint"):
                self._save(step, *saved)
        self._hold(step)
        return None

    def _observe_health(self, step: int, validation: Evaluation) -> None:
        events: list[tuple[Event, str]] = []
        for (layer, seed), health in sorted(validation.health.items()):
            if math.isfinite(health):
                observed = Event(step, layer, seed, EventKind.HEALTH, value=health)
                self._trainee.apply(observed)
                events.append((observed, ""))
        with self._clock.charge("record"):
            self._journal.events(events)

    def _publish(
        self, step: int, train_loss: float, validation: Evaluation, test: Evaluation
    ) -> None:
        state = self._trainee.seeds
        health = np.asarray(state.health)
        row = {
            "step": step,
            "train_loss": _finite(train_loss),
            "validation_loss": _finite(validation.loss),
            "validation_accuracy": _finite(validation.accuracy),
            "test_loss": _finite(test.loss),
            "test_accuracy": _finite(test.accuracy),
            "stages": np.asarray(state.stage).tolist(),
            "alphas": np.asarray(state.alpha).tolist(),
            "health": [[_finite(float(value)) for value in layer] for layer in health],
            "parameters": self._trainee.cost().parameters,
            "compilations": self._trainee.compilations,
            "learning_rate": self._rate(step),
            "flops": self._course.flops,
            "rollbacks": len(self._course.rollbacks),
            "seconds": dict(self._clock.spent),
        }
        self._bus.publish(Topic.METRICS, row)
        self._measured.add(row)
        if self._hooks.on_boundary is not None:
            self._hooks.on_boundary(row)

    def _rate(self, step: int) -> float:
        return self._table[min(step, len(self._table) - 1)] * self._course.rate_scale

    def _judge_progress(self, loss: float) -> None:
        course = self._course
        if course.best_validation is None or loss < course.best_validation:
            course.best_validation, course.stale = loss, 0
        else:
            course.stale += 1
        patience = self._config.early_stopping
        self._ended = patience is not None and course.stale >= patience

    def _probed(self, step: int, count: int | None = None) -> np.ndarray:
        """The training examples by which layers are seen at a step."""
        count = min(count or self._config.probe_examples, len(self._task.train))
        random = np.random.default_rng([self._config.seed, 2, step])
        return random.permutation(len(self._task.train))[:count].astype(np.int32)

    def _probe(self, layer: int, step: int) -> Probe:
        with self._clock.charge("evaluate"):
            return self._trainee.probe(layer, self._probed(step))

    def _norms(self, step: int) -> SiteNorms:
        with self._clock.charge("evaluate"):
            return self._trainee.norms(self._probed(step))

    def _follows(self, layers: Sequence[int], step: int) -> np.ndarray:
        """See `Observation.follows`; NaN for layers that cannot be probed."""
        trainee = self._trainee
        kinds = [node.kind for node in trainee.topology.nodes]
        rows = [row for row in trainee.probed if row in layers]
        found = np.full((len(trainee.sites), len(FOLLOWED)), np.nan, np.float32)
        with self._clock.charge("evaluate"):
            probes = trainee.probes(rows, self._probed(step, MOST_ROWS)) if rows else {}
            for row, probe in probes.items():
                found[row] = probe_follows(probe, kinds[row])
        return found

    def _decide(
        self, step: int, losses: np.ndarray, train_loss: float, validation: Evaluation
    ) -> None:
        assert self._controller is not None
        measured: dict[Place, Worth] = {}

        def worths(places: Sequence[Place]) -> dict[Place, Worth]:
            missing = [place for place in places if place not in measured]
            with self._clock.charge("evaluate"):
                found = removal_costs(self._trainee, missing)
            for (layer, seed), own in found.items():
                self._journal.worth(step, layer, seed, own)
            measured.update(found)
            return {place: measured[place] for place in places}

        observation = Observation(
            step=step,
            steps=self._config.steps,
            train_loss=train_loss,
            validation_loss=validation.loss,
            validation_accuracy=validation.accuracy,
            seeds=self._trainee.seeds,
            sites=self._trainee.sites,
            candidates=self._candidates,
            host=self._host_cost,
            now=self._trainee.cost(self._grower.loading()),
            rollbacks=tuple(self._course.rollbacks),
            worth=lambda layer, seed: worths([(layer, seed)])[layer, seed],
            probe=lambda layer: self._probe(layer, step),
            random=np.random.default_rng([self._config.seed, 4, step]),
            first_loss=_or_nan(self._course.first_validation),
            loss_spread=_spread(losses),
            worths=worths,
            norms=lambda: self._norms(step),
            follows=lambda layers: self._follows(layers, step),
            topology=lambda: self._trainee.topology,
            recorded=lambda: self._ledger.recorded_notes(step),
        )
        wanted = self._controller.decide(observation)
        remarks = self._controller.remarks() if isinstance(self._controller, Remarking) else ()
        allowed, vetoes = self._guard.review(observation, wanted, self._grower.unusable)
        allowed, more = self._within_the_number(allowed)
        self._guard.count(more)
        vetoes = [*vetoes, *more]
        with self._clock.charge("record"):
            self._journal.notes(step, remarks)
            self._journal.vetoes(step, vetoes)
        for decision in allowed:
            self._obey(step, decision)
        self._controller.told(observation, allowed, vetoes)

    def _within_the_number(
        self, decisions: Sequence[Decision]
    ) -> tuple[list[Decision], list[Veto]]:
        """Refuse grafts beyond the most that the run may have."""
        most, allowed, vetoes = self._config.max_grafts, list[Decision](), list[Veto]()
        for decision in decisions:
            grafts = sum(own.action is Action.GRAFT for own in allowed) + self._course.grafted
            if most is not None and decision.action is Action.GRAFT and grafts >= most:
                reason = f"the run has had {grafts} grafts, and may have {most}"
                vetoes.append(Veto(decision, "max_grafts", reason))
            else:
                allowed.append(decision)
        return allowed, vetoes

    def _obey(self, step: int, decision: Decision) -> None:
        self._keep_region("before")
        with self._clock.charge("record"):
            self._journal.decision(step, decision)
        with self._clock.charge("compile"):
            self._grower.obey(step, decision)

    # Going back.

    def _hold(self, step: int) -> None:
        self._remember()
        self._held = _Held(
            step, self._trainee.hold(), self._course.state(), self._journal.cursor.lines
        )

    def _remember(self) -> None:
        course = self._course
        course.controller = self._controller.state() if self._controller else None
        course.guard = self._guard.state()

    def _take_back(self, step: int, cause: str) -> int:
        """Be again what the run was after the last boundary; returns its step."""
        self._last = self._config.steps
        held, before = self._held, self._course
        tried = before.attempts
        rollbacks = [*before.rollbacks, step]
        if held is None or tried >= self._config.max_rollbacks:
            raise given_up(cause, rollbacks[:-1], tried, self._folder.path)
        self._trainee.take_back(held.trainee)
        self._losses = []
        course = Course.of(held.course)
        course.rollbacks, course.attempts = rollbacks, tried + 1
        course.offset, course.rate_scale = before.offset, before.rate_scale
        remedies = REMEDIES[: tried + 1]
        self._journal.rollback(step, held.step, held.lines, cause, remedies[-1])
        self._take_over(course)
        if len(remedies) > 1:
            self._grower.unload_youngest(held.step, f"{cause}; {REMEDIES[1]}")
        if len(remedies) > 2:
            course.offset += step - held.step
            course.rate_scale /= 2.0
        return held.step

    def _take_over(self, course: Course) -> None:
        self._course = self._grower.course = course
        # A branch begins with a controller that remembers nothing.
        if self._controller is not None and course.controller is not None:
            self._controller.restore(course.controller)
        self._guard.restore(course.guard)

    # Recording.

    def _keep_region(self, when: str) -> None:
        """Keep the probability of class 1 over the square of ±1.1, `[120, 120]` from below."""
        plane = self._task.train.x.shape[1:] == (2,) and self._task.loss == "cross_entropy"
        if not plane or when in self.regions:
            return
        axis = np.linspace(-1.1, 1.1, 120, dtype=np.float32)
        grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
        self.regions[when] = self._trainee.predict(grid)[:, 1].reshape(120, 120)

    # `advanced` is the step that ramps had been brought to, which replaying needs to
    # compare digests: they move in every step and no event tells of it.

    def _tree(self) -> dict[str, Any]:
        tree = dict(self._trainee.snapshot())
        if self.regions:
            tree["regions"] = dict(self.regions)
        return tree

    def _meta(self, advanced: int) -> dict[str, Any]:
        self._remember()
        return {
            "ledger": list(self._journal.cursor),
            "digest": state_digest(self._trainee.seeds),
            "course": self._course.state(),
            "losses": [float(loss) for loss in self._trainee.read_losses(self._losses)],
            "advanced": advanced,
        }

    def _saved(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a checkpoint before a step holds."""
        # Without a ramp under way nothing was advanced in the steps before.
        advanced = max(0, step - 1)
        self._trainee.advance(advanced)
        return self._tree(), self._meta(advanced)

    def _save(
        self, step: int, tree: dict[str, Any], meta: dict[str, Any], *, replace: bool = False
    ) -> None:
        # The checkpoint refers to a place in the ledger.
        self._journal.sync()
        self._writer.save(step, tree, meta, replace=replace)

    def _save_as_it_is(self, step: int) -> None:
        """Save the run before any step, with what it would be taken back to."""
        if step in checkpoint_steps(self._folder.checkpoints):
            # From there the record leads to where the run is.
            return
        with self._clock.charge("checkpoint"):
            tree, meta = self._saved(step)
            held = self._held
            if held is not None:
                tree["held"] = self._trainee.snapshot(held.trainee)
                meta["held"] = {"step": held.step, "course": held.course, "lines": held.lines}
            self._save(step, tree, meta)
            self._writer.wait()

    def restore(self, tree: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Take over a checkpoint.

        Raises:
            ArtifactError, LibraryError: for a kernel that is not there any more.
        """
        self._restored = True
        # JSON keeps f32 exactly, through the double that each of them is.
        self._losses = [np.float32(loss) for loss in meta["losses"]]
        self.regions = dict(tree.get("regions", {}))
        held = meta.get("held")
        if held is not None:
            self._restore_trainee(tree["held"], Course.of(held["course"]))
            self._held = _Held(held["step"], self._trainee.hold(), held["course"], held["lines"])
        course = Course.of(meta["course"])
        self._restore_trainee(tree, course)
        self._take_over(course)

    def _restore_trainee(self, tree: Mapping[str, Any], course: Course) -> None:
        artifacts = {
            int(slot): self._grower.artifact(course.grafts[int(slot)].kernel_id)
            for slot in tree.get("kernels", {})
        }
        self._trainee.restore(tree, artifacts)

    def _finish(self, step: int) -> None:
        snapshot = self._trainee.snapshot()
        self._journal.mark(
            step,
            "end",
            seeds=state_digest(self._trainee.seeds),
            arrays=tree_digest(snapshot),
            measurements=str(self._measured),
        )
        self._keep_region("before")
        self._keep_region("after")
        with self._clock.charge("checkpoint"):
            # A run whose FLOPs are used up just where a checkpoint was due ends at that step.
            self._save(step, self._tree(), self._meta(step), replace=True)
            self._writer.wait()


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _spread(losses: np.ndarray) -> float:
    """Standard deviation over the mean's size; 0 where that is 0."""
    mean = abs(float(losses.mean(dtype=np.float64)))
    return float(losses.std(dtype=np.float64)) / mean if mean else 0.0


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
