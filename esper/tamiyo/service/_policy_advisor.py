"""An advisor by a policy over model graphs: one forward pass for many models."""

import functools
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esper.tamiyo._controller import Action, Decision, Worth
from esper.tamiyo._places import resets
from esper.tamiyo.graph import Edges, ModelGraph, Readings, model_graph
from esper.tamiyo.policy import ALPHAS, Advice, Kind, LoadedPolicy
from esper.tamiyo.service._advisor import News
from esper.tamiyo.service._readings import edges_of, readings_of

_GROWTH = 4
"""Models in one program: 1, 4, 16, and so on, the rest of which are filled up."""

_ACTIONS = {
    Kind.GRAFT: Action.GRAFT,
    Kind.UNLOAD: Action.UNLOAD,
    Kind.FOSSILIZE: Action.FOSSILIZE,
    Kind.RETARGET: Action.RETARGET,
}


class PolicyAdvisor:
    """Asks for what a policy advises, and for seeds in ERROR_RECOVERY to be emptied.

    Models whose graphs have one bucket are stacked, and decided upon by one program. There is a
    program for each bucket and for 1, 4, 16, 64, … models in it, so that models that come and go
    compile nothing. The first decision about a bucket waits for its program, or, where it is
    compiled aside, is made once it is there, and others are made meanwhile.

    A model is asked about once for each of its reports: a policy makes one choice at a boundary.

    Args:
        policy: what advises. It may be exchanged for another one of the same structure.
        compile_aside: compile programs in a thread.
    """

    def __init__(self, policy: LoadedPolicy, *, compile_aside: bool = False) -> None:
        self.policy = policy
        self._thread = ThreadPoolExecutor(1, "esper-compile") if compile_aside else None
        self._programs: dict[Any, Future[None]] = {}

    def exchange(self, policy: LoadedPolicy) -> None:
        """Ask this policy from the next advice on.

        Weights are arguments of all programs, so one of the same structure compiles nothing.
        """
        self.policy = policy

    def advise(self, news: Sequence[News]) -> list[list[Decision] | None]:
        """See `Advisor.advise`.

        Raises:
            InputError: for a report of which kernels are described by another number of numbers.
        """
        asked: list[list[Decision] | None] = [resets(own.observation) for own in news]
        groups: dict[Any, list[tuple[int, Readings, Edges]]] = {}
        for at, own in enumerate(news):
            if own.fresh:
                edges = edges_of(own.report)
                readings = readings_of(own, len(edges.there))
                shape = edges.bucket, own.report.data.seeds, len(readings.kernels)
                groups.setdefault(shape, []).append((at, readings, edges))
        for shape, group in groups.items():
            if not self._is_ready(shape, group):
                for at, _, _ in group:
                    asked[at] = None
                continue
            graphs = _stacked(group)
            advice = self.policy.decide_many(graphs)
            for row, (at, _, _) in enumerate(group):
                chosen = _decisions(news[at], advice[row], graphs.legal.free[row])
                asked[at] = [*(asked[at] or ()), *chosen]
        return asked

    def _is_ready(self, shape: Any, group: Sequence[tuple[int, Readings, Edges]]) -> bool:
        """Whether nothing has to be compiled for a group, or somebody has the time to wait."""
        if self._thread is None:
            return True
        key = shape, _count(group)
        if key not in self._programs:
            self._programs[key] = self._thread.submit(self.policy.compile, _stacked(group))
        # One that failed says why where it is used.
        return self._programs[key].done()


def _count(group: Sequence[Any]) -> int:
    count = 1
    while count < len(group):
        count *= _GROWTH
    return count


def _stacked(group: Sequence[tuple[int, Readings, Edges]]) -> ModelGraph:
    """The graphs of models of one bucket, and graphs without a site in the rows beyond."""
    count = _count(group)

    def stack(*leaves: np.ndarray) -> np.ndarray:
        stacked = np.zeros((count, *np.shape(leaves[0])), np.asarray(leaves[0]).dtype)
        stacked[: len(leaves)] = np.stack(leaves)
        return stacked

    readings = jax.tree.map(stack, *(own for _, own, _ in group))
    edges = jax.tree.map(stack, *(own for _, _, own in group))
    return jax.tree.map(np.asarray, _graphs(readings, edges))


@jax.jit
def _graphs(readings: Readings, edges: Edges) -> ModelGraph:
    return jax.vmap(functools.partial(model_graph, xp=jnp))(readings, edges)


def _decisions(news: News, advice: Advice, free: np.ndarray) -> list[Decision]:
    choice, data = advice.choice, news.report.data
    if choice.kind == Kind.WAIT:
        return []
    kind, seed, kernel, alpha = Kind(choice.kind), int(choice.seed), "", 1.0
    if kind is Kind.GRAFT:
        index = data.fits[choice.node][choice.kernel]
        assert index is not None, "what does not fit is masked"
        seed, kernel = int(free[choice.node]), data.kernel_ids[index]
    elif kind is Kind.RETARGET:
        alpha = ALPHAS[choice.alpha]
    moved = ", ".join(name for name, _ in advice.reasons)
    return [
        Decision(
            _ACTIONS[kind],
            int(choice.node),
            seed,
            f"an effect of {advice.effect[0]:.3g} is expected, most of all for {moved}",
            kernel,
            alpha=alpha,
            confidence=min(1.0, max(0.0, advice.confidence)),
            uncertainty=advice.epistemic,
            effect=Worth(*advice.effect),
            features=advice.reasons,
        )
    ]
