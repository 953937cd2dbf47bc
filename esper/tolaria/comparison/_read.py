"""An outcome, read from the files of a run."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

from esper.errors import EsperError, InputError, RunFolderError
from esper.nissa import read_metrics
from esper.tolaria._ledger import MARK, ROLLBACK, Entry, read_ledger
from esper.tolaria._measured import check_measurements
from esper.tolaria._run_folder import RUN, open_run
from esper.tolaria.comparison._design import Budget
from esper.tolaria.comparison._earned import earned
from esper.tolaria.comparison._outcome import Curve, Outcome, Setting
from esper_functional import EventKind, SeedLifecycleState

_RECIPE = (
    "batch_size", "accumulate", "optimizer", "learning_rate", "schedule", "warmup_steps",
    "momentum", "weight_decay", "clip_norm", "precision", "ema_decay", "early_stopping",
)  # fmt: skip
"""How parameters are trained, whatever grows; runs of old have fewer of these."""
_RUNS = (SeedLifecycleState.ACTIVE, SeedLifecycleState.FOSSILIZED)


def read_outcome(run_folder: Path, arm: str, budget: Budget) -> Outcome:
    """Read what a run came to, from `run.json`, its ledger and its measurements.

    A run that has not ended, or diverged, gives an outcome that says so; `judge` refuses it.

    Args:
        arm: which arm of a comparison the run belongs to.
        budget: what the arms of that comparison were given the same amount of.

    Raises:
        InputError: for a budget that is neither "steps" nor "flops".
        RunFolderError: where there is no run.
        LedgerError: where its ledger is damaged, which is verified line by line.
        EsperError: where its measurements are damaged, or not those that its ledger saw.
    """
    if budget not in get_args(Budget):
        raise InputError(
            f"{run_folder} cannot be read as an outcome: expected the budget to be one of"
            f" {', '.join(get_args(Budget))}, got {budget!r}; choose one of them"
        )
    folder = open_run(run_folder)
    ledger = list(read_ledger(folder.ledger, folder.genesis))
    entries = _standing(ledger, folder.ledger)
    rollbacks = sum(entry.data["kind"] == ROLLBACK for entry in ledger)
    measured = read_metrics(folder.metrics)
    rows = _forward(measured, rollbacks > 0, folder.metrics)
    setting = _setting(run_folder)
    last = rows[-1] if rows else {}
    steps = int(last.get("step", 0))
    ends = [e for e in entries if e["kind"] == MARK and e.get("name") == "end"]
    for end in ends:
        check_measurements(folder.metrics, measured, end)
    kept, removed = _kernels(entries, last.get("stages", ()))
    seconds = last.get("seconds")
    curve = Curve(
        steps=tuple(int(row["step"]) for row in rows),
        flops=tuple(_finite(row.get("flops")) for row in rows),
        test_accuracy=tuple(_finite(row["test_accuracy"]) for row in rows),
        test_loss=tuple(_finite(row["test_loss"]) for row in rows),
    )
    return Outcome(
        arm=arm,
        seed=folder.config.seed,
        budget=budget,
        folder=str(run_folder),
        setting=setting,
        ended=steps in [end["step"] for end in ends],
        diverged_at=next((int(row["step"]) for row in rows if _diverged(row)), None),
        rollbacks=rollbacks,
        steps=steps,
        test_accuracy=_finite(last.get("test_accuracy")),
        test_loss=_finite(last.get("test_loss")),
        reward=earned(setting, curve, last.get("parameters")),
        validation_loss=_finite(last.get("validation_loss")),
        parameters=last.get("parameters"),
        training_flops=_finite(last.get("flops")),
        kept=kept,
        removed=removed,
        compilations=last.get("compilations"),
        seconds=None if seconds is None else float(sum(seconds.values())),
        curve=curve,
    )


def _finite(value: object) -> float | None:
    number = float(value) if isinstance(value, int | float) else math.nan
    return number if math.isfinite(number) else None


def _setting(path: Path) -> Setting:
    content: dict[str, Any] = json.loads((path / RUN).read_bytes())
    config = content["config"]
    try:
        host, task = content.get("host") or {}, content.get("task") or {}
        sites = host.get("sites")
        return Setting(
            task=str(task.get("name", config["task"])),
            task_digest=task.get("digest"),
            backend=str(config["backend"]),
            host_sites=None if sites is None else tuple(str(name) for name in sites),
            host_parameters=host.get("parameters"),
            host_step_flops=host.get("step_flops"),
            planned_steps=int(config["steps"]),
            recipe=tuple((name, str(config[name])) for name in _RECIPE if name in config),
            branched=content.get("branch") is not None,
            versions=tuple(sorted((content.get("versions") or {}).items())),
        )
    except (AttributeError, TypeError) as error:
        raise RunFolderError(
            f"{path / RUN} is damaged: expected `host` and `task` to be mappings with `sites`,"
            f" `parameters`, `name` and `digest` ({error}); restore it from a copy"
        ) from error


def _standing(ledger: Iterable[Entry], path: Path) -> list[dict[str, Any]]:
    """The entries that no rollback took back."""
    kept: list[Entry] = []
    for entry in ledger:
        if entry.data["kind"] == ROLLBACK:
            lines = entry.data.get("lines")
            if not isinstance(lines, int) or not 0 <= lines < entry.number:
                raise EsperError(
                    f"{path} cannot be read: expected the rollback at line {entry.number} to go"
                    f" back to a line before it, got {lines!r}; see esper replay"
                )
            kept = [before for before in kept if before.number <= lines]
        kept.append(entry)
    return [entry.data for entry in kept]


def _forward(rows: Sequence[dict[str, Any]], went_back: bool, path: Path) -> list[dict[str, Any]]:
    """The measurements of the steps that stand, the later of two of one step."""
    standing: list[dict[str, Any]] = []
    for row in rows:
        if standing and row["step"] <= standing[-1]["step"]:
            if not went_back:
                raise EsperError(
                    f"{path} cannot be read: step {row['step']} follows step"
                    f" {standing[-1]['step']}, and the ledger beside it records no rollback;"
                    " restore it from a copy, or make the run again"
                )
            standing = [before for before in standing if before["step"] < row["step"]]
        standing.append(row)
    return standing


def _diverged(row: dict[str, Any]) -> bool:
    # There is no training loss before the first step.
    names = ("train_loss", "validation_loss", "test_loss")[0 if row["step"] > 0 else 1 :]
    return any(_finite(row[name]) is None for name in names)


def _kernels(entries: Iterable[dict[str, Any]], stages: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Kernels kept and removed."""
    fossils: set[tuple[int, int]] = set()
    asked = folded = 0
    for entry in entries:
        kind = entry["kind"]
        if kind == EventKind.LOAD:
            asked += 1
        elif kind == EventKind.FOSSILIZE:
            fossils.add((entry["layer"], entry["seed"]))
        elif kind == EventKind.FOLD:
            # A folded fossil keeps its stage, and is counted by it.
            folded += (entry["layer"], entry["seed"]) not in fossils
    ends = [stage for layer in stages for stage in layer]
    kept = folded + sum(stage in _RUNS for stage in ends)
    waiting = sum(stage == SeedLifecycleState.LOADING for stage in ends)
    return kept, asked - kept - waiting
