"""Tolaria, the trainer: runs that grow, resume and replay."""

from esper.tolaria._branch import WhatIf, branch_run, read_what_if
from esper.tolaria._build import make_trainee
from esper.tolaria._config import (
    GrowConfig,
    InitialGraft,
    SafetyConfig,
    ScheduledDecision,
    ServiceConfig,
    make_config,
    read_config_file,
)
from esper.tolaria._decided import Decided, decisions_of
from esper.tolaria._divergence import DivergedError
from esper.tolaria._grow import resume_run, start_run
from esper.tolaria._hooks import Hooks
from esper.tolaria._replay import Replay, replay_run
from esper.tolaria._retrain import Retrained, retrain_run
from esper.tolaria._run_folder import RunFolder, has_run, open_run
from esper.tolaria._study import Study, create_study, is_study, open_study
from esper.tolaria._trainee import Evaluation, Optimisation, Rates, Trainee
from esper.tolaria.tasks import TASKS, Task, batch_indices, initial_host, load_task

__all__ = [
    "TASKS",
    "Decided",
    "DivergedError",
    "Evaluation",
    "GrowConfig",
    "Hooks",
    "InitialGraft",
    "Optimisation",
    "Rates",
    "Replay",
    "Retrained",
    "RunFolder",
    "SafetyConfig",
    "ScheduledDecision",
    "ServiceConfig",
    "Study",
    "Task",
    "Trainee",
    "WhatIf",
    "batch_indices",
    "branch_run",
    "create_study",
    "decisions_of",
    "has_run",
    "initial_host",
    "is_study",
    "load_task",
    "make_config",
    "make_trainee",
    "open_run",
    "open_study",
    "read_config_file",
    "read_what_if",
    "replay_run",
    "resume_run",
    "retrain_run",
    "start_run",
]
