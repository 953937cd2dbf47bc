"""torch.compile and torch.export of models with seeds: what is traced, and how often."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend, EagerAndRecordGraphs

from esper_adapters.pytorch import kernel_from_module, unwrap, wrap
from tests.tolerance import assert_close

# The compiler does so itself when it looks into one.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_host() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))


def low_rank(inputs: int = 6, outputs: int = 6, seed: int = 1, **options):
    torch.manual_seed(seed)
    layers = nn.Linear(inputs, 2, bias=False), nn.Linear(2, outputs, bias=False)
    return kernel_from_module(nn.Sequential(*layers), **options)


def batch() -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randn(5, 6)


def gradients(model, run, x):
    model.zero_grad()
    run(x).square().sum().backward()
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def assert_eager(model, compiled, x):
    """The compiled model does what the model does, in output and gradients."""
    assert_close(compiled(x).detach(), model(x).detach())
    ours, theirs = gradients(model, compiled, x), gradients(model, model, x)
    for name, gradient in theirs.items():
        assert (gradient is None) == (ours[name] is None), name
        if gradient is not None:
            assert_close(ours[name], gradient)


def test_a_dormant_models_graph_is_the_bare_ones():
    host, graphs = make_host(), []
    for model in (host, wrap(host)):
        recorder = EagerAndRecordGraphs()
        torch.compile(model, backend=recorder, fullgraph=True)(batch())
        (graph,) = recorder.graphs
        graphs.append([(node.op, node.name, str(node.target)) for node in graph.graph.nodes])
    assert graphs[0] == graphs[1]


@pytest.mark.parametrize("training", [True, False])
def test_one_recompilation_at_activation_and_none_along_a_ramp_or_on_return(training):
    model, x = wrap(make_host()).train(training), batch()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    assert_eager(model, compiled, x)
    assert counter.frame_count == 1
    model.load_kernel_sync("0", 1, low_rank(), alpha=0.0)
    assert_eager(model, compiled, x)
    assert_eager(model, compiled, x)
    assert counter.frame_count == 2
    model.ramp_seed_alpha("0", 1, 1.0, 100)
    for step in range(101):
        model.advance(step)
        assert_close(compiled(x).detach(), model(x).detach())
    assert model.seeds.alpha[0, 1] == 1.0
    assert_eager(model, compiled, x)
    model.unload_kernel_sync("0", 1)
    assert_eager(model, compiled, x)
    assert counter.frame_count == 2
    model.load_kernel_sync("0", 0, low_rank(seed=3), alpha=0.5)
    assert_eager(model, compiled, x)
    assert counter.frame_count == 2
    model.fossilize("0", 0)
    assert_eager(model, compiled, x)
    assert counter.frame_count == 3


@pytest.mark.parametrize("blend", ["convex", "residual", "sequential"])
def test_failures_are_contained_and_counted_as_in_eager(blend):
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(6))

        def forward(self, x):
            return torch.sqrt(x.sum(-1, keepdim=True)) * self.scale

    model = wrap(make_host(), blend=blend)
    model.load_kernel_sync("0", 0, kernel_from_module(Root()), alpha=0.4)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = batch().abs()
    x[2] = -1.0
    eager = copy.deepcopy(model)
    for run, of in ((compiled, model), (eager, eager)):
        for _ in range(2):
            of.zero_grad()
            run(x).sum().backward()
    assert model[0].error_counts().tolist() == eager[0].error_counts().tolist() == [2]
    for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        assert torch.isfinite(ours.grad).all()
        assert_close(ours.grad, theirs.grad)
    # Eager and compiled calls count on together.
    model(x)
    assert model[0].error_counts().tolist() == [3]
    host = unwrap(model)
    assert_close(compiled(x.abs()).detach(), host(x.abs()).detach())


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("grown", [True, False])
# Strict export names what it saw functional_call exchange, and put back.
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")
def test_export_gives_a_program_that_does_the_same(grown, strict, tmp_path):
    model, x = wrap(make_host()).eval(), batch()
    if grown:
        model.load_kernel_sync("0", 0, low_rank(), alpha=0.4)
        model.load_kernel_sync("2", 1, low_rank(6, 3), alpha=0.2)
        model.fossilize("2", 1)
    rows = torch.export.Dim("rows", min=2, max=64)
    exported = torch.export.export(model, (x,), strict=strict, dynamic_shapes=({0: rows},))
    torch.export.save(exported, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    for other in (x, torch.randn(9, 6)):
        assert_close(again(other).detach(), model(other).detach())
    if not grown:
        bare = torch.export.export(make_host(), (x,), strict=strict, dynamic_shapes=({0: rows},))
        assert [n.name for n in exported.graph.nodes] == [n.name for n in bare.graph.nodes]
