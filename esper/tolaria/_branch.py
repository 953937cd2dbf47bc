"""A run that goes another way from some step on: what if it had been decided otherwise?"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from esper.checkpoints import checkpoint_steps, save_checkpoint
from esper.errors import InputError
from esper.nissa import read_metrics
from esper.tamiyo import Action
from esper.tolaria._build import (
    check_batch,
    check_grafts,
    check_task,
    find_candidates,
    growing_rows,
    make_trainee,
)
from esper.tolaria._config import GrowConfig, ScheduledDecision, make_config
from esper.tolaria._decider import controller_of
from esper.tolaria._departure import depart
from esper.tolaria._fold import Fold
from esper.tolaria._grow import resume_run
from esper.tolaria._hooks import Hooks
from esper.tolaria._ledger import Ledger, read_ledger
from esper.tolaria._replay import site_count
from esper.tolaria._run_folder import RunFolder, check_free, create_run, open_run
from esper.tolaria._yaml import read_yaml
from esper.tolaria.tasks import Task
from esper.urza import Library
from esper_functional import advance, state_digest

_KEPT = ("task", "backend", "seed", "seeds_per_layer", "blend", "isolate", "grow_at", "optimizer",
         "momentum", "ema_decay", "initial_grafts", "library")  # fmt: skip
"""What a branch shares with its run: what came before the branch would be another with another."""
_CHOSEN = ("blueprints", "blueprint_sizes", "variants")
"""By which a run's kernels were chosen, once, before its first step."""


class WhatIf(BaseModel):
    """What is to be decided otherwise, and from which step on."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)

    begins: Annotated[int, Field(alias="from", ge=0)]
    """The branch begins at the last checkpoint that is not after it."""
    decisions: list[ScheduledDecision] | None = None
    """Instead of the controller's; an empty list changes nothing any more."""
    change: dict[str, Any] = Field(default_factory=dict)
    """Other keys of the configuration, from there on."""


def read_what_if(path: Path) -> WhatIf:
    """What a YAML file asks for.

    Raises:
        InputError: where it cannot be read, or asks for what is unknown.
    """
    values = read_yaml("what-if file", path)
    if not isinstance(values, dict):
        raise InputError(
            f"the what-if file {path} must be a mapping with `from: STEP`, and `decisions:` or"
            f" `change:`; it is a {type(values).__name__}"
        )
    try:
        found = WhatIf.model_validate(values)
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise InputError(f"the what-if file {path} is not valid: {told}") from error
    if found.decisions is None and not found.change:
        raise InputError(
            f"the what-if file {path} changes nothing: give `decisions:`, a list (which may be"
            " empty), or `change:`, keys of the configuration"
        )
    early = [own.step for own in found.decisions or [] if own.step < found.begins]
    if early:
        raise InputError(
            f"the what-if file {path} decides at step {early[0]}, before the branch begins at"
            f" {found.begins}: decide later, or begin earlier"
        )
    return found


def branch_run(
    path: Path,
    out: Path,
    what_if: WhatIf,
    *,
    task: Task | None = None,
    hooks: Hooks | None = None,
) -> RunFolder:
    """Train a run's branch to its end, in a folder of its own.

    Up to the checkpoint that it begins at, its record is the run's; from there on it goes its own
    way. It can be resumed and replayed as any run.

    Raises:
        InputError: for a branch that cannot be, or a folder in use; nothing is written.
        LedgerError, CheckpointError, ArtifactError: where the run is damaged.
        Interrupted: when asked to stop; the branch can be resumed.
    """
    check_free(out)
    folder = open_run(path)
    known = check_task(folder, task)
    config = _changed(folder, what_if)
    start = depart(folder, at=what_if.begins)
    if start.saved is None or start.cursor is None:
        first = min(checkpoint_steps(folder.checkpoints), default=None)
        told = "it has none" if first is None else f"its first is of step {first}"
        raise InputError(
            f"a branch begins at a checkpoint, and the run {path} has none up to step"
            f" {what_if.begins}: {told}"
        )
    _check_grows(folder, config, known)
    tree, meta = start.saved
    assert folder.host is not None
    assert folder.task_digest is not None
    branch = create_run(
        out,
        config,
        folder.kernels,
        host=folder.host,
        task_digest=folder.task_digest,
        branch={"genesis": folder.genesis, "step": start.step, "lines": start.cursor.lines},
    )
    ledger = Ledger(branch.ledger, branch.genesis)
    fold = Fold(site_count(folder), config.seeds_per_layer)
    for entry in read_ledger(folder.ledger, folder.genesis):
        if entry.number > start.cursor.lines:
            break
        fold.take(entry, folder.ledger)
        ledger.append([entry.data])
    seeds = state_digest(advance(fold.state, int(meta["advanced"])))
    mark = {"kind": "mark", "step": int(meta["advanced"]), "name": "branch", "seeds": seeds}
    ledger.append([mark])
    ledger.close()
    course = dict(meta["course"])
    if config.controller != folder.config.controller or what_if.decisions is not None:
        course["controller"] = None
    own = {name: part for name, part in tree.items() if name != "held"}
    saved = {name: value for name, value in meta.items() if name != "held"}
    save_checkpoint(
        branch.checkpoints, start.step, own,
        {**saved, "course": course, "ledger": list(ledger.cursor)},
    )  # fmt: skip
    rows = [row for row in read_metrics(folder.metrics) if row["step"] < start.step]
    branch.metrics.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))
    return resume_run(out, task=task, hooks=hooks)


def _check_grows(folder: RunFolder, config: GrowConfig, task: Task) -> None:
    """Refuse decisions on layers, seeds or kernels that are not there, before anything is written.

    Raises:
        InputError: naming the first.
        LibraryError, ArtifactError: for a kernel that is gone or damaged.
    """
    check_batch(config, task)
    trainee = make_trainee(task, config)
    growing_rows(config, task, trainee)
    for own in config.schedule_of_grafts:
        known = len(folder.kernels.get(own.site, []))
        if own.action is Action.GRAFT and own.kernel is None and own.candidate >= known:
            raise InputError(
                f"the decision at step {own.step} grafts candidate {own.candidate} into {own.site},"
                f" and the run {folder.path} has {known} kernels for it, counted from 0: name one"
                " of these, or a kernel by its id"
            )
    library = Library(folder.library, create=False)
    try:
        find_candidates(folder, task, trainee, library)
        check_grafts(config, trainee, library)
        controller_of(config, trainee.sites)
    finally:
        library.close()


def _changed(folder: RunFolder, what_if: WhatIf) -> GrowConfig:
    was = folder.config.model_dump(mode="json")
    kept = [key for key in what_if.change if key in _KEPT]
    if kept:
        raise InputError(
            f"a branch of {folder.path} cannot change {kept[0]!r}: what came before it would be"
            " another run; begin that one with `esper grow`"
        )
    chosen = [key for key in what_if.change if key in _CHOSEN]
    if chosen:
        raise InputError(
            f"a branch of {folder.path} cannot change {chosen[0]!r}: it chooses from the kernels"
            " that the run began with; begin another run with `esper grow`"
        )
    both = {"controller", "schedule_of_grafts"} & what_if.change.keys()
    if what_if.decisions is not None and both:
        raise InputError(
            f"a branch of {folder.path} has `decisions:` and changes {min(both)!r}, which says who"
            " decides, too: leave out one of them"
        )
    values: Mapping[str, Any] = {**was, "library": str(folder.library), **what_if.change}
    if what_if.decisions is not None:
        decisions = [own.model_dump(mode="json") for own in what_if.decisions]
        controller = "fixed" if decisions else "none"
        of_others = {"policy": None, "service": None}
        values = {**values, **of_others, "controller": controller, "schedule_of_grafts": decisions}
    config = make_config(**values)
    if config.steps <= what_if.begins:
        raise InputError(
            f"the branch begins at step {what_if.begins} and ends at {config.steps}: give"
            " `change: {steps: N}` with more, or begin earlier"
        )
    return config
