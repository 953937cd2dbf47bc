"""What does not belong together is refused in both modes, with what to do about it."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from esper_functional import (
    BlendError,
    KasminaException,
    KernelMismatchError,
    SeedIndexError,
    absorb,
    bare,
    execute,
    forward,
    forward_batch,
    init_seeds,
    kernel_from_function,
    make_bank,
    run,
    shadow_forward,
)
from tests.functional.lives import KERNELS, planned, state_of
from tests.functional.networks import SITES, batch, dense, dense_kernel, host_params, mlp
from tests.tolerance import assert_close

PARAMS, X = host_params(), batch()
HIDDEN = state_of((0, 0, "active", 0))


def in_plan(state, kernels=KERNELS, net=mlp, sites=SITES, **options):
    return execute(net, PARAMS, state, kernels, X, sites=sites, **options)


def in_program(state, kernels=KERNELS, net=mlp, sites=SITES, **options):
    own = make_bank(kernels)
    return jax.jit(lambda state: execute(net, PARAMS, state, own, X, sites=sites, **options))(state)


both_modes = pytest.mark.parametrize("executed", [in_plan, in_program], ids=["planned", "dynamic"])


@both_modes
def test_a_plan_of_another_model_names_the_unknown_site_and_the_nearest(executed):
    with pytest.raises(
        SeedIndexError,
        match=r"unknown site 'hidden': this plan has \['hiden', 'out'\].*\['hiden'\]",
    ):
        executed(state_of(), sites=("hiden", "out"))


@both_modes
@pytest.mark.parametrize("axes", [(3, 2), (1, 2), (2, 2, 2), (4,)])
def test_a_state_of_another_shape_is_refused_with_both(axes, executed):
    with pytest.raises(
        SeedIndexError,
        match=r"each of the 2 sites \('hidden', 'out'\); got shape \(" + ", ".join(map(str, axes)),
    ):
        executed(init_seeds(*axes))


@both_modes
def test_two_sites_of_one_name_are_refused(executed):
    with pytest.raises(SeedIndexError, match=r"different names; got \('hidden', 'hidden'\)"):
        executed(init_seeds(2, 2), sites=("hidden", "hidden"))


@both_modes
def test_an_unknown_blend_is_refused_with_the_nearest(executed):
    with pytest.raises(BlendError, match="unknown blend 'sequental'.*did you mean 'sequential'"):
        executed(HIDDEN, blend="sequental")


@both_modes
@pytest.mark.parametrize("axes", [(2, 0), (2, 1), (2, 5)])
def test_any_number_of_seeds_will_do(axes, executed):
    y, after = executed(init_seeds(*axes))
    assert after.shape == axes
    assert_close(y, mlp(PARAMS, bare, X))


def live_parts():
    """Live parts that belong to other plans, and how they differ from one of two kernels."""
    one, two = state_of((0, 0, "active", 0)), state_of((0, 0, "active", 0), (0, 1, "active", 1))
    return {
        "of none": None,
        "of one kernel": planned(one)[1],
        "of two at one site": planned(two)[1],
        "of three": planned(state_of(*((0, i, "active", 0) for i in (0, 1)), (1, 0, "active", 4)))[
            1
        ],
    }


@pytest.mark.parametrize("name", live_parts())
@pytest.mark.parametrize("go", [forward, forward_batch, run, shadow_forward])
def test_a_live_part_of_another_plan_is_refused(go, name):
    own, _ = planned(state_of((0, 0, "active", 0), (1, 0, "active", 4)))
    live = live_parts()[name]
    for given in (live, jax.tree.map(jnp.asarray, live)):
        with pytest.raises(KasminaException, match="gather the live part with the plan"):
            go(mlp, own, PARAMS, given, X)


def test_the_message_says_how_many_there_are_and_should_be():
    own, _ = planned(state_of((0, 0, "active", 0), (1, 0, "active", 4)))
    with pytest.raises(
        KasminaException, match="runs 2 kernels at 2 sites and the live part holds 2 of 1"
    ):
        forward(mlp, own, PARAMS, live_parts()["of two at one site"], X)


def test_a_live_part_without_shadows_is_refused_where_kernels_incubate():
    own, live = planned(state_of((0, 0, "incubating", 0)))
    waiting = planned(state_of((0, 0, "active at 0", 0)))[1]
    assert len(live.shadows) == 1
    with pytest.raises(KasminaException, match="1 incubating kernels and.*weights of 0 shadows"):
        shadow_forward(mlp, own, PARAMS, waiting, X)
    with pytest.raises(KasminaException, match="a dormant plan has no live part"):
        shadow_forward(mlp, own, PARAMS, None, X)


def test_absorbing_into_another_state_is_refused():
    own, live = planned(state_of((0, 0, "active", 0), (1, 0, "active", 4)))
    _, after = run(mlp, own, PARAMS, live, X)
    with pytest.raises(KasminaException, match="the state runs 1 seeds and the live part has 2"):
        absorb(HIDDEN, after, step=0)


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap])
def test_a_concrete_state_among_traced_arguments_is_refused_with_what_to_do(transform):
    with pytest.raises(KasminaException, match="state"):
        transform(lambda x: execute(mlp, PARAMS, HIDDEN, KERNELS, x, sites=SITES)[0])(X[None])


def misfit(apply, **params):
    return kernel_from_function(apply, {n: jnp.asarray(p) for n, p in params.items()})


W = jnp.ones((3, 4))
MISFITS = {
    "narrow": (
        misfit(lambda p, x: x @ p["w"], w=W[:, :1]),
        r"returned float32\[5, 1\].*site 'hidden'.*returns float32\[5, 4\]",
    ),
    "another input": (
        misfit(lambda p, x: x @ p["w"], w=jnp.ones((2, 4))),
        r"does not fit site 'hidden', which needs float32\[5, 3\] -> float32\[5, 4\].*TypeError",
    ),
    "another rank": (
        misfit(lambda p, x: (x @ p["w"])[..., None], w=W),
        r"returned float32\[5, 4, 1\].*site 'hidden'.*returns float32\[5, 4\]",
    ),
    "another dtype": (
        misfit(lambda p, x: (x @ p["w"]).astype(jnp.bfloat16), w=W),
        r"returned bfloat16\[5, 4\].*site 'hidden'.*returns float32\[5, 4\]",
    ),
    "mixed dtypes": (
        misfit(lambda p, x: x @ p["w"], w=W.astype(jnp.float16)),
        r"does not fit site 'hidden', which needs float32\[5, 3\] -> float32\[5, 4\]",
    ),
    "a missing parameter": (
        misfit(lambda p, x: x @ p["w"], v=W),
        r"does not fit site 'hidden'.*KeyError: 'w'",
    ),
    "examples of a higher rank": (
        kernel_from_function(dense, dense_kernel(0).params, example_rank=3),
        r"takes examples of rank 3, and site 'hidden' gives it float32\[5, 3\]",
    ),
    "a pair": (
        misfit(lambda p, x: (x @ p["w"], x), w=W),
        r"site 'hidden'",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_kernel_that_does_not_fit_names_site_expected_and_found_while_tracing(name):
    kernel, message = MISFITS[name]
    own, live = planned(HIDDEN, {0: kernel})
    for function in (
        lambda: forward(mlp, own, PARAMS, live, X),
        lambda: jax.eval_shape(lambda x: forward(mlp, own, PARAMS, live, x)[0], X),
    ):
        with pytest.raises(KernelMismatchError, match=message) as caught:
            function()
        assert kernel.program.key in str(caught.value)


@pytest.mark.parametrize("name", MISFITS)
def test_inside_a_program_it_counts_as_failed_instead(name):
    kernel, _ = MISFITS[name]
    y, after = in_program(HIDDEN, {0: kernel})
    assert after.error_count.tolist() == [[1, 0], [0, 0]]
    assert_close(y, mlp(PARAMS, bare, X))


def test_errors_of_the_host_are_the_hosts_own():
    """Nothing that a layer raises is taken for a kernel's."""

    def broken(params, site, x):
        def layer(params, x):
            raise ZeroDivisionError("the layer's own")

        return site("hidden", layer, params["hidden"], x)

    for executed in (in_plan, in_program):
        with pytest.raises(ZeroDivisionError, match="the layer's own"):
            executed(HIDDEN, net=broken)


def test_parameters_of_another_shape_than_the_plans_are_seen_while_tracing():
    own, live = planned(HIDDEN)
    other = dataclasses.replace(live, params=(dense_kernel(0, "out").params,))
    with pytest.raises(KernelMismatchError, match="does not fit site 'hidden', which needs"):
        forward(mlp, own, PARAMS, other, X)
