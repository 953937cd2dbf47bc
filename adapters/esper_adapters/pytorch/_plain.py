"""A grown torch model without Esper in it.

Affine kernels are folded into their hosts. Any other layer with kernels stays what it is and gets
a forward hook, which is an `fx.GraphModule`: torch's own class, with the kernels as modules of it.
"""

import copy
import operator
from typing import Any

import torch
from torch import fx, nn

from esper_adapters.pytorch._boundaries import absorb_faults
from esper_adapters.pytorch._grafted import GraftedKernel
from esper_adapters.pytorch._layer import Live, SeededLayer
from esper_adapters.pytorch._model import check_wrapped
from esper_adapters.pytorch._sharded import refuse_sharded
from esper_adapters.pytorch._wrap import unwrap
from esper_functional import FoldError, KasminaException


def export_plain(model: nn.Module) -> nn.Module:
    """The trained network, kernels and all, as a model of its host's class that needs no Esper.

    Shares no tensor with the model. Kernels that are affine are folded into linear layers where
    the blend allows it. Every other layer with kernels keeps its class, attributes and keys, and
    has its kernels in a child called `grown`, an `fx.GraphModule` that is also a forward hook of
    it; an `nn.Sequential`, which runs all its children, becomes an `fx.GraphModule` that holds
    both. Fossils are frozen as they were, other kernels train, gradients are neither contained nor
    isolated any more, and outputs that are not finite are still replaced. Kernels that incubate
    are left out.

    Raises:
        KasminaException: for a model that is not wrapped, for a layer of which it is not known
            what it returns (call the model once), and for a kernel that cannot be traced.
    """
    check_wrapped("export_plain", model)
    refuse_sharded(model, "export_plain")
    grown: Any = copy.deepcopy(model)
    # What has stopped by itself is no part of the network.
    layers = list(grown.kasmina_layers.values())
    absorb_faults(grown.seed_table, layers, grown.seed_table.step)
    for layer in layers:
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
    modules = dict(host.named_modules())
    # Inner layers first: an outer one may be replaced.
    for name in sorted(blends, key=lambda name: -name.count(".")):
        layer, blend = modules[name], blends[name].graph_module()
        if isinstance(layer, nn.Sequential):
            plain = _beside(layer, blend)
            if not name:
                return plain
            for path in [p for p, m in host.named_modules(remove_duplicate=False) if m is layer]:
                parent, _, own = path.rpartition(".")
                setattr(host.get_submodule(parent), own, plain)
            continue
        layer.add_module("grown", blend)
        # Before hooks that look at what the layer returns.
        layer.register_forward_hook(blend, with_kwargs=True, prepend=True)
    for module in host.modules():
        if isinstance(module, nn.TransformerEncoder):
            # Nested tensors are for fused layers alone, and layers with hooks are not fused.
            hooked = any(m._forward_hooks for m in module.modules())
            module.use_nested_tensor = module.use_nested_tensor and not hooked
    return host


def _beside(layer: nn.Module, blend: fx.GraphModule) -> fx.GraphModule:
    """A module whose children all run, and its kernels, as children of another."""
    root, graph = nn.Module(), fx.Graph()
    root.add_module("host", layer)
    root.add_module("grown", blend)
    x = graph.placeholder("input")
    h = graph.call_module("host", (x,))
    graph.output(graph.call_module("grown", (None, (x,), {}, h)))
    return fx.GraphModule(root, graph, class_name=f"Grown{type(layer).__name__}")


class _Blend:
    """One layer's blend, written as a graph."""

    def __init__(self, layer: SeededLayer, live: Live) -> None:
        if layer._returns is None:
            raise KasminaException(
                f"export_plain: it is not known what layer {layer.layer_name!r} returns: call the"
                " model once, while its kernels run"
            )
        self._host_weight = float(live.host_weight)
        self._weights = [float(weight) for weight in live.weights]
        self._kernels = [_plain_kernel(kernel) for kernel in live.kernels]
        self._ranks = [kernel.example_rank for kernel in live.kernels]
        self._blend = layer.blend
        self._returns: Any = layer._returns
        self._input = type(layer)._esper_input

    def graph_module(self) -> fx.GraphModule:
        """The blend as a forward hook, `hook(module, args, kwargs, output)`."""
        root, graph = nn.Module(), fx.Graph()
        graph.placeholder("module")
        args, kwargs, result = (graph.placeholder(name) for name in ("args", "kwargs", "output"))
        # The first argument, whether it was given by its place or by its name.
        named = graph.call_method("get", (kwargs, self._input))
        every = graph.call_function(operator.add, (args, (named,)))
        x = graph.call_function(operator.getitem, (every, 0))
        several = self._returns is not torch.Tensor
        h = graph.call_function(operator.getitem, (result, 0)) if several else result
        y = self._mix(graph, root, h, x)
        if several and hasattr(self._returns, "_fields"):
            # A named tuple: another of its kind.
            y = graph.call_method("_replace", (result,), {self._returns._fields[0]: y})
        elif several:
            rest = graph.call_function(operator.getitem, (result, slice(1, None)))
            first = [y] if issubclass(self._returns, list) else (y,)
            y = graph.call_function(operator.add, (first, rest))
        graph.output(y)
        graph.lint()
        return fx.GraphModule(root, graph, class_name="Grown")

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
                # An output's example need not have as many axes as the input's.
                lead = graph.call_function(operator.sub, (graph.call_method("dim", (x,)), rank))
                inner = graph.call_function(range, (lead, graph.call_method("dim", (k,))))
                dims = graph.call_function(tuple, (inner,))
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
            for p, param in zip(inner.parameters(), kernel.parameters(), strict=True):
                p.data = param.detach().clone()
                p.requires_grad_(param.requires_grad)
            for b, name in zip(inner.buffers(), kernel._buffer_names, strict=True):
                b.data = getattr(kernel, name).detach().clone()
        return inner.train(kernel.training)
    # TorchScript goes along as it is, a module of torch's own.
    script = getattr(kernel.program, "module", None)
    program = script if isinstance(script, torch.jit.ScriptModule) else kernel.program
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
