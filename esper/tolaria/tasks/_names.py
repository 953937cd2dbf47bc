"""Tasks by name: those made here, and readers of what the user has."""

import difflib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import parse_qsl

from esper.errors import InputError
from esper.tolaria.tasks._cifar import cifar10
from esper.tolaria.tasks._digits import digits
from esper.tolaria.tasks._grammar import grammar
from esper.tolaria.tasks._gym import check_gym, gym
from esper.tolaria.tasks._huggingface import OPTIONS, huggingface
from esper.tolaria.tasks._parity import parity
from esper.tolaria.tasks._shapes import shapes
from esper.tolaria.tasks._spirals import spirals
from esper.tolaria.tasks._task import Task

TASKS: Mapping[str, Callable[[], Task]] = {
    "spirals": spirals,
    "digits": digits,
    "shapes": shapes,
    "grammar": grammar,
    **{f"xor-{bits}": lambda bits=bits: parity(bits) for bits in range(2, 13)},
}
"""Tasks that need no files."""

_LISTED = (
    "spirals, digits, xor-N, shapes, grammar, gym:FAMILY, cifar10:FOLDER or"
    " huggingface:NAME_OR_FOLDER"
)
_READERS = ("cifar10", "huggingface")


def check_task_name(name: str) -> None:
    """Whether `load_task` would know what to do; nothing is read.

    Raises:
        InputError: for an unknown name, with the nearest; for a reader without its place, or
            with options that it does not have.
    """
    _parsed(name)


def load_task(name: str) -> Task:
    """A task by name.

    Args:
        name: `spirals`, `digits`, `xor-N` for N of 2 to 12, `shapes` or `grammar`; or
            `gym:FAMILY` or `gym:FAMILY?draw=N`, a family of the gym with data and host of draw N;
            or
            `cifar10:PATH`, a folder or archive of its files; or `huggingface:NAME_OR_FOLDER`,
            with options such as `?x=image&y=label`.

    Raises:
        InputError: for an unknown one, with the nearest, and for what a reader cannot read.
    """
    return _parsed(name)()


def _parsed(name: str) -> Callable[[], Task]:
    reader, colon, rest = name.partition(":")
    if reader == "gym" and colon:
        return _drawn(rest)
    if not colon:
        if name in TASKS:
            return TASKS[name]
        if re.fullmatch(r"xor-\d{1,9}", name):
            return _number(name)
        if name in _READERS:
            raise InputError(
                f"the task {name!r} is read from files: expected {name}:PATH, such as"
                f" {name}:data/{name}"
            )
        near = difflib.get_close_matches(name, [*TASKS, *_READERS], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"unknown task {name!r}: expected one of {_LISTED}{hint}")
    if reader not in _READERS:
        near = difflib.get_close_matches(reader, _READERS, n=1)
        hint = f"; did you mean {f'{near[0]}:{rest}'!r}?" if near else ""
        raise InputError(f"unknown task {name!r}: expected one of {_LISTED}{hint}")
    if reader == "cifar10":
        return lambda: cifar10(_place(name, rest))
    place, _, query = rest.partition("?")
    options = _options(name, query)
    _place(name, place)
    return lambda: huggingface(place, options)


def _drawn(rest: str) -> Callable[[], Task]:
    family, asked, draw = rest.partition("?draw=")
    if asked and not re.fullmatch(r"\d{1,9}", draw):
        raise InputError(
            f"the draw of gym:{family} is a whole number from 0, such as gym:{family}?draw=3; got"
            f" {draw!r}"
        )
    number = int(draw or 0)
    check_gym(family, number)
    return lambda: gym(family, number)


def _number(name: str) -> Callable[[], Task]:
    bits = int(name.removeprefix("xor-"))
    if name != f"xor-{bits}" or f"xor-{bits}" not in TASKS:
        raise InputError(f"{name} is not a task: expected xor-2 to xor-12")
    return TASKS[name]


def _place(name: str, place: str) -> Path:
    if not place:
        raise InputError(f"the task {name!r} names no place: expected {name.split(':')[0]}:PATH")
    return Path(place)


def _options(name: str, query: str) -> dict[str, str]:
    try:
        given = dict(parse_qsl(query, strict_parsing=True)) if query else {}
    except ValueError as error:
        raise InputError(
            f"the options of the task {name!r} cannot be read ({error}): expected"
            " ?x=COLUMN&y=COLUMN and so on"
        ) from error
    for option in given:
        if option not in OPTIONS:
            near = difflib.get_close_matches(option, OPTIONS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(
                f"the task {name!r} has the unknown option {option!r}: expected one of"
                f" {', '.join(OPTIONS)}{hint}"
            )
    return given
