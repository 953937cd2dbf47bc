"""What a forward pass is told of: maps around it, sites it never calls, arrays traced in part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper_functional import (
    KasminaException,
    KernelMismatchError,
    UncalledSiteWarning,
    attention,
    bare,
    count_faults,
    execute,
    forward,
    forward_dynamic,
    gather,
    host_call,
    init_attention,
    kernel_from_function,
    lift,
    linear,
    plan,
    record_faults,
    state_digest,
)
from tests.functional.lives import KERNELS, bank, state_of
from tests.functional.networks import SITES, batch, host_params, mlp
from tests.tolerance import assert_bitwise, assert_close, assert_tree_close

PARAMS, X, BANK = host_params(), batch(), bank()
STATE = state_of((0, 0, "active", 0), (1, 0, "active", 4))
OWN = plan(STATE, KERNELS, SITES)
LIVE = gather(STATE, KERNELS, OWN)
NOISE = jnp.array([1.0, jnp.nan, 2.0])


def in_plan(net, x=X):
    y, seen = forward(net, OWN, PARAMS, LIVE, x)
    return y, jnp.stack(seen.faults)


def in_program(net, x=X):
    return forward_dynamic(net, PARAMS, STATE, BANK, x, sites=SITES)


modes = pytest.mark.parametrize("run", [in_plan, in_program], ids=["planned", "dynamic"])


@modes
def test_a_map_over_what_the_network_closes_over_is_refused(run):
    def noisy(c):
        return run(lambda params, site, x: mlp(params, site, x * c))

    for transformed in (jax.vmap(noisy), jax.jit(jax.vmap(noisy)), jax.vmap(jax.jit(noisy))):
        with pytest.raises(KasminaException, match="closes over.*a part of x or params"):
            transformed(NOISE)


@modes
def test_given_as_a_part_of_x_it_is_the_loop(run):
    def noisy(c):
        return run(lambda params, site, x: mlp(params, site, x[0] * x[1]), (X, c))

    _, faults = jax.vmap(noisy)(NOISE)
    assert_bitwise(faults, np.stack([noisy(c)[1] for c in NOISE]))
    assert faults.reshape(3, -1).any(axis=1).tolist() == [False, True, False]


@modes
def test_what_is_mapped_after_the_pass_is_not_its_affair(run):
    target = jnp.arange(3.0)
    losses = jax.vmap(lambda t: jnp.sum((run(mlp)[0] - t) ** 2))(target)
    assert_close(losses, jnp.stack([jnp.sum((run(mlp)[0] - t) ** 2) for t in target]))


@modes
@pytest.mark.parametrize("transform", [jax.vmap, lambda f: lambda x: jax.lax.map(f, x)])
def test_a_lifted_map_gives_one_fault_for_all_rows(run, transform):
    def net(params, site, x):
        def part(site, row):
            return site("hidden", linear, params["hidden"], row)

        return site("out", linear, params["out"], jax.nn.relu(lift(site, transform, part)(x)))

    def plain(params, site, x):
        hidden = site("hidden", linear, params["hidden"], x)
        return site("out", linear, params["out"], jax.nn.relu(hidden))

    for x in (X, X.at[1].set(jnp.inf)):
        ours, theirs = run(net, x), run(plain, x)
        assert_tree_close(ours[1], theirs[1])
    y, faults = run(net)
    assert_close(y, run(plain)[0])
    assert faults.size == in_plan(mlp)[1].size or faults.shape == STATE.shape


def test_a_site_with_kernels_that_is_never_called_is_warned_of_and_not_counted():
    def short(params, site, x):
        return site("hidden", linear, params["hidden"], x)

    with pytest.warns(UncalledSiteWarning, match=r"run at \['out'\].*called \['hidden'\]"):
        _, seen = forward(short, OWN, PARAMS, LIVE, X, capture=True)
    assert [fault is None for fault in seen.faults] == [False, True]
    assert [output is None for output in seen.outputs] == [False, True]
    twice = state_of((0, 0, "active", 0), (1, 0, "failed twice", 4))
    live = gather(twice, KERNELS, OWN)
    assert count_faults(live, seen.faults).errors.tolist() == [0, 2]
    dormant = plan(state_of(), KERNELS, SITES)
    forward(short, dormant, PARAMS, None, X)


def test_a_state_of_which_a_part_is_traced_runs_dynamically():
    def swept(factor):
        state = STATE.replace(alpha=STATE.alpha * factor)
        return execute(mlp, PARAMS, state, KERNELS, X, sites=SITES)[0]

    factors = jnp.array([0.0, 0.5, 1.0])
    ys = jax.vmap(swept)(factors)
    for factor, y in zip(factors, ys, strict=True):
        state = STATE.replace(alpha=STATE.alpha * np.asarray(factor))
        assert_close(y, execute(mlp, PARAMS, state, KERNELS, X, sites=SITES)[0])


def test_a_bank_that_is_traced_runs_dynamically():
    y = jax.jit(lambda b: execute(mlp, PARAMS, STATE, b, X, sites=SITES)[0])(BANK)
    assert_close(y, execute(mlp, PARAMS, STATE, BANK, X, sites=SITES)[0])


def test_faults_may_be_traced_where_the_state_is_not():
    @jax.jit
    def step(x):
        _, faults = forward_dynamic(mlp, PARAMS, STATE, BANK, x, sites=SITES)
        return record_faults(STATE, faults, step=3)

    after = jax.tree.map(np.asarray, step(X.at[0].set(jnp.nan)))
    assert after.error_count.tolist() == [[1, 0], [1, 0]]
    assert state_digest(jax.tree.map(np.asarray, step(X))) == state_digest(STATE)


def test_without_a_step_nothing_but_counts_and_stages_changes():
    state = state_of((0, 0, "failed twice", 3), (0, 1, "ramping", 1))
    for run in (execute, jax.jit(execute, static_argnames=("net", "sites"))):
        _, after = run(net=mlp, params=PARAMS, state=state, kernels=BANK, x=X, sites=SITES)
        assert np.asarray(after.error_count)[0, 0] == 3
        assert_bitwise(np.asarray(after.last_update), state.last_update)
        assert_bitwise(np.asarray(after.alpha), state.alpha)


def test_alphas_have_no_gradient_in_either_mode():
    def dynamic(alpha):
        state = jax.tree.map(jnp.asarray, STATE).replace(alpha=alpha)
        return jnp.sum(forward_dynamic(mlp, PARAMS, state, BANK, X, sites=SITES)[0])

    assert not np.asarray(jax.grad(dynamic)(jnp.asarray(STATE.alpha))).any()


def test_a_layer_called_by_name_with_several_arrays_is_refused():
    params = init_attention(jax.random.key(0), 4, 2)
    x = jnp.ones((3, 4))
    kernel = kernel_from_function(lambda p, x: x * p, jnp.ones(()))
    own = plan(STATE, {0: kernel, 4: kernel}, SITES)
    live = gather(STATE, {0: kernel, 4: kernel}, own)

    def net(params, site, x):
        return site("hidden", attention, params, num_heads=2, mask=jnp.zeros((3, 3)), query=x)

    with pytest.raises(KernelMismatchError, match=r"\['mask', 'query'\] by name.*positionally"):
        forward(net, own, params, live, x)
    assert host_call("site", x, (), {"x": x, "flag": True}).x is x
    assert bare("hidden", linear, PARAMS["hidden"], X).shape == (len(X), 4)
