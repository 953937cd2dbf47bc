"""Tasks: data in three parts, the host that is to grow, and the batches of a step.

Loading one imports neither torch nor Equinox; a host's `jax` and `torch` do.
"""

from esper.tolaria.tasks._augment import crop_and_flip
from esper.tolaria.tasks._check import make_task
from esper.tolaria.tasks._cifar import CifarDigestWarning
from esper.tolaria.tasks._conv_host import ConvHost
from esper.tolaria.tasks._grammar import grammar_entropy_rate
from esper.tolaria.tasks._gym import DRAWN_BY_SEED, task_of_seed
from esper.tolaria.tasks._host import CustomHost, DescribedHost, Host, Interface
from esper.tolaria.tasks._loader import Augment, Batch, Loader, batch_indices, make_loader
from esper.tolaria.tasks._mlp_host import MLPHost, initial_host
from esper.tolaria.tasks._names import TASKS, check_task_name, load_task
from esper.tolaria.tasks._task import LOSSES, Loss, Split, Task
from esper.tolaria.tasks._text_host import TextHost

__all__ = [
    "DRAWN_BY_SEED",
    "LOSSES",
    "TASKS",
    "Augment",
    "Batch",
    "CifarDigestWarning",
    "ConvHost",
    "CustomHost",
    "DescribedHost",
    "Host",
    "Interface",
    "Loader",
    "Loss",
    "MLPHost",
    "Split",
    "Task",
    "TextHost",
    "batch_indices",
    "check_task_name",
    "crop_and_flip",
    "grammar_entropy_rate",
    "initial_host",
    "load_task",
    "make_loader",
    "make_task",
    "task_of_seed",
]
