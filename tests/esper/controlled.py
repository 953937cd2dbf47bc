"""What controllers, triggers and safety are shown in tests: observations, and a world of seeds."""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from esper.tamiyo import Action, Cost, Decision, Observation, Probe, Veto, Worth
from esper.tamiyo.graph import Flow, Node, Topology, make_topology
from esper.urza import KernelRecord
from esper_functional import (
    Event,
    EventKind,
    SeedLifecycleState,
    SeedState,
    apply_event,
    init_seeds,
)

SITES = ("layers.0", "layers.1", "layers.2")
DECIDE_EVERY = 50
HOST = Cost(100, 200.0)


def record(
    name: str, blueprint: str = "low_rank", parameters: int = 1, flops: int = 1
) -> KernelRecord:
    kernel_id = hashlib.sha256(name.encode()).hexdigest()
    return KernelRecord(
        kernel_id=kernel_id,
        recipe="0" * 64,
        blueprint=blueprint,
        signature="2->8 float32",
        birth="zero",
        confidence=0.5,
        init_seed=0,
        parameter_count=parameters,
        flops=flops,
        size_bytes=1,
    )


A, B, C = record("a"), record("b"), record("c")
OTHER = record("other", "mlp")


def worthless(layer: int, seed: int) -> Worth:
    return Worth(0.0, 0.0, 0.0)


def no_probe(layer: int) -> Probe:
    raise AssertionError(f"layer {layer} was probed, and nobody should have")


@functools.cache
def chain(sites: tuple[str, ...]) -> Topology:
    """Each site feeds the next."""
    nodes = [Node(site, "linear", (8,), (8,), 72) for site in sites]
    edges = frozenset((row, row + 1) for row in range(len(sites) - 1))
    return make_topology(nodes, Flow(tuple(range(len(sites))), edges))


def observe(
    step: int,
    train: float = 1.0,
    validation: float = 1.0,
    *,
    seeds: SeedState | None = None,
    candidates: Mapping[int, Sequence[KernelRecord]] | None = None,
    worth: Worth | Callable[[int, int], Worth] = worthless,
    probe: Callable[[int], Probe] = no_probe,
    host: Cost = HOST,
    now: Cost | None = None,
    rollbacks: Sequence[int] = (),
    run: int = 0,
) -> Observation:
    seeds = init_seeds(1, 2) if seeds is None else seeds
    return Observation(
        step=step,
        steps=10_000,
        train_loss=train,
        validation_loss=validation,
        validation_accuracy=0.5,
        seeds=seeds,
        sites=SITES[: seeds.shape[0]],
        candidates={0: [A, B, C]} if candidates is None else candidates,
        host=host,
        now=host if now is None else now,
        rollbacks=rollbacks,
        worth=worth if callable(worth) else lambda *_: worth,
        probe=probe,
        random=np.random.default_rng([run, step]),
        topology=lambda: chain(SITES[: seeds.shape[0]]),
    )


def hold(
    *places: tuple[int, int],
    kernel: KernelRecord = A,
    shape: tuple[int, int] = (1, 2),
    seeds: SeedState | None = None,
    step: int = 1,
) -> SeedState:
    """Seeds with ACTIVE kernels in `places`."""
    state = init_seeds(*shape) if seeds is None else seeds
    for place in places:
        state = apply_event(state, Event(step, *place, EventKind.LOAD, kernel.kernel_id))
        state = apply_event(state, Event(step, *place, EventKind.ACTIVATE, kernel.kernel_id, 0.0))
    return state


EVENTS = {
    Action.GRAFT: EventKind.LOAD,
    Action.FOSSILIZE: EventKind.FOSSILIZE,
    Action.UNLOAD: EventKind.UNLOAD,
    Action.RESET: EventKind.RESET,
    Action.RETARGET: EventKind.RAMP,
}


class World:
    """A run without a network: seeds that obey decisions, fail, and are taken back."""

    def __init__(self, shape: tuple[int, int], candidates: Mapping[int, Sequence[KernelRecord]]):
        self.seeds = init_seeds(*shape)
        self.candidates = candidates
        self.step = 0
        self.rollbacks: list[int] = []
        self._before: dict[int, SeedState] = {}
        """What the seeds were just before each boundary."""

    def observe(self, train: float = 1.0, validation: float = 1.0, **more) -> Observation:
        self._before[self.step] = self.seeds
        return observe(
            self.step,
            train,
            validation,
            seeds=self.seeds,
            candidates=self.candidates,
            rollbacks=tuple(self.rollbacks),
            **more,
        )

    def obey(self, decisions: Sequence[Decision]) -> None:
        """Change the seeds, by events that raise for what the lifecycle does not allow."""
        for decision in decisions:
            value = decision.alpha if decision.action is Action.RETARGET else 0.0
            event = Event(
                self.step,
                decision.layer,
                decision.seed,
                EVENTS[decision.action],
                decision.kernel_id,
                value,
                span=10 if decision.action is Action.RETARGET else 0,
            )
            self.seeds = apply_event(self.seeds, event)

    def happen(self, stage: SeedLifecycleState, kind: EventKind, value: float = 0.0) -> bool:
        """Something happens to the first seed of a stage, if there is one."""
        for layer, seed in np.argwhere(self.seeds.stage == stage):
            event = Event(self.step, int(layer), int(seed), kind, value=value)
            self.seeds = apply_event(self.seeds, event)
            return True
        return False

    def activate(self) -> None:
        while self.happen(SeedLifecycleState.LOADING, EventKind.ACTIVATE):
            pass

    def go_on(self) -> None:
        self.step += DECIDE_EVERY

    def go_back(self, boundaries: int) -> None:
        """Take the run back: what was done at that boundary and since is undone."""
        to = max(self.step - boundaries * DECIDE_EVERY, 0)
        if to in self._before:
            self.rollbacks.append(self.step)
            self.step, self.seeds = to, self._before[to]


def boundary(controller, observation: Observation, vetoes: Sequence[int] = ()) -> list[Decision]:
    """One boundary: the decisions, of which those at `vetoes` are refused and the others done."""
    decisions = controller.decide(observation)
    refused = [
        Veto(d, "test", "because the test says so")
        for index, d in enumerate(decisions)
        if index in vetoes
    ]
    applied = [d for index, d in enumerate(decisions) if index not in vetoes]
    controller.told(observation, applied, refused)
    return applied
