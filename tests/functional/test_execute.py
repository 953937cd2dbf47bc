"""Running a network with kernels: dormant costs nothing, grafted is the formula."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper_functional import (
    BLENDS,
    KasminaException,
    KernelMismatchError,
    SeedIndexError,
    bare,
    execute,
    forward,
    gather,
    init_seeds,
    kernel_from_function,
    linear,
    plan,
    run,
    state_digest,
)
from tests.functional.networks import (
    SITES,
    batch,
    dense,
    dense_kernel,
    filled,
    fossilise,
    grafted_state,
    host_params,
    mlp,
    optimised_hlo,
)
from tests.tolerance import assert_bitwise, assert_close, assert_finite, assert_tree_close

PARAMS, X = host_params(), batch()
KERNELS = {0: dense_kernel(0), 1: dense_kernel(1), 2: dense_kernel(2, "out")}
STATE = grafted_state((0, 0, 0, 0.2), (0, 2, 1, 0.3), (1, 1, 2, 0.6))


def loss_of(net):
    return lambda params, x: jnp.sum(net(params, x) ** 2)


def sgd(net, params, x):
    value, grads = jax.value_and_grad(loss_of(net))(params, x)
    return value, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)


def by_hand(blend, params, kernels, x, stop=lambda x: x):
    """`mlp` with the kernels of `STATE` written out; `stop` is applied to kernel inputs."""

    def mixed(h, pairs):
        if blend == "convex":
            s = sum(a for a, _ in pairs)
            return h * (1 - s) + sum(a * k for a, k in pairs)
        for a, k in pairs:
            h = h + a * k if blend == "residual" else (1 - a) * h + a * k
        return h

    h = linear(params["hidden"], x)
    ks = [dense(kernels[i], stop(x)) for i in (0, 1)]
    h = jax.nn.relu(mixed(h, list(zip((0.2, 0.3), ks, strict=True))))
    y = linear(params["out"], h)
    return mixed(y, [(0.6, dense(kernels[2], stop(h)))])


def planned(state, **options):
    planned = plan(state, KERNELS, SITES, **options)
    return planned, gather(state, KERNELS, planned)


def grafted(state, **options):
    """`(params, kernel params, x) -> output` with the kernels of a state."""
    own, live = planned(state, **options)
    assert live is not None

    def net(params, kernels, x):
        chosen = replace(live, params=tuple(kernels))
        return forward(mlp, own, params, chosen, x)[0]

    return net, live.params


def test_dormant_forward_compiles_to_the_very_program_of_the_bare_network():
    own, live = planned(init_seeds(2, 3))
    plain = optimised_hlo(lambda params, x: mlp(params, bare, x), PARAMS, X)
    dormant = optimised_hlo(lambda params, x: forward(mlp, own, params, live, x)[0], PARAMS, X)
    assert dormant == plain
    assert "dot" in plain
    assert "metadata" not in plain


def test_a_dormant_training_step_compiles_to_the_very_program_of_the_bare_one():
    own, live = planned(init_seeds(2, 3))
    plain = optimised_hlo(partial(sgd, lambda params, x: mlp(params, bare, x)), PARAMS, X)
    dormant = optimised_hlo(
        lambda params, x: sgd(lambda p, x: run(mlp, own, p, live, x)[0], params, x), PARAMS, X
    )
    assert dormant == plain


def test_a_grafted_network_compiles_to_another():
    own, live = planned(STATE)
    plain = optimised_hlo(lambda params, x: mlp(params, bare, x), PARAMS, X)
    assert (
        optimised_hlo(lambda params, x: forward(mlp, own, params, live, x)[0], PARAMS, X) != plain
    )


@pytest.mark.parametrize("blend", BLENDS)
def test_jit_equals_eager(blend):
    own, live = planned(STATE, blend=blend)
    eager = run(mlp, own, PARAMS, live, X)
    assert_tree_close(jax.jit(partial(run, mlp, own))(PARAMS, live, X), eager)


@pytest.mark.parametrize("blend", BLENDS)
def test_output_and_gradients_are_those_of_the_composition_written_by_hand(blend):
    net, kernels = grafted(STATE, blend=blend)
    hand = partial(by_hand, blend)
    assert_close(net(PARAMS, kernels, X), hand(PARAMS, kernels, X))
    ours, theirs = (
        jax.jit(jax.grad(lambda *a, f=f: jnp.sum(f(*a) ** 2), argnums=(0, 1, 2)))(
            PARAMS, kernels, X
        )
        for f in (net, hand)
    )
    assert_tree_close(ours, theirs)
    assert all(np.asarray(g).any() for g in jax.tree.leaves(ours))


@pytest.mark.parametrize("blend", BLENDS)
def test_isolation_stops_the_gradient_from_kernels_to_their_input_alone(blend):
    net, kernels = grafted(STATE, blend=blend, isolate=True)
    hand = partial(by_hand, blend, stop=jax.lax.stop_gradient)
    assert_close(net(PARAMS, kernels, X), by_hand(blend, PARAMS, kernels, X))
    ours, theirs = (
        jax.jit(jax.grad(lambda *a, f=f: jnp.sum(f(*a) ** 2), argnums=(0, 1, 2)))(
            PARAMS, kernels, X
        )
        for f in (net, hand)
    )
    assert_tree_close(ours, theirs)
    assert all(np.asarray(g).any() for g in jax.tree.leaves(ours[1]))


def test_parameters_of_fossils_get_no_gradient_and_all_others_keep_theirs():
    net, kernels = grafted(fossilise(STATE, 0, 2))
    open_net, _ = grafted(STATE)
    assert_close(net(PARAMS, kernels, X), open_net(PARAMS, kernels, X))
    ours, theirs = (
        jax.jit(jax.grad(lambda *a, f=f: jnp.sum(f(*a) ** 2), argnums=(0, 1, 2)))(
            PARAMS, kernels, X
        )
        for f in (net, open_net)
    )
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(ours[1][1]))
    ours[1][1].clear()
    theirs[1][1].clear()
    assert_tree_close(ours, theirs)


def test_a_dormant_seed_whose_kernel_is_nan_leaves_every_bit():
    poisoned = {slot: filled(kernel, np.nan) for slot, kernel in KERNELS.items()}
    state = init_seeds(2, 3)
    own = plan(state, poisoned, SITES)
    plain = mlp(PARAMS, bare, X)
    assert_finite(plain)
    assert_bitwise(forward(mlp, own, PARAMS, gather(state, poisoned, own), X)[0], plain)


def test_alpha_zero_gives_the_host_exactly_and_alpha_one_the_kernel():
    one_site = partial(lambda params, site, x: site("hidden", linear, params["hidden"], x))
    for alpha, expected in ((0.0, linear(PARAMS["hidden"], X)), (1.0, dense(KERNELS[0].params, X))):
        state = grafted_state((0, 1, 0, alpha))
        own, live = planned(state)
        assert_bitwise(forward(one_site, own, PARAMS, live, X)[0], expected)


def test_execute_runs_and_hands_the_state_back():
    own, live = planned(STATE)
    y, after = execute(mlp, PARAMS, STATE, KERNELS, X, sites=SITES)
    assert_close(y, jax.jit(partial(run, mlp, own))(PARAMS, live, X)[0])
    assert state_digest(after) == state_digest(STATE)
    dormant, _ = execute(mlp, PARAMS, init_seeds(2, 3), {}, X, sites=SITES)
    assert_bitwise(dormant, jax.jit(lambda params, x: mlp(params, bare, x))(PARAMS, X))


@pytest.mark.parametrize("blend", BLENDS)
def test_execute_passes_its_options_on(blend):
    net, kernels = grafted(STATE, blend=blend)
    y, _ = execute(mlp, PARAMS, STATE, KERNELS, X, sites=SITES, blend=blend, isolate=True)
    assert_close(y, net(PARAMS, kernels, X))


def test_outputs_are_captured_where_asked_for():
    own, live = planned(STATE)
    y, seen = forward(mlp, own, PARAMS, live, X, capture=True)
    assert_bitwise(forward(mlp, own, PARAMS, live, X)[0], y)
    assert forward(mlp, own, PARAMS, live, X)[1].outputs == ()
    assert_close(seen.outputs[1], dense(KERNELS[1].params, X))
    assert [o.shape for o in seen.outputs] == [(5, 4), (5, 4), (5, 2)]


def test_a_live_part_of_another_plan_is_refused():
    own, live = planned(STATE)
    dormant, nothing = planned(init_seeds(2, 3))
    for plan_, live_ in ((dormant, live), (own, nothing)):
        with pytest.raises(KasminaException, match="gather the live part with the plan"):
            forward(mlp, plan_, PARAMS, live_, X)


def test_an_unknown_site_is_refused_with_the_nearest():
    own = plan(init_seeds(2, 3), {}, ("hiden", "out"))
    with pytest.raises(SeedIndexError, match=r"unknown site 'hidden'.*nearest are \['hiden'\]"):
        forward(mlp, own, PARAMS, gather(init_seeds(2, 3), {}, own), X)


def test_a_kernel_of_another_shape_is_refused_while_tracing():
    narrow = kernel_from_function(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 1))})
    state = grafted_state((0, 0, 0, 0.5))
    own = plan(state, [narrow], SITES)
    with pytest.raises(
        KernelMismatchError, match=r"float32\[5, 1\].*host site 'hidden' returns float32\[5, 4\]"
    ):
        forward(mlp, own, PARAMS, gather(state, [narrow], own), X)
