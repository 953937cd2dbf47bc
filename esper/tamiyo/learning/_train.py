"""The training loop: iterations, their metrics on the disk, checkpoints, and going on from them."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from esper._files import write_atomically
from esper.checkpoints import (
    CheckpointError,
    CheckpointWriter,
    checkpoint_steps,
    load_checkpoint,
    read_manifest,
    tree_digest,
)
from esper.checkpoints._store import discard_checkpoint
from esper.errors import InputError, Interrupted
from esper.tamiyo.learning._choices import CHOICES
from esper.tamiyo.learning._distribution import Distribution
from esper.tamiyo.learning._folder import made_own
from esper.tamiyo.learning._learner import Learner, LearningState
from esper.tamiyo.learning._losses import Policy
from esper.tamiyo.learning._rollout import EnvironmentLike
from esper.tamiyo.learning._settings import LearningSettings
from esper.tamiyo.learning._verdict import Diagnosis, verdict

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"


class Learnt(NamedTuple):
    """What came of it."""

    policy: Any
    metrics: list[dict[str, Any]]
    """A row for each iteration, as `Learner.metrics` makes them."""
    diagnosis: Diagnosis
    state: LearningState


def train(
    environment: EnvironmentLike,
    policy: Policy,
    settings: LearningSettings,
    key: jax.Array,
    *,
    distribution: Distribution = CHOICES,
    folder: Path | None = None,
    checkpoint_every: int = 10,
    kept: int = 2,
    told: Callable[[dict[str, Any]], None] = lambda row: None,
    stop: Callable[[], bool] = lambda: False,
) -> Learnt:
    """Let a policy learn from its own steps.

    With a folder, each iteration is a line of its `metrics.jsonl`, and every so many are a
    checkpoint. What was cut off, at any moment, goes on from the last checkpoint when it is called
    again alike, and comes to the same parameters and metrics, bit by bit.

    Args:
        environment: in which it walks.
        policy: where it begins.
        settings: how it learns.
        key: of everything that is drawn.
        distribution: of the policy's choices.
        folder: where it is kept; made where there is none. None keeps nothing.
        checkpoint_every: iterations from one checkpoint to the next, from 1.
        kept: how many checkpoints are there at most when it is done, from 1.
        told: is called with the row of each iteration that is made now.
        stop: is asked before each iteration whether to save and stop.

    Raises:
        InputError: for numbers below 1, where the folder is of other settings, another
            environment, policy or key, and while another training is kept there.
        CheckpointError: where a checkpoint is damaged or could not be written, and where the
            metrics of iterations before it are missing.
        Interrupted: when asked to stop, with a checkpoint of that iteration where there is a
            folder.
    """
    for name, number in (("checkpoint_every", checkpoint_every), ("kept", kept)):
        if number < 1:
            raise InputError(f"{name} is a whole number from 1, and not {number}")
    learner = Learner(environment, policy, settings, distribution)
    state = learner.start(key)
    if folder is None:
        rows: list[dict[str, Any]] = []
        while (done := len(rows)) < settings.iterations:
            if stop():
                raise Interrupted(f"stopped before iteration {done}; nothing was kept of it")
            state = learner.iterate(state)
            rows.append(learner.metrics(state))
            told(rows[-1])
        return Learnt(learner.policy(state), rows, verdict(rows), state)
    with _Kept(Path(folder), _identity(learner, environment, state), kept) as run:
        state = run.restored(state)
        while (done := len(run.rows)) < settings.iterations:
            if stop():
                run.save(state)
                raise Interrupted(
                    f"stopped before iteration {done}; go on with the same folder, {folder}"
                )
            state = learner.iterate(state)
            run.append(learner.metrics(state))
            told(run.rows[-1])
            if (done + 1) % checkpoint_every == 0 or done + 1 == settings.iterations:
                run.save(state)
        run.finish()
    return Learnt(learner.policy(state), run.rows, verdict(run.rows), state)


def _identity(
    learner: Learner, environment: EnvironmentLike, state: LearningState
) -> dict[str, Any]:
    """What a run must have in common with what it goes on from."""
    return {
        "settings": dataclasses.asdict(learner.settings),
        "environment": repr(environment),
        "begun": tree_digest((state.params, state.key)),
    }


class _Kept:
    """A run's folder."""

    def __init__(self, folder: Path, identity: dict[str, Any], kept: int) -> None:
        # As long as the process has it: two that write there would each lose what the other kept.
        self._lock = made_own(folder, "a training", "another one")
        self.rows: list[dict[str, Any]] = []
        self._folder = folder
        self._identity = identity
        self._kept = kept
        self._checkpoints = folder / CHECKPOINTS
        self._writer = CheckpointWriter(self._checkpoints)
        self._metrics = folder / METRICS
        self._file: Any = None

    def restored(self, state: LearningState) -> LearningState:
        """The state to go on from: that of the newest checkpoint, or the one given."""
        step = max(checkpoint_steps(self._checkpoints), default=0)
        if step:
            self._check_same(read_manifest(self._checkpoints, step)["meta"])
            state, _ = load_checkpoint(self._checkpoints, step, like=state)
        kept = self._metrics.read_bytes() if step and self._metrics.exists() else b""
        lines = kept.splitlines(keepends=True)
        if len(lines) < step:
            raise CheckpointError(
                f"{self._metrics} has {len(lines)} lines, and the checkpoint beside it is of"
                f" iteration {step}: put the file back, or begin in another folder"
            )
        # Iterations after the checkpoint are made again; the last line may be half of one.
        write_atomically(self._metrics, b"".join(lines[:step]))
        self.rows = [json.loads(line) for line in lines[:step]]
        self._file = self._metrics.open("ab")
        return state

    def _check_same(self, meta: dict[str, Any]) -> None:
        for name, own in json.loads(json.dumps(self._identity)).items():
            if meta.get(name) != own:
                what = {"begun": "policy or key"}.get(name, name)
                if name == "settings":
                    saved = meta.get(name, {})
                    what = ", ".join(k for k in own if saved.get(k) != own[k]) or name
                raise InputError(
                    f"{self._folder} holds a run with another {what}; go on with what it was begun"
                    " with, or begin in another folder"
                )

    def append(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()
        self.rows.append(row)

    def save(self, state: LearningState) -> None:
        """Begin a checkpoint; its metrics are on the disk before."""
        os.fsync(self._file.fileno())
        step = len(self.rows)
        if step == 0:
            return
        self._writer.save(step, state, self._identity)
        self._discard()

    def _discard(self) -> None:
        """Let old checkpoints go; what is still being written is not counted."""
        for step in sorted(checkpoint_steps(self._checkpoints))[: -self._kept]:
            discard_checkpoint(self._checkpoints, step)

    def finish(self) -> None:
        self._writer.wait()
        self._discard()

    def __enter__(self) -> "_Kept":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            if error is None or isinstance(error, Interrupted):
                self._writer.wait()
        finally:
            self._writer.close()
            if self._file is not None:
                self._file.close()
            os.close(self._lock)
