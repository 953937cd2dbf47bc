"""Any sequence of growing, pruning, grafting and freezing, on any tree: nobody's moments move."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_adapters.optax import carry, freeze
from tests.tolerance import assert_bitwise


class Pair(NamedTuple):
    """Fields named like those of a state, to be mistaken for them."""

    mu: Any
    count: Any


class Block(eqx.Module):
    nu: Any
    w: Any


class Grafted(eqx.Module):
    esper_host: Any
    esper_kernels: dict[int, Any]


LEAF = 0
NAMES = st.sampled_from(["w", "mu", "count", "inner_state", "value"])
SKELETONS = st.recursive(
    st.just(LEAF),
    lambda inner: st.one_of(
        st.dictionaries(NAMES, inner, max_size=3),
        st.lists(inner, max_size=3),
        st.builds(Pair, inner, inner),
        st.builds(Block, inner, inner),
    ),
    max_leaves=6,
)
OPERATIONS = st.sampled_from(["grow", "prune", "graft", "ungraft", "freeze", "thaw", "nothing"])


class Names:
    """Numbers the parameters, so that each can be followed through a tree's changes."""

    def __init__(self) -> None:
        self.last = 0

    def new(self) -> int:
        self.last += 1
        return self.last


def nodes(skeleton: Any, kind: type | tuple[type, ...]) -> list[Any]:
    found: list[Any] = []

    def visit(node: Any) -> bool:
        if isinstance(node, kind):
            found.append(node)
        return False

    jax.tree.leaves(skeleton, is_leaf=visit)
    return found


def replace(skeleton: Any, target: Any, by: Any) -> Any:
    def is_target(node: Any) -> bool:
        return node is target

    return jax.tree.map(lambda n: by if n is target else n, skeleton, is_leaf=is_target)


def change(skeleton: Any, operation: str, names: Names, draw: Any) -> Any:
    """The skeleton after growing, pruning, grafting or ungrafting at a drawn place."""
    if operation == "grow":
        # Kernels' dicts are growing nodes like any other.
        places = nodes(skeleton, (dict, list))
        if places:
            place = draw(st.sampled_from(places))
            name = names.new()
            grown = [*place, name] if isinstance(place, list) else {**place, f"new{name}": name}
            return replace(skeleton, place, grown)
    if operation == "prune":
        leaves = jax.tree.leaves(skeleton)
        if leaves:
            return replace(skeleton, draw(st.sampled_from(leaves)), None)
    if operation == "graft":
        inside = nodes([g.esper_host for g in nodes(skeleton, Grafted)], object)
        hosts = [
            node
            for node in nodes(skeleton, (int, dict, list, Pair, Block))
            if not nodes(node, Grafted) and not any(node is other for other in inside)
        ]
        if hosts:
            host = draw(st.sampled_from(hosts))
            return replace(skeleton, host, Grafted(host, {"a": names.new(), "b": [names.new()]}))
    if operation == "ungraft":
        grafts = nodes(skeleton, Grafted)
        if grafts:
            graft = draw(st.sampled_from(grafts))
            return replace(skeleton, graft, graft.esper_host)
    return skeleton


def params_of(skeleton: Any) -> Any:
    return jax.tree.map(lambda name: jnp.full(1 + name % 3, float(name)), skeleton)


def make_optimizer(kind: str, skeleton: Any, frozen: frozenset[int]) -> Any:
    def trainable(_: Any) -> Any:
        return jax.tree.map(lambda name: name not in frozen, skeleton)

    if kind == "freeze outermost":
        return freeze(optax.chain(optax.clip(1.0), optax.adam(1e-2)), trainable)
    if kind == "freeze inside":
        return optax.apply_if_finite(freeze(optax.adam(1e-2), trainable), 3)
    return freeze(
        optax.partition(
            {"odd": optax.adam(1e-2), "even": optax.adam(1e-2)},
            lambda params: jax.tree.map(lambda p: "odd" if p.size % 2 else "even", params),
        ),
        trainable,
    )


def moments_of(kind: str, state: Any, skeleton: Any, frozen: frozenset[int]) -> dict[int, Any]:
    """First moments by the parameter's number.

    By the order of leaves alone, since moments are trees of the params' own structure.
    """
    names = [name for name in jax.tree.leaves(skeleton) if name not in frozen]
    if kind == "partition":
        odd = {name: (1 + name % 3) % 2 == 1 for name in names}
        parts = {
            label: jax.tree.leaves(inner.inner_state[0].mu)
            for label, inner in state.inner_states.items()
        }
        found = dict(zip([n for n in names if odd[n]], parts["odd"], strict=True))
        return found | dict(zip([n for n in names if not odd[n]], parts["even"], strict=True))
    adam = state[1][0] if kind == "freeze outermost" else state.inner_state[0]
    return dict(zip(names, jax.tree.leaves(adam.mu), strict=True))


@pytest.mark.parametrize("kind", ["freeze outermost", "freeze inside", "partition"])
@settings(max_examples=40)
@given(data=st.data())
def test_incumbents_keep_their_moments_through_any_sequence_of_changes(kind, data):
    names = Names()
    skeleton = jax.tree.map(lambda _: names.new(), data.draw(SKELETONS))
    frozen: frozenset[int] = frozenset()
    optimizer = make_optimizer(kind, skeleton, frozen)
    params = params_of(skeleton)
    with jax.numpy_dtype_promotion("standard"), jax.disable_jit():
        state = optimizer.init(params)
        for operation in data.draw(st.lists(OPERATIONS, min_size=1, max_size=5)):
            _, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
            before = moments_of(kind, state, skeleton, frozen)

            leaves = jax.tree.leaves(skeleton)
            if operation == "freeze" and leaves:
                frozen |= data.draw(st.sets(st.sampled_from(leaves)))
            if operation == "thaw":
                frozen = frozenset()
            skeleton = change(skeleton, operation, names, data.draw)
            old_params, params = params, params_of(skeleton)
            old_optimizer, optimizer = optimizer, make_optimizer(kind, skeleton, frozen)

            old_state = state
            state = carry(optimizer, state, old_params, params, old_optimizer=old_optimizer)
            assert jax.tree.structure(state) == jax.tree.structure(optimizer.init(params))
            after = moments_of(kind, state, skeleton, frozen)
            assert after.keys() == set(jax.tree.leaves(skeleton)) - frozen
            for name, moment in after.items():
                if name in before:
                    assert moment is before[name]
                else:
                    assert_bitwise(moment, jnp.zeros(1 + name % 3))
            if operation in ("grow", "graft"):
                back = carry(old_optimizer, state, params, old_params, old_optimizer=optimizer)
                assert_bitwise(back, old_state)
