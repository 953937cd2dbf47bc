"""A grown torch model without Esper in it.

Affine kernels are folded into their hosts. Any other layer with kernels becomes an
`fx.GraphModule`: torch's own class, with the bare layer and the kernels as modules of it.
"""

import copy
import inspect
import operator
from typing import Any

import torch
from torch import fx, nn

from esper_adapters.pytorch._grafted import GraftedKernel
from esper_adapters.pytorch._layer import Live, SeededLayer
from esper_adapters.pytorch._model import MorphableModel
from esper_adapters.pytorch._wrap import unwrap
from esper_functional import FoldError, KasminaException


def export_plain(model: nn.Module) -> nn.Module:
    """The trained network, kernels and all, as a model of its host's class that needs no Esper.

    Shares no tensor with the model. Kernels that are affine are folded into linear layers where
    the blend allows it; every other layer with kernels becomes an `fx.GraphModule` that holds
    the layer (`host`) and its kernels (`kernel_0`, …). Fossils are frozen as they were, other
    kernels train, gradients are neither contained nor isolated any more, and outputs that are
    not finite are still replaced. Kernels that incubate are left out.

    Raises:
        KasminaException: for a model that is not wrapped, and for a layer of which it is not
            known what it returns: call the model once.
    """
    if not isinstance(model, MorphableModel):
        raise KasminaException(
            f"export_plain: {type(model).__name__} is not a wrapped model; pass what esper.wrap"
            " returned"
        )
    grown: Any = copy.deepcopy(model)
    for layer in grown.kasmina_layers.values():
        for seed in layer.incubating:
            SeededLayer.unload_kernel_sync(layer, seed)
        for seed in layer.running:
            try:
                SeededLayer.fold(layer, seed)
            except FoldError:
                continue
    blends = {
        name: _Blend(layer, live)
        for name, layer in grown.kasmina_layers.items()
        if (live := layer._live) is not None
    }
    host = unwrap(grown)
    for name, blend in sorted(blends.items(), key=lambda item: -item[0].count(".")):
        plain = blend.graph_module(host.get_submodule(name))
        if not name:
            return plain
        parent, _, own = name.rpartition(".")
        setattr(host.get_submodule(parent), own, plain)
    return host


class _Blend:
    """One layer's blend, written as a graph."""

    def __init__(self, layer: SeededLayer, live: Live) -> None:
        if layer._returns_several is None:
            raise KasminaException(
                f"export_plain: it is not known what layer {layer.layer_name!r} returns: call the"
                " model once, while its kernels run"
            )
        self._host_weight = float(live.host_weight)
        self._weights = [float(weight) for weight in live.weights]
        self._kernels = [_plain_kernel(kernel) for kernel in live.kernels]
        self._ranks = [kernel.example_rank for kernel in live.kernels]
        self._blend = layer.blend
        self._several = layer._returns_several
        self._signature = inspect.signature(type(layer)._esper_base.forward)

    def graph_module(self, host: nn.Module) -> fx.GraphModule:
        """The layer with its kernels."""
        root = nn.Module()
        root.add_module("host", host)
        graph = fx.Graph()
        args: list[fx.Node] = []
        options: dict[str, Any] = {}
        for name, parameter in list(self._signature.parameters.items())[1:]:
            kind = parameter.kind
            if kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise KasminaException(
                    f"export_plain: a layer of class {type(host).__name__} takes arguments without"
                    " names, and a graph has none: unload its kernels"
                )
            node = graph.placeholder(name, default_value=parameter.default)
            if kind is parameter.KEYWORD_ONLY:
                options[name] = node
            else:
                args.append(node)
        x = args[0]
        result = graph.call_module("host", tuple(args), options)
        h = graph.call_function(operator.getitem, (result, 0)) if self._several else result
        y = self._mix(graph, root, h, x)
        if self._several:
            rest = graph.call_function(operator.getitem, (result, slice(1, None)))
            y = graph.call_function(operator.add, ((y,), rest))
        graph.output(y)
        graph.lint()
        return fx.GraphModule(root, graph, class_name=f"Grown{type(host).__name__}")

    def _mix(self, graph: fx.Graph, root: nn.Module, h: fx.Node, x: fx.Node) -> fx.Node:
        y = h
        if self._blend == "convex":
            y = graph.call_function(torch.mul, (h, self._host_weight))
        for i, (kernel, rank, weight) in enumerate(
            zip(self._kernels, self._ranks, self._weights, strict=True)
        ):
            root.add_module(f"kernel_{i}", kernel)
            k = graph.call_module(f"kernel_{i}", (x,))
            finite = graph.call_function(torch.isfinite, (k,))
            if rank:
                dims = tuple(range(-rank, 0))
                finite = graph.call_function(torch.all, (finite,), {"dim": dims, "keepdim": True})
            instead: Any = {"convex": h, "residual": 0.0, "sequential": y}[self._blend]
            own = graph.call_function(torch.where, (finite, k, instead))
            own = graph.call_function(torch.mul, (own, weight))
            if self._blend == "sequential":
                y = graph.call_function(torch.mul, (y, 1.0 - weight))
            y = graph.call_function(torch.add, (y, own))
        return y


def _plain_kernel(kernel: GraftedKernel) -> nn.Module:
    """A kernel as a module of torch alone."""
    if kernel.module is not None:
        inner = copy.deepcopy(kernel.module)
        with torch.no_grad():
            for (_, p), name in zip(inner.named_parameters(), kernel._names, strict=True):
                p.copy_(getattr(kernel, name))
                p.requires_grad_(not kernel.frozen)
        return inner
    program = kernel.program
    if not isinstance(program, nn.Module):
        return _traced(kernel, program)
    root, graph = nn.Module(), fx.Graph()
    root.add_module("program", program)
    x = graph.placeholder("x")
    own: list[fx.Node] = []
    for name in kernel._names:
        root.register_parameter(name, getattr(kernel, name))
        own.append(graph.get_attr(name))
    graph.output(graph.call_module("program", (*own, x)))
    return fx.GraphModule(root, graph, class_name="Kernel")


class _Calls(nn.Module):
    """A function of parameters, as a module to be traced."""

    def __init__(self, kernel: GraftedKernel, program: Any) -> None:
        super().__init__()
        self._program = (program,)
        self._names = kernel._names
        for name in kernel._names:
            self.register_parameter(name, getattr(kernel, name))

    def forward(self, x: Any) -> Any:
        return self._program[0](*(getattr(self, name) for name in self._names), x)


def _traced(kernel: GraftedKernel, program: Any) -> fx.GraphModule:
    try:
        return fx.symbolic_trace(_Calls(kernel, program))
    except Exception as error:  # whatever the user's function raises on a proxy
        raise KasminaException(
            f"export_plain: kernel {kernel.kernel_id[:12] or 'without an id'} is a function that"
            f" torch.fx cannot trace ({error}): make it of a module, by kernel_from_module"
        ) from error
