"""Which of optax's optimisers can be carried: laws for those that can, errors for the others."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import DictKey
from optax import contrib

from esper_adapters.optax import OptimizerSurgeryError, carry, freeze, per_group
from tests.tolerance import assert_bitwise

NEW = "grown"


class Case(NamedTuple):
    make: Callable[[], Any]
    extra: Callable[[Any], dict[str, Any]] = lambda params: {}
    coupled: bool = False
    """Whether an incumbent's update depends on the other parameters'."""


def objective(params: Any) -> Any:
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


def with_value(params: Any) -> dict[str, Any]:
    return {"value": objective(params)}


def with_objective(params: Any) -> dict[str, Any]:
    return {"obj_fn": objective}


def with_line_search(params: Any) -> dict[str, Any]:
    value, grad = jax.value_and_grad(objective)(params)
    return {"value": value, "grad": grad, "value_fn": objective}


def matrices(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, params)


def labels(params: Any) -> Any:
    return jax.tree.map(lambda p: "matrix" if p.ndim > 1 else "vector", params)


def key() -> Any:
    return jax.random.key(0)


SCHEDULE = optax.linear_schedule(1e-2, 1e-3, 10)

CARRIED = {
    name: Case(partial(getattr(optax, name), 1e-2))
    for name in (
        *("adabelief", "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamaxw", "adamw"),
        *("adan", "amsgrad", "fromage", "lamb", "lars", "lion", "nadam", "nadamw", "novograd"),
        *("optimistic_adam_v2", "optimistic_gradient_descent", "radam", "rmsprop", "rprop"),
        *("sgd", "sign_sgd", "signum", "sm3", "yogi"),
    )
}
CARRIED |= {
    f"contrib.{name}": Case(partial(getattr(contrib, name), 1e-2))
    for name in (
        *("acprop", "ademamix", "adopt", "madgrad", "muon"),
        *("schedule_free_adamw", "schedule_free_sgd", "simplified_ademamix"),
    )
}
CARRIED |= {
    f"contrib.{name}": Case(partial(getattr(contrib, name), 1e-2), coupled=True)
    for name in ("dadapt_adamw", "prodigy", "dog", "dowg")
}
CARRIED |= {
    "contrib.cocob": Case(contrib.cocob),
    "contrib.sophia": Case(lambda: contrib.sophia(1e-2), with_objective, coupled=True),
    "contrib.momo": Case(lambda: contrib.momo(1e-2), with_value, coupled=True),
    "contrib.momo_adam": Case(lambda: contrib.momo_adam(1e-2), with_value, coupled=True),
    "contrib.mechanize": Case(lambda: contrib.mechanize(optax.adam(1e-2)), coupled=True),
    "contrib.sam": Case(lambda: contrib.sam(optax.adam(1e-2), optax.sgd(0.1))),
    "contrib.sam opaque": Case(
        lambda: contrib.sam(optax.adam(1e-2), optax.sgd(0.1), opaque_mode=True),
        lambda params: {"grad_fn": lambda p, _: jax.grad(objective)(p)},
    ),
    "contrib.reduce_on_plateau": Case(
        lambda: optax.chain(optax.adam(1e-2), contrib.reduce_on_plateau()), with_value, coupled=True
    ),
    "contrib.split_real_and_imaginary": Case(
        lambda: contrib.split_real_and_imaginary(optax.adam(1e-2))
    ),
    "sgd with momentum": Case(lambda: optax.sgd(1e-2, momentum=0.9, nesterov=True)),
    "centred rmsprop": Case(lambda: optax.rmsprop(1e-2, momentum=0.9, centered=True)),
    "factored adafactor": Case(
        lambda: optax.adafactor(1e-2, min_dim_size_to_factor=2, momentum=0.9)
    ),
    "adamw with a schedule": Case(lambda: optax.adamw(SCHEDULE)),
    "polyak_sgd": Case(optax.polyak_sgd, with_value, coupled=True),
    "noisy_sgd": Case(lambda: optax.noisy_sgd(1e-2, key=key()), coupled=True),
    "add_noise": Case(lambda: optax.add_noise(0.1, 0.5, key=key()), coupled=True),
    "ema": Case(lambda: optax.ema(0.9)),
    "apply_every": Case(lambda: optax.apply_every(3)),
    "zero_nans": Case(lambda: optax.chain(optax.zero_nans(), optax.adam(1e-2))),
    "clip_by_global_norm": Case(
        lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)), coupled=True
    ),
    "adaptive_grad_clip": Case(lambda: optax.chain(optax.adaptive_grad_clip(0.1), optax.sgd(0.1))),
    "scale_by_rss": Case(optax.scale_by_rss),
    "named_chain": Case(
        lambda: optax.named_chain(("momentum", optax.trace(0.9)), ("step", optax.scale(-0.1)))
    ),
    "masked": Case(lambda: optax.masked(optax.adam(1e-2), matrices)),
    "masked decay": Case(lambda: optax.adamw(1e-2, mask=matrices)),
    "partition": Case(
        lambda: optax.partition(
            {"matrix": optax.adam(1e-2), "vector": optax.sgd(1e-2, 0.9)}, labels
        )
    ),
    "inject_hyperparams": Case(
        lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=SCHEDULE, weight_decay=0.1)
    ),
    "MultiSteps": Case(lambda: optax.MultiSteps(optax.adam(1e-2), 3)),
    "apply_if_finite": Case(lambda: optax.apply_if_finite(optax.adam(1e-2), 3), coupled=True),
    "conditionally_transform": Case(
        lambda: optax.conditionally_transform(optax.adam(1e-2), lambda step: step < 3)
    ),
    "schedule_free": Case(lambda: contrib.schedule_free(optax.rmsprop(1e-2), 1e-2)),
    "snapshot": Case(lambda: optax.snapshot("norm", optax.tree.norm)),
    "freeze": Case(lambda: freeze(optax.adamw(1e-2), matrices)),
    "freeze in muon's way": Case(lambda: freeze(contrib.muon(1e-2), matrices)),
    "per_group": Case(
        lambda: per_group(optax.adamw(SCHEDULE), lambda params: {name: name for name in params})
    ),
}

REFUSED = {
    "flatten": (lambda: optax.flatten(optax.adam(1e-2)), r"\[0\]\.mu in ScaleByAdamState.*flatten"),
    "lbfgs": (lambda: optax.lbfgs(linesearch=None), r"ScaleByLBFGSState at \[0\]"),
    "line search": (
        lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(3)),
        r"ScaleByBacktrackingLinesearchState at \[1\].*objective's value",
    ),
    "zoom line search": (
        lambda: optax.chain(optax.sgd(1.0), optax.scale_by_zoom_linesearch(3)),
        r"ScaleByZoomLinesearchState at \[1\]",
    ),
    "galore": (lambda: contrib.galore(1e-2, rank=2), r"GaLoreState at \[0\].*update_proj_gap"),
    "monitor": (
        lambda: optax.monitor({"norm": optax.tree.norm}),
        r"found and not expected: \.measurements\['norm'\] \(in MonitorState\)",
    ),
}


def random_like(params: Any, seed: int) -> Any:
    """The same numbers for the same top-level entry, whatever stands beside it."""
    return {
        name: jax.tree.map(
            lambda leaf, n=name: jnp.asarray(
                np.random.default_rng([seed, len(n)]).normal(size=leaf.shape), leaf.dtype
            ),
            part,
        )
        for name, part in params.items()
    }


def step(optimizer: Any, state: Any, params: Any, seed: int, extra: Any) -> tuple[Any, Any]:
    with jax.numpy_dtype_promotion("standard"):
        return optimizer.update(random_like(params, seed), state, params, **extra(params))


def train(optimizer: Any, extra: Any = lambda params: {}) -> tuple[Any, Any]:
    params = {"a": {"b": jnp.full(4, 0.2), "w": jnp.full((3, 4), 0.5)}}
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(params)
    for seed in range(4):
        updates, state = step(optimizer, state, params, seed, extra)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_same_arrays(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a is b


def grow(params: Any) -> Any:
    return {**params, NEW: {"c": jnp.full(2, 0.1), "u": jnp.full((4, 2), 0.3)}}


@pytest.fixture(autouse=True)
def _standard_promotion():
    # One operation at a time: XLA fuses a larger tree otherwise, and may round otherwise.
    with jax.numpy_dtype_promotion("standard"), jax.disable_jit():
        yield


@pytest.mark.parametrize("name", CARRIED)
def test_growing_keeps_incumbents_and_starts_newcomers_as_init_does(name):
    make, extra, coupled = CARRIED[name]
    optimizer = make()
    params, state = train(optimizer, extra)
    assert_same_arrays(carry(optimizer, state, params, params), state)

    larger = grow(params)
    grown = carry(optimizer, state, params, larger)
    initial = dict(jax.tree_util.tree_leaves_with_path(optimizer.init(larger)))
    old = dict(jax.tree_util.tree_leaves_with_path(state))
    for path, leaf in jax.tree_util.tree_leaves_with_path(grown):
        if DictKey(NEW) in path:
            assert_bitwise(leaf, initial[path])
        else:
            assert leaf is old[path]

    updates, after = step(optimizer, grown, larger, 9, extra)
    assert jax.tree.structure(after) == jax.tree.structure(grown)
    ungrown, _ = step(optimizer, state, params, 9, extra)
    if not coupled:
        assert_bitwise(updates["a"], ungrown["a"])

    assert_same_arrays(carry(optimizer, grown, larger, params), state)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_carried_is_named_with_what_to_do(name):
    make, message = REFUSED[name]
    optimizer = make()
    params, state = train(optimizer, with_line_search if "search" in name else lambda params: {})
    with pytest.raises(OptimizerSurgeryError, match=message) as caught:
        carry(optimizer, state, params, grow(params))
    advice = "old_optimizer" if name == "monitor" else r"optimizer\.init\(new_params\)"
    assert caught.match(advice)


@pytest.mark.parametrize("name", ["lbfgs", "flatten", "galore"])
def test_what_changes_no_parameter_is_never_refused(name):
    optimizer = REFUSED[name][0]()
    params, state = train(optimizer)
    assert_same_arrays(carry(optimizer, state, params, params), state)


def test_galore_can_be_pruned():
    optimizer = contrib.galore(1e-2, rank=2)
    params, state = train(optimizer)
    kept = {"a": {"w": params["a"]["w"]}}
    shrunk = carry(optimizer, state, params, kept)
    assert shrunk[0].projector["a"]["w"] is state[0].projector["a"]["w"]


def test_lookahead_is_carried_by_both_its_trees():
    optimizer = optax.lookahead(optax.adam(1e-2), sync_period=3, slow_step_size=0.5)
    params, _ = train(optax.sgd(1e-2))
    pair = optax.LookaheadParams.init_synced(params)
    state = optimizer.init(pair)
    _, state = optimizer.update(random_like(params, 0), state, pair)
    larger = optax.LookaheadParams(*map(grow, pair))
    grown = carry(optimizer, state, pair, larger)
    assert grown.fast_state[0].mu["a"]["w"] is state.fast_state[0].mu["a"]["w"]
    assert grown.steps_since_sync is state.steps_since_sync
    updates, _ = optimizer.update(random_like(larger.fast, 9), grown, larger)
    ungrown, _ = optimizer.update(random_like(params, 9), state, pair)
    assert_bitwise(updates.fast["a"], ungrown.fast["a"])


def test_a_vector_over_all_parameters_is_found_where_sizes_happen_to_agree():
    optimizer = optax.flatten(optax.adam(1e-2))
    params = {"a": jnp.ones(3), "b": jnp.ones(4)}
    state = optimizer.init(params)
    with pytest.raises(OptimizerSurgeryError, match=r"float32\[7\], and float32\[4\]"):
        carry(optimizer, state, params, {"b": params["b"], "c": jnp.ones(3)})
