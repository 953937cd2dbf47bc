"""`carry`: whose state a leaf is, what goes on, and what is refused."""

import doctest
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import esper_adapters.optax._carry
from esper_adapters._naming import HOST_FIELD, KERNELS_FIELD
from esper_adapters.optax import OptimizerSurgeryError, carry, per_group
from tests.tolerance import assert_bitwise, assert_close


class Grafted(eqx.Module):
    esper_host: Any
    esper_kernels: dict[int, Any]


def ones_like(params: Any) -> Any:
    return jax.tree.map(jnp.ones_like, params)


def trained(optimizer: Any, params: Any, steps: int = 2) -> Any:
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(params)
        for _ in range(steps):
            _, state = optimizer.update(ones_like(params), state, params)
    return state


def mlp() -> Any:
    return eqx.filter(eqx.nn.MLP(2, 2, 3, 1, key=jax.random.key(0)), eqx.is_inexact_array)


KERNELS = {2: {"w": jnp.full((2, 3), 0.5)}}


def grafted(model: Any) -> Any:
    return eqx.tree_at(lambda m: m.layers[0], model, Grafted(model.layers[0], KERNELS))


def test_the_fields_of_grafted_nodes_are_the_agreed_names():
    assert (HOST_FIELD, KERNELS_FIELD) == ("esper_host", "esper_kernels")
    assert [f"esper_{field}" for field in ("host", "kernels")] == list(Grafted.__dataclass_fields__)


def test_the_public_names():
    names = {"FrozenNode", "HasInit", "OptimizerSurgeryError", "carry", "freeze", "per_group"}
    assert set(esper_adapters.optax.__all__) == names


def test_the_docstrings_example_runs():
    with jax.numpy_dtype_promotion("standard"):
        failed, ran = doctest.testmod(esper_adapters.optax._carry)
    assert (failed, ran > 5) == (0, True)


def test_a_graft_keeps_its_hosts_moments():
    optimizer = optax.adamw(1e-3)
    old = mlp()
    new = grafted(old)
    state = trained(optimizer, old)
    grown = carry(optimizer, state, old, new)[0]
    assert grown.mu.layers[0].esper_host.weight is state[0].mu.layers[0].weight
    assert grown.nu.layers[1].bias is state[0].nu.layers[1].bias
    assert_bitwise(grown.mu.layers[0].esper_kernels, jax.tree.map(jnp.zeros_like, KERNELS))
    assert grown.count is state[0].count

    back = carry(optimizer, (grown, *state[1:]), new, old)
    assert_bitwise(back, state)


def test_a_graft_by_dict_keys_and_at_the_root_is_the_same():
    optimizer = optax.adam(1e-3)
    old = {"w": jnp.ones(3)}
    state = trained(optimizer, old)
    new = {HOST_FIELD: old, KERNELS_FIELD: {0: {"w": jnp.ones(3)}}}
    grown = carry(optimizer, state, old, new)
    assert grown[0].mu[HOST_FIELD]["w"] is state[0].mu["w"]
    assert_bitwise(grown[0].mu[KERNELS_FIELD][0]["w"], jnp.zeros(3))


def test_a_single_array_may_be_grafted():
    optimizer = optax.adam(1e-3)
    old = jnp.ones(3)
    state = trained(optimizer, old)
    grown = carry(optimizer, state, old, {HOST_FIELD: old, KERNELS_FIELD: {0: jnp.ones(3)}})
    assert grown[0].nu[HOST_FIELD] is state[0].nu


def test_parameters_named_like_parts_of_a_state_are_told_apart():
    class Params(NamedTuple):
        count: Any
        mu: Any
        w: Any = None

    optimizer = optax.adam(1e-3)
    old = Params(jnp.ones(()), {"w": jnp.ones(2)})
    new = old._replace(w=jnp.ones(2))
    state = trained(optimizer, old)
    grown = carry(optimizer, state, old, new)[0]
    assert int(grown.count) == 2
    assert grown.mu.count is state[0].mu.count
    assert grown.mu.mu["w"] is state[0].mu.mu["w"]
    assert_bitwise(grown.mu.w, jnp.zeros(2))
    assert_bitwise(carry(optimizer, (grown, *state[1:]), new, old), state)


def test_a_tree_of_another_type_with_the_same_names_is_the_same():
    class Params(NamedTuple):
        a: Any
        b: Any = None

    optimizer = optax.adam(1e-3)
    old = {"a": jnp.ones(2)}
    state = trained(optimizer, old)
    grown = carry(optimizer, state, old, Params(old["a"], jnp.ones(3)))
    assert grown[0].mu.a is state[0].mu["a"]


def test_flax_states_are_trees_like_others():
    nnx = pytest.importorskip("flax.nnx", exc_type=(ImportError, AttributeError))

    class Net(nnx.Module):
        def __init__(self, grown: bool) -> None:
            self.layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
            if grown:
                self.layer = nnx.Dict(
                    {HOST_FIELD: self.layer, KERNELS_FIELD: nnx.Dict({"0": nnx.Param(jnp.ones(2))})}
                )

    optimizer = optax.adam(1e-3)
    old, new = (nnx.state(Net(grown), nnx.Param) for grown in (False, True))
    state = trained(optimizer, old)
    grown = carry(optimizer, state, old, new)
    moments = grown[0].mu["layer"]
    assert_bitwise(moments[HOST_FIELD]["kernel"].get_value(), jnp.full((2, 3), 0.19))
    assert_bitwise(moments[KERNELS_FIELD]["0"].get_value(), jnp.zeros(2))
    assert_bitwise(carry(optimizer, grown, new, old), state)


def test_none_stands_for_what_a_filter_took_out():
    optimizer = optax.adam(1e-3)
    full = {"a": jnp.ones(2), "b": [jnp.ones(3), jnp.ones(3)]}
    holes = {"a": jnp.ones(2), "b": [None, full["b"][1]]}
    state = trained(optimizer, full)
    pruned = carry(optimizer, state, full, holes)
    assert pruned[0].mu["b"][0] is None
    assert pruned[0].mu["b"][1] is state[0].mu["b"][1]
    again = carry(optimizer, pruned, holes, full)
    assert_bitwise(again[0].mu["b"][0], jnp.zeros(3))


def test_schedules_changed_hyperparameters_and_keys_go_on():
    schedule = optax.linear_schedule(1.0, 0.0, 10)
    optimizer = optax.chain(
        optax.add_noise(0.1, 0.5, key=jax.random.key(3)),
        optax.inject_hyperparams(optax.adamw)(learning_rate=schedule, weight_decay=0.1),
    )
    old = {"a": jnp.ones(2)}
    state = trained(optimizer, old)
    state[1].hyperparams["weight_decay"] = 0.25
    grown = carry(optimizer, state, old, {**old, "b": jnp.ones(3)})
    assert grown[1].hyperparams["weight_decay"] == 0.25
    assert grown[1].hyperparams["learning_rate"] is state[1].hyperparams["learning_rate"]
    assert grown[1].hyperparams_states is not None
    assert int(grown[1].count) == 2
    assert grown[0].rng_key is state[0].rng_key


def test_accumulated_gradients_are_carried_in_mid_accumulation():
    optimizer = optax.MultiSteps(optax.adam(1e-3), 3)
    old = {"a": jnp.ones(2)}
    state = trained(optimizer, old, steps=4)
    grown = carry(optimizer, state, old, {**old, "b": jnp.ones(3)})
    assert int(grown.mini_step) == 1
    assert grown.acc_grads["a"] is state.acc_grads["a"]
    assert_bitwise(grown.acc_grads["b"], jnp.zeros(3))


def test_a_carried_state_is_one_that_a_compiled_step_takes():
    optimizer = optax.adam(1e-3)
    old = mlp()
    new = grafted(old)
    grown = carry(optimizer, trained(optimizer, old), old, new)
    with jax.numpy_dtype_promotion("standard"):
        _, after = jax.jit(optimizer.update)(ones_like(new), grown, new)
    assert jax.tree.structure(after) == jax.tree.structure(grown)
    inside = jax.jit(lambda state: carry(optimizer, state, old, new))(trained(optimizer, old))
    assert_bitwise(inside, grown)


def test_adams_first_steps_under_a_long_running_count_are_as_large_as_documented():
    optimizer = optax.adam(1e-3)
    old = {"a": jnp.ones(2)}
    state = optimizer.init(old)
    state = (state[0]._replace(count=jnp.asarray(100_000, jnp.int32)), *state[1:])
    new = {**old, "b": jnp.ones(3)}

    def first_update(optimizer: Any, state: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(ones_like(new), state, new)[0]["b"]

    shared = first_update(optimizer, carry(optimizer, state, old, new))
    assert_close(shared, jnp.full(3, -1e-3 * 0.1 / np.sqrt(0.001)))

    own = per_group(optimizer, lambda params: {name: name for name in params})
    grown = carry(own, trained(own, old), old, new)
    assert_close(first_update(own, grown), jnp.full(3, -1e-3))


@pytest.mark.parametrize("name", ["acprop", "adopt", "prodigy"])
def test_a_group_of_its_own_starts_as_the_optimiser_starts(name):
    make = getattr(contrib, name)
    optimizer = per_group(make(1e-2), lambda params: {group: group for group in params})
    old, kernel = {"a": jnp.ones((2, 2))}, {"b": jnp.ones(3)}
    new = {**old, **kernel}
    grown = carry(optimizer, trained(optimizer, old), old, new)
    alone = make(1e-2)
    alone_state = alone.init(kernel)
    with jax.numpy_dtype_promotion("standard"), jax.disable_jit():
        for _ in range(3):
            updates, grown = optimizer.update(ones_like(new), grown, new)
            expected, alone_state = alone.update(ones_like(kernel), alone_state, kernel)
            assert_bitwise(updates["b"], expected["b"])


def refused(match: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(OptimizerSurgeryError, match=match):
        carry(*args, **kwargs)


ADAM = optax.adam(1e-3)
OLD = {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}


@pytest.mark.parametrize(
    ("leaf", "shown"),
    [(jnp.ones((2, 4)), r"float32\[2, 4\]"), (jnp.ones((2, 3), jnp.bfloat16), r"bfloat16\[2, 3\]")],
)
def test_an_incumbent_keeps_its_shape_and_dtype(leaf, shown):
    match = rf"parameter \['a'\] was float32\[2, 3\] and is {shown}.*path of its own"
    refused(match, ADAM, ADAM.init(OLD), OLD, {**OLD, "a": leaf})


def test_two_parameters_that_differ_by_the_host_field_alone_are_refused():
    both = {"a": jnp.ones(2), HOST_FIELD: {"a": jnp.ones(2)}}
    match = r"two leaves of new_params.*\['a'\] and \['esper_host'\]\['a'\]; give one"
    refused(match, ADAM, ADAM.init(OLD), OLD, both)


def test_pruning_from_the_middle_of_a_list_is_refused():
    old = [jnp.ones(2), jnp.ones(2), jnp.ones(2)]
    match = r"array at \[1\] was at \[2\].*leave None"
    refused(match, ADAM, ADAM.init(old), old, [old[0], old[2]])


def test_leaves_that_are_no_arrays_are_refused():
    match = r"new_params must hold arrays, got .*Function at \['f'\].*eqx.filter"
    refused(match, ADAM, ADAM.init(OLD), OLD, {**OLD, "f": jnp.sin})


def test_another_optimisers_state_is_refused_with_expected_and_found():
    match = (
        r"expected and not found: \[0\]\.count, \[0\]\.mu\['a'\], .*"
        r"found and not expected: \[0\]\.trace\['a'\], \[0\]\.trace\['b'\] \(in TraceState\)"
    )
    refused(match, ADAM, optax.sgd(1e-3, 0.9).init(OLD), OLD, OLD)


def test_the_state_of_other_params_is_refused():
    state = ADAM.init({**OLD, "b": jnp.ones(4)})
    match = r"opt_state\[0\]\.mu\['b'\] in ScaleByAdamState is float32\[4\]; expected float32\[3\]"
    refused(match, ADAM, state, OLD, OLD)
    match = r"expected and not found: nothing; found.*\['c'\]"
    refused(match, ADAM, ADAM.init({**OLD, "c": jnp.ones(4)}), OLD, OLD)


def test_a_state_in_other_containers_is_refused():
    state = ADAM.init(OLD)
    match = r"nodes of other types.*expected PyTreeDef\(\(.*found PyTreeDef\(\["
    refused(match, ADAM, list(state), OLD, OLD)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.masked(ADAM, {"a": True, "b": False}),
        optax.partition({"x": ADAM, "y": optax.sgd(1e-3)}, {"a": "x", "b": "y"}),
        optax.adamw(1e-3, mask={"a": True, "b": False}),
    ],
    ids=["masked", "partition", "decay"],
)
def test_a_mask_of_the_old_structure_is_refused_with_what_to_do(optimizer):
    match = r"(?s)init\(new_params\) fails: .*function of the params.*jax\.tree\.map"
    refused(match, optimizer, optimizer.init(OLD), OLD, {**OLD, "c": jnp.ones(2)})


def test_a_label_function_that_loses_a_grafted_incumbent_is_refused():
    def labels(params: Any) -> Any:
        first = lambda path, _: "x" if path[0].key == "a" else "y"  # noqa: E731
        return jax.tree_util.tree_map_with_path(first, params)

    optimizer = optax.partition({"x": ADAM, "y": optax.sgd(1e-3)}, labels)
    old = {"a": {"w": jnp.ones(2)}, "b": jnp.ones(2)}
    state = trained(optimizer, old)
    new = {HOST_FIELD: old, KERNELS_FIELD: {0: jnp.ones(2)}}
    match = (
        r"takes away what incumbents have in the state: .*\.mu\['a'\]\['w'\].*"
        r"\(in PartitionState / MaskedState / ScaleByAdamState\).*'esper_host'.*freeze"
    )
    refused(match, optimizer, state, old, new)


def test_a_mask_that_takes_an_incumbent_in_is_refused():
    def small(params: Any) -> Any:
        return jax.tree.map(lambda p: len(jax.tree.leaves(params)) > 2 or p.ndim > 1, params)

    optimizer = optax.masked(ADAM, small)
    state = trained(optimizer, OLD)
    match = r"gives anew what incumbents have.*\.mu\['b'\].*MaskedState"
    refused(match, optimizer, state, OLD, {**OLD, "c": jnp.ones((2, 2))})


def test_functions_of_values_are_refused_before_anything_is_made():
    optimizer = optax.masked(ADAM, lambda p: jax.tree.map(lambda x: bool(x.sum() > 0), p))
    match = r"(?s)init fails on old_params, called abstractly.*not at values"
    refused(match, optimizer, optimizer.init(OLD), OLD, {**OLD, "c": jnp.ones(2)})


def test_an_optimiser_of_other_functions_is_carried_by_naming_the_old_one():
    def only(*names: str) -> Any:
        return optax.masked(ADAM, lambda params: {name: name in names for name in params})

    state = trained(only("a"), OLD)
    new = {**OLD, "c": jnp.ones(2)}
    grown = carry(only("a", "c"), state, OLD, new, old_optimizer=only("a"))
    assert grown.inner_state[0].mu["a"] is state.inner_state[0].mu["a"]
    assert_bitwise(grown.inner_state[0].mu["c"], jnp.zeros(2))
    refused("init fails on the incumbents|not of the structure", only("a", "b"), state, OLD, new)
