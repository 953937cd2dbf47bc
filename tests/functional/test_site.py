"""Sites: layers of several arguments and results, called once or twice, in both modes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import esper_functional as ef
from tests.functional.lives import low_rank_kernel
from tests.functional.networks import batch, dense, dense_kernel, host_params
from tests.tolerance import assert_bitwise, assert_close, assert_tree_close

PARAMS, X = host_params()["hidden"], batch()
KERNELS = {0: dense_kernel(0), 1: low_rank_kernel(1)}
BANK = ef.make_bank(KERNELS)
MASK = jnp.asarray(np.arange(20).reshape(5, 4) % 3 > 0)
KEY = jax.random.key(3)
MODES = ("planned", "dynamic")
every_mode = pytest.mark.parametrize("mode", MODES)


class Pair(NamedTuple):
    y: jax.Array
    aux: Any


def plain(params, x):
    return ef.linear(params, x)


def masked(params, x, mask):
    return jnp.where(mask, ef.linear(params, x), 0.0)


def keyed(params, x, *, key):
    return jnp.where(jax.random.bernoulli(key, 0.5, (5, 4)), ef.linear(params, x), 0.0)


def by_keyword(params, *, x, scale):
    return ef.linear(params, x) * scale


def paired(params, x, aux):
    return ef.linear(params, x), aux


def alone_in_a_tuple(params, x):
    return (ef.linear(params, x),)


def listed(params, x, aux):
    return [ef.linear(params, x), aux, None]


def named(params, x, aux):
    return Pair(ef.linear(params, x), {"aux": aux, "label": "static"})


AUX = {"mean": jnp.arange(3.0), "count": jnp.int32(7)}
LAYERS = {
    "one array": (plain, (X,), {}),
    "a mask": (masked, (X, MASK), {}),
    "a key": (keyed, (X,), {"key": KEY}),
    "keywords alone": (by_keyword, (), {"x": X, "scale": 2.0}),
    "a tuple": (paired, (X, AUX), {}),
    "a tuple of one": (alone_in_a_tuple, (X,), {}),
    "a list": (listed, (X, AUX), {}),
    "a named tuple": (named, (X, AUX), {}),
}


def grafted(*seeds: tuple[int, float]) -> ef.SeedState:
    """One layer of three seeds, of which each (slot, alpha) is ACTIVE."""
    events = []
    for seed, (slot, alpha) in enumerate(seeds):
        events.append(ef.Event(0, 0, seed, ef.EventKind.LOAD, value=float(slot)))
        events.append(ef.Event(0, 0, seed, ef.EventKind.ACTIVATE, value=alpha))
    return ef.fold_events(ef.init_seeds(1, 3), events)


def run_mode(mode, net, state, params=PARAMS, x: Any = X, kernels=KERNELS):
    """The network's result, and for each running kernel whether it failed."""
    if mode == "planned":
        own = ef.plan(state, kernels, ("layer",))
        y, seen = ef.forward(net, own, params, ef.gather(state, kernels, own), x)
        return y, [bool(f) for f in seen.faults]
    own = ef.make_bank(kernels)
    y, faults = ef.forward_dynamic(net, params, state, own, x, sites=("layer",))
    return y, [bool(faults[ij]) for ij in ef.running_seeds(state)]


STATE = grafted((0, 0.25), (1, 0.5))


def blended(h):
    own = KERNELS[1].params
    return h * 0.25 + dense(KERNELS[0].params, X) * 0.25 + X @ own["a"] @ own["b"] * 0.5


def first(result):
    return result[0] if isinstance(result, tuple | list) else result


def rest(result):
    return result[1:] if isinstance(result, tuple | list) else ()


@every_mode
@pytest.mark.parametrize("kind", LAYERS)
def test_the_first_array_is_blended_and_all_else_is_the_hosts(kind, mode):
    layer, args, options = LAYERS[kind]

    def net(params, site, _):
        return site("layer", layer, params, *args, **options)

    bare = net(PARAMS, ef.bare, X)
    ours, faults = run_mode(mode, net, STATE)
    assert faults == [False, False]
    assert type(ours) is type(bare)
    assert_close(first(ours), blended(first(bare)))
    assert_bitwise(*([jax.tree.leaves(rest(r)) for r in (ours, bare)]))
    if isinstance(bare, Pair):
        assert ours.aux["label"] == "static"
    # Dormant, the site is the layer's call and nothing else.
    dormant, _ = run_mode("planned", net, ef.init_seeds(1, 3))
    assert_bitwise(*([jax.tree.leaves((first(r), rest(r))[0]) for r in (dormant, bare)]))


@every_mode
def test_attention_gives_its_query_to_kernels_and_keeps_its_weights(mode):
    params = ef.init_attention(jax.random.key(1), 4, 2)
    query = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 4)), jnp.float32)
    memory = jnp.asarray(np.random.default_rng(2).normal(size=(2, 5, 4)), jnp.float32)
    mask = jnp.arange(5) < 4
    attend = ef.seeded(ef.attention, num_heads=2, mask=mask, need_weights=True)

    def net(params, site, inputs):
        return attend(params, site, *inputs)

    kernel = ef.kernel_from_function(lambda p, x: x @ p["w"], {"w": jnp.eye(4) * 3.0})
    state = grafted((0, 0.5))
    (y, weights), _ = run_mode(
        mode, net, state, params, (query, memory, memory), kernels={0: kernel}
    )
    h, plain_weights = net(params, ef.bare, (query, memory, memory))
    assert_close(y, 0.5 * h + 1.5 * query)
    assert_bitwise(weights, plain_weights)


def twice(params, site, x):
    first = site("layer", ef.linear, params, x)
    return first + 2.0 * site("layer", ef.linear, params, -x)


@every_mode
def test_a_layer_called_twice_runs_its_kernels_twice(mode):
    h = [ef.linear(PARAMS, x) for x in (X, -X)]
    k = [dense(KERNELS[0].params, x) for x in (X, -X)]
    ours, _ = run_mode(mode, twice, grafted((0, 0.25)))
    assert_close(ours, 0.75 * (h[0] + 2 * h[1]) + 0.25 * (k[0] + 2 * k[1]))


@every_mode
def test_the_gradient_of_a_layer_called_twice_is_the_sum(mode):
    state = grafted((0, 0.25))

    def of(kernel):
        kernels = {0: ef.Kernel(KERNELS[0].program, kernel)}
        own = ef.plan(state, kernels, ("layer",))
        if mode == "planned":
            y, _ = ef.forward(twice, own, PARAMS, ef.gather(state, kernels, own), X)
        else:
            held = ef.make_bank(kernels)
            y, _ = ef.forward_dynamic(twice, PARAMS, state, held, X, sites=("layer",))
        return jnp.sum(y)

    def by_hand(kernel):
        return jnp.sum(0.25 * dense(kernel, X) + 0.5 * dense(kernel, -X))

    own = KERNELS[0].params
    assert_tree_close(jax.jit(jax.grad(of))(own), jax.grad(by_hand)(own))


@every_mode
def test_a_layer_called_twice_fails_once_if_it_fails_in_either(mode):
    root = ef.kernel_from_function(
        lambda p, x: jnp.sqrt(jnp.sum(x, -1, keepdims=True)) * p["w"], {"w": jnp.ones(4)}
    )
    for x in (jnp.abs(X), -jnp.abs(X)):
        _, faults = run_mode(mode, twice, grafted((0, 0.25)), x=x, kernels={0: root})
        assert faults == [True]
    state = grafted((0, 0.25))
    _, after = ef.execute(twice, PARAMS, state, {0: root}, X, sites=("layer",))
    assert after.error_count.tolist() == [[1, 0, 0]]


def test_seeded_makes_a_host_of_any_layer():
    """By itself, with its options, and as a part of a larger network."""
    conv: Any = ef.seeded(ef.conv2d, name="conv", padding=1)
    params = ef.init_conv2d(jax.random.key(2), 2, 3, 3)
    image = jnp.asarray(np.random.default_rng(3).normal(size=(2, 2, 4, 4)), jnp.float32)
    assert_bitwise(conv(params, ef.bare, image), ef.conv2d(params, image, padding=1))
    strided = conv(params, ef.bare, image, stride=2)
    assert_bitwise(strided, ef.conv2d(params, image, padding=1, stride=2))
    assert_bitwise(conv(params, ef.bare, image, padding=0), ef.conv2d(params, image, padding=0))

    part = ef.seeded(ef.linear, "layer")

    def larger(params, site, x):
        return jnp.tanh(part(params, site, x))

    ours, _ = run_mode("planned", larger, STATE)
    assert_close(ours, jnp.tanh(blended(ef.linear(PARAMS, X))))


@every_mode
@pytest.mark.parametrize(
    ("layer", "args", "message"),
    [
        (lambda p, x: ef.linear(p, x["x"]), ({"x": X},), r"must take an array.*it does take dict"),
        (lambda p: p["bias"], (), r"must take an array.*it does take NoneType"),
        (lambda p, x: {"y": ef.linear(p, x)}, (X,), r"must return an array.*does return dict"),
        (lambda p, x: ((ef.linear(p, x), 1),), (X,), r"must return an array.*does return tuple"),
        (lambda p, x: (), (X,), r"must return an array.*does return tuple"),
        (lambda p, x: None, (X,), r"must return an array.*does return NoneType"),
    ],
    ids=["a dict in", "nothing in", "a dict out", "nested", "empty", "None"],
)
def test_a_grafted_layer_takes_and_returns_an_array_first(layer, args, message, mode):
    def net(params, site, _):
        return site("layer", layer, params, *args)

    with pytest.raises(ef.KernelMismatchError, match=r"site 'layer' carries kernels.*" + message):
        run_mode(mode, net, STATE)


def test_a_dormant_layer_takes_and_returns_anything():
    def net(params, site, x):
        return site("layer", lambda p, x: {"y": ef.linear(p, x["x"])}, params, {"x": x})

    ours, _ = run_mode("planned", net, ef.init_seeds(1, 3))
    assert_bitwise(ours, net(PARAMS, ef.bare, X))


def test_the_input_among_keywords_is_the_first_array():
    """As `seeded(layer, scale=2.0)` passes its own options first."""
    layer: Any = ef.seeded(by_keyword, scale=2.0)

    def net(params, site, x):
        return layer(params, site, x=x)

    ours, _ = run_mode("planned", net, STATE)
    assert_close(ours, blended(2.0 * ef.linear(PARAMS, X)))


@every_mode
def test_inputs_in_numpy_are_arrays(mode):
    def layer(params, x):
        return x @ params["weight"].T + params["bias"]

    ours, _ = run_mode(mode, ef.seeded(layer), STATE, x=np.asarray(X))
    assert_close(ours, blended(ef.linear(PARAMS, X)))
