"""Whether what a host returns is for its task's labels."""

import numpy as np

from esper.errors import InputError
from esper.tolaria.tasks import CustomHost, Task


def check_outputs(outputs: tuple[int, ...], task: Task) -> None:
    """Refuse a host whose outputs are not for the task's labels.

    Args:
        outputs: the shape of what the host returns for one example.

    Raises:
        InputError: with what was expected and what was found.
    """
    labels = task.train.y.shape[1:]
    declared = task.host.outputs if isinstance(task.host, CustomHost) else None
    if declared is not None and outputs[-1:] not in ((), (declared,)):
        raise InputError(
            f"the host of {task.name} is said to have {declared} outputs, and returns"
            f" {list(outputs)} for an example: say {outputs[-1]}, or leave `outputs` out"
        )
    found = f"the host of {task.name} returns {list(outputs)} for an example"
    if task.loss == "mean_squared_error":
        if np.prod(outputs) != np.prod(labels):
            raise InputError(
                f"{found}, and its labels are {list(labels)}: for the mean squared error the host"
                " must return as many values as there are"
            )
        return
    if outputs[:-1] != labels or not outputs:
        raise InputError(
            f"{found}, and its labels are {list(labels)}: for cross-entropy expected"
            f" {[*labels, 'classes']}, the classes last"
        )
    most = max(int(split.y.max()) for split in task.splits.values())
    if most >= outputs[-1]:
        raise InputError(
            f"{found}, and its largest label is {most}: with {outputs[-1]} classes, labels are from"
            f" 0 to {outputs[-1] - 1}"
        )
