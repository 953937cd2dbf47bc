"""The data flow of a host on jax, read off its jaxpr; nothing is run.

Each site marks what it returns with an operation that does nothing. A walk through the jaxpr
then knows of every value by which sites' marks it came: where a value is marked, those are the
sites that feed the one that marks it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Primitive
from jax.interpreters import ad, batching

from esper.tamiyo.graph._topology import Flow

Labels = frozenset[int]
"""Rows of the sites that a value came by, without a site between."""

_NONE: Labels = frozenset()

_mark = Primitive("esper_site")
_mark.def_abstract_eval(lambda value, *, row: value)
ad.deflinear2(_mark, lambda cotangent, _, *, row: [cotangent])


def _batched(values: Sequence[Any], axes: Sequence[Any], *, row: int) -> tuple[Any, Any]:
    return _mark.bind(values[0], row=row), axes[0]


batching.primitive_batchers[_mark] = _batched


class _Marking:
    """A site that marks all arrays that its layers return."""

    def __init__(self, rows: Mapping[str, int]) -> None:
        self._rows = rows

    def __call__(self, name: str, layer: Any, params: Any, /, *args: Any, **options: Any) -> Any:
        result = layer(params, *args, **options)
        row = self._rows[name]
        return jax.tree.map(
            lambda leaf: _mark.bind(leaf, row=row) if isinstance(leaf, jax.Array) else leaf, result
        )


def jax_flow(run: Callable[[Any, Any], Any], sites: Sequence[str], example: Any) -> Flow:
    """How data flows between the sites of a host.

    Args:
        run: `run(site, x)` calls the host, whose layers call `site(name, layer, params, x, ...)`.
        sites: all names, by row.
        example: what `x` is like: arrays or their shapes.
    """
    site = _Marking({name: row for row, name in enumerate(sites)})
    closed = jax.make_jaxpr(lambda x: run(site, x))(example)
    walk = _Walk()
    walk.labels(closed.jaxpr, [_NONE] * len(closed.jaxpr.invars))
    return Flow(tuple(walk.order), frozenset(walk.edges))


class _Walk:
    """What the marks that were met so far say."""

    def __init__(self) -> None:
        self.order: dict[int, None] = {}
        self.edges: set[tuple[int, int]] = set()

    def labels(self, jaxpr: Jaxpr, given: Sequence[Labels]) -> list[Labels]:
        """Of a program's results, from those of its arguments."""
        known: dict[Any, Labels] = dict(zip(jaxpr.invars, given, strict=True))

        def of(variable: Any) -> Labels:
            return _NONE if isinstance(variable, Literal) else known.get(variable, _NONE)

        for equation in jaxpr.eqns:
            found = self._results(equation, [of(own) for own in equation.invars])
            known.update(zip(equation.outvars, found, strict=True))
        return [of(variable) for variable in jaxpr.outvars]

    def _results(self, equation: Any, given: list[Labels]) -> list[Labels]:
        if equation.primitive is _mark:
            row = equation.params["row"]
            self.order.setdefault(row)
            self.edges |= {(sender, row) for sender in given[0]}
            return [frozenset({row})]
        parts = [part for value in equation.params.values() for part in _programs(value)]
        if not parts:
            return [_union(given)] * len(equation.outvars)
        kind = equation.primitive.name
        if kind == "scan":
            return self._scan(equation, parts[0], given)
        if kind == "cond":
            return self._cond(parts, given)
        if len(parts) == 1 and _is_call(parts[0], equation):
            return self.labels(parts[0], given)
        return self._loop(equation, parts, given)

    def _scan(self, equation: Any, body: Jaxpr, given: list[Labels]) -> list[Labels]:
        consts, carried = equation.params["num_consts"], equation.params["num_carry"]
        given = list(given)
        while True:
            found = self.labels(body, given)
            carry = [own | found[i] for i, own in enumerate(given[consts : consts + carried])]
            if carry == given[consts : consts + carried]:
                return found
            given[consts : consts + carried] = carry

    def _cond(self, branches: Sequence[Jaxpr], given: list[Labels]) -> list[Labels]:
        # Which branch it is, decides over all results.
        results = [self.labels(branch, given[1:]) for branch in branches]
        return [_union([given[0], *own]) for own in zip(*results, strict=True)]

    def _loop(self, equation: Any, parts: Sequence[Jaxpr], given: list[Labels]) -> list[Labels]:
        """Of `while`, and of operations that are not known: anything may come of anything."""
        everything = _union(given)
        while True:
            found = [
                label
                for part in parts
                for label in self.labels(part, [everything] * len(part.invars))
            ]
            more = _union([everything, *found])
            if more == everything:
                return [everything] * len(equation.outvars)
            everything = more


def _is_call(part: Jaxpr, equation: Any) -> bool:
    """Whether an operation runs a program once, on its own arguments."""
    return (
        equation.primitive.name != "while"
        and len(part.invars) == len(equation.invars)
        and len(part.outvars) == len(equation.outvars)
    )


def _programs(value: Any) -> list[Jaxpr]:
    if isinstance(value, ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, Jaxpr):
        return [value]
    if isinstance(value, tuple | list):
        return [part for own in value for part in _programs(own)]
    return []


def _union(labels: Iterable[Labels]) -> Labels:
    return frozenset().union(*labels)
