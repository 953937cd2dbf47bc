"""Which site feeds which: read off jaxprs and off passes of torch, and the same for both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from esper.errors import InputError
from esper.tamiyo.graph import Flow, Node, kind_of, make_topology
from esper.tamiyo.graph.jax_flow import jax_flow
from esper.tamiyo.graph.torch_flow import FlowRecorder
from esper.tolaria._jax_trainee import JaxTrainee
from esper.tolaria._torch_trainee import TorchTrainee
from esper.tolaria._trainee import Optimisation
from esper.tolaria.tasks import load_task

NAMES = ("a", "b", "c", "d")


def layer(params, x, *more):
    return jnp.tanh(x * params) + sum(more, jnp.zeros(()))


def chain(site, x):
    for name in NAMES:
        x = jax.nn.relu(site(name, layer, 2.0, x))
    return x


def residual(site, x):
    h = x + site("a", layer, 2.0, x)
    h = h + site("b", layer, 2.0, h)
    return site("c", layer, 2.0, h)


def branches(site, x):
    a, b = site("a", layer, 1.0, x), site("b", layer, 1.0, x)
    # The second array reaches it too.
    return site("c", layer, 1.0, a, b.sum()) * site("d", layer, 1.0, x)


def jitted(site, x):
    a = site("a", layer, 1.0, x)
    return jax.jit(lambda a: site("b", layer, 1.0, a * 2))(a)


def rematerialised(site, x):
    return jax.checkpoint(lambda x: site("b", layer, 1.0, site("a", layer, 1.0, x)))(x)


def mapped(site, x):
    a = site("a", layer, 1.0, x)
    return jax.vmap(lambda row: site("b", layer, 1.0, row))(a)


def scanned(site, x):
    def body(carry, row):
        h = site("a", layer, 1.0, carry + row)
        return site("b", layer, 1.0, h), h

    carry, rows = jax.lax.scan(body, x[0], x)
    return site("c", layer, 1.0, carry) + site("d", layer, 1.0, rows.sum(0))


def looped(site, x):
    def body(state):
        i, h = state
        return i + 1, site("b", layer, 1.0, h)

    a = site("a", layer, 1.0, x)
    return site("c", layer, 1.0, jax.lax.while_loop(lambda s: s[0] < 3, body, (0, a))[1])


def chosen(site, x):
    a, b = site("a", layer, 1.0, x), site("b", layer, 1.0, x)
    c = jax.lax.cond(a.sum() > 0, lambda h: site("c", layer, 1.0, h), lambda h: h, b)
    return site("d", layer, 1.0, c)


def own_derivative(site, x):
    a = site("a", layer, 1.0, x)
    return site("b", layer, 1.0, jax.nn.silu(jax.nn.gelu(jax.nn.relu(a))))


def energy(site, x):
    return site("b", layer, 1.0, jax.grad(lambda x: site("a", layer, 1.0, x).sum())(x))


HOSTS = {
    chain: {(0, 1), (1, 2), (2, 3)},
    residual: {(0, 1), (0, 2), (1, 2)},
    branches: {(0, 2), (1, 2)},
    jitted: {(0, 1)},
    rematerialised: {(0, 1)},
    mapped: {(0, 1)},
    scanned: {(0, 1), (1, 0), (1, 2), (0, 3)},
    looped: {(0, 1), (1, 1), (0, 2), (1, 2)},
    chosen: {(1, 2), (0, 3), (1, 3), (2, 3)},
    own_derivative: {(0, 1)},
}


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.__name__)
def test_edges_on_jax(host):
    flow = jax_flow(host, NAMES, jax.ShapeDtypeStruct((3, 2), jnp.float32))
    assert flow.edges == HOSTS[host]
    assert sorted(flow.order) == sorted(
        {row for edge in flow.edges for row in edge} | {*flow.order}
    )


def test_a_host_that_takes_a_gradient_of_its_own():
    flow = jax_flow(energy, NAMES, jnp.ones((3, 2)))
    assert set(flow.order) == {0, 1}


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        h = x + self.a(x)
        h = h + self.b(h)
        return self.c(h)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        if float(x.sum()) > -1e9:  # which torch.export refuses
            a += b  # in place
        return self.c(a.view(-1, 2).reshape(-1, 4)) * self.d(x)


class Written(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        h = torch.zeros(len(x), 4)
        h[:, :2] = self.a(x)[:, 2:]
        torch.relu(h, out=h) if False else torch.mul(h, 2.0, out=h)
        return self.b(h)


class Again(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.b(self.a(torch.relu(self.a(x))))


def torch_flow(module, x):
    layers = list(module.children())
    with torch.no_grad(), FlowRecorder() as flow:
        hooks = [
            own.register_forward_hook(lambda m, a, y, row=row: flow.leave(row, y))
            for row, own in enumerate(layers)
        ]
        module(x)
    for hook in hooks:
        hook.remove()
    return flow.flow


@pytest.mark.parametrize(
    ("host", "order", "edges"),
    [
        (Residual, (0, 1, 2), {(0, 1), (0, 2), (1, 2)}),
        (Branches, (0, 1, 2, 3), {(0, 2), (1, 2)}),
        (Written, (0, 1), {(0, 1)}),
        (Again, (0, 1), {(0, 0), (0, 1)}),
    ],
)
def test_edges_on_torch(host, order, edges):
    assert torch_flow(host(), torch.ones(3, 4)) == Flow(order, frozenset(edges))


def test_depths_and_what_has_no_way():
    nodes = [Node(name, "linear", (2,), (2,), 4) for name in NAMES]
    flow = Flow((1, 0, 3), frozenset({(1, 0), (0, 3), (1, 3), (3, 1), (0, 0)}))
    topology = make_topology(nodes, flow)
    assert topology.sites == NAMES
    assert topology.depths.tolist() == [1, 0, 0, 2]
    pairs = list(zip(topology.senders.tolist(), topology.receivers.tolist(), strict=True))
    assert pairs == [(0, 3), (1, 0), (1, 3), (3, 1)]
    assert topology.senders.dtype == np.int32
    with pytest.raises(ValueError, match=r"names rows \[4\], and there are 4 sites"):
        make_topology(nodes, Flow((4,), frozenset()))


def test_a_model_of_unconnected_sites():
    topology = make_topology([Node("a", "linear", (), (), 0)], Flow((), frozenset()))
    assert topology.senders.shape == (0,)
    assert topology.depths.tolist() == [0]


def test_a_model_without_sites_is_refused():
    with pytest.raises(InputError, match=r"one site at least, .* has none: give one .* seeds"):
        make_topology([], Flow((), frozenset()))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (nn.Linear, "linear"),
        (nn.Conv2d, "convolution"),
        (nn.BatchNorm1d, "norm"),
        (nn.LayerNorm, "norm"),
        (nn.MultiheadAttention, "attention"),
        (nn.LSTM, "recurrent"),
        (nn.Embedding, "embedding"),
        (nn.ReLU, "other"),
        (type("Mine", (nn.Conv1d,), {}), "convolution"),
    ],
)
def test_kinds(name, kind):
    assert kind_of(name) == kind


# Of trainees


@pytest.mark.parametrize("task", ["spirals", "digits", "shapes", "grammar"])
def test_both_backends_show_one_topology(task):
    task = load_task(task)
    how = Optimisation()
    ours, theirs = (
        kind(task, seed=0, seeds_per_layer=2, blend="convex", optimisation=how).topology
        for kind in (JaxTrainee, TorchTrainee)
    )
    assert ours.nodes == theirs.nodes
    for name in ("senders", "receivers", "depths"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    assert len(ours.senders) >= len(ours.nodes) - 1
    assert ours.depths.max() >= 1


def test_the_topology_of_convolutions():
    topology = TorchTrainee(
        load_task("shapes"), seed=0, seeds_per_layer=1, blend="convex", optimisation=Optimisation()
    ).topology
    assert topology.nodes == (
        Node("blocks.0.conv", "convolution", (1, 16, 16), (2, 16, 16), 20),
        Node("blocks.1.conv", "convolution", (2, 8, 8), (2, 8, 8), 38),
        Node("head", "linear", (2,), (6,), 18),
    )
    assert topology.senders.tolist() == [0, 1]
    assert topology.receivers.tolist() == [1, 2]
    assert topology.depths.tolist() == [0, 1, 2]
