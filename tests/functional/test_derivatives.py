"""Which derivatives a grafted network has: one, backwards; and every one without containment."""

import jax
import jax.numpy as jnp
import pytest

from esper_functional import (
    DerivativeError,
    bare,
    execute,
    forward,
    forward_dynamic,
    gather,
    init_seeds,
    linear,
    make_bank,
    plan,
)
from tests.functional.lives import state_of
from tests.functional.networks import SITES, batch, dense, dense_kernel, host_params, mlp
from tests.tolerance import assert_close, assert_tree_close

PARAMS, X = host_params(), batch(size=2)
KERNELS = {0: dense_kernel(0)}
STATE = state_of((0, 0, "active", 0))
MODES = ("planned", "dynamic")
every_mode = pytest.mark.parametrize("mode", MODES)


def grafted(mode, state=STATE, **options):
    """A function of the input."""
    if mode == "planned":
        own = plan(state, KERNELS, SITES, **options)
        live = gather(state, KERNELS, own)
        return lambda x: forward(mlp, own, PARAMS, live, x)[0]
    bank = make_bank(KERNELS)
    return lambda x: forward_dynamic(mlp, PARAMS, state, bank, x, sites=SITES, **options)[0]


def by_hand(x):
    h = 0.4 * linear(PARAMS["hidden"], x) + 0.6 * dense(KERNELS[0].params, x)
    return linear(PARAMS["out"], jax.nn.relu(h))


def squares(function):
    return lambda x: jnp.sum(function(x) ** 2)


FORBIDDEN = {
    "jvp": lambda f: jax.jvp(f, (X,), (X,)),
    "linearize": lambda f: jax.linearize(f, X)[1](X),
    "hessian": lambda f: jax.hessian(squares(f))(X),
    "grad of grad": lambda f: jax.grad(lambda x: jnp.sum(jax.grad(squares(f))(x)))(X),
    "jvp in a program": lambda f: jax.jit(lambda x: jax.jvp(f, (x,), (x,)))(X),
}


@pytest.mark.parametrize(
    ("mode", "name"),
    [("planned", "jacfwd"), *((mode, name) for mode in MODES for name in FORBIDDEN)],
)
def test_forward_mode_and_second_derivatives_are_refused_with_what_to_do(mode, name):
    with pytest.raises(DerivativeError, match=r"once, in reverse mode.*Use jax\.grad.*contain=Fal"):
        {**FORBIDDEN, "jacfwd": lambda f: jax.jacfwd(f)(X)}[name](grafted(mode))


def test_jacfwd_of_the_dynamic_mode_is_refused_in_the_same_words():
    with pytest.raises(DerivativeError, match="once, in reverse mode"):
        jax.jacfwd(grafted("dynamic"))(X)


@every_mode
def test_reverse_mode_is_there(mode):
    assert_close(jax.jacrev(grafted(mode))(X), jax.jacrev(by_hand)(X))


@every_mode
def test_without_containment_every_derivative_is_there(mode):
    free = grafted(mode, contain=False)
    assert_tree_close(jax.jvp(free, (X,), (X,)), jax.jvp(by_hand, (X,), (X,)))
    assert_close(jax.hessian(squares(free))(X), jax.hessian(squares(by_hand))(X))


def test_where_no_kernel_runs_in_the_plan_every_derivative_is_there():
    for state in (init_seeds(2, 2), state_of((0, 0, "incubating", 0))):
        ours = jax.hessian(squares(grafted("planned", state)))(X)
        assert_close(ours, jax.hessian(squares(lambda x: mlp(PARAMS, bare, x)))(X))


@every_mode
def test_isolation_leaves_the_hosts_own_derivatives(mode):
    """Kernels are constants there, and are not differentiated."""
    constant = jax.lax.stop_gradient

    def isolated(x):
        h = 0.4 * linear(PARAMS["hidden"], x) + 0.6 * dense(KERNELS[0].params, constant(x))
        return linear(PARAMS["out"], jax.nn.relu(h))

    ours = jax.hessian(squares(grafted(mode, isolate=True)))(X)
    assert_close(ours, jax.hessian(squares(isolated))(X))


def test_execute_with_a_concrete_state_has_gradients():
    def of(params):
        return jnp.sum(execute(mlp, params, STATE, KERNELS, X, sites=SITES)[0] ** 2)

    def dynamic(params, state):
        y, _ = execute(mlp, params, state, KERNELS, X, sites=SITES)
        return jnp.sum(y**2)

    assert_tree_close(jax.grad(of)(PARAMS), jax.jit(jax.grad(dynamic))(PARAMS, STATE))
