"""Folders of runs as the trainer writes them, made without training: `python -m
tests.esper.watch_runs FOLDER` writes one live.

Seeds change by the core's own events, the ledger is Tolaria's own, and losses are drawn at random.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from esper.tolaria._ledger import Cursor, Ledger, entry_event, event_entry
from esper_functional import (
    Event,
    EventKind,
    SeedLifecycleState,
    SeedState,
    advance,
    apply_event,
    init_seeds,
    observe_health,
    running,
)

SHAPES = ("linear", "cosine", "sigmoid")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a made run is like."""

    layers: int = 4
    seeds: int = 2
    steps: int = 1_000
    every: int = 20
    """Steps between boundaries."""
    loading: int = 10
    ramp: int = 100
    trial: int = 150
    busy: float = 0.06
    """Chance that a seed is given a kernel at a boundary."""
    seed: int = 0
    task: str = "spirals"
    schema: int = 2
    reason: str = "training loss {loss:.4f} has not fallen by 1% over 2 boundaries"


class RunMaker:
    """Writes one run, a boundary at a time."""

    def __init__(self, path: Path, plan: Plan | None = None) -> None:
        self.path = path
        self.plan = plan = plan or Plan()
        self.random = np.random.default_rng(plan.seed)
        self.step = 0
        self.rollbacks = 0
        self.spent = 0.0
        self.state: SeedState = init_seeds(plan.layers, plan.seeds)
        self.kernels: dict[tuple[int, int], str] = {}
        self.since = np.zeros((plan.layers, plan.seeds), np.int64)
        """Step at which a kernel was at work."""
        self._marks: list[tuple[int, int, SeedState, dict[tuple[int, int], str]]] = []
        path.mkdir(parents=True)
        content: dict[str, Any] = {
            "schema_version": plan.schema,
            "config": {
                "task": plan.task, "backend": "jax", "seed": plan.seed, "steps": plan.steps,
                "decide_every": plan.every, "controller": "heuristic", "library": None,
            },
            "kernels": {name: ["ab" * 32] for name in self.sites[:2]},
            "versions": {"python": "3.11.7", "jax": "0.10.2", "numpy": "2.4.6"},
        }  # fmt: skip
        if plan.schema >= 2:
            content["host"] = {"sites": self.sites, "parameters": 42 * plan.layers}
            content["task"] = {"name": plan.task, "digest": "cd" * 32}
        (path / "run.json").write_text(json.dumps(content, sort_keys=True, indent=1))
        config = {key: value for key, value in content["config"].items() if key != "library"}
        text = json.dumps({**content, "config": config}, sort_keys=True)
        genesis = hashlib.sha256(text.encode()).hexdigest()
        (path / "events.jsonl").touch()
        self.ledger = Ledger(path / "events.jsonl", genesis, Cursor(0, 0, genesis))
        self._metrics = (path / "metrics.jsonl").open("ab")

    @property
    def sites(self) -> list[str]:
        """Names of the layers."""
        return [f"blocks.{layer}.linear" for layer in range(self.plan.layers)]

    @property
    def ended(self) -> bool:
        """Whether the last step has been reached."""
        return self.step > self.plan.steps

    def boundary(self) -> dict[str, Any]:
        """Write what happened until the next boundary, and measure there."""
        step, plan = self.step, self.plan
        self._marks.append((step, self.ledger.cursor.lines, self.state, dict(self.kernels)))
        del self._marks[:-50]
        entries: list[dict[str, Any]] = []
        loss = 0.02 + math.exp(-3.0 * step / plan.steps) * (0.7 + 0.05 * self.random.random())
        if step:
            entries += self._live(step, loss)
        self.state = advance(self.state, step)
        self.ledger.append(entries)
        row = self._row(step, loss)
        self._metrics.write(json.dumps(row, sort_keys=True).encode() + b"\n")
        self._metrics.flush()
        self.step += plan.every
        if self.ended:
            digests = {"seeds": "ef" * 32, "arrays": "01" * 32}
            self.ledger.append([{"kind": "mark", "step": step, "name": "end", **digests}])
        return row

    def go_back(self, boundaries: int) -> None:
        """Take the last boundaries back."""
        before = self.step
        step, lines, state, kernels = self._marks[-boundaries]
        del self._marks[-boundaries:]
        self.ledger.append(
            [
                {
                    "kind": "rollback", "step": before, "to": step, "lines": lines,
                    "cause": "the training loss is not finite",
                    "remedy": "half the learning rate",
                }
            ]
        )  # fmt: skip
        self.step, self.state, self.kernels = step, state, dict(kernels)
        self.rollbacks += 1

    def finish(self) -> "RunMaker":
        """Write all that is left."""
        while not self.ended:
            self.boundary()
        self.close()
        return self

    def close(self) -> None:
        """Close the files."""
        self._metrics.close()
        self.ledger.close()

    def _live(self, step: int, loss: float) -> list[dict[str, Any]]:
        """Events of this boundary, each of them allowed."""
        plan, entries = self.plan, []
        stage = np.asarray(self.state.stage)
        since = step - self.since
        chance = self.random.random(stage.shape)
        for place in np.ndindex(*stage.shape):
            at = (int(place[0]), int(place[1]))
            match SeedLifecycleState(int(stage[place])):
                case SeedLifecycleState.DORMANT if chance[place] < plan.busy:
                    if chance[place] < plan.busy / 6:
                        entries += [*self._said(step, at), self._veto(step, at)]
                        continue
                    self.kernels[at] = self.random.bytes(32).hex()
                    reason = plan.reason.format(loss=loss)
                    entries.append(self._event(step, at, EventKind.LOAD, reason))
                case SeedLifecycleState.LOADING:
                    if chance[place] < 0.03:
                        entries.append(self._event(step, at, EventKind.FAIL, "digest differs"))
                        continue
                    entries.append(self._event(step, at, EventKind.ACTIVATE))
                    shape = SHAPES[sum(at) % 3] if plan.schema >= 2 else ""
                    ramp = {"value": 1.0, "span": plan.ramp, "shape": shape}
                    entries.append(self._event(step, at, EventKind.RAMP, **ramp))
                case SeedLifecycleState.ACTIVE if since[place] >= plan.trial:
                    worth = float(self.random.normal(0.03, 0.04))
                    told = {"value": worth, "low": worth - 0.02, "high": worth + 0.02}
                    entries.append({"kind": "worth", "step": step, "layer": at[0], "seed": at[1],
                                    **told})  # fmt: skip
                    kind = EventKind.FOSSILIZE if worth > 0.01 else EventKind.UNLOAD
                    rises = f"validation loss rises by {worth:.4f} without it"
                    entries.append(self._event(step, at, kind, rises))
                case SeedLifecycleState.ACTIVE if chance[place] < 0.004:
                    event = self._event(step, at, EventKind.ERRORS, "output not finite", value=3.0)
                    entries.append(event)
                case SeedLifecycleState.ERROR_RECOVERY:
                    entries.append(self._event(step, at, EventKind.RESET, "failed 3 times"))
        runs = np.asarray(running(self.state))
        health = self.random.uniform(0.5, 1.0, runs.shape).astype(np.float32)
        # All in one call: by events one after the other, a wide network takes seconds a boundary.
        self.state = observe_health(self.state, runs, health, step=step)
        entries += [
            event_entry(Event(step, i, j, EventKind.HEALTH, value=float(health[i, j])))
            for i, j in np.argwhere(runs).tolist()
        ]
        return entries

    def _said(self, step: int, at: tuple[int, int]) -> list[dict[str, Any]]:
        return [
            {"kind": "note", "step": step, "reason": "unlike any network of its training"},
            {
                "kind": "decision", "step": step, "layer": at[0], "seed": at[1], "action": "graft",
                "kernel": "ab" * 32, "confidence": 0.75, "uncertainty": 0.1, "value": 0.5,
                "low": 0.25, "high": 0.75, "features": [["progress", 0.5]],
            },
        ]  # fmt: skip

    def _veto(self, step: int, at: tuple[int, int]) -> dict[str, Any]:
        return {
            "kind": "veto", "step": step, "layer": at[0], "seed": at[1], "action": "graft",
            "kernel": "ab" * 32, "rule": "cooldown",
            "reason": f"layer {at[0]} was grafted less than 100 steps ago",
        }  # fmt: skip

    def _event(
        self, step: int, at: tuple[int, int], kind: EventKind, reason: str = "",
        value: float = 0.0, span: int = 0, shape: str = "",
    ) -> dict[str, Any]:  # fmt: skip
        held = {EventKind.RAMP, EventKind.ERRORS}
        kernel = "" if kind in held else self.kernels[at]
        if kind is EventKind.LOAD:
            value = float(at[0] * self.plan.seeds + at[1])
        entry = event_entry(Event(step, *at, kind, kernel, value, span), reason)
        if shape:
            entry["shape"] = shape
        self.state = apply_event(self.state, entry_event(entry))
        if kind is EventKind.ACTIVATE:
            self.since[at] = step
        if kind in (EventKind.UNLOAD, EventKind.RESET):
            del self.kernels[at]
        return entry

    def _row(self, step: int, loss: float) -> dict[str, Any]:
        plan = self.plan
        steps = plan.every / 400
        self.spent += steps * (1.0 + 0.2 * float(self.random.random()))
        stages, alphas = np.asarray(self.state.stage), np.asarray(self.state.alpha)
        health = np.asarray(self.state.health, dtype=np.float64)
        accuracy = 1.0 - 0.45 * min(loss, 1.0)
        row: dict[str, Any] = {
            "step": step,
            "train_loss": loss if step else None,
            "validation_loss": loss * 1.1,
            "validation_accuracy": accuracy,
            "test_loss": loss * 1.15,
            "test_accuracy": accuracy - 0.01,
            "stages": stages.tolist(),
            "alphas": alphas.tolist(),
            "parameters": 42 * plan.layers + 64 * int((stages >= 2).sum()),
            "compilations": 1 + int((stages == 2).sum()),
            "seconds": {
                "train": self.spent * 0.8, "evaluate": self.spent * 0.12,
                "compile": 0.4, "checkpoint": self.spent * 0.05, "record": self.spent * 0.03,
            },
        }  # fmt: skip
        if plan.schema >= 2:
            row |= {
                "health": [[None if math.isnan(h) else h for h in line] for line in health],
                "learning_rate": 0.01 * 0.5**self.rollbacks,
                "flops": 2e6 * step,
                "rollbacks": self.rollbacks,
            }
        return row


def make_run(path: Path, **plan: Any) -> Path:
    """A run that has ended."""
    RunMaker(path, Plan(**plan)).finish()
    return path


def long_rows(path: Path, count: int) -> None:
    """Give a run so many measurements, of two layers with two seeds."""
    row = {
        "validation_accuracy": 0.5, "test_loss": 0.7, "test_accuracy": 0.5, "parameters": 84,
        "stages": [[0, 2], [0, 4]], "alphas": [[0.0, 0.5], [0.0, 1.0]], "compilations": 1,
    }  # fmt: skip
    with (path / "metrics.jsonl").open("w") as file:
        for i in range(count):
            # One measurement stands out, and must not be lost when points are merged.
            loss = 9.0 if i == count // 3 else 0.5 + 0.1 * math.sin(i / 1000)
            more = {"step": i * 10, "train_loss": loss, "validation_loss": loss}
            file.write(json.dumps(row | more | {"seconds": {"train": i / 100}}) + "\n")


def main() -> None:
    """Write one run live, some boundaries a second."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rate", type=float, default=10.0, help="boundaries a second")
    for name in ("layers", "seeds", "steps", "every", "ramp", "trial"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Plan, name))
    options = vars(parser.parse_args())
    rate, folder = options.pop("rate"), options.pop("folder")
    maker = RunMaker(folder, Plan(**options))
    due = time.monotonic()
    while not maker.ended:
        maker.boundary()
        due += 1.0 / rate
        time.sleep(max(0.0, due - time.monotonic()))
    maker.close()


if __name__ == "__main__":
    main()
