"""The training loop of a growing network.

Steps are the optimiser's; between some of them lie decision boundaries, where
losses are read, seeds are judged, and all that has happened is recorded. Seeds
change at boundaries and at the end of their loading time, and nowhere else.
Nothing depends on a clock: a run is a function of its configuration.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from esper.artifacts import Artifact
from esper.checkpoints import CheckpointError, save_checkpoint, tree_digest
from esper.errors import EsperError
from esper.oona import Bus, InProcessBus, Topic
from esper.tamiyo import Action, Controller, Decision, Observation
from esper.tolaria._config import GrowConfig
from esper.tolaria._ledger import MARK, Ledger, event_entry
from esper.tolaria._run_folder import RunFolder
from esper.tolaria._tasks import Task, batch_indices
from esper.tolaria._trainee import Trainee
from esper.urza import KernelRecord, Library
from esper_functional import Event, EventKind, SeedLifecycleState, state_digest


class Interrupted(EsperError):
    """The run was asked to stop; it is saved and can be resumed."""


class Clock:
    """Wall time by activity, for the report alone."""

    def __init__(self, spent: Mapping[str, float] | None = None) -> None:
        self.spent: dict[str, float] = dict(spent or {})

    @contextmanager
    def charge(self, activity: str) -> Iterator[None]:
        """Charge the time of a block to an activity."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - begin
            self.spent[activity] = self.spent.get(activity, 0.0) + elapsed


class Trainer:
    """One run, from its step to its last.

    Args:
        folder: where it is recorded.
        trainee: the host on its backend.
        controller: None trains without growing.
        library: where kernels are.
        candidates: kernels to choose from, by layer row.
        ledger: open at the run's step.
        bus: measurements and events are published on it.
        stop: is asked before every step whether to stop.
        after_boundary: is called when a boundary's measurements are published.
    """

    def __init__(
        self,
        *,
        folder: RunFolder,
        task: Task,
        trainee: Trainee,
        controller: Controller | None,
        library: Library,
        candidates: Mapping[int, list[KernelRecord]],
        ledger: Ledger,
        bus: Bus | None = None,
        stop: Callable[[], bool] = lambda: False,
        clock: Clock | None = None,
        after_boundary: Callable[[], None] = lambda: None,
    ) -> None:
        self._folder = folder
        self._config: GrowConfig = folder.config
        self._task = task
        self._trainee = trainee
        self._controller = controller
        self._library = library
        self._candidates = candidates
        self._ledger = ledger
        self._bus = bus or InProcessBus()
        self._stop = stop
        self._clock = clock or Clock()
        self._after_boundary = after_boundary
        self._restored = False
        self._losses: list[Any] = []
        self._kernel_ids: dict[int, str] = {}
        """Artifact of every seed that holds or awaits a kernel, by slot."""
        self._artifacts: dict[str, Artifact] = {}
        self.regions: dict[str, np.ndarray] = {}
        """Probability of class 1 over a grid, before and after growth."""

    def run(self, start: int = 0) -> None:
        """Train from `start` to the end; `restore` first, where there is a checkpoint.

        Raises:
            Interrupted: when asked to stop, with a checkpoint of that step.
        """
        try:
            self._run(start)
        finally:
            self._ledger.close()

    def _run(self, start: int) -> None:
        config = self._config
        if not self._restored:
            self._graft_initially()
        for step in range(start, config.steps):
            if self._stop():
                self._checkpoint(step, advanced=step - 1)
                raise Interrupted(
                    f"stopped before step {step}; go on with --resume {self._folder.path}"
                )
            if step % config.checkpoint_every == 0 and step > start:
                self._checkpoint(step, advanced=step - 1)
            if step % config.decide_every == 0:
                self._boundary(step)
            self._activate_loaded(step)
            self._trainee.advance(step)
            indices = batch_indices(self._task, config.batch_size, config.seed, step)
            with self._clock.charge("train"):
                self._losses.append(self._trainee.step(indices))
        self._finish()

    # Events

    def _record(self, events: list[tuple[Event, str]]) -> None:
        if not events:
            return
        entries = [event_entry(event, reason) for event, reason in events]
        with self._clock.charge("record"):
            self._ledger.append(entries)
        for entry in entries:
            self._bus.publish(Topic.SEED_EVENT, entry)

    def _mark(self, step: int, name: str, **digests: str) -> None:
        entry = {"kind": MARK, "step": step, "name": name, **digests}
        with self._clock.charge("record"):
            self._ledger.append([entry])

    def _change(self, event: Event, reason: str = "", artifact: Artifact | None = None) -> None:
        """Change a seed, then record that it was changed."""
        self._trainee.apply(event, artifact)
        self._record([(event, reason)])

    def _artifact(self, kernel_id: str) -> Artifact:
        if kernel_id not in self._artifacts:
            self._artifacts[kernel_id] = self._library.get(kernel_id)
        return self._artifacts[kernel_id]

    def _load(self, step: int, layer: int, seed: int, kernel_id: str, reason: str) -> None:
        slot = layer * self._config.seeds_per_layer + seed
        self._kernel_ids[slot] = kernel_id
        load = Event(step, layer, seed, EventKind.LOAD, kernel_id, float(slot))
        self._change(load, reason)
        with self._clock.charge("compile"):
            coming = Event(step, layer, seed, EventKind.ACTIVATE, kernel_id, 0.0)
            self._trainee.prepare(coming, self._artifact(kernel_id))

    def _activate(self, step: int, layer: int, seed: int, alpha: float) -> None:
        slot = layer * self._config.seeds_per_layer + seed
        kernel_id = self._kernel_ids[slot]
        event = Event(step, layer, seed, EventKind.ACTIVATE, kernel_id, alpha)
        with self._clock.charge("compile"):
            self._change(event, artifact=self._artifact(kernel_id))

    def _activate_loaded(self, step: int) -> None:
        """Graft what has been LOADING for its time, however long the compiler took."""
        seeds = self._trainee.seeds
        loading = np.asarray(seeds.stage) == SeedLifecycleState.LOADING
        ripe = loading & (np.asarray(seeds.last_update) + self._config.loading_steps <= step)
        for layer, seed in np.argwhere(ripe):
            self._activate(step, int(layer), int(seed), alpha=0.0)
            ramp = Event(
                step, int(layer), int(seed), EventKind.RAMP, value=1.0, span=self._config.ramp_steps
            )
            self._change(ramp)

    def _graft_initially(self) -> None:
        for graft in self._config.initial_grafts:
            layer = self._trainee.sites.index(graft.site)
            self._load(0, layer, graft.seed, graft.kernel, "there from the start")
            self._activate(0, layer, graft.seed, alpha=1.0)

    # Boundaries

    def _boundary(self, step: int) -> None:
        self._record([(event, "output not finite") for event in self._trainee.absorb(step)])
        with self._clock.charge("train"):
            # Waiting for the device is training time, not measuring time.
            losses = self._trainee.read_losses(self._losses)
        self._losses = []
        train_loss = float(np.mean(losses, dtype=np.float64)) if len(losses) else math.nan
        with self._clock.charge("evaluate"):
            validation = self._trainee.evaluate("validation")
            test = self._trainee.evaluate("test")
        for (layer, seed), health in sorted(validation.health.items()):
            if math.isfinite(health):
                observed = Event(step, layer, seed, EventKind.HEALTH, value=health)
                self._trainee.apply(observed)
                self._record([(observed, "")])
        if self._controller is not None and len(losses) and step < self._config.steps:
            self._decide(step, train_loss, validation.loss)
        state = self._trainee.seeds
        self._bus.publish(
            Topic.METRICS,
            {
                "step": step,
                "train_loss": train_loss if math.isfinite(train_loss) else None,
                "validation_loss": validation.loss,
                "validation_accuracy": validation.accuracy,
                "test_loss": test.loss,
                "test_accuracy": test.accuracy,
                "stages": np.asarray(state.stage).tolist(),
                "alphas": np.asarray(state.alpha).tolist(),
                "parameters": self._trainee.parameter_count(),
                "compilations": self._trainee.compilations,
                "seconds": dict(self._clock.spent),
            },
        )
        self._after_boundary()

    def _decide(self, step: int, train_loss: float, validation_loss: float) -> None:
        assert self._controller is not None

        def worth(layer: int, seed: int) -> float:
            with self._clock.charge("evaluate"):
                without = self._trainee.evaluate("validation", muted=[(layer, seed)])
            return without.loss - validation_loss

        observation = Observation(
            step=step,
            train_loss=train_loss,
            validation_loss=validation_loss,
            seeds=self._trainee.seeds,
            sites=self._trainee.sites,
            candidates=self._candidates,
            worth=worth,
        )
        for decision in self._controller.decide(observation):
            self._obey(step, decision)

    def _obey(self, step: int, decision: Decision) -> None:
        layer, seed = decision.layer, decision.seed
        if decision.action is Action.GRAFT:
            self._keep_region("before")
            self._load(step, layer, seed, decision.kernel_id, decision.reason)
            return
        kind = {
            Action.FOSSILIZE: EventKind.FOSSILIZE,
            Action.UNLOAD: EventKind.UNLOAD,
            Action.RESET: EventKind.RESET,
        }[decision.action]
        slot = layer * self._config.seeds_per_layer + seed
        self._change(Event(step, layer, seed, kind, self._kernel_ids[slot]), decision.reason)
        if decision.action is not Action.FOSSILIZE:
            del self._kernel_ids[slot]

    # Recording

    def _keep_region(self, when: str) -> None:
        """Keep the probability of class 1 over the square of ±1.1, `[120, 120]` from below."""
        if self._task.host_sizes[0] != 2 or when in self.regions:
            return
        axis = np.linspace(-1.1, 1.1, 120, dtype=np.float32)
        grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
        self.regions[when] = self._trainee.predict(grid)[:, 1].reshape(120, 120)

    # `advanced` is the step that ramps had been brought to, which replaying needs to
    # compare digests: they move in every step and no event tells of it.

    def _meta(self) -> dict[str, Any]:
        return {
            "ledger": list(self._ledger.cursor),
            "digest": state_digest(self._trainee.seeds),
            "kernels": {str(slot): kernel for slot, kernel in self._kernel_ids.items()},
            "controller": self._controller.state() if self._controller else None,
            "losses": [float(loss) for loss in self._trainee.read_losses(self._losses)],
        }

    def _checkpoint(self, step: int, *, advanced: int) -> None:
        with self._clock.charge("checkpoint"):
            tree = dict(self._trainee.snapshot())
            if self.regions:
                tree["regions"] = self.regions
            meta = self._meta() | {"advanced": advanced}
            try:
                save_checkpoint(self._folder.checkpoints, step, tree, meta)
            except CheckpointError as error:
                raise CheckpointError(f"{error} Then --resume the run.") from error

    def restore(self, tree: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Take over a checkpoint."""
        self._restored = True
        self._kernel_ids = {int(slot): str(k) for slot, k in meta["kernels"].items()}
        # JSON keeps f32 exactly, through the double that each of them is.
        self._losses = [np.float32(loss) for loss in meta["losses"]]
        self.regions = dict(tree.get("regions", {}))
        if self._controller is not None:
            self._controller.restore(meta["controller"])
        held = {
            int(slot): self._artifact(self._kernel_ids[int(slot)])
            for slot in tree.get("kernels", {})
        }
        self._trainee.restore(tree, held)

    def _finish(self) -> None:
        steps = self._config.steps
        self._trainee.advance(steps)
        self._boundary(steps)
        snapshot = self._trainee.snapshot()
        self._mark(
            steps,
            "end",
            seeds=state_digest(self._trainee.seeds),
            arrays=tree_digest(snapshot),
        )
        self._keep_region("before")
        self._keep_region("after")
        self._checkpoint(steps, advanced=steps)
