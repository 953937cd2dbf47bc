"""From an environment to what is told of it: costs counted, readings as those of a run."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from esper.tamiyo.graph import FOLLOWED, KERNEL, PAST, Readings, cost_columns
from esper.tamiyo.gym._growing import Measured, World, norms
from esper.tamiyo.gym._host import Shape, count
from esper.tamiyo.gym._state import State
from esper_functional import SeedLifecycleState, SeedState


@dataclasses.dataclass(frozen=True)
class Sight:
    """What an environment tells; static."""

    world: World
    nodes: int
    """Rows of a graph."""
    boundaries: int
    """Of an episode."""

    def stages(self, seeds: SeedState) -> Any:
        return self._by_node(seeds.stage, 0)

    def _by_node(self, values: Any, filling: float) -> Any:
        """`[layers, seeds, ...]` as rows of the graph."""
        rows = jnp.full((self.nodes, *values.shape[1:]), filling, values.dtype)
        return rows.at[: self.world.depth].set(values)

    def costs(self, state: State) -> tuple[Any, Any, Any]:
        """Parameters, FLOPs and bytes over the host's; bytes are of parameters and two moments."""
        shape, stage = state.episode.shape, state.growing.seeds.stage
        host = count(shape, self.world.depth, self.nodes)
        parameters, flops = self._kernel_costs(state)
        total, all_flops = jnp.sum(host.sizes[:, 0]), jnp.sum(host.flops)
        frozen = stage == int(SeedLifecycleState.FOSSILIZED)
        held = jnp.sum(jnp.where(frozen, parameters, 3.0 * parameters))
        return (
            1.0 + jnp.sum(parameters) / total,
            1.0 + jnp.sum(flops) / all_flops,
            1.0 + held / (3.0 * total),
        )

    def _kernel_costs(self, state: State) -> tuple[Any, Any]:
        """Of what each seed holds: f32 `[layers, seeds]` each."""
        inputs, width = self._site_sizes(state.episode.shape)
        table, row = self.world.table, state.row
        own = jnp.maximum(row, 0), inputs[:, None] - 1, width - 1
        return tuple(
            jnp.where(row >= 0, jnp.asarray(counts)[own], 0.0)
            for counts in (table.parameters, table.flops)
        )  # pyright: ignore[reportReturnType]

    def _site_sizes(self, shape: Shape) -> tuple[Any, Any]:
        inputs = jnp.where(jnp.arange(self.world.depth) == 0, shape.inputs, shape.width)
        return inputs, shape.width

    def _described(self, state: State) -> tuple[Any, Any]:
        """What seeds hold `[layers, seeds, KERNEL]`, and what is offered `[offers, KERNEL]`."""
        shape, table = state.episode.shape, self.world.table
        host = count(shape, self.world.depth, self.nodes)
        totals = jnp.sum(host.sizes[:, 0]), jnp.sum(host.flops)

        def describe(row: Any, inputs: Any) -> Any:
            at = row, inputs - 1, shape.width - 1
            parameters = jnp.asarray(table.parameters)[at]
            own = cost_columns(parameters, jnp.asarray(table.flops)[at], *totals, jnp)
            by_itself = jnp.log2(1.0 + parameters * state.episode.scale) / 4.0
            own = own.at[0].set(by_itself)
            return jnp.concatenate([own, jnp.asarray(table.described)[row]])

        inputs, _ = self._site_sizes(shape)
        held = jax.vmap(jax.vmap(describe, (0, None)))(jnp.maximum(state.row, 0), inputs)
        held = jnp.where((state.row >= 0)[..., None], held, 0.0)
        # Costs differ between sites: what is offered is described as for the first one.
        offered = jax.vmap(describe, (0, None))(jnp.arange(len(self.world.table.offers)), inputs[0])
        return held, offered

    def read(
        self, state: State, measured: Measured, train_loss: Any, spread: Any, gradients: Any,
        follows: Any,
    ) -> Readings:  # fmt: skip
        shape, seeds, before = state.episode.shape, state.growing.seeds, state.readings
        host = count(shape, self.world.depth, self.nodes)
        parameters, flops, _ = self.costs(state)
        held, offered = self._described(state)
        row = jnp.arange(self.nodes)
        hidden = row < shape.depth
        depth = jnp.where(row == self.world.depth, shape.depth, row).astype(jnp.float32)
        age = jnp.where(state.row >= 0, state.boundary - state.born, 0).astype(jnp.float32)
        return Readings(
            progress=state.boundary.astype(jnp.float32) / self.boundaries,
            train_loss=_newest(train_loss, before.train_loss),
            validation_loss=_newest(measured.loss, before.validation_loss),
            validation_accuracy=measured.accuracy,
            first_loss=state.episode.first_loss,
            loss_spread=jnp.where(jnp.isfinite(spread), spread, 0.0),
            rollbacks=jnp.zeros(()),
            parameters=parameters,
            flops=flops,
            kind=jnp.zeros(self.nodes, jnp.int32),
            sizes=host.sizes * state.episode.scale,
            depth=jnp.where(hidden | (row == self.world.depth), depth, 0.0),
            grows=hidden,
            gradient_norm=gradients,
            weight_norm=norms(state.growing.trained.host, self.world.sites, self.nodes),
            follows=jnp.where(hidden[:, None], self._by_node(follows, jnp.nan), jnp.nan),
            stage=self.stages(seeds),
            alpha=self._by_node(seeds.alpha, 0.0),
            health=self._by_node(measured.health, jnp.nan),
            health_before=before.health,
            worth=self._by_node(measured.worth, jnp.nan),
            worth_half=self._by_node(measured.worth_half, jnp.nan),
            age=self._by_node(age, 0.0),
            held=self._by_node(held, 0.0),
            kernels=offered,
            fits=jnp.ones((self.nodes, len(self.world.table.offers)), jnp.bool_),
        )

    def nothing(self) -> Readings:
        """Before anything was measured."""
        nan = jnp.full(PAST, jnp.nan, jnp.float32)
        places = jnp.full((self.nodes, self.world.seeds), jnp.nan, jnp.float32)
        one = jnp.ones(())
        rows = jnp.zeros(self.nodes)
        return Readings(
            one, nan, nan, one, one, one, one, one, one,
            jnp.zeros(self.nodes, jnp.int32), jnp.zeros((self.nodes, 3)), rows,
            jnp.zeros(self.nodes, jnp.bool_), rows, rows, jnp.zeros((self.nodes, len(FOLLOWED))),
            jnp.zeros((self.nodes, self.world.seeds), jnp.uint8),
            places, places, places, places, places, places,
            jnp.zeros((self.nodes, self.world.seeds, KERNEL)),
            jnp.zeros((len(self.world.table.offers), KERNEL)),
            jnp.ones((self.nodes, len(self.world.table.offers)), jnp.bool_),
        )  # fmt: skip


def _newest(value: Any, past: Any) -> Any:
    return jnp.concatenate([jnp.asarray(value)[None], past[:-1]])
