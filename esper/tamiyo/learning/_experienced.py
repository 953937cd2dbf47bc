"""From what came of a decision, as a service tells it, to a step that a policy learns from."""

from enum import StrEnum
from typing import Any, NamedTuple

import jax
import numpy as np

from esper.errors import InputError
from esper.tamiyo._controller import Action, Decision
from esper.tamiyo.graph import Edges, Legal, ModelGraph, model_graph
from esper.tamiyo.learning._replay import Transition
from esper.tamiyo.policy import ALPHAS, Choice, Kind
from esper.tamiyo.service import HEALTH, Experience, News, Report
from esper.tamiyo.service._readings import edges_of, readings_of

Shape = tuple[int, ...]
"""Nodes, slots, edges in the list, seeds, kernels: what decides over the program."""

_KINDS = {
    Action.GRAFT: Kind.GRAFT,
    Action.UNLOAD: Kind.UNLOAD,
    Action.FOSSILIZE: Kind.FOSSILIZE,
    Action.RETARGET: Kind.RETARGET,
}
_WAIT = Choice(*(np.int32(0) for _ in Choice._fields))
_FULL = 1.0
"""The alpha that a policy's grafts run to."""


class Refusal(StrEnum):
    """Why an experience teaches nothing."""

    SEVERAL = "several"
    """More than one thing was done, and a policy chooses one."""
    UNCHOOSABLE = "unchoosable"
    """What was done is no choice of a policy: RESET, or an alpha that is none of `ALPHAS`."""
    NOT_OFFERED = "not_offered"
    """The kernel was not offered at that site."""
    ILLEGAL = "illegal"
    """What was done is not legal in the report before."""
    NOT_FINITE = "not_finite"
    """The reward is not."""
    RESHAPED = "reshaped"
    """The report after is of another bucket, since more kernels are offered."""
    UNREADABLE = "unreadable"
    """Kernels are described by another number of numbers than policies here read."""
    CROWDED = "crowded"
    """There are as many buckets as may be, and it is of another one."""
    TOO_LARGE = "too_large"
    """A store of its bucket would hold too few."""
    LOST = "lost"
    """It waited for too long."""


class Experienced(NamedTuple):
    """What one experience teaches."""

    shape: Shape
    transition: Transition
    """numpy."""


def experienced(experience: Experience) -> Experienced | Refusal:
    """One boundary as a step from graph to graph.

    Graphs are those that `PolicyAdvisor` makes of reports, but for health that was heard between
    them. The step is the last one where the report after is at the end of the run.
    """
    if not np.isfinite(experience.reward):
        return Refusal.NOT_FINITE
    if len(experience.decisions) > 1:
        return Refusal.SEVERAL
    try:
        shape, graph = _seen(experience.model, experience.before)
        shape_after, graph_after = _seen(experience.model, experience.after)
    except InputError:
        return Refusal.UNREADABLE
    choice = _WAIT
    if experience.decisions:
        found = _choice(experience.decisions[0], experience.before, graph.legal)
        if isinstance(found, Refusal):
            return found
        choice = found
    if shape != shape_after:
        return Refusal.RESHAPED
    ended = experience.after.data.step >= experience.after.data.steps
    reward = np.float32(experience.reward)
    return Experienced(shape, Transition(graph, choice, reward, np.bool_(ended), graph_after))


def blank_transition(columns: list[np.ndarray]) -> Transition:
    """A transition of zeros whose leaves are as the rows of `columns`, as stores keep them."""
    leaves = [np.zeros(own.shape[1:], own.dtype) for own in columns]
    return jax.tree.unflatten(_structure(), leaves)


def _structure() -> Any:
    def graph() -> ModelGraph:
        edges, legal = Edges(*map(_number, Edges._fields)), Legal(*map(_number, Legal._fields))
        return ModelGraph(0, 0, 0, 0, edges, legal)

    return jax.tree.structure(Transition(graph(), _WAIT, 0, 0, graph()))


def _number(_: str) -> Any:
    return 0


def _seen(model: str, report: Report) -> tuple[Shape, ModelGraph]:
    news = News(model, (report,), np.zeros(0, HEALTH))
    edges = edges_of(report)
    readings = readings_of(news, len(edges.there))
    # Logarithms of what is not known are replaced; jax would say nothing of them.
    with np.errstate(all="ignore"):
        graph = model_graph(readings, edges, np)
    shape = *edges.bucket, report.data.seeds, len(readings.kernels)
    return shape, jax.tree.map(_single, graph)


def _single(leaf: Any) -> np.ndarray:
    array = np.asarray(leaf)
    return array.astype(np.float32) if array.dtype == np.float64 else array


def _choice(decision: Decision, before: Report, legal: Legal) -> Choice | Refusal:
    kind = _KINDS.get(decision.action)
    if kind is None:
        return Refusal.UNCHOOSABLE
    node, seed, kernel, alpha = decision.layer, decision.seed, 0, 0
    if kind is Kind.RETARGET:
        if decision.alpha not in ALPHAS:
            return Refusal.UNCHOOSABLE
        alpha = ALPHAS.index(decision.alpha)
    if kind is Kind.GRAFT:
        if decision.alpha != _FULL:
            return Refusal.UNCHOOSABLE
        offered = [
            None if own is None else before.data.kernel_ids[own] for own in before.data.fits[node]
        ]
        if decision.kernel_id not in offered:
            return Refusal.NOT_OFFERED
        kernel = offered.index(decision.kernel_id)
        if not legal.graft[node, kernel] or int(legal.free[node]) != seed:
            return Refusal.ILLEGAL
        seed = 0
    elif not legal.unload[node, seed]:
        # What is done to a kernel is legal where one is ACTIVE, whatever it is.
        return Refusal.ILLEGAL
    return Choice(*(np.int32(own) for own in (kind, node, seed, kernel, alpha)))
