"""From what controllers are shown to what policies see: the readings of a run."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from esper.errors import InputError
from esper.tamiyo._check import require
from esper.tamiyo._controller import Action, Decision, Observation, Worth
from esper.tamiyo._offers import FindBlueprint, Offers, built_in_blueprint
from esper.tamiyo._past import Past
from esper.tamiyo._places import Place
from esper.tamiyo.graph import FOLLOWED, KERNEL, KINDS, Edges, Readings, Topology, pad_topology
from esper.urza import KernelRecord
from esper_functional import SeedLifecycleState


class ReadingsRecorder:
    """Turns the observations of a run, boundary by boundary, into `Readings`.

    Rows are filled up to buckets, so that models of about one size share a program. The worths of
    all kernels that run are measured in one batched pass.

    Args:
        offset: where to begin among kernels of one description, from 0, so that runs of other
            seeds meet other ones.
        find: the blueprints of kernels; by default those that ship with Esper, by name.
    """

    def __init__(self, *, offset: int = 0, find: FindBlueprint = built_in_blueprint) -> None:
        require("offset", offset, 0, whole=True)
        self._offset = offset
        self._find = find
        self._past = Past()
        self._grafts = 0
        self._offers: tuple[Any, Offers] | None = None
        self._known: _Known | None = None

    def read(self, observation: Observation) -> Readings:
        """The readings of a boundary, in numpy; to be asked at each of them, in order.

        Raises:
            InputError: for an observation without a topology.
        """
        known, offers = self._known_of(observation), self._offered(observation)
        state, seen = observation.seeds, self._past.see(observation)
        nodes = len(known.edges.there)
        worth, half = _worths(observation, np.argwhere(seen.judged))
        norms = None if observation.norms is None else observation.norms()
        nowhere = np.full(len(known.topology.nodes), np.nan, np.float32)
        layers = [layer for layer, records in observation.candidates.items() if records]
        grows = np.zeros(nodes, np.bool_)
        grows[layers] = True
        follows = np.full((len(nowhere), len(FOLLOWED)), np.nan, np.float32)
        if observation.follows is not None and layers:
            follows = observation.follows(layers)
        spread = observation.loss_spread

        def rows(values: Any, filling: float = 0.0) -> np.ndarray:
            own = np.asarray(values)
            padded = np.full((nodes, *own.shape[1:]), filling, own.dtype)
            padded[: len(own)] = own
            return padded

        return Readings(
            progress=np.float32(observation.step / observation.steps),
            train_loss=seen.train_loss,
            validation_loss=seen.validation_loss,
            validation_accuracy=np.float32(observation.validation_accuracy),
            first_loss=np.float32(seen.first_loss),
            loss_spread=np.float32(spread if np.isfinite(spread) else 0.0),
            rollbacks=np.float32(len(observation.rollbacks)),
            parameters=_over(observation.now.parameters, observation.host.parameters),
            flops=_over(observation.now.flops, observation.host.flops),
            kind=known.kind,
            sizes=known.sizes,
            depth=known.depth,
            grows=grows,
            gradient_norm=rows(nowhere if norms is None else norms.gradient),
            weight_norm=rows(nowhere if norms is None else norms.weight),
            follows=rows(follows, np.nan),
            stage=rows(np.asarray(state.stage).astype(np.uint8)),
            alpha=rows(np.asarray(state.alpha).astype(np.float32)),
            health=rows(seen.health, np.nan),
            health_before=rows(seen.health_before, np.nan),
            worth=rows(worth, np.nan),
            worth_half=rows(half, np.nan),
            age=rows(seen.age),
            held=rows(_held(observation, offers)),
            kernels=offers.described,
            fits=rows(offers.fits),
        )

    def edges(self, observation: Observation) -> Edges:
        """The edges of the model graph, filled up to the readings' rows."""
        return self._known_of(observation).edges

    def kernel(self, observation: Observation, row: int, layer: int) -> KernelRecord:
        """Which kernel a graft of a row of `Readings.kernels` takes in a layer.

        Those of one description are taken in turn, one further with each graft.

        Raises:
            KeyError: where none of the row fits the layer.
        """
        return self._offered(observation).kernel(row, layer, self._offset + self._grafts)

    def told(self, applied: Sequence[Decision]) -> None:
        """Take note of decisions that were applied."""
        self._grafts += sum(decision.action is Action.GRAFT for decision in applied)

    def state(self) -> dict[str, Any]:
        """Everything it remembers, as JSON values."""
        return {"past": self._past.state(), "grafts": self._grafts}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Remember what `state` returned."""
        self._past.restore(state["past"])
        self._grafts = int(state["grafts"])

    def _offered(self, observation: Observation) -> Offers:
        # The trainer shows the same mapping at every boundary.
        if self._offers is None or self._offers[0] is not observation.candidates:
            offers = Offers(observation.candidates, observation.host, self._find)
            self._offers = (observation.candidates, offers)
        return self._offers[1]

    def _known_of(self, observation: Observation) -> "_Known":
        if observation.topology is None:
            raise InputError(
                "an observation came without the model's topology, which a policy needs: expected"
                " `topology` to give it, as the trainer's observations do"
            )
        topology = observation.topology()
        if self._known is None or self._known.topology is not topology:
            self._known = _Known(topology)
        return self._known


class _Known:
    """What grafts do not change."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self.edges = pad_topology(topology)
        count, nodes = len(self.edges.there), topology.nodes
        self.kind = np.zeros(count, np.int32)
        self.kind[: len(nodes)] = [KINDS.index(node.kind) for node in nodes]
        self.sizes: Float[np.ndarray, "nodes 3"] = np.zeros((count, 3), np.float32)
        self.sizes[: len(nodes)] = [
            (node.parameters, _elements(node.inputs), _elements(node.outputs)) for node in nodes
        ]
        self.depth = np.zeros(count, np.float32)
        self.depth[: len(nodes)] = topology.depths


def _elements(shape: Sequence[int]) -> int:
    """How many; 0 where the shape is not known."""
    return math.prod(shape) if shape else 0


def _held(observation: Observation, offers: Offers) -> np.ndarray:
    seeds = observation.seeds
    stage, words = np.asarray(seeds.stage), np.asarray(seeds.kernel_id)
    found = np.zeros((*stage.shape, KERNEL), np.float32)
    there = stage != int(SeedLifecycleState.DORMANT)
    found[there] = offers.held(words[there])
    return found


def _over(value: float, host: float) -> np.float32:
    return np.float32(value / max(1.0, host))


def _worths(observation: Observation, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Worths and half the widths of their intervals, f32 `[sites, seeds]`; NaN elsewhere."""
    shape = np.asarray(observation.seeds.stage).shape
    worth, half = (np.full(shape, np.nan, np.float32) for _ in range(2))
    if len(places):
        layers, seeds = places.T
        own: list[Place] = list(zip(layers.tolist(), seeds.tolist(), strict=True))
        found: Mapping[Place, Worth]
        if observation.worths is None:
            found = {place: observation.worth(*place) for place in own}
        else:
            found = observation.worths(own)
        numbers = itertools.chain.from_iterable(found[place] for place in own)
        values = np.fromiter(numbers, np.float64, 3 * len(own)).reshape(-1, 3)
        worth[layers, seeds] = values[:, 0]
        with np.errstate(invalid="ignore"):  # of infinite ends
            half[layers, seeds] = (values[:, 2] - values[:, 1]) / 2.0
    return worth, half
