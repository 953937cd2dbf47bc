"""Controllers in the gym: the very objects that decide in runs, shown what they are shown there."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from esper.errors import InputError
from esper.tamiyo import Action, Controller, Cost, Decision, Observation, Probe, Worth
from esper.tamiyo.gym._environment import Environment
from esper.tamiyo.gym._host import count
from esper.tamiyo.gym._state import State
from esper.tamiyo.policy._choice import ALPHAS, Choice, Kind
from esper.tezzeret import load_blueprint
from esper.urza import KernelRecord
from esper_functional import SeedState

_KINDS = {
    Action.GRAFT: Kind.GRAFT,
    Action.UNLOAD: Kind.UNLOAD,
    Action.FOSSILIZE: Kind.FOSSILIZE,
    Action.RETARGET: Kind.RETARGET,
}
"""RESET is not among them: an environment empties seeds that have failed by itself."""


class Played(NamedTuple):
    """Episodes that were played to their end, `[episodes]` each."""

    returned: np.ndarray
    """Sum of rewards."""
    loss: np.ndarray
    """Validation loss in the end."""
    twin_loss: np.ndarray
    validation_accuracy: np.ndarray
    flops: np.ndarray
    """Of a forward pass in the end, over the host's."""
    family: np.ndarray
    """Index into the environment's families."""
    grafts: np.ndarray
    """How many were made."""


Choosing = Callable[[int, State], Sequence[Choice]]
"""What to do at a boundary: choices in all environments `[episodes]`, applied in their order."""


def play(
    environment: Environment,
    key: jax.Array,
    episodes: int,
    choosing: Choosing,
    *,
    each_family: bool = False,
) -> Played:
    """Play whole episodes at once; those of one key are the same whoever plays them.

    Args:
        episodes: how many, from 1.
        choosing: asked at each boundary but the first, as controllers are in runs.
        each_family: whether to play so many of each of the environment's families, rather than
            of families that are drawn.
    """
    reset, act, advance = _programs(environment)
    families = np.arange(len(environment.families))
    if each_family:
        episodes *= len(families)
        family = np.resize(families, episodes).astype(np.int32)
        state = reset(jax.random.split(key, episodes), family)
    else:
        state = reset(jax.random.split(key, episodes), None)
    grafts, info = np.zeros(episodes, np.int64), dict[str, Any]()
    for boundary in range(environment.boundaries):
        if boundary:
            for choice in choosing(boundary, state):
                changed = act(state, choice)
                made = np.asarray(changed.row != state.row) & np.asarray(changed.row >= 0)
                grafts += made.reshape(episodes, -1).any(axis=1)
                state = changed
        state, info = advance(state)
    named = {name: np.asarray(info[name]) for name in Played._fields if name in info}
    return Played(**named, grafts=grafts)


_PROGRAMS: dict[Environment, Any] = {}


def _programs(environment: Environment) -> Any:
    """Compiled once for each environment."""
    if environment not in _PROGRAMS:

        def advance(state: State) -> tuple[State, dict[str, Any]]:
            after, _, info = environment.advance(state)
            return after, info

        _PROGRAMS[environment] = (
            jax.jit(jax.vmap(lambda key, family: environment.reset(key, family)[0])),
            jax.jit(jax.vmap(environment.act)),
            jax.jit(jax.vmap(advance)),
        )
    return _PROGRAMS[environment]


def waiting(boundary: int, state: State) -> Sequence[Choice]:
    """Never grow."""
    return ()


class Controlled:
    """Controllers, one for each environment, as a `Choosing`.

    Args:
        make: a new controller, by the number of its environment.
        seed: of the random numbers that controllers are given.
    """

    def __init__(
        self, environment: Environment, make: Callable[[int], Controller], seed: int = 0
    ) -> None:
        self._environment = environment
        self._make = make
        self._seed = seed
        self._controllers: list[Controller] = []

    def __call__(self, boundary: int, state: State) -> Sequence[Choice]:
        """See `Choosing`."""
        here: State = jax.tree.map(np.asarray, _plain(state))
        episodes = len(here.boundary)
        if len(self._controllers) != episodes:
            self._controllers = [self._make(i) for i in range(episodes)]
        wanted: list[list[Choice]] = []
        for i, controller in enumerate(self._controllers):
            one: State = jax.tree.map(lambda leaf, i=i: leaf[i], here)
            random = np.random.default_rng([self._seed, i, boundary])
            seen = observe(self._environment, one, random)
            decisions = [d for d in controller.decide(seen) if d.action in _KINDS]
            controller.told(seen, decisions, [])
            wanted.append([self._choice(own) for own in decisions])
        most = max(map(len, wanted), default=0)
        still = Choice(0, 0, 0, 0, 0)
        return [
            Choice(
                *(
                    jnp.asarray(column, jnp.int32)
                    for column in zip(
                        *(own[k] if k < len(own) else still for own in wanted), strict=True
                    )
                )
            )
            for k in range(most)
        ]

    def _choice(self, decision: Decision) -> Choice:
        alpha = int(np.argmin([abs(decision.alpha - own) for own in ALPHAS]))
        ids = self._environment.world.table.ids
        kernel = ids.index(decision.kernel_id) if decision.kernel_id else 0
        return Choice(_KINDS[decision.action], decision.layer, decision.seed, kernel, alpha)


def _plain(state: State) -> State:
    """Without keys, which numpy does not know."""
    episode = state.episode._replace(key=state.boundary)
    return state._replace(key=state.boundary, episode=episode)


def observe(environment: Environment, state: State, random: np.random.Generator) -> Observation:
    """What a controller is shown of one environment, whose arrays are numpy's."""
    readings, seeds = state.readings, state.growing.seeds
    depth = int(state.episode.shape.depth)
    host = _cost(environment, state)
    parameters, flops = float(readings.parameters), float(readings.flops)

    def worth(layer: int, seed: int) -> Worth:
        value = float(readings.worth[layer, seed])
        half = float(readings.worth_half[layer, seed])
        return Worth(value, value - half, value + half)

    return Observation(
        step=int(state.boundary) * environment.steps,
        steps=environment.boundaries * environment.steps,
        train_loss=float(readings.train_loss[0]),
        validation_loss=float(readings.validation_loss[0]),
        validation_accuracy=float(readings.validation_accuracy),
        seeds=SeedState(**{k: np.asarray(v)[:depth] for k, v in vars(seeds).items()}),
        sites=environment.world.sites[:depth],
        candidates={row: _records(environment, state, row) for row in range(depth)},
        host=host,
        now=Cost(round(host.parameters * parameters), host.flops * flops),
        rollbacks=(),
        worth=worth,
        probe=_no_probe,
        random=random,
    )


def _cost(environment: Environment, state: State) -> Cost:
    shape = jax.tree.map(int, state.episode.shape)
    own = count(jax.tree.map(jnp.asarray, shape), environment.depth, environment.nodes)
    return Cost(int(own.sizes[:, 0].sum()), float(own.flops.sum()))


def _records(environment: Environment, state: State, row: int) -> list[KernelRecord]:
    table, shape = environment.world.table, state.episode.shape
    width = int(shape.width)
    inputs = int(shape.inputs) if row == 0 else width
    at = inputs - 1, width - 1
    return [
        KernelRecord(
            kernel_id=table.ids[kernel],
            recipe="0" * 64,
            blueprint=offer.blueprint,
            signature=f"{inputs}->{width} float32",
            birth=_blueprint(offer.blueprint).birth,
            confidence=_blueprint(offer.blueprint).confidence,
            init_seed=0,
            parameter_count=int(table.parameters[kernel][at]),
            flops=int(table.flops[kernel][at]),
            size_bytes=4 * int(table.parameters[kernel][at]),
        )
        for kernel, offer in enumerate(table.offers)
    ]


_blueprint = cache(load_blueprint)
"""Asked for every kernel, layer and environment at each boundary."""


def _no_probe(layer: int) -> Probe:
    raise InputError(
        "networks of the gym are not probed: give the controller a trigger that looks at losses,"
        " such as plateau, schedule or random"
    )
