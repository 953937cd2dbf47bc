"""Values of every contract, made from the types of their fields."""

import functools
import json
import math
import types
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from pydantic import JsonValue
from pydantic.fields import FieldInfo

from esper.contracts import (
    ENTRY_FIELDS,
    BlueprintRequest,
    Columns,
    Data,
    KernelChanged,
    KernelOutcome,
    ModelReport,
    SeedEvent,
    TrainingMetrics,
)

# Some of each kind that a name may have: accents, other alphabets, an emoji, a combining mark.
_TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Zl", "Zp")), max_size=12)
_ANY_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
_SHAPES = st.lists(st.integers(1, 999), min_size=1, max_size=3).map(
    lambda sizes: "x".join(map(str, sizes))
)

PATTERNS: dict[str, SearchStrategy[str]] = {
    r"^[^\p{C}\p{Zl}\p{Zp}]*$": _TEXT,
    r"^[0-9a-f]{64}$": st.binary(min_size=32, max_size=32).map(bytes.hex),
    r"^[0-9a-f]{32}$": st.binary(min_size=16, max_size=16).map(bytes.hex),
    r"^[^\x00]*$": _ANY_TEXT,
    r"^[!-~]*$": st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=12),
    r"^[0-9]+(x[0-9]+)*->[0-9]+(x[0-9]+)* (float32|bfloat16)$": st.builds(
        "{}->{} {}".format, _SHAPES, _SHAPES, st.sampled_from(["float32", "bfloat16"])
    ),
}


SOURCE_CHECK = next(
    each for each in BlueprintRequest.model_fields["source"].metadata if hasattr(each, "func")
)

JSON: SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | _ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_ANY_TEXT, inner, max_size=3),
    max_leaves=8,
)


def bounds(metadata: list[Any]) -> dict[str, Any]:
    """What the metadata of a field say: ge, gt, le, min_length, max_length, pattern."""
    found: dict[str, Any] = {}
    for each in metadata:
        flat = bounds(each.metadata) if isinstance(each, FieldInfo) else {}
        for key in ("ge", "gt", "le", "min_length", "max_length", "pattern"):
            value = flat.get(key, getattr(each, key, None))
            if value is not None:
                found[key] = value
    return found


def _texts(known: dict[str, Any]) -> SearchStrategy[str]:
    own = PATTERNS[known["pattern"]] if "pattern" in known else _ANY_TEXT
    least = known.get("min_length", 0)
    return own.filter(lambda text: len(text) >= least) if least else own


def _floats(known: dict[str, Any]) -> SearchStrategy[float]:
    return st.floats(
        known.get("ge", known.get("gt")),
        known.get("le"),
        exclude_min="gt" in known,
        allow_nan=False,
        allow_infinity=False,
    )


def values(annotation: Any, metadata: list[Any]) -> SearchStrategy[Any]:
    """Values of a type of a field."""
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return values(inner, [*metadata, *more])
    if any(each is SOURCE_CHECK for each in metadata):
        return sources()
    if annotation is JsonValue:
        return JSON
    known, arguments = bounds(metadata), get_args(annotation)
    if get_origin(annotation) is Literal:
        return st.sampled_from(arguments)
    if get_origin(annotation) in (Union, types.UnionType):
        return st.one_of([values(each, metadata) for each in arguments])
    if get_origin(annotation) is tuple:
        if arguments[-1] is not Ellipsis:
            return st.tuples(*(values(each, []) for each in arguments))
        least = known.get("min_length", 0)
        return st.lists(values(arguments[0], []), min_size=least, max_size=3).map(tuple)
    if get_origin(annotation) is dict:
        return st.dictionaries(values(arguments[0], []), values(arguments[1], []), max_size=3)
    if annotation is type(None):
        return st.none()
    if annotation is bool:
        return st.booleans()
    if annotation is int:
        return st.integers(known.get("ge", -(2**63)), known.get("le", 2**63 - 1))
    if annotation is float:
        return _floats(known)
    if annotation is str:
        return _texts(known)
    if issubclass(annotation, Enum):
        return st.sampled_from(list(annotation))
    return data_of(annotation)


def sources() -> SearchStrategy[str]:
    content = st.fixed_dictionaries({"name": _TEXT.filter(bool)}, optional={"nodes": st.just([1])})
    return content.map(lambda data: json.dumps(data, sort_keys=True, indent=1))


def _some(model: type[Data], names: Any) -> dict[str, SearchStrategy[Any]]:
    return {
        name: values(model.model_fields[name].annotation, list(model.model_fields[name].metadata))
        for name in names
    }


def entries(kind: str) -> SearchStrategy[Any]:
    """Entries of a ledger of one kind."""
    own = _some(SeedEvent, sorted(ENTRY_FIELDS[kind]))
    if kind in ("activate", "alpha", "ramp", "health"):
        own["value"] = st.floats(0.0, 1.0)
    elif kind in ("load", "errors"):
        own["value"] = st.integers(0, 1 << 40).map(float)
    elif kind == "latency":
        own["value"] = st.floats(0.0, allow_infinity=False)
    elif kind != "worth" and "value" in own:
        own["value"] = st.floats(allow_nan=False, allow_infinity=False)
    return st.fixed_dictionaries({"kind": st.just(kind), **own}).map(lambda v: SeedEvent(**v))


@st.composite
def _metrics(draw: st.DrawFn) -> TrainingMetrics:
    rows, seeds = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    own = _some(TrainingMetrics, set(TrainingMetrics.model_fields) - {"schema_version"})

    def matrix(values: SearchStrategy[Any]) -> SearchStrategy[Any]:
        row = st.lists(values, min_size=seeds, max_size=seeds).map(tuple)
        return st.lists(row, min_size=rows, max_size=rows).map(tuple)

    own["stages"] = matrix(st.integers(0, 4))
    own["alphas"] = matrix(st.floats(0.0, 1.0))
    own["health"] = matrix(st.none() | st.floats(allow_nan=False, allow_infinity=False))
    return TrainingMetrics(**draw(st.fixed_dictionaries(own)))


@st.composite
def _outcomes(draw: st.DrawFn) -> KernelOutcome:
    own = _some(KernelOutcome, set(KernelOutcome.model_fields) - {"schema_version", "low", "high"})
    given = draw(st.fixed_dictionaries(own))
    below, above = (st.none() | st.floats(0.0, 1e9) for _ in range(2))
    low, high = draw(below), draw(above)
    gain = given["gain"]
    given["low"] = None if low is None else max(gain - low, -1.7e308)
    given["high"] = None if high is None else min(gain + high, 1.7e308)
    if (low is not None and given["low"] > gain) or (high is not None and given["high"] < gain):
        given["low"] = given["high"] = None
    return KernelOutcome(**given)


_REPORTS = ModelReport.model_fields
_BY_SEED = {"stage", "alpha", "health", "health_before", "worth", "worth_half", "age"}
_OF_KERNELS = {"kernel_ids", "kernel_parameters", "kernel_flops"}
_OF_REPORTS = {"step", "steps", "senders", "receivers", "depths", "descriptions", "held", "fits"}


@functools.cache
def _entries_of(name: str) -> SearchStrategy[Any]:
    """Values of one entry of a column of a report, and of a field that is no column."""
    field = _REPORTS[name]
    if get_origin(field.annotation) is not tuple or name.endswith("_loss") or name == "rollbacks":
        return values(field.annotation, list(field.metadata))
    inside = get_args(field.annotation)[0]
    return values(get_args(inside)[0] if name in _BY_SEED else inside, [])


@functools.cache
def _rows(own: SearchStrategy[Any], count: int, width: int | None = None) -> SearchStrategy[Any]:
    """So many entries, or rows of them."""
    inner = own if width is None else _rows(own, width)
    return st.lists(inner, min_size=count, max_size=count).map(tuple)


@functools.cache
def _below(count: int) -> SearchStrategy[Any]:
    return st.none() | st.integers(0, count - 1) if count else st.none()


@functools.cache
def _reports_of(sites: int, seeds: int, rows: int, kernels: int) -> SearchStrategy[ModelReport]:
    columns: dict[str, SearchStrategy[Any]] = {}
    for name, field in _REPORTS.items():
        if name == "schema_version" or name in _OF_REPORTS:
            continue
        own, plain = _entries_of(name), get_origin(field.annotation) is not tuple
        if plain or name.endswith("_loss") or name == "rollbacks":
            columns[name] = own
        elif name in _OF_KERNELS:
            columns[name] = _rows(own, kernels)
        else:
            columns[name] = _rows(own, sites, seeds if name in _BY_SEED else None)
    to = _rows(st.integers(0, sites - 1), 2)
    numbers = _rows(_floats({}), rows, 2)
    columns |= {
        "senders": to, "receivers": to, "depths": _rows(st.integers(0, sites - 1), sites),
        "descriptions": numbers, "held": _rows(_below(rows), sites, seeds),
        "fits": _rows(_below(kernels), sites, rows), "step": st.integers(0, 1 << 40),
        "steps": st.integers(1 << 40, 1 << 41),
    }  # fmt: skip
    return st.fixed_dictionaries(columns).map(lambda given: ModelReport(**given))


_REPORT_SHAPES = [(1, 1, 0, 0), (1, 1, 1, 1), (2, 1, 1, 0), (2, 2, 2, 1), (1, 3, 0, 2)]


def data_of(model: type[Data]) -> SearchStrategy[Any]:
    """Values of a model, with and without what has a default."""
    if model is ModelReport:
        return st.sampled_from(_REPORT_SHAPES).flatmap(lambda own: _reports_of(*own))
    if model is SeedEvent:
        return st.sampled_from(sorted(ENTRY_FIELDS)).flatmap(entries)
    if model is TrainingMetrics:
        return _metrics()
    if model is KernelOutcome:
        return _outcomes()
    if issubclass(model, Columns):
        return st.lists(data_of(model.ITEM), max_size=4).map(model.of)
    fields = model.model_fields
    required = {name for name, field in fields.items() if field.is_required()}
    own = _some(model, set(fields) - {"schema_version"})
    made = st.fixed_dictionaries(
        {name: own[name] for name in own if name in required},
        optional={name: own[name] for name in own if name not in required},
    )
    if model is KernelChanged:
        made = made.filter(lambda v: not (v["before"] is None and v["after"] is None))
    return made.map(lambda given: model(**given))


NOT_FINITE = (math.nan, math.inf, -math.inf)
