"""Thousands of growing networks at once, as an environment: pure `reset` and `step`.

One step is a choice and then some optimiser steps of a host with seeds in the dynamic mode, all in
one program that `jax.vmap` maps over environments: over tasks, shapes of hosts, learning rates and
seeds of randomness. Each environment trains a twin beside it, the same host on the same batches, in
which nothing is ever grafted; rewards are what was earned beyond it.
"""

import dataclasses
import math
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esper.errors import InputError
from esper.tamiyo._check import require
from esper.tamiyo.graph import (
    Edges,
    ModelGraph,
    bucket,
    legal_choices,
    model_graph,
)
from esper.tamiyo.gym._families import FAMILIES, TRAINING, draw_examples
from esper.tamiyo.gym._growing import PARTS, Data, Growing, World, norms
from esper.tamiyo.gym._host import WIDTH, Shape, edges_by_depth
from esper.tamiyo.gym._kernels import KernelTable, Offered
from esper.tamiyo.gym._reward import (
    Reward,
    measurements,
    of_host,
    potentials,
    spread_of,
    step_reward,
)
from esper.tamiyo.gym._sight import Sight
from esper.tamiyo.gym._state import Episode, State, Step
from esper.tamiyo.policy._choice import ALPHAS, Choice, Kind
from esper_functional import (
    SeedLifecycleState,
    SeedState,
    init_seeds,
    start_ramp,
    transition,
)

OFFERS = (
    Offered("residual_mlp", 4),
    Offered("residual_mlp", 16),
    Offered("low_rank", 2),
    Offered("bottleneck", 4),
)
"""Kernels of the gym that policies are trained in."""


@dataclasses.dataclass(frozen=True)
class Environment:
    """The rules; static, and the same for all environments under one `jax.vmap`.

    Raises:
        InputError: for values out of range, and for unknown families.
    """

    families: tuple[str, ...] = TRAINING
    """Of `FAMILIES`; each reset draws one."""
    offers: tuple[Offered, ...] = OFFERS
    depth: int = 2
    """Hidden layers of the deepest hosts, 1 to 4."""
    widths: tuple[int, ...] = (2, 3, 4, 6, 8)
    """Units of hidden layers, 1 to 8; each reset draws one."""
    seeds: int = 2
    """Of each layer, from 1."""
    boundaries: int = 20
    """Steps of an episode, from 1."""
    steps: int = 40
    """Of the optimiser, in each of them, from 1."""
    ramp: int = 80
    """Optimiser steps over which alpha goes to its target, from 1."""
    batch: int = 32
    """Examples of an optimiser step, from 1."""
    examples: int = 512
    """To train on, from 1."""
    validation: int = 256
    """Examples to validate on: a multiple of 8."""
    rates: tuple[float, float] = (5e-3, 2e-2)
    """Lowest and highest learning rate; each reset draws one, its logarithm uniformly."""
    octaves: float = 10.0
    """Sizes are told larger by up to 2 to this, from 0."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.families if name not in FAMILIES]
        if unknown or not self.families:
            what = f"unknown family {unknown[0]!r}" if unknown else "no family is named"
            raise InputError(f"{what}: expected some of {', '.join(FAMILIES)}")
        require("depth of an environment", self.depth, 1, 4, whole=True)
        for width in self.widths:
            require("widths of an environment", width, 1, WIDTH, whole=True)
        for name in ("seeds", "boundaries", "steps", "ramp", "batch", "examples"):
            require(f"{name} of an environment", getattr(self, name), 1, whole=True)
        require("octaves of an environment", self.octaves, 0, 40)
        low, high = self.rates if len(self.rates) == 2 else (math.nan, math.nan)
        if not (0.0 < low <= high < math.inf):
            raise InputError(
                "learning rates of an environment are the least and the greatest, finite and above"
                f" 0, such as (0.005, 0.05); got {self.rates!r}"
            )
        if not self.widths or self.validation % PARTS or self.validation < PARTS:
            raise InputError(
                "an environment needs at least one of `widths`, and a multiple of"
                f" {PARTS} as `validation`; got {self.widths} and {self.validation}"
            )

    @cached_property
    def world(self) -> World:
        """What networks share."""
        table = KernelTable(self.offers, WIDTH)
        return World(table, self.depth, self.seeds, self.batch, self.steps)

    @cached_property
    def nodes(self) -> int:
        """Rows of a graph: hidden layers, the last layer, and what fills up the bucket."""
        return bucket(self.depth + 1)

    @cached_property
    def _sight(self) -> Sight:
        return Sight(self.world, self.nodes, self.boundaries)

    @cached_property
    def _edges(self) -> Edges:
        return edges_by_depth(self.depth, self.nodes)

    def edges(self, depth: Any) -> Edges:
        """Of the graph of a host of some depth."""
        return jax.tree.map(lambda own: jnp.asarray(own)[depth - 1], self._edges)

    def graph(self, state: State) -> ModelGraph:
        """What a policy sees."""
        return model_graph(state.readings, self.edges(state.episode.shape.depth), jnp)

    # Resetting.

    def reset(self, key: jax.Array, family: Any = None) -> tuple[State, ModelGraph]:
        """A new episode: a family, a host, a learning rate, data, first parameters.

        Args:
            family: index into the environment's families; None draws one.
        """
        state = self._reset(key, family)
        return state, self.graph(state)

    def _reset(self, key: jax.Array, family: Any = None) -> State:
        key, own = jax.random.split(key)
        keys = jax.random.split(own, 8)
        drawn = jax.random.randint(keys[0], (), 0, len(self.families))
        family = drawn if family is None else jnp.asarray(family, jnp.int32)
        width = jax.random.choice(keys[1], jnp.asarray(self.widths))
        inputs = jnp.asarray([FAMILIES[name].inputs for name in self.families])[family]
        shape = Shape(inputs, width, jax.random.randint(keys[2], (), 1, self.depth + 1))
        low, high = np.log(self.rates)
        rate = jnp.exp(jax.random.uniform(keys[3], minval=low, maxval=high))
        x, y = draw_examples(family, self.families, keys[4], self.examples + self.validation)
        data = Data(x[: self.examples], y[: self.examples], x[self.examples :], y[self.examples :])
        seeds: SeedState = jax.tree.map(jnp.asarray, init_seeds(self.depth, self.seeds))
        growing = self.world.born(keys[5], shape, seeds)
        first_loss = self.world.host_loss(growing.trained.host, data, shape)
        # All that a host's size means to a kernel is in its costs over the host's. So that a policy
        # learns that, sizes by themselves are told too large by a factor that means nothing (domain
        # randomisation: Tobin et al., 2017), and hosts of other sizes are nothing new to it.
        scale = jnp.exp2(jax.random.uniform(keys[7], maxval=self.octaves))
        episode = Episode(family, shape, rate, scale, data, keys[6], first_loss)
        measured = self.world.measure(growing, data, shape)
        start = potentials(of_host(first_loss, first_loss, jnp.zeros(self.steps)))
        places = (self.depth, self.seeds)
        state = State(
            key=key,
            episode=episode,
            boundary=jnp.zeros((), jnp.int32),
            growing=growing,
            twin=growing.trained.host,
            twin_moments=growing.trained.host_moments,
            row=jnp.full(places, -1, jnp.int32),
            born=jnp.zeros(places, jnp.int32),
            faults=jnp.zeros(()),
            illegal=jnp.zeros(()),
            touched=jnp.zeros((), jnp.bool_),
            potentials=start,
            twin_potentials=start,
            returned=jnp.zeros(()),
            readings=self._sight.nothing(),
        )
        nan = jnp.full((), jnp.nan, jnp.float32)
        nowhere = jnp.full(self.nodes, jnp.nan, jnp.float32)
        follows = self.world.follows(growing, data, shape)
        readings = self._sight.read(state, measured, nan, nan, nowhere, follows)
        return state._replace(readings=readings)

    # Stepping.

    def step(self, state: State, choice: Choice) -> tuple[State, Step]:
        """Do what was chosen, train, measure; where the episode is over, begin the next.

        An illegal choice is dropped, and counts against safety.
        """
        after, reward, info = self.advance(self.act(state, choice))
        done = after.boundary >= self.boundaries
        fresh = self._reset(after.key)
        following = jax.tree.map(lambda new, old: _where(done, new, old), fresh, after)
        info["illegal"] = (after.illegal > state.illegal).astype(jnp.float32)
        return following, Step(self.graph(following), reward.total, done, info)

    def act(self, state: State, choice: Choice) -> State:
        """Change the seeds as one choice says; nothing is trained. More than one may follow."""
        seeds = state.growing.seeds
        now = state.boundary * self.steps
        there = self.edges(state.episode.shape.depth).there
        legal = legal_choices(state.readings._replace(stage=self._sight.stages(seeds)), there, jnp)
        kind, node, seed, kernel, alpha = choice
        at_node = jnp.minimum(node, self.depth - 1)
        allowed = jnp.stack(
            [
                jnp.ones((), jnp.bool_),
                legal.graft[node, kernel],
                *(own[node, seed] for own in (legal.unload, legal.fossilize, legal.retarget)),
            ]
        )[kind]
        grafts, unloads, freezes, retargets = (
            allowed & (kind == own)
            for own in (Kind.GRAFT, Kind.UNLOAD, Kind.FOSSILIZE, Kind.RETARGET)
        )
        seed = jnp.where(kind == Kind.GRAFT, jnp.maximum(legal.free[node], 0), seed)
        place = jnp.zeros(seeds.shape, jnp.bool_).at[at_node, seed].set(True)
        slot = at_node * self.seeds + seed
        slots = jnp.arange(seeds.stage.size, dtype=jnp.int32).reshape(seeds.shape)
        words: Any = jnp.asarray(self.world.table.id_words)[kernel]
        seeds = _emptied(seeds, now)
        for where, stage in (
            (grafts, SeedLifecycleState.LOADING),
            (grafts, SeedLifecycleState.ACTIVE),
            (unloads, SeedLifecycleState.DORMANT),
            (freezes, SeedLifecycleState.FOSSILIZED),
        ):
            seeds = transition(
                seeds, place & where, stage, step=now, slot=slots, kernel_id=words
            ).state  # fmt: skip
        seeds = _ramp(seeds, place & grafts, 1.0, self.ramp, now)
        for index, target in enumerate(ALPHAS):
            seeds = _ramp(seeds, place & retargets & (alpha == index), target, self.ramp, now)
        growing = self._grafted(state, seeds, grafts, place, slot, kernel, at_node)
        row = jnp.where(place & grafts, kernel, state.row)
        row = jnp.where(seeds.stage == int(SeedLifecycleState.DORMANT), -1, row)
        return state._replace(
            growing=growing,
            row=row,
            born=jnp.where(place & grafts, state.boundary, state.born),
            illegal=state.illegal + (~allowed).astype(jnp.float32),
            touched=state.touched | grafts,
        )

    def _grafted(
        self, state: State, seeds: SeedState, grafts: Any, place: Any, slot: Any, kernel: Any,
        node: Any,
    ) -> Growing:  # fmt: skip
        """With a kernel's first parameters in its slot, and no moments."""
        growing, shape, table = state.growing, state.episode.shape, self.world.table
        inputs = jnp.where(node == 0, shape.inputs, shape.width)
        key = jax.random.fold_in(state.episode.key, -1 - state.boundary)
        fresh = table.first_params(jax.random.fold_in(key, slot), kernel, inputs, shape.width)
        here = (place & grafts).reshape(-1)

        def put(rows: Any, own: Any) -> Any:
            return jnp.where(here.reshape(-1, *[1] * (rows.ndim - 1)), own, rows)

        trained = growing.trained
        return Growing(
            trained._replace(
                kernels=jax.tree.map(put, trained.kernels, fresh),
                kernel_moments=jax.tree.map(
                    lambda rows: put(rows, jnp.zeros_like(rows)), trained.kernel_moments
                ),
            ),
            jnp.where(here, jnp.asarray(table.program_of)[kernel], growing.code),
            seeds,
        )

    def advance(self, state: State) -> tuple[State, Reward, dict[str, Any]]:
        """Train to the next boundary, and measure.

        Seeds that have failed are emptied first, as by `act`: it may not have been called.
        """
        world, episode = self.world, state.episode
        data, shape, rate, key = episode.data, episode.shape, episode.rate, episode.key
        first = state.boundary * self.steps
        seeds = _emptied(state.growing.seeds, first)
        empty = seeds.stage == int(SeedLifecycleState.DORMANT)
        state = state._replace(
            growing=state.growing._replace(seeds=seeds), row=jnp.where(empty, -1, state.row)
        )
        growing, losses, gradient = world.train(state.growing, data, shape, rate, key, first)
        twin, moments, twin_losses = world.train_host(
            state.twin, state.twin_moments, data, shape, rate, key, first
        )
        measured = world.measure(growing, data, shape)
        twin_loss = world.host_loss(twin, data, shape)
        # What was never grafted into is its twin, and not another computation of it, which
        # compilers round differently in some shapes: to wait earns exactly nothing.

        def own_or_twins(own: Any, twins: Any) -> Any:
            return jax.tree.map(lambda a, b: jnp.where(state.touched, a, b), own, twins)

        trained = growing.trained
        growing = growing._replace(
            trained=trained._replace(
                host=own_or_twins(trained.host, twin),
                host_moments=own_or_twins(trained.host_moments, moments),
            )
        )
        measured = measured._replace(loss=own_or_twins(measured.loss, twin_loss))
        losses = own_or_twins(losses, twin_losses)
        failed = growing.seeds.stage == int(SeedLifecycleState.ERROR_RECOVERY)
        faults = state.faults + jnp.sum(failed.astype(jnp.float32))
        parameters, flops, memory = self._sight.costs(state._replace(growing=growing))
        own = potentials(
            measurements(
                measured, episode.first_loss, losses, flops=flops, parameters=parameters,
                memory=memory, faults=faults, illegal=state.illegal,
            )
        )  # fmt: skip
        others = potentials(of_host(twin_loss, episode.first_loss, twin_losses))
        own = {
            name: value if name == "safety" else own_or_twins(value, others[name])
            for name, value in own.items()
        }
        reward = step_reward(
            state.potentials, own, state.twin_potentials, others, flops, self.boundaries
        )
        after = state._replace(
            growing=growing,
            twin=twin,
            twin_moments=moments,
            boundary=state.boundary + 1,
            faults=faults,
            potentials=own,
            twin_potentials=others,
            returned=state.returned + reward.total,
        )
        gradients = norms(gradient, world.sites, self.nodes)
        follows = world.follows(growing, data, shape)
        readings = self._sight.read(
            after, measured, jnp.mean(losses), spread_of(losses), gradients, follows
        )
        info = {
            **reward.components,
            "loss": measured.loss,
            "twin_loss": twin_loss,
            "validation_accuracy": measured.accuracy,
            "flops": flops,
            "family": episode.family,
            "returned": after.returned,
        }
        return after._replace(readings=readings), reward, info


def _emptied(seeds: SeedState, now: Any) -> SeedState:
    """Without what has failed, as controllers leave it."""
    failed = seeds.stage == int(SeedLifecycleState.ERROR_RECOVERY)
    return transition(seeds, failed, SeedLifecycleState.DORMANT, step=now).state


def _ramp(seeds: SeedState, where: Any, target: float, span: int, now: Any) -> SeedState:
    return start_ramp(seeds, where, target, span, step=now).state


def _where(done: Any, new: Any, old: Any) -> Any:
    if jnp.issubdtype(new.dtype, jax.dtypes.prng_key):
        data = jnp.where(done, jax.random.key_data(new), jax.random.key_data(old))
        return jax.random.wrap_key_data(data)
    return jnp.where(done, new, old)
