"""What is NNX's own: graphs with shared nodes, running statistics, modes, random streams."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esper_functional import FoldError
from tests.adapters.faces import (
    FLAX,
    X,
    affine_kernel,
    arrays,
    at,
    dense_kernel,
    flax_linear,
    loss,
    trained,
)
from tests.adapters.hosts import HOSTS, VECTORS
from tests.tolerance import assert_bitwise, assert_close


class Shared(nnx.Module):
    """One layer under two names, the second of which comes first in the alphabet."""

    def __init__(self):
        self.middle = flax_linear(3, 3)
        self.first = self.middle
        self.out = flax_linear(3, 2)

    def __call__(self, x):
        return self.out(self.middle(jnp.tanh(self.first(x))))


class TiedWeights(nnx.Module):
    """Two layers with one weight."""

    def __init__(self):
        self.first, self.second = flax_linear(3, 3), flax_linear(3, 3)
        self.second.kernel = self.first.kernel
        self.second.bias[...] = jnp.arange(3.0)

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


CHANGES = {
    "alpha": lambda m: m.set_seed_alpha("middle", 0, 0.7),
    "fossilize": lambda m: m.fossilize("first", 0),
    "unload": lambda m: m.unload_kernel("middle", 0),
    "fold": lambda m: m.load_kernel("middle", 1, affine_kernel(0, 3, 3)).fold("first", 1),
    "another site": lambda m: m.load_kernel("out", 0, dense_kernel(0, 3, 2)),
    "with_module": lambda m: m.with_module(trained(FLAX, m.module)),
}


@pytest.mark.parametrize("targets", [[nnx.Linear], ["middle", "out"], ["first", "out"], ["*"]])
@pytest.mark.parametrize("name", ["middle", "first"])
def test_a_module_at_two_paths_is_one_site_of_either_name(targets, name):
    host = Shared()
    model = FLAX.wrap(host, target_layers=targets)
    assert len(model.sites) == 2
    kernel = dense_kernel(0, 3, 3)
    model = model.load_kernel(name, 0, kernel, alpha=0.4)
    assert model.module.first is model.module.middle

    def grafted(x):
        return 0.6 * host.middle(x) + 0.4 * kernel.program.apply(kernel.params, x)

    assert_close(model.module(X), host.out(grafted(jnp.tanh(grafted(X)))))
    for change in CHANGES.values():
        after = change(model)
        assert after.module.first is after.module.middle
        back = FLAX.api.unwrap(after)
        assert back.first is back.middle
        assert isinstance(back.first, nnx.Linear)
        assert len(arrays(back)) == len(arrays(host)) == 4


def test_a_shared_layer_is_folded_once():
    model = FLAX.wrap(Shared()).load_kernel("middle", 0, affine_kernel(0, 3, 3), alpha=0.4)
    assert_close(model.fold("first", 0).module(X), model.module(X))
    assert_close(FLAX.api.export_plain(model)(X), model.module(X))


def test_a_shared_variable_stays_one():
    host = TiedWeights()
    model = FLAX.wrap(host).load_kernel("second", 0, dense_kernel(0, 3, 3), alpha=0.4)
    assert model.sites == ("first", "second")
    for site in ("first", "second"):
        grown = model.load_kernel(site, 1, dense_kernel(1, 3, 3), alpha=0.2)
        assert at(grown.module, "first").kernel is at(grown.module, "second").kernel
    trained_model = model.with_module(trained(FLAX, model.module))
    back = FLAX.api.unwrap(trained_model.unload_kernel("second", 0))
    assert back.first.kernel is back.second.kernel
    assert len(arrays(back)) == len(arrays(host)) == 3
    assert (np.asarray(back.first.kernel[...]) != np.asarray(host.first.kernel[...])).any()


def test_a_shared_variable_is_not_folded_into():
    model = FLAX.wrap(TiedWeights()).load_kernel("second", 0, affine_kernel(0, 3, 3), alpha=0.4)
    with pytest.raises(FoldError, match="'second' shares its weights with another layer"):
        model.fold("second", 0)
    plain = FLAX.api.export_plain(model)
    assert_close(plain(X), model.module(X))


def with_kernels(host):
    """Every stage of a seed, beside and within the batch norm of a host."""
    model = FLAX.wrap(host, target_layers=[nnx.Linear, nnx.BatchNorm])
    model = model.load_kernel("layers.1", 0, dense_kernel(0, 5, 5), alpha=0.4)
    model = model.load_kernel("layers.1", 1, dense_kernel(1, 5, 5), alpha=0.2)
    model = model.fossilize("layers.1", 1).load_kernel(
        "layers.1", 2, dense_kernel(2, 5, 5), alpha=0.0
    )
    model = model.incubate("layers.1", 2)
    return model.load_kernel("layers.3", 0, dense_kernel(0, 5, 2), alpha=0.5)


@pytest.mark.parametrize("blend", ["convex", "residual"])
def test_running_statistics_are_the_bare_hosts_whatever_the_seeds_do(blend):
    host = HOSTS["flax statistics"]().module
    host.layers[2].deterministic = True
    model = with_kernels(host)

    @nnx.jit
    def step(module):
        return nnx.grad(lambda module: loss(FLAX, module, VECTORS))(module)

    grads = step(model.module)
    step(host)
    ours, theirs = at(model.module, "layers.1"), host.layers[1]
    assert np.asarray(theirs.mean[...]).any()
    assert_bitwise((ours.mean[...], ours.var[...]), (theirs.mean[...], theirs.var[...]))
    after = model.unload_kernel("layers.1", 0)
    norm = at(FLAX.api.unwrap(after), "layers.1")
    assert_bitwise((norm.mean[...], norm.var[...]), (theirs.mean[...], theirs.var[...]))
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(grads))


def test_modes_reach_the_host_through_the_graft_and_stay():
    host = HOSTS["flax statistics"]().module
    model = FLAX.wrap(host, target_layers=[nnx.BatchNorm, nnx.Dropout])
    for site in model.sites:
        model = model.load_kernel(site, 0, dense_kernel(0, 5, 5), alpha=0.4)
    noisy = [model.module(VECTORS) for _ in range(2)]
    assert (noisy[0] != noisy[1]).any()
    model.module.eval()
    count = int(at(model.module, "layers.2").rngs.count[...])
    assert_bitwise(model.module(VECTORS), model.module(VECTORS))
    assert int(at(model.module, "layers.2").rngs.count[...]) == count
    after = model.unload_kernel("layers.1", 0)
    back = FLAX.api.unwrap(after)
    assert back.layers[1].use_running_average
    assert back.layers[2].deterministic
    view = nnx.view(after.module, deterministic=False)
    assert (view(VECTORS) != view(VECTORS)).any()
    after.module.train()
    assert not FLAX.api.unwrap(after).layers[2].deterministic


def test_a_module_in_another_mode_is_taken_back():
    host = HOSTS["flax statistics"]().module
    model = FLAX.wrap(host).load_kernel("layers.0", 0, dense_kernel(), alpha=0.4)
    other = nnx.clone(model.module)
    other.eval()
    after = model.with_module(other)
    assert after.host.layers[2].deterministic
    assert not model.host.layers[2].deterministic


def test_streams_go_on_where_they_were():
    host = HOSTS["flax statistics"]().module
    model = FLAX.wrap(host, target_layers=[nnx.Dropout])
    model = model.load_kernel("layers.2", 0, dense_kernel(0, 5, 5), alpha=0.4)
    bare = nnx.clone(host)
    for _ in range(3):
        model.module(VECTORS)
        bare(VECTORS)
    after = model.unload_kernel("layers.2", 0)
    assert_bitwise(after.module(VECTORS), bare(VECTORS))


def test_what_is_set_on_a_grafted_layer_is_set_on_its_host():
    model = FLAX.wrap().load_kernel("layers.0", 0, dense_kernel(), alpha=0.4)
    layer = at(model.module, "layers.0")
    layer.kernel = nnx.Param(jnp.zeros((3, 5)))
    layer.bias[...] = jnp.ones(5)
    assert layer.kernel is layer.esper_host.kernel
    host = FLAX.api.unwrap(model.unload_kernel("layers.0", 0))
    assert not np.asarray(host.layers[0].kernel[...]).any()
    assert_bitwise(host.layers[0].bias[...], jnp.ones(5))


def test_a_graft_hides_no_attribute_of_its_layer():
    class Weighted(nnx.Module):
        def __init__(self):
            self.weights, self.errors = nnx.Param(jnp.arange(3.0)), nnx.Param(jnp.ones(3))
            self.anatomy = self.blending = "its own"

        def __call__(self, x):
            return x * self.weights[...] + self.errors[...]

    host = nnx.Sequential(Weighted())
    model = FLAX.wrap(host, target_layers=[Weighted])
    model = model.load_kernel("layers.0", 0, dense_kernel(0, 3, 3), alpha=0.4)
    layer = at(model.module, "layers.0")
    assert_bitwise(layer.weights[...], jnp.arange(3.0))
    assert layer.anatomy == layer.blending == "its own"


def test_layers_in_lists_tuples_and_dicts():
    class Nested(nnx.Module):
        def __init__(self):
            self.pair = nnx.data((flax_linear(3, 3), flax_linear(3, 3)))
            self.table = nnx.data({"z": [flax_linear(3, 2)]})
            self.named = nnx.Dict({"a": flax_linear(3, 3)})

        def __call__(self, x):
            first, second = self.pair
            return self.table["z"][0](second(self.named["a"](jnp.tanh(first(x)))))

    host = Nested()
    model = FLAX.wrap(host)
    assert model.sites == ("named.a", "pair.0", "pair.1", "table.z.0")
    for site in model.sites:
        outputs = 2 if site == "table.z.0" else 3
        model = model.load_kernel(site, 0, affine_kernel(0, 3, outputs), alpha=0.4)
    folded = model
    for site in model.sites:
        folded = folded.fold(site, 0)
    assert_close(folded.module(X), model.module(X))
    flat = FLAX.api.to_functional(model)
    from esper_functional import forward

    y, _ = forward(flat.net, model.plan, flat.params, model.live, X)
    assert_close(y, model.module(X))
    for site in model.sites:
        model = model.unload_kernel(site, 0)
    assert_bitwise(arrays(FLAX.api.unwrap(model)), arrays(host))
    assert nnx.split(FLAX.api.unwrap(model))[0] == nnx.split(host)[0]


@pytest.mark.parametrize("kept", [jnp.bfloat16, jnp.float32])
def test_hosts_in_bfloat16_whole_or_over_float32_parameters(kept):
    layer = nnx.Linear(3, 5, dtype=jnp.bfloat16, param_dtype=kept, rngs=nnx.Rngs(0))
    model = FLAX.wrap(nnx.Sequential(layer))
    kernel = dense_kernel(dtype=jnp.bfloat16)
    model = model.load_kernel("layers.0", 0, kernel, alpha=0.4)
    x = X.astype(jnp.bfloat16)
    y = model.module(x)
    assert y.dtype == jnp.bfloat16
    assert_close(y, 0.6 * layer(x) + 0.4 * kernel.program.apply(kernel.params, x))
    affine = FLAX.wrap(nnx.Sequential(layer))
    affine = affine.load_kernel("layers.0", 0, affine_kernel(dtype=jnp.bfloat16), alpha=0.4)
    folded = affine.fold("layers.0", 0)
    assert folded.module.layers[0].kernel[...].dtype == kept
    assert_close(folded.module(x), affine.module(x))


def test_parameters_of_every_kind_of_seed_are_variables_of_their_own_kind():
    model = FLAX.wrap().load_kernel("layers.0", 0, dense_kernel(), alpha=0.4)
    model = model.load_kernel("layers.0", 1, dense_kernel(1)).fossilize("layers.0", 1)
    state = nnx.state(model.module)
    kinds = {}
    for path, variable in nnx.to_flat_state(state):
        kinds.setdefault(type(variable), []).append(".".join(map(str, path)))
    assert set(kinds) == {nnx.Param, FLAX.api.FossilParam, FLAX.api.BlendData}
    assert kinds[FLAX.api.FossilParam] == [
        "layers.0.esper_kernels.1.b",
        "layers.0.esper_kernels.1.w",
    ]
    pure = nnx.to_pure_dict(state)
    restored = nnx.clone(model.module)
    nnx.update(restored, jax.tree.map(jnp.zeros_like, state))
    assert not restored(X).any()
    nnx.replace_by_pure_dict(blank := nnx.state(restored), pure)
    nnx.update(restored, blank)
    assert_bitwise(restored(X), model.module(X))
