"""A dormant model is its host: the same tree or graph, and the very same program."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tests.adapters.faces import EQUINOX, FACES, FLAX, SITES, X, dense_kernel, each_face
from tests.adapters.hosts import HOSTS
from tests.functional.networks import optimised_hlo
from tests.tolerance import assert_bitwise


def programs(module: Any, apply: Any, x: Any) -> list[str]:
    """The compiled forward pass and training step, state included."""
    if isinstance(module, nnx.Module):
        graph, params, rest = nnx.split(module, nnx.Param, ...)

        def forward(params: Any, rest: Any, x: Any) -> Any:
            own = nnx.merge(graph, params, rest, copy=True)
            y = apply(own, x)
            return y, nnx.split(own, nnx.Param, ...)[2]

    else:
        params, rest = eqx.partition(module, eqx.is_inexact_array)
        static = rest
        rest = None

        def forward(params: Any, rest: Any, x: Any) -> Any:
            y = apply(eqx.combine(params, static), x)
            return y[0] if isinstance(y, tuple) else y, y[1:] if isinstance(y, tuple) else None

    def step(params: Any, rest: Any, x: Any) -> Any:
        def loss(params: Any) -> Any:
            y, after = forward(params, rest, x)
            return jnp.mean(y**2), after

        (value, after), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return value, after, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    return [optimised_hlo(own, params, rest, x) for own in (forward, step)]


@pytest.mark.parametrize("name", HOSTS)
def test_a_dormant_model_compiles_to_the_very_programs_of_its_host(name):
    host = HOSTS[name]()
    model = FACES[name.split()[0]].wrap(host.module, target_layers=host.types)
    assert len(model.sites) > 1
    assert programs(model.module, host.apply, host.x) == programs(host.module, host.apply, host.x)


@each_face
def test_and_a_grafted_one_to_another(face):
    model = face.wrap()
    grown = model.load_kernel("layers.0", 0, dense_kernel())
    assert programs(grown.module, face.over, X) != programs(model.module, face.over, X)


@pytest.mark.parametrize("name", [name for name in HOSTS if name.startswith("equinox")])
def test_the_dormant_equinox_module_is_the_host_object(name):
    host = HOSTS[name]()
    model = EQUINOX.wrap(host.module, target_layers=host.types)
    assert model.module is host.module
    assert model.host is host.module
    assert EQUINOX.api.unwrap(model) is host.module


@pytest.mark.parametrize("name", [name for name in HOSTS if name.startswith("flax")])
def test_the_dormant_flax_module_is_the_hosts_graph_and_state(name):
    host = HOSTS[name]()
    model = FLAX.wrap(host.module, target_layers=host.types)
    assert model.module is not host.module
    (graph, state), (own_graph, own_state) = nnx.split(host.module), nnx.split(model.module)
    assert own_graph == graph
    for own, theirs in zip(jax.tree.leaves(own_state), jax.tree.leaves(state), strict=True):
        assert own is theirs


@each_face
def test_nothing_runs_and_nothing_is_held(face):
    model = face.wrap(seeds_per_layer=3)
    assert model.sites == SITES
    assert model.seeds.shape == (2, 3)
    assert model.plan.dormant
    assert model.live is None
    assert model.kernels == {}
    assert list(model.kasmina_layers) == list(SITES)
    assert_bitwise(face.over(model.module, X), face.over(face.mlp(), X))
    assert_bitwise(face.over(model, X), face.over(face.mlp(), X))
