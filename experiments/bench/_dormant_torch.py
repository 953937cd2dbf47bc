"""Dormant seeds in PyTorch: captured graphs and times."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

import esper_adapters.pytorch
from esper_adapters.pytorch import KasminaLayer
from experiments.bench._dormant import Settings
from experiments.bench._paired import Twins, compare
from experiments.bench._results import Check, Results

Models = tuple[nn.Module, nn.Module, nn.Module]
"""Bare, bare again and dormant, on the same parameters."""


def torch_step(model: nn.Module, params: list[nn.Parameter], x: torch.Tensor) -> Any:
    """Forward and backward."""
    return torch.autograd.grad(model(x).square().mean(), params)


def compare_torch(
    results: Results,
    settings: Settings,
    name: str,
    target: float,
    make: Callable[[Settings], Models],
    compiled: bool = False,
) -> None:
    """Times without gradients, and with backward."""
    x = torch.randn(settings.batch, settings.width)

    def calls() -> tuple[list[Any], list[nn.Parameter]]:
        torch.compiler.reset()
        models = make(settings)
        runs = [compile_alone(model, i) if compiled else model for i, model in enumerate(models)]
        return runs, list(models[0].parameters())

    def build_forward() -> Twins:
        return Twins(*(partial(run, x) for run in calls()[0]))

    def build_step() -> Twins:
        runs, params = calls()
        return Twins(*(partial(torch_step, run, params, x) for run in runs))

    if results.wants(title := f"{name}, forward"):
        with torch.no_grad():
            row = compare(title, target, build_forward, settings.sampling)
        results.rows.append(row)
    if results.wants(title := f"{name}, forward + backward"):
        results.rows.append(compare(title, target, build_step, settings.sampling))


def compile_alone(model: nn.Module, index: int) -> Any:
    """`torch.compile` of a call of `model`, with a cache of its own.

    What is compiled is kept by code object, and the models have theirs in common:
    of one cache's entries the first is found sooner, which is 0.7 % of a forward
    pass here and has nothing to do with seeds.
    """

    def call(x: torch.Tensor) -> torch.Tensor:
        return model(x)

    call.__code__ = call.__code__.replace(co_name=f"call_{index}")
    return torch.compile(call)


def shared_copy(model: nn.Module) -> Any:
    """A second model on the same parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def torch_layer(settings: Settings) -> Models:
    """One `nn.Linear`, and the `KasminaLayer` that takes its place."""
    width = settings.width
    host = nn.Linear(width, width)
    layer = KasminaLayer(width, width, num_seeds=settings.seeds_per_layer)
    layer.weight, layer.bias = host.weight, host.bias
    return host, shared_copy(host), layer


def torch_stack(settings: Settings) -> Models:
    """A stack of linear layers and ReLU, and what `wrap` makes of it."""
    width = settings.width
    layers = [(nn.Linear(width, width), nn.ReLU()) for _ in range(settings.depth)]
    host = nn.Sequential(*(part for pair in layers for part in pair))
    wrapped = esper_adapters.pytorch.wrap(host, seeds_per_layer=settings.seeds_per_layer)
    return host, shared_copy(host), wrapped


def captured(model: nn.Module, x: torch.Tensor) -> tuple[int, list[str]]:
    """How often `torch.compile` breaks a model's graph, and the operations it captures."""
    torch.compiler.reset()
    found = torch._dynamo.explain(model)(x)
    nodes = [node for graph in found.graphs for node in graph.graph.nodes]
    skip = ("placeholder", "get_attr", "output")
    operations = [f"{node.op} {node.target}" for node in nodes if node.op not in skip]
    return found.graph_break_count, operations


def measure_torch_compiled(results: Results, settings: Settings) -> None:
    """The stack through `torch.compile`: the captured graph, and the time."""
    name = f"torch compiled, {settings.shape(settings.depth)}"
    if not results.wants(name):
        return
    host, _, wrapped = torch_stack(settings)
    x = torch.randn(settings.batch, settings.width)
    try:
        _, operations = captured(host, x)
        breaks, own = captured(wrapped, x)
        same = "yes" if own == operations else "no"
        title = f"{name}: its {len(own)} operations as bare's"
        results.checks.append(Check(f"{name}: graph breaks", "0", str(breaks)))
        results.checks.append(Check(title, "yes", same))
        target = settings.torch_compiled_target
        compare_torch(results, settings, name, target, torch_stack, compiled=True)
    except Exception as error:  # what a compiler may raise is not known here
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        results.notes.append(f"{name}: not measured to the end: {reason}")


def measure_torch(results: Results, settings: Settings) -> None:
    """One layer and a stack in eager mode, and the stack compiled."""
    torch.manual_seed(settings.seed)
    name, target = f"torch eager, {settings.shape(1)}", settings.torch_layer_target
    compare_torch(results, settings, name, target, torch_layer)
    name, target = f"torch eager, {settings.shape(settings.depth)}", settings.torch_stack_target
    compare_torch(results, settings, name, target, torch_stack)
    measure_torch_compiled(results, settings)
