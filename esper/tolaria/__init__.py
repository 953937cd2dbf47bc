"""Tolaria, the trainer: runs that grow, resume and replay."""

from esper.tolaria._config import (
    GrowConfig,
    InitialGraft,
    make_config,
    read_config_file,
)
from esper.tolaria._grow import make_trainee, resume_run, start_run
from esper.tolaria._replay import Replay, replay_run
from esper.tolaria._run_folder import RunFolder, has_run, open_run
from esper.tolaria._study import Study, create_study, is_study, open_study
from esper.tolaria._tasks import TASKS, Task, batch_indices, initial_host, load_task
from esper.tolaria._trainee import Evaluation, Trainee
from esper.tolaria._trainer import Interrupted

__all__ = [
    "TASKS",
    "Evaluation",
    "GrowConfig",
    "InitialGraft",
    "Interrupted",
    "Replay",
    "RunFolder",
    "Study",
    "Task",
    "Trainee",
    "batch_indices",
    "create_study",
    "has_run",
    "initial_host",
    "is_study",
    "load_task",
    "make_config",
    "make_trainee",
    "open_run",
    "open_study",
    "read_config_file",
    "replay_run",
    "resume_run",
    "start_run",
]
