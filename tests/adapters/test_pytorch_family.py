"""Every class of layer can carry seeds, and is what it was besides."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from esper_adapters.pytorch import (
    KasminaAttentionLayer,
    KasminaBatchNormLayer,
    KasminaConv2dLayer,
    KasminaLayer,
    KasminaLayerNormLayer,
    SeededLayer,
    kernel_from_function,
    kernel_from_module,
    unwrap,
    wrap,
)
from esper_adapters.pytorch._sites import check_targets
from esper_functional import (
    BLENDS,
    EventKind,
    KasminaException,
    KernelMismatchError,
    SeedIndexError,
    UncalledSiteWarning,
)


class Block(nn.Module):
    """A user's own, which takes two arguments and returns a tensor first."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x, scale=1.0):
        return torch.tanh(self.inner(x)) * scale, "more"


def own(module):
    torch.manual_seed(1)
    return module()


KINDS = {
    "linear": (lambda: nn.Linear(4, 4), (3, 4), 1, lambda: nn.Linear(4, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 4, 3, padding=1), (2, 4, 6), 2, lambda: nn.Conv1d(4, 4, 1)),
    "conv2d": (
        lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        (2, 4, 5, 5),
        3,
        lambda: nn.Conv2d(4, 4, 1),
    ),
    "layer norm": (lambda: nn.LayerNorm(4), (3, 4), 1, lambda: nn.Linear(4, 4)),
    "batch norm 1d": (lambda: nn.BatchNorm1d(4), (6, 4), 1, lambda: nn.Linear(4, 4)),
    "batch norm 2d": (lambda: nn.BatchNorm2d(4), (2, 4, 3, 3), 3, lambda: nn.Conv2d(4, 4, 1)),
    "batch norm 3d": (lambda: nn.BatchNorm3d(4), (2, 4, 2, 2, 2), 4, lambda: nn.Conv3d(4, 4, 1)),
    "lstm": (lambda: nn.LSTM(4, 4, batch_first=True), (2, 3, 4), 1, lambda: nn.Linear(4, 4)),
    "gru": (lambda: nn.GRU(4, 4), (3, 2, 4), 1, lambda: nn.Linear(4, 4)),
    "a user's block": (Block, (3, 4), 1, lambda: nn.Linear(4, 4)),
    "weight norm": (
        lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
        (3, 4),
        1,
        lambda: nn.Linear(4, 4),
    ),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True),
        (2, 3, 4),
        1,
        lambda: nn.Linear(4, 4),
    ),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


class Host(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        result = self.layer(x)
        return result if isinstance(result, torch.Tensor) else result[0]


def made(kind):
    """A host, its input, and a kernel that fits its one layer."""
    layer, shape, rank, kernel = KINDS[kind]
    torch.manual_seed(0)
    host = Host(layer())
    x = torch.randn(*shape)
    return host, x, kernel_from_module(own(kernel), kernel_id="ab" * 32, example_rank=rank)


def seeded(host):
    return wrap(host, target_layers=["layer"], seeds_per_layer=2)


def load(model, kernel, seed=0, **options):
    SeededLayer.load_kernel_sync(model.kasmina_layers["layer"], seed, kernel, **options)


def backward(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    grads = [p.grad for p in model.parameters()]
    return y.detach(), x.grad, grads


def assert_equal(ours, theirs):
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    for a, b in zip(ours[2], theirs[2], strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@every_kind
@pytest.mark.parametrize("training", [True, False])
def test_dormant_it_is_its_host_bit_by_bit(kind, training):
    host, x, _ = made(kind)
    host.train(training)
    model = seeded(copy.deepcopy(host))
    assert isinstance(model.layer, type(host.layer))
    assert list(model.state_dict()) == list(host.state_dict())
    assert_equal(backward(model, x), backward(host, x))
    for ours, theirs in zip(model.buffers(), host.buffers(), strict=True):
        assert torch.equal(ours, theirs)


@every_kind
@pytest.mark.parametrize("blend", BLENDS)
def test_grafted_it_is_the_formula(kind, blend):
    host, x, kernel = made(kind)
    host.eval()
    model = wrap(host, target_layers=["layer"], blend=blend)
    load(model, kernel, alpha=0.25)
    with torch.no_grad():
        h, k = host(x), kernel.program(*kernel.params.values(), x)
        share = {"convex": 0.75, "residual": 1.0, "sequential": 0.75}[blend]
        torch.testing.assert_close(model(x), share * h + 0.25 * k)


@every_kind
def test_it_trains_is_copied_pickled_and_unwrapped(kind):
    host, x, kernel = made(kind)
    model = seeded(host)
    load(model, kernel, alpha=0.5)
    _, _, grads = backward(model, x)
    grafted = list(model.layer.kernel(0).parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in grafted)
    assert len(grads) == len(list(host.parameters())) + len(grafted)
    model.eval()
    twin = copy.deepcopy(model)
    assert type(twin) is type(model)
    assert torch.equal(twin(x), model(x))
    assert not any(a is b for a, b in zip(twin.parameters(), model.parameters(), strict=True))
    dormant = seeded(host).eval()
    if kind != "weight norm":  # torch pickles no parametrised module
        for restored in (pickle.loads(pickle.dumps(dormant)), through_a_file(dormant)):
            assert type(restored) is type(dormant)
            assert torch.equal(restored(x), host.eval()(x))
    back = unwrap(model)
    assert type(back) is Host
    assert type(back.layer) is type(host.layer)
    assert torch.equal(back(x), host(x))
    assert set(vars(back.layer)) == set(vars(host.layer))


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_attention_returns_what_it_returns_and_kernels_see_the_query():
    torch.manual_seed(0)
    host = nn.MultiheadAttention(4, 2, batch_first=True, kdim=3, vdim=5).eval()
    q, k, v = torch.randn(2, 3, 4), torch.randn(2, 6, 3), torch.randn(2, 6, 5)
    mask = torch.zeros(3, 6, dtype=torch.bool).index_fill_(1, torch.tensor([1]), True)
    model = wrap(nn.ModuleDict({"layer": host}), target_layers=[nn.MultiheadAttention])
    layer = model.kasmina_layers["layer"]
    assert isinstance(layer, KasminaAttentionLayer)
    kernel = kernel_from_module(own(lambda: nn.Linear(4, 4)))
    layer.load_kernel_sync(0, kernel, alpha=0.25)
    for options in ({"need_weights": True}, {"need_weights": False}):
        y, weights = layer(query=q, key=k, value=v, attn_mask=mask, **options)
        h, expected = host(q, k, v, attn_mask=mask, **options)
        torch.testing.assert_close(y, 0.75 * h + 0.25 * kernel.program(*kernel.params.values(), q))
        assert weights is expected is None or torch.equal(weights, expected)


@pytest.mark.parametrize("target", ["layers.0.linear1", "layers.0.self_attn", "layers.1.norm2"])
def test_a_fused_path_is_off_while_kernels_run_in_it_and_on_again_after(target):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    host = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(3, 5, 8)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    model = wrap(host, target_layers=[target])
    with torch.no_grad():
        assert torch.equal(model(x), host(x))
        out = 16 if "linear1" in target else 8
        kernel = kernel_from_module(own(lambda: nn.Linear(8, out)))
        SeededLayer.load_kernel_sync(model.kasmina_layers[target], 0, kernel, alpha=1.0)
        slow = [model(x), model(x, src_key_padding_mask=padding)]
        assert model.absorb() == []
    # With gradients there is no fused path, so this is what they must be.
    with torch.enable_grad():
        told = [model(x), model(x, src_key_padding_mask=padding)]
    torch.testing.assert_close(slow[0], told[0])
    torch.testing.assert_close(slow[1][~padding], told[1][~padding])
    assert (slow[0] - host(x)).abs().max() > 1e-3
    model.unload_kernel_sync(target, 0)
    assert not model.get_submodule(target)._forward_pre_hooks
    with torch.no_grad():
        assert torch.equal(model(x), host(x))


class PassesBy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return x @ self.layer.weight.T


def test_kernels_that_no_forward_pass_calls_are_warned_of():
    model = seeded(PassesBy())
    load(model, kernel_from_module(nn.Linear(4, 4)), alpha=0.5)
    assert model.absorb() == []
    model(torch.randn(2, 4)).sum().backward()
    heard = []
    model.seed_table.listeners.append(heard.append)
    with pytest.warns(UncalledSiteWarning, match=r"kernels run in layers \['layer'\], and no"):
        events = model.absorb(step=7)
    assert [(e.kind, e.layer, e.seed, e.step) for e in events] == [(EventKind.UNCALLED, 0, 0, 7)]
    assert heard == events


def test_kernels_of_indices_sit_on_embeddings():
    torch.manual_seed(0)
    model = wrap(nn.Sequential(nn.Embedding(10, 4)), target_layers=[nn.Embedding])
    kernel = kernel_from_module(own(lambda: nn.Embedding(10, 4)), example_rank=0)
    SeededLayer.load_kernel_sync(model.kasmina_layers["0"], 0, kernel, alpha=0.5)
    ids = torch.tensor([[1, 2, 3], [3, 4, 1]])
    y = model(ids)
    (table,) = kernel.params.values()
    torch.testing.assert_close(y, 0.5 * model[0].weight[ids] + 0.5 * table[ids])
    y.sum().backward()
    reached = model[0].kernel(0).weight.grad.sum(1) != 0
    assert reached.nonzero().flatten().tolist() == [1, 2, 3, 4]


def test_stand_alone_layers_take_their_bases_arguments_and_their_own():
    layers = [
        KasminaLayer(4, 3, bias=False, num_seeds=2, layer_name="fc"),
        KasminaLayer(input_size=4, output_size=3, num_seeds=2, layer_name="fc"),
        KasminaConv2dLayer(3, 4, 3, stride=2, padding_mode="circular", padding=1, num_seeds=2),
        KasminaAttentionLayer(8, 2, batch_first=True, num_seeds=2),
        KasminaLayerNormLayer(8, elementwise_affine=False, num_seeds=2),
        KasminaBatchNormLayer(4, momentum=None, num_seeds=2),
    ]
    assert all(isinstance(layer, SeededLayer) and layer.num_seeds == 2 for layer in layers)
    assert [layer.layer_name for layer in layers[:3]] == ["fc", "fc", "KasminaConv2dLayer"]
    assert layers[1].in_features == 4
    x = torch.randn(6, 4)
    bare = nn.BatchNorm1d(4, momentum=None)
    assert torch.equal(layers[5](x), bare(x))
    with pytest.raises(ValueError, match="at least 2 axes, got 1"):
        layers[5](torch.randn(4))
    for layer in layers:
        assert type(copy.deepcopy(layer)) is type(layer)
        assert type(pickle.loads(pickle.dumps(layer))) is type(layer)


def test_targets_are_types_paths_patterns_and_predicates():
    host = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
    sites = {
        "0": ["0"],
        "1.*": ["1.0", "1.1"],
        nn.LayerNorm: ["1.1"],
        (nn.LayerNorm, "0"): ["0", "1.1"],
        (lambda name, module: name.endswith("0") and isinstance(module, nn.Linear)): ["0", "1.0"],
    }
    for target, expected in sites.items():
        assert list(wrap(host, target_layers=target).kasmina_layers) == expected
    for target, message in {
        "1.7": r"no module's path matches '1\.7'; the nearest are \['1\.",
        nn.Conv2d: r"no layer of type Conv2d: it is made of \['LayerNorm', 'Linear'",
        (lambda name, module: False): "the predicate is true of no module",
    }.items():
        with pytest.raises(SeedIndexError, match=message):
            wrap(host, target_layers=target)
    with pytest.raises(SeedIndexError, match="takes types of layers, paths such as .*; got 3"):
        check_targets(3)
    with pytest.raises(SeedIndexError, match="target_layers is empty"):
        wrap(host, target_layers=[])
    listed = nn.ModuleList([nn.Linear(4, 4)])
    with pytest.raises(SeedIndexError, match="has no forward of its own"):
        wrap(nn.ModuleDict({"a": listed}), target_layers=["a"])


def test_a_kernel_of_another_shape_is_refused_and_the_layer_as_it_was():
    host, x, _ = made("conv2d")
    model = seeded(host)
    load(model, kernel_from_module(nn.Conv2d(4, 3, 1), example_rank=3), alpha=0.5)
    with pytest.raises(
        KernelMismatchError, match=r"returned float32\[2, 3, 5, 5\] where the layer returns .*4, 5"
    ):
        model(x)
    model.unload_kernel_sync("layer", 0)
    assert torch.equal(model(x), host(x))


def test_a_layer_that_returns_no_tensor_is_refused_when_its_kernels_run():
    class Odd(nn.Module):
        def forward(self, x):
            return {"x": x}

    model = wrap(nn.ModuleDict({"layer": Odd()}), target_layers=[Odd])
    layer = model.kasmina_layers["layer"]
    layer.load_kernel_sync(0, kernel_from_function(lambda x: x, {}), alpha=0.5)
    with pytest.raises(KernelMismatchError, match="it takes Tensor and returns dict. Unload"):
        layer(torch.ones(2))


def test_what_comes_without_a_step_comes_at_the_one_reached():
    host, x, kernel = made("linear")
    model = seeded(host)
    load(model, kernel, alpha=0.0)
    model.ramp_seed_alpha("layer", 0, 1.0, 100, step=1000)
    model.advance(1050)
    y = model(x)
    load(model, kernel, seed=1, alpha=0.0)
    model.absorb()
    model.fossilize("layer", 0)
    assert model.seeds.alpha[0, 0] == 0.5
    assert torch.equal(model(x), y)
    with pytest.raises(KasminaException, match="step 3 is over: .* reached step 1050"):
        model.set_seed_alpha("layer", 1, 0.1, step=3)


def test_no_gradient_of_parameters_is_not_finite():
    model = seeded(Host(nn.Linear(4, 4)))
    params = {"g": torch.ones(4), "w": torch.zeros(3)}
    kernel = kernel_from_function(lambda g, w, x: x[:, :1] * g + torch.sqrt((w**2).sum()), params)
    load(model, kernel, alpha=0.5)
    model(torch.randn(2, 4)).sum().backward()
    grafted = model.layer.kernel(0)
    assert not grafted.w.grad.any()
    assert grafted.g.grad.all()
    assert model.layer.weight.grad.isfinite().all()
