"""Data sets in the form of Hugging Face's `datasets`, which the user has already.

Nothing is downloaded: what a run trains on should not change between two runs of it.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from esper.errors import InputError
from esper.tolaria.tasks._check import make_task
from esper.tolaria.tasks._conv_host import ConvHost
from esper.tolaria.tasks._host import Host
from esper.tolaria.tasks._mlp_host import MLPHost
from esper.tolaria.tasks._task import Task

OPTIONS = ("x", "y", "train", "validation", "test", "config")
"""What may follow the name, as in `huggingface:mnist?x=image&y=label`."""

_Pair = tuple[np.ndarray, np.ndarray]


def huggingface(place: str, options: Mapping[str, str]) -> Task:
    """A classification task of a data set that is on this machine.

    Images of bytes become f32 in -1 to 1, channels first, for a small `ConvHost`; rows of
    numbers are kept as f32 for a small `MLPHost`. Where there is no validation part, the
    last tenth of the training part validates.

    Args:
        place: a folder that `save_to_disk` wrote, or a name that `load_dataset` knows: a folder
            of files or a data set in the cache, the latter with HF_HUB_OFFLINE=1 set.
        options: `x` and `y`, the columns (by default "image" and "label"); `train`,
            `validation` and `test`, the names of the parts; `config`, of a data set with several.

    Raises:
        InputError: where `datasets` is not installed, or the data set, a part of it or a column
            is not there, is named twice, or holds what no host of ours takes.
    """
    names = [options.get(part, part) for part in ("train", "validation", "test")]
    if len(set(names)) < len(names):
        raise InputError(
            f"huggingface:{place} is to take {', '.join(names)} for training, validation and test,"
            " one of them twice: expected three parts; leave out `validation` to take the last"
            " tenth of the training part"
        )
    parts = _opened(place, options.get("config"))
    optional = "validation" not in options
    missing = [n for n in names if n not in parts and not (optional and n == "validation")]
    if missing:
        raise InputError(
            f"huggingface:{place} has the parts {', '.join(parts)}, and not {missing[0]!r}: name"
            " them, as in ?train=train&test=validation"
        )
    columns = (options.get("x", "image"), options.get("y", "label"))
    data = {name: _columns(place, name, parts[name], columns) for name in names if name in parts}
    train, validation, test = data[names[0]], data.get(names[1]), data[names[2]]
    if validation is None:
        kept = len(train[0]) - max(1, len(train[0]) // 10)
        train, validation = (
            (train[0][:kept], train[1][:kept]),
            (train[0][kept:], train[1][kept:]),
        )
    # Labels that are no classes are told of by make_task.
    classes = 1 + int(train[1].max(initial=1)) if train[1].dtype.kind in "iu" else 2
    host = _host(f"huggingface:{place}", train[0], classes)
    name = f"huggingface:{place}"
    return make_task(name, train=train, validation=validation, test=test, host=host)


def _opened(place: str, config: str | None) -> Mapping[str, Any]:
    try:
        datasets: Any = importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        raise InputError(
            f"huggingface:{place} is read by the package `datasets`, which is not installed: pip"
            " install datasets, or read the data yourself and use make_task"
        ) from error
    folder = Path(place).expanduser()
    try:
        if folder.is_dir() and any(
            (folder / name).exists() for name in ("dataset_dict.json", "state.json")
        ):
            opened = datasets.load_from_disk(str(folder))
        elif folder.is_dir() or datasets.config.HF_HUB_OFFLINE:
            opened = datasets.load_dataset(str(folder) if folder.is_dir() else place, config)
        else:
            raise InputError(
                f"huggingface:{place} is no folder, so it could only come from the cache or from"
                " the network, and tasks are not downloaded: set HF_HUB_OFFLINE=1 to take it from"
                " the cache, or give a folder that save_to_disk wrote"
            )
    except (OSError, ValueError) as error:
        raise InputError(f"huggingface:{place} cannot be read: {error}") from error
    return opened if isinstance(opened, dict) else {"train": opened}


def _columns(place: str, part: str, table: Any, columns: tuple[str, str]) -> _Pair:
    unknown = [name for name in columns if name not in table.column_names]
    if unknown:
        raise InputError(
            f"the part {part!r} of huggingface:{place} has no column {unknown[0]!r}: it has"
            f" {', '.join(table.column_names)}; name them, as in ?x=image&y=label"
        )
    # Twice the same column is one, which is a mistake that make_task tells of.
    held = table.select_columns(list(dict.fromkeys(columns))).with_format("numpy")[:]
    x, y = (np.asarray(held[name]) for name in columns)
    if x.dtype == np.uint8 and x.ndim in (3, 4):
        channels = x[..., None] if x.ndim == 3 else x
        x = np.moveaxis(channels, -1, 1).astype(np.float32) / np.float32(127.5) - np.float32(1)
    return np.ascontiguousarray(x), y


def _host(name: str, x: np.ndarray, classes: int) -> Host:
    if x.ndim == 2 and x.dtype.kind == "f":
        return MLPHost((x.shape[1], 8, classes))
    if x.ndim == 4 and x.dtype.kind == "f" and x.shape[2] == x.shape[3]:
        halvings = next(n for n in (2, 1, 0) if x.shape[2] % 2**n == 0)
        return ConvHost(x.shape[1], x.shape[2], (8, 16, 16)[: halvings + 1], classes)
    raise InputError(
        f"{name} has examples {x.dtype}{list(x.shape[1:])}: expected rows of floating point"
        " numbers, or square images of one size; read the data yourself and use make_task, with"
        " a host that takes it"
    )
