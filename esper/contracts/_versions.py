"""What was written by another version of Esper.

Every model that is stored or sent says which version of its schema it has. An older one is made a
newer one by the functions of `UPGRADES`, one version at a time; a newer one is refused, because
what it means cannot be known. What says no version has version 1.
"""

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, get_args

from pydantic import ValidationError

from esper.contracts._data import Data
from esper.contracts._decisions import AdaptationDecision, AdaptationDecisionBatch
from esper.contracts._kernels import KernelRecord

T = TypeVar("T", bound=Data)


def _kernel_with_a_state(data: dict[str, Any]) -> dict[str, Any]:
    # Nobody has said of it that it is good, and nothing is known of its tags and ancestors.
    return {**data, "state": "testing", "tags": [], "created": 0.0}


def _decision_with_an_effect(data: dict[str, Any]) -> dict[str, Any]:
    return {**data, "uncertainty": None, "effect": None, "features": []}


def _decisions_with_effects(data: dict[str, Any]) -> dict[str, Any]:
    steps = data.get("step")
    rows = len(steps) if isinstance(steps, list) else 0
    none: list[None] = [None] * rows
    return {**data, "uncertainty": none, "effect": none, "features": [[] for _ in none]}


UPGRADES: Mapping[tuple[type[Data], int], Callable[[dict[str, Any]], dict[str, Any]]] = {
    (KernelRecord, 1): _kernel_with_a_state,
    (AdaptationDecision, 1): _decision_with_an_effect,
    (AdaptationDecisionBatch, 1): _decisions_with_effects,
}
"""From which version of which model: what makes it one of the next version."""


@functools.cache
def schema_version(model: type[Data]) -> int | None:
    """The newest version of a model; None of one that is only ever part of another."""
    field = model.model_fields.get("schema_version")
    return None if field is None else max(get_args(field.annotation))


def _nested(annotation: Any) -> Iterator[type[Data]]:
    if isinstance(annotation, type) and issubclass(annotation, Data):
        yield annotation
    for argument in get_args(annotation):
        yield from _nested(argument)


def upgraded(model: type[Data], data: Any) -> Any:
    """JSON data of any version as data of the newest one, the models inside included.

    Raises:
        SchemaVersionError: for a newer version.
    """
    if not isinstance(data, dict):
        return data
    known = schema_version(model)
    if known is not None:
        data = _own_upgraded(model, data, known)
    for name, field in model.model_fields.items():
        inside = next(_nested(field.annotation), None)
        if inside is None or name not in data:
            continue
        value = data[name]
        changed = (
            [upgraded(inside, item) for item in value]
            if isinstance(value, list)
            else upgraded(inside, value)
        )
        data = {**data, name: changed}
    return data


def _own_upgraded(model: type[Data], data: dict[str, Any], known: int) -> dict[str, Any]:
    version = data.get("schema_version", 1)
    if type(version) is not int or version < 1:
        return data  # the model says what is wrong
    if version > known:
        from esper.errors import SchemaVersionError

        raise SchemaVersionError(
            f"this {model.__name__} has schema version {version}, and this version of Esper knows"
            f" it up to {known}: it was written by a newer one. Update Esper here."
        )
    while version < known and (model, version) in UPGRADES:
        data = {**UPGRADES[model, version](data), "schema_version": version + 1}
        version += 1
    return data


def explained(error: ValidationError) -> str:
    """Each thing that is wrong, with its place and what came; what is secret is not repeated."""
    return "; ".join(_told(each) for each in error.errors(include_url=False))


def _told(each: Any) -> str:
    where = ".".join(map(str, each["loc"])) or "all of it"
    came = "" if {"token", "source"} & {str(key) for key in each["loc"]} else repr(each["input"])
    shown = f" (got {came[:77] + '…' if len(came) > 78 else came})" if came else ""
    known = "" if each["type"] in ("missing", "json_invalid", "value_error") else shown
    return f"{where}: {each['msg'].removeprefix('Value error, ')}{known}"


def read(model: type[T], data: bytes | str) -> T:
    """Read what `model_dump_json` wrote, by this version of Esper or an older one.

    Raises:
        SchemaVersionError: where a newer one wrote it.
        InputError: for what is no such data, naming each thing that is wrong.
    """
    try:
        found = model.model_validate_json(data)
        if schema_version(model) in (None, 1) or "schema_version" in found.model_fields_set:
            return found
    except ValidationError as error:
        problem: ValidationError | None = error
    else:
        problem = None
    from esper.errors import InputError

    try:
        return model.model_validate_json(json.dumps(upgraded(model, json.loads(data))))
    except ValidationError as error:
        problem = error
    except (ValueError, RecursionError) as error:
        if problem is None:
            raise InputError(f"this is no {model.__name__}: {error}") from error
    raise InputError(f"this is no {model.__name__}: {explained(problem)}") from problem
