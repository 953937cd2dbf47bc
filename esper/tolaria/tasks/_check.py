"""Making a task of arrays, and refusing arrays that no training could use."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from esper.errors import InputError
from esper.tolaria.tasks._host import CustomHost, DescribedHost, Host, Interface
from esper.tolaria.tasks._task import LOSSES, Loss, Split, Task

_BLOCK = 1 << 24
"""Values looked at together: a part may be larger than memory."""


def make_task(
    name: str,
    *,
    train: Sequence[Any],
    validation: Sequence[Any],
    test: Sequence[Any],
    host: Host,
    loss: Loss = "cross_entropy",
    best_loss: float | None = None,
) -> Task:
    """A task of the user's own arrays.

    Args:
        name: what runs record; `load_task` does not know it.
        train: `(x, y)`, each with the examples along its first axis. `x` is floating (kept as
            f32) or integers (tokens, kept as i32); `y` is integers (classes, kept as i32)
            for cross entropy, numbers (kept as f32) for the mean squared error. An `x` that
            is a `numpy.memmap` of f32 or i32 stays on disk and is read batch by batch.
        validation: likewise; controllers judge by it.
        test: likewise; it decides nothing.
        host: the network to grow.
        loss: "cross_entropy" or "mean_squared_error".
        best_loss: the loss that no model can be below, where it is known.

    Raises:
        InputError: for a part that is empty, not finite, of a dtype or shape that cannot be
            used, or with labels that the host has no output for; it names part and example.
    """
    if not name:
        raise InputError("a task needs a name, which its runs are recorded under; got ''")
    if loss not in LOSSES:
        raise InputError(
            f"unknown loss {loss!r} of the task {name!r}: expected one of {', '.join(LOSSES)}"
        )
    interface = host.interface() if isinstance(host, DescribedHost) else None
    splits = {
        part: _check_split(f"the {part} part of {name!r}", given, host, interface, loss)
        for part, given in (("train", train), ("validation", validation), ("test", test))
    }
    first = splits["train"]
    for part, split in splits.items():
        if split.x.shape[1:] != first.x.shape[1:] or split.x.dtype != first.x.dtype:
            raise InputError(
                f"the {part} part of {name!r} has examples {_described(split.x)}, and the train"
                f" part {_described(first.x)}: expected the same in all parts"
            )
    return Task(name, **splits, host=host, loss=loss, best_loss=best_loss)


def _described(array: np.ndarray) -> str:
    return f"{array.dtype}[{', '.join(map(str, array.shape[1:]))}]"


def _check_split(
    where: str, given: Sequence[Any], host: Host, interface: Interface | None, loss: str
) -> Split:
    if not isinstance(given, Sequence) or len(given) != 2:
        raise InputError(f"{where} is not a pair: expected (x, y), got {type(given).__name__}")
    x, y = (_array(f"{role} of {where}", value) for role, value in zip("xy", given, strict=True))
    if len(x) != len(y):
        raise InputError(
            f"{where} has {len(x)} examples and {len(y)} labels: expected one label, or one row"
            " of labels, for each example"
        )
    if not len(x):
        raise InputError(f"{where} is empty: expected at least one example")
    x = _check_x(f"x of {where}", x, host, interface)
    outputs = host.outputs if isinstance(host, CustomHost) else interface and interface.outputs
    if loss == "cross_entropy":
        y = _check_classes(f"y of {where}", y, host, outputs)
        expected = x.shape if interface and interface.tokens else x.shape[:1]
    else:
        y = _check_values(f"y of {where}", y)
        expected = (len(x), outputs)
    if interface is not None and y.shape != expected:
        raise InputError(
            f"y of {where} has the shape {list(y.shape)}: expected {list(expected)} for the host"
            f" {host.name!r} and {loss}"
        )
    return Split(x, y)


def _array(where: str, value: Any) -> np.ndarray:
    array = value if isinstance(value, np.ndarray) else np.asarray(value)
    if array.dtype.kind not in "iuf":
        raise InputError(
            f"{where} has dtype {array.dtype}, which cannot be used: expected floating point"
            " numbers or integers; convert with .astype(numpy.float32) or .astype(numpy.int32)"
        )
    if array.ndim == 0:
        raise InputError(f"{where} is a single number: expected an array, examples first")
    return array


def _check_x(where: str, x: np.ndarray, host: Host, interface: Interface | None) -> np.ndarray:
    if interface is not None:
        tokens = x.dtype.kind in "iu"
        if tokens != interface.tokens:
            wanted = "integer tokens" if interface.tokens else "floating point values"
            hint = "" if interface.tokens else "; images of bytes are often divided by 255"
            raise InputError(
                f"{where} has dtype {x.dtype}: the host {host.name!r} takes {wanted}{hint}"
            )
        shape = interface.example
        fits = len(shape) == x.ndim - 1 and all(
            want in (None, got) for want, got in zip(shape, x.shape[1:], strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if want is None else str(want) for want in shape)
            raise InputError(
                f"{where} has examples of shape {list(x.shape[1:])}: the host {host.name!r} takes"
                f" [{wanted}]"
            )
    if x.dtype.kind == "f":
        return _finite(where, _as(where, x, np.float32))
    low, high = 0, (interface.vocabulary if interface else None) or 2**31
    _within(where, "token", x, low, high, host)
    return _as(where, x, np.int32)


def _check_classes(where: str, y: np.ndarray, host: Host, outputs: int | None) -> np.ndarray:
    if y.dtype.kind == "f":
        raise InputError(
            f"{where} has dtype {y.dtype}, and cross entropy takes classes: expected integers;"
            " convert with .astype(numpy.int32), or choose the loss mean_squared_error"
        )
    _within(where, "class", y, 0, outputs or 2**31, host)
    return _as(where, y, np.int32)


def _check_values(where: str, y: np.ndarray) -> np.ndarray:
    if y.ndim < 2:
        raise InputError(
            f"{where} has the shape {list(y.shape)}: the mean squared error takes one row of"
            " values for each example; reshape with y[:, None]"
        )
    return _finite(where, _as(where, y, np.float32))


def _as(where: str, array: np.ndarray, dtype: type[np.generic]) -> np.ndarray:
    if array.dtype == dtype:
        return array
    if isinstance(array, np.memmap):
        raise InputError(
            f"{where} is a mapped file of {array.dtype}, which could only be converted by loading"
            f" it whole: write it as {np.dtype(dtype).name}"
        )
    with np.errstate(over="ignore"):  # what overflows is refused as infinite, by its example
        return array.astype(dtype)


def _blocks(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    rows = max(1, _BLOCK // max(1, array[:1].size))
    for start in range(0, len(array), rows):
        yield start, array[start : start + rows].reshape(len(array[start : start + rows]), -1)


def _finite(where: str, array: np.ndarray) -> np.ndarray:
    for start, block in _blocks(array):
        bad = ~np.isfinite(block)
        if bad.any():
            row, column = (int(i) for i in np.argwhere(bad)[0])
            raise InputError(
                f"{where} holds {block[row, column]} in example {start + row}: expected finite"
                " float32 values in all examples; remove or repair this one"
            )
    return array


def _within(where: str, what: str, array: np.ndarray, low: int, high: int, host: Host) -> None:
    for start, block in _blocks(array):
        bad = (block < low) | (block >= high)
        if bad.any():
            row, column = (int(i) for i in np.argwhere(bad)[0])
            raise InputError(
                f"{where} holds the {what} {block[row, column]} in example {start + row}: the host"
                f" {host.name!r} takes {low} to {high - 1}"
            )
