"""An environment as data: its episode, its network and twin, and what was measured last."""

from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float

from esper.tamiyo.graph import ModelGraph, Readings
from esper.tamiyo.gym._growing import Data, Growing
from esper.tamiyo.gym._host import Shape


class Episode(NamedTuple):
    """What does not change from a reset to the next."""

    family: Any
    """i32 `[]`: index into the environment's families."""
    shape: Shape
    rate: Any
    """f32 `[]`: the learning rate."""
    scale: Any
    """f32 `[]`: by how much sizes are told larger than they are, from 1."""
    data: Data
    key: Any
    """Of batches and of first parameters."""
    first_loss: Any


class State(NamedTuple):
    """One environment."""

    key: Any
    """Of the resets to come."""
    episode: Episode
    boundary: Any
    """i32 `[]`: how many steps were taken since the reset."""
    growing: Growing
    twin: Any
    """The twin's parameters."""
    twin_moments: Any
    row: Any
    """i32 `[layers, seeds]`: which kernel each seed holds, as a row of the offers; -1 for none."""
    born: Any
    """i32 `[layers, seeds]`: at which boundary it was grafted."""
    faults: Any
    illegal: Any
    touched: Any
    """bool `[]`: whether something was grafted since the reset."""
    potentials: dict[str, Any]
    twin_potentials: dict[str, Any]
    returned: Any
    """f32 `[]`: the sum of rewards since the reset."""
    readings: Readings


class Step(NamedTuple):
    """What a step gives beside the next state."""

    graph: ModelGraph
    """Of the state after; of the new episode, where one ended."""
    reward: Float[Array, ""]
    done: Bool[Array, ""]
    info: dict[str, Any]
    """Parts of the reward by name; `illegal`, whether the choice was dropped as illegal; and of the
    network as it was before a reset: `loss` and `validation_accuracy`, `twin_loss`, `flops`,
    `family`, and `returned`, the rewards since the episode began."""
