"""Wrapping a torch model: the host is untouched, the wrapped one is the host until a graft."""

import copy
import inspect
import threading

import pytest
import torch
from torch import nn

from esper_adapters.pytorch import KasminaLayer, MorphableModel, unwrap, wrap
from esper_functional import BlendError, KasminaException, SeedIndexError
from tests.adapters.kernels import torch_kernel


class Host(nn.Module):
    """A model with nested layers, a custom signature, an attribute, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 5))
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 3, bias=False)
        self.register_buffer("shift", torch.ones(3))
        self.tag = "mine"

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        return self.head(self.norm(self.encoder(x))) * scale + self.shift


SITES = ["encoder.0", "encoder.2", "head"]


def host() -> Host:
    torch.manual_seed(0)
    return Host()


def resolve(_: str):
    return torch_kernel()


def grown(model: Host | None = None, alpha: float = 0.5):
    wrapped = wrap(model or host(), resolve=resolve, seeds_per_layer=2)
    wrapped.load_kernel_sync("encoder.0", 0, "a" * 64, alpha=alpha)
    return wrapped


def inputs() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(6, 3)


def test_the_host_is_not_changed():
    original = host()
    modules = list(original.named_modules())
    before = {name: dict(vars(module)) for name, module in modules}
    model = grown(original)
    model(inputs()).sum().backward()
    assert type(original) is Host
    assert [(n, m) for n, m in original.named_modules()] == modules
    for name, module in modules:
        assert vars(module).keys() == before[name].keys()
        assert not isinstance(module, KasminaLayer | MorphableModel)
    assert list(original.state_dict()) == list(host().state_dict())


def test_the_tensors_are_shared_or_copied_as_asked():
    original = host()
    shared, copied = wrap(original), wrap(original, copy=True)
    for name, tensor in [*original.named_parameters(), *original.named_buffers()]:
        assert dict([*shared.named_parameters(), *shared.named_buffers()])[name] is tensor
        other = dict([*copied.named_parameters(), *copied.named_buffers()])[name]
        assert other.data_ptr() != tensor.data_ptr()
        assert torch.equal(other, tensor)


def test_it_is_a_subclass_of_the_hosts_class_with_all_the_host_has():
    original, model = host(), wrap(host())
    assert isinstance(model, Host)
    assert isinstance(model, MorphableModel)
    assert inspect.signature(model.forward) == inspect.signature(original.forward)
    assert model.tag == "mine"
    assert list(model.state_dict()) == list(original.state_dict())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in original.named_modules()]
    assert list(model.kasmina_layers) == SITES
    assert all(isinstance(layer, nn.Linear) for layer in model.kasmina_layers.values())
    assert [layer.layer_name for layer in model.kasmina_layers.values()] == SITES
    assert model.seeds.shape == (3, 4)


def test_dormant_it_computes_the_very_bits_forward_and_backward():
    original, model = host(), wrap(host(), copy=True)
    left, right = original(inputs(), scale=2.0), model(inputs(), scale=2.0)
    assert torch.equal(left, right)
    left.square().sum().backward()
    right.square().sum().backward()
    for a, b in zip(original.parameters(), model.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_state_dicts_go_both_ways_while_it_is_dormant():
    trained, model = host(), wrap(host(), copy=True)
    with torch.no_grad():
        trained.head.weight.add_(1.0)
    model.load_state_dict(trained.state_dict())
    assert torch.equal(model(inputs()), trained(inputs()))
    trained.load_state_dict(model.state_dict())


def test_hooks_and_frozen_parameters_are_kept():
    original, calls = host(), []
    original.head.register_forward_hook(lambda *_: calls.append("head"))
    original.encoder[0].weight.requires_grad_(False)
    model = wrap(original)
    model(inputs())
    assert calls == ["head"]
    assert not model.encoder[0].weight.requires_grad
    assert model.head.weight.requires_grad


@pytest.mark.parametrize("copied", [False, True])
def test_tied_weights_stay_tied(copied):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
            self.again = self.first
            self.last.weight = self.embed.weight

    for model in (wrap(Tied(), copy=copied), unwrap(wrap(Tied(), copy=copied))):
        assert model.last.weight is model.embed.weight
        assert model.again is model.first
    assert list(wrap(Tied()).kasmina_layers) == ["first", "last"]


def test_subclasses_are_taken_and_what_their_host_passes_by_is_left_alone():
    class Own(nn.Linear):
        def forward(self, input):
            return super().forward(input) * 2

    original = nn.Sequential(nn.Linear(3, 3), Own(3, 3), nn.MultiheadAttention(4, 2))
    model = wrap(original)
    assert list(model.kasmina_layers) == ["0", "1"]
    assert isinstance(model[1], Own)
    x = torch.randn(2, 3)
    assert torch.equal(model[1](x), original[1](x))
    assert list(model.left_alone) == ["2.out_proj"]
    with pytest.raises(SeedIndexError, match=r"'2\.out_proj' carries no seeds: .*without being"):
        model.load_kernel_sync("2.out_proj", 0, "0" * 64)
    assert type(unwrap(model)[1]) is Own


def test_unwrap_returns_the_trained_host_as_plain_modules():
    original = host()
    model = grown(original)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    before = original.head.weight.detach().clone()
    model(inputs()).square().sum().backward()
    optimiser.step()
    plain = unwrap(model)
    assert type(plain) is Host
    assert {type(plain.get_submodule(name)) for name in SITES} == {nn.Linear}
    assert list(plain.state_dict()) == list(host().state_dict())
    for name, module in plain.named_modules():
        assert vars(module).keys() == vars(host().get_submodule(name)).keys()
    assert not torch.equal(plain.head.weight, before)
    assert plain.head.weight is original.head.weight
    assert torch.equal(plain(inputs()), original(inputs()))
    # The wrapped model goes on as it was.
    assert isinstance(model.head, KasminaLayer)
    assert model.encoder[0].kernel(0) is not None
    assert torch.equal(unwrap(wrap(plain))(inputs()), plain(inputs()))


def test_a_copy_of_a_wrapped_model_lives_its_own_life():
    model = grown()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(inputs()), model(inputs()))
    twin.set_seed_alpha("encoder.0", 0, 1.0)
    twin.load_kernel_sync("encoder.0", 1, "b" * 64)
    assert model.seeds.alpha[0].tolist() == [0.5, 0.0]
    assert not torch.equal(twin(inputs()), model(inputs()))


def test_wrapping_twice_is_refused():
    model = wrap(host())
    for again in (model, nn.Sequential(model), model.encoder):
        with pytest.raises(KasminaException, match="wrapped already; esper.unwrap it first"):
            wrap(again)


def test_unwrapping_what_is_not_wrapped_is_refused():
    with pytest.raises(KasminaException, match="unwrap: Host is not a wrapped model"):
        unwrap(host())


def test_a_model_without_a_target_is_refused_with_what_it_is_made_of():
    with pytest.raises(
        SeedIndexError,
        match=r"no layer of type Linear: it is made of \['ReLU', 'Sequential'\]\. Choose others",
    ):
        wrap(nn.Sequential(nn.ReLU()))
    with pytest.raises(SeedIndexError, match="no layer of type Bilinear: it is made of"):
        wrap(host(), target_layers=[nn.Bilinear, nn.Embedding])


def test_options_that_mean_nothing_are_refused():
    with pytest.raises(SeedIndexError, match="seeds_per_layer must be at least 1, got 0"):
        wrap(host(), seeds_per_layer=0)
    with pytest.raises(BlendError, match="did you mean 'sequential'"):
        wrap(host(), blend="sequentail")


class Shelf:
    """A library of which there can only be one, as of any that holds a lock."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def get(self, _: str):
        return torch_kernel()


@pytest.mark.parametrize("duplicate", [unwrap, copy.deepcopy])
def test_the_library_is_not_copied_with_the_model(duplicate):
    duplicate(wrap(host(), resolve=Shelf().get))


def test_a_model_that_is_one_linear_layer():
    model = wrap(nn.Linear(3, 5), resolve=resolve)
    assert model.load_kernel_sync("", 0, "a" * 64)
    model.set_seed_alpha("", 0, 0.25)
    model.unload_kernel_sync("", 0)
    assert type(unwrap(model)) is nn.Linear
