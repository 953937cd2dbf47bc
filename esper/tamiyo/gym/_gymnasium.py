"""The gym for agents of other libraries that do not speak jax: as Gymnasium has environments."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from esper.errors import InputError
from esper.tamiyo._check import require
from esper.tamiyo.graph import BOUND, ModelGraph
from esper.tamiyo.gym._environment import Environment
from esper.tamiyo.gym._state import State
from esper.tamiyo.policy._choice import ALPHAS, Choice, Kind

if TYPE_CHECKING:
    import gymnasium


def gymnasium_env(environment: Environment) -> "gymnasium.Env[dict[str, np.ndarray], np.ndarray]":
    """One environment behind Gymnasium's interface.

    Observations are dictionaries of what a `ModelGraph` holds: `run`, `nodes`, `seeds` and
    `kernels`, f32 in [-BOUND, BOUND]; `slots`, `slot_kinds`, `taken` and `there` of its edges;
    `graft`, `unload`, `fossilize`, `retarget` (what is legal) and `free`. Actions are i64 `[5]`: a
    `Choice`. What is illegal is dropped, and costs safety. Episodes terminate after the
    environment's boundaries.

    Raises:
        InputError: where Gymnasium is not installed; of `step`, for an action that is not in the
            space.
    """
    _require_gymnasium()
    import gymnasium

    reset = jax.jit(environment.reset)
    act, advance = jax.jit(environment.act), jax.jit(environment.advance)
    see = jax.jit(environment.graph)
    observations, actions = _spaces(environment)

    class Growing(gymnasium.Env[dict[str, np.ndarray], np.ndarray]):
        """See `gymnasium_env`."""

        metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012

        def __init__(self) -> None:
            self.observation_space: Any = observations
            self.action_space: Any = actions
            self._state: State | None = None

        def reset(
            self, *, seed: int | None = None, options: dict[str, Any] | None = None
        ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
            """Begin an episode, drawn by the seed."""
            super().reset(seed=seed)
            drawn = int(self.np_random.integers(2**31))
            self._state, graph = reset(jax.random.key(drawn))
            return _arrays(graph), {}

        def step(
            self, action: np.ndarray
        ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
            """Do what was chosen, train, measure."""
            if self._state is None:
                raise InputError("no episode was begun: call reset() before step()")
            if int(self._state.boundary) >= environment.boundaries:
                raise InputError(
                    f"the episode ended after its {environment.boundaries} steps: call reset()"
                    " before the next step()"
                )
            choice = Choice(*jnp.asarray(_whole(action, actions.nvec, (5,)), jnp.int32))
            changed = act(self._state, choice)
            illegal = float(changed.illegal - self._state.illegal)
            after, reward, info = advance(changed)
            self._state = after
            done = int(after.boundary) >= environment.boundaries
            told = {name: float(own) for name, own in info.items()}
            return (
                _arrays(see(after)),
                float(reward.total),
                done,
                False,
                {**told, "illegal": illegal},
            )

    return Growing()


def gymnasium_vector_env(
    environment: Environment, count: int
) -> "gymnasium.vector.VectorEnv[dict[str, np.ndarray], np.ndarray, np.ndarray]":
    """Many environments behind Gymnasium's interface, in one program.

    Observations and actions are those of `gymnasium_env`, stacked. Episodes begin and end together,
    and the next ones begin in the step in which they end (`AutoresetMode.SAME_STEP`): the
    observations are then of the new ones. Of those that ended, `final_obs` has one observation for
    each, in an array of objects, and `final_info` is stacked, as of Gymnasium's own.

    Args:
        count: environments, from 1.

    Raises:
        InputError: where Gymnasium is not installed, or for a count below 1.
    """
    require("count of environments", count, 1, whole=True)
    _require_gymnasium()
    from gymnasium.vector import AutoresetMode, VectorEnv
    from gymnasium.vector.utils import batch_space

    reset = jax.jit(jax.vmap(environment.reset))
    observations, actions = _spaces(environment)

    @jax.jit
    @jax.vmap
    def step(state: State, choice: Choice) -> Any:
        changed = environment.act(state, choice)
        after, reward, info = environment.advance(changed)
        info["illegal"] = changed.illegal - state.illegal
        return after, environment.graph(after), reward.total, info

    class GrowingVector(VectorEnv[dict[str, np.ndarray], np.ndarray, np.ndarray]):
        """See `gymnasium_vector_env`."""

        metadata: dict[str, Any] = {  # noqa: RUF012
            "render_modes": [],
            "autoreset_mode": AutoresetMode.SAME_STEP,
        }

        def __init__(self) -> None:
            self.num_envs = count
            self.single_observation_space: Any = observations
            self.single_action_space: Any = actions
            self.observation_space: Any = batch_space(observations, count)
            self.action_space: Any = batch_space(actions, count)
            self._state: State | None = None

        def reset(
            self, *, seed: int | None = None, options: dict[str, Any] | None = None
        ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
            """Begin as many episodes, drawn by the seed."""
            super().reset(seed=seed)
            drawn = int(self.np_random.integers(2**31))
            self._state, graphs = reset(jax.random.split(jax.random.key(drawn), count))
            return _arrays(graphs), {}

        def step(
            self, actions: np.ndarray
        ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
            """Do what was chosen, train, measure."""
            if self._state is None:
                raise InputError("no episode was begun: call reset() before step()")
            chosen = _whole(actions, self.single_action_space.nvec, (count, 5))
            choices = Choice(*jnp.asarray(chosen, jnp.int32).T)
            state, graphs, rewards, info = step(self._state, choices)
            told = {name: np.asarray(own) for name, own in info.items()}
            done = np.asarray(state.boundary >= environment.boundaries)
            found: dict[str, Any] = {**told, **{f"_{name}": np.ones_like(done) for name in told}}
            if done.all():
                last, ended = _arrays(graphs), np.empty(count, object)
                ended[:] = [{name: own[i] for name, own in last.items()} for i in range(count)]
                found |= {"final_info": dict(found), "_final_info": done}
                found |= {"final_obs": ended, "_final_obs": done}
                state, graphs = reset(state.key)
            self._state = state
            return _arrays(graphs), np.asarray(rewards), done, np.zeros_like(done), found

    return GrowingVector()


def _require_gymnasium() -> None:
    try:
        import gymnasium  # noqa: F401
    except ModuleNotFoundError as error:
        raise InputError(
            "the gym of other libraries needs gymnasium, which is not installed: pip install"
            " 'esper-morphogenetic[gym]'"
        ) from error


def _spaces(environment: Environment) -> tuple[Any, Any]:
    """Of observations and of actions."""
    from gymnasium import spaces

    example = _observed(jax.eval_shape(environment.reset, jax.random.key(0))[1])

    def space(own: Any) -> Any:
        if own.dtype == jnp.bool_:
            return spaces.MultiBinary(own.shape)
        if own.dtype == jnp.float32:
            return spaces.Box(-BOUND, BOUND, own.shape, np.float32)
        # -1 stands for a node without a free seed.
        return spaces.Box(-1, max(environment.nodes, environment.seeds), own.shape, np.int32)

    sizes = (len(Kind), environment.nodes, environment.seeds, len(environment.offers))
    return (
        spaces.Dict({name: space(own) for name, own in example.items()}),
        spaces.MultiDiscrete([*sizes, len(ALPHAS)]),
    )


def _observed(graph: ModelGraph) -> dict[str, Any]:
    edges, legal = graph.edges, graph.legal
    return {
        **{name: getattr(graph, name) for name in ("run", "nodes", "seeds", "kernels")},
        **{name: getattr(edges, name) for name in ("slots", "slot_kinds", "taken", "there")},
        **legal._asdict(),
    }


def _whole(actions: Any, sizes: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Actions as they are, where they are in their space: jax would clamp indices, or wrap them."""
    own = np.asarray(actions)
    if own.shape != shape or own.dtype.kind not in "iu":
        raise InputError(
            f"actions are whole numbers of the shape {shape}, each a {', '.join(Choice._fields)};"
            f" got {own.dtype} of the shape {own.shape}"
        )
    beyond = np.argwhere((own < 0) | (own >= sizes))
    if len(beyond):
        *_, part = place = tuple(beyond[0])
        raise InputError(
            f"the {Choice._fields[part]} of an action is from 0 to {sizes[part] - 1}, and"
            f" {own[place]} was given: what a kind of action does not use is any of these, such as"
            " 0"
        )
    return own


def _arrays(graph: ModelGraph) -> dict[str, np.ndarray]:
    # A MultiBinary space holds i8.
    arrays = {name: np.asarray(own) for name, own in _observed(graph).items()}
    return {
        name: own.astype(np.int8) if own.dtype == np.bool_ else own for name, own in arrays.items()
    }
