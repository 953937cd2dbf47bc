"""Laws of hosts: one set of first parameters, and one function of them, on both backends."""

import dataclasses
import hashlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F

import esper
from esper.tolaria.tasks import ConvHost, CustomHost, MLPHost, TextHost, initial_host
from tests.tolerance import assert_bitwise, assert_close

HOSTS = [
    MLPHost((2, 8, 2)),
    MLPHost((5, 4, 3, 2)),
    MLPHost((3, 2)),
    ConvHost(1, 8, (2, 4), 3),
    ConvHost(3, 8, (4, 4, 6), 5, groups=2),
    TextHost(7, embedding=3, window=4, channels=5, hidden=2),
]


def named(module):
    params = eqx.filter(module, eqx.is_inexact_array)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(p, simple=True, separator="."): leaf for p, leaf in leaves}


def examples(host, count=6):
    random = np.random.default_rng(5)
    takes = host.interface()
    shape = (count, *(9 if n is None else n for n in takes.example))
    if takes.tokens:
        x = random.integers(0, takes.vocabulary, shape).astype(np.int32)
        return x, random.integers(0, takes.outputs, shape).astype(np.int32)
    x = random.standard_normal(shape).astype(np.float32)
    return x, random.integers(0, takes.outputs, count).astype(np.int32)


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.name)
def test_both_backends_hold_the_same_first_parameters(host):
    params = host.params(3)
    ours, theirs = named(host.jax(3)), dict(host.torch(3).named_parameters())
    assert ours.keys() == theirs.keys() == params.keys()
    for name, value in params.items():
        assert value.dtype == np.float32
        assert_bitwise(np.asarray(ours[name]).reshape(value.shape), value)
        assert_bitwise(theirs[name].detach().numpy(), value)
        assert theirs[name].requires_grad
    again = host.params(3)
    assert_bitwise(again, params)
    assert all(
        not np.array_equal(params[name], other)
        for name, other in host.params(4).items()
        if ".norm." not in name
    )


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.name)
def test_both_backends_give_the_same_outputs_and_gradients(host):
    x, y = examples(host)
    module, params = host.torch(1), eqx.filter(host.jax(1), eqx.is_inexact_array)
    rest = eqx.filter(host.jax(1), eqx.is_inexact_array, inverse=True)

    @jax.jit
    def loss_of(params, x, y):
        logits = jax.vmap(eqx.combine(params, rest))(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), logits

    (loss, logits), gradient = jax.value_and_grad(loss_of, has_aux=True)(params, x, y)
    theirs = module(torch.tensor(x))
    their_loss = F.cross_entropy(theirs.flatten(0, -2), torch.tensor(y.reshape(-1)).long())
    their_loss.backward()
    assert logits.shape[-1] == host.interface().outputs
    assert_close(theirs.detach().numpy(), logits)
    assert_close(np.float32(their_loss.item()), loss)
    for name, own in named(gradient).items():
        other = dict(module.named_parameters())[name].grad
        assert other is not None
        assert_close(other.numpy(), np.asarray(own).reshape(other.shape))
        assert float(np.abs(other.numpy()).max()) > 0, name


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.name)
def test_the_places_to_grow_are_sites_of_both_wrapped_hosts(host):
    assert host.grow_at
    for build in (host.jax, host.torch):
        wrapped = esper.wrap(build(0), target_layers=list(host.grow_at))
        assert set(wrapped.kasmina_layers) == set(host.grow_at)


def test_equal_hosts_are_one_key_and_other_ones_are_not():
    for host in HOSTS:
        assert dataclasses.replace(host) == host
        assert hash(dataclasses.replace(host)) == hash(host)
    assert len(set(HOSTS)) == len({host.name for host in HOSTS}) == len(HOSTS)
    assert MLPHost([2, 8, 2]) == MLPHost((2, 8, 2))  # pyright: ignore[reportArgumentType]


def test_the_programs_of_equal_hosts_are_shared():
    host = HOSTS[3]
    module, other = host.jax(0), dataclasses.replace(host).jax(1)
    assert jax.tree.structure(module) == jax.tree.structure(other)


def test_building_a_host_draws_no_random_numbers_of_torch():
    state = torch.random.get_rng_state()
    for host in HOSTS:
        host.torch(0)
    assert torch.equal(state, torch.random.get_rng_state())


def test_an_mlp_is_equinoxs_own_to_the_bit():
    host = MLPHost((3, 5, 5, 2))
    own = host.jax(2)
    mlp = eqx.nn.MLP(3, 2, 5, 2, key=jax.random.key(0))
    mlp = eqx.tree_at(lambda m: m.layers, mlp, own.layers)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((7, 3)), jnp.float32)
    params, rest = eqx.partition(own, eqx.is_inexact_array)
    theirs, their_rest = eqx.partition(mlp, eqx.is_inexact_array)

    def loss(params, rest):
        return (jax.vmap(eqx.combine(params, rest))(x) ** 2).sum()

    ours = jax.jit(jax.value_and_grad(lambda p: loss(p, rest)))(params)
    other = jax.jit(jax.value_and_grad(lambda p: loss(p, their_rest)))(theirs)
    assert_bitwise(ours[0], other[0])
    assert_bitwise(named(ours[1]), named(other[1]))
    assert_bitwise(host.params(2), initial_host((3, 5, 5, 2), 2))


def test_first_parameters_are_those_that_runs_were_recorded_with():
    digests = []
    for sizes in ((2, 8, 2), (64, 8, 10)):
        values = MLPHost(sizes).params(3).values()
        digests.append(hashlib.sha256(b"".join(value.tobytes() for value in values)).hexdigest())
    assert [digest[:16] for digest in digests] == ["b092fd3991b9ed78", "be878bdec3c0c4bc"]


def test_a_text_hosts_output_does_not_depend_on_what_comes_later():
    host = HOSTS[-1]
    x, _ = examples(host, 1)
    changed = x.copy()
    changed[0, 5:] = (changed[0, 5:] + 1) % 7
    for run in (
        lambda x: np.asarray(jax.vmap(host.jax(0))(jnp.asarray(x))),
        lambda x: host.torch(0)(torch.tensor(x)).detach().numpy(),
    ):
        one, other = run(x)[0], run(changed)[0]
        np.testing.assert_array_equal(one[:5], other[:5])
        assert (one[5:] != other[5:]).any(axis=1).all()


def test_a_conv_hosts_output_does_not_depend_on_its_batch():
    host = HOSTS[4]
    x, _ = examples(host)
    module = host.torch(0)
    alone = [module(torch.tensor(x[i : i + 1])).detach().numpy()[0] for i in range(len(x))]
    assert_close(np.stack(alone), module(torch.tensor(x)).detach().numpy())
    assert not dict(module.named_buffers())


def test_a_users_functions_build_a_users_host():
    def build_jax(seed):
        return eqx.nn.Linear(2, 2, key=jax.random.key(seed))

    def build_torch(seed):
        return torch.nn.Linear(2, 2)

    host = CustomHost("mine", jax=build_jax, torch=build_torch, grow_at=("layers.0",), outputs=2)
    assert isinstance(host.jax(0), eqx.nn.Linear)
    assert isinstance(host.torch(0), torch.nn.Linear)
    assert host == CustomHost(
        "mine", jax=build_jax, torch=build_torch, grow_at=("layers.0",), outputs=2
    )
    assert (
        len({host, CustomHost("mine", jax=build_jax), CustomHost("mine", torch=build_torch)}) == 3
    )
