"""What a host shows when it is called on a few examples, before it trains."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from esper.contracts import KernelSignature
from esper.errors import InputError
from esper.tamiyo.graph import Flow, Node, Topology, kind_of, make_topology
from esper.tamiyo.graph.torch_flow import FlowRecorder
from esper.tolaria._torch_random import random_states, random_stream
from esper_adapters.pytorch import SeededLayer


@dataclasses.dataclass(frozen=True)
class Site:
    """What one call of a layer took and gave; shapes are of one example."""

    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    input_dtype: torch.dtype
    output_dtype: torch.dtype
    batch_axis: int


@dataclasses.dataclass(frozen=True)
class Survey:
    """What is known of a host from calling it."""

    sites: Mapping[int, Site | str]
    """By layer row; in words why nothing is known, where that is so."""
    random: bool
    """Whether a forward pass in training draws random numbers."""
    outputs: tuple[int, ...]
    """Shape of what the host returns for one example."""
    flops: float
    """Of a forward pass of one example: multiplications and additions of linear maps,
    convolutions and attention."""
    topology: Topology


def survey(model: nn.Module, layers: Sequence[SeededLayer], x: Tensor) -> Survey:
    """Call a dormant model on a few examples; buffers and random numbers stay as they are.

    Args:
        x: some examples, `[n, *example]`, of which up to three are used.

    Raises:
        InputError: for a model that does not return one tensor with the batch first.
    """
    three = x[torch.arange(3, device=x.device) % len(x)]
    seen = [_calls(model, layers, three[:size]) for size in (2, 3)]
    sites = {layer.row: _site(*(calls[layer.row] for calls, *_ in seen)) for layer in layers}
    random = any(draws for _, draws, _, _ in seen)
    nodes = [_node(layer, sites[layer.row]) for layer in layers]
    topology = make_topology(nodes, seen[0][3])
    return Survey(sites, random, seen[0][2], _flops(model, x[:1]), topology)


def _node(layer: SeededLayer, site: "Site | str") -> Node:
    shapes = ((), ()) if isinstance(site, str) else (site.input_shape, site.output_shape)
    parameters = sum(own.numel() for own in layer.parameters())
    return Node(layer.layer_name, kind_of(type(layer)), *shapes, parameters)


_Call = tuple[Tensor, Tensor] | None
"""Input and output; None for a call that has not got tensors."""


def _calls(
    model: nn.Module, layers: Sequence[SeededLayer], x: Tensor
) -> tuple[dict[int, list[_Call]], bool, tuple[int, ...], Flow]:
    """What each layer took and gave in training, whether it drew, what came out, and the flow."""
    calls: dict[int, list[_Call]] = {layer.row: [] for layer in layers}
    recorder = FlowRecorder()

    def note(layer: Any, args: Any, options: Any, result: Any) -> None:
        taken = args[0] if args else next(iter(options.values()), None)
        given = result[0] if isinstance(result, tuple | list) and result else result
        if isinstance(taken, Tensor) and isinstance(given, Tensor):
            calls[layer.row].append((taken.detach(), given.detach()))
        else:
            calls[layer.row].append(None)
        recorder.leave(layer.row, result)

    # In training mode, as random numbers are drawn there; its buffers are copies.
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        with torch.no_grad(), random_stream(x.device, 0), recorder:
            before = random_states(x.device)
            y: Any = torch.func.functional_call(model, buffers, (x,))
            drawn = random_states(x.device) != before
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    if not isinstance(y, Tensor) or y.dim() < 1 or len(y) != len(x):
        found = list(y.shape) if isinstance(y, Tensor) else f"a {type(y).__name__}"
        raise InputError(
            f"the host {type(model).__name__} returned {found} for {len(x)} examples: expected one"
            f" tensor of outputs, [{len(x)}, ...], with the batch first"
        )
    return calls, drawn, tuple(y.shape[1:]), recorder.flow


def _site(two: list[_Call], three: list[_Call]) -> Site | str:
    if len(two) != 1 or len(three) != 1:
        return f"its host calls it {len(two)} times in a forward pass, and not once"
    one, other = two[0], three[0]
    if one is None or other is None:
        return "it does not take and return tensors"
    axes = [_batch_axis(a.shape, b.shape) for a, b in zip(one, other, strict=True)]
    if axes[0] is None or axes[0] != axes[1]:
        return "its input and output have no axis for the batch alone"
    shapes = [tuple(size for i, size in enumerate(t.shape) if i != axes[0]) for t in one]
    return Site(shapes[0], shapes[1], one[0].dtype, one[1].dtype, axes[0])


def _batch_axis(two: Sequence[int], three: Sequence[int]) -> int | None:
    """The axis that is as long as the batch in calls with two and with three examples."""
    if len(two) != len(three):
        return None
    changed = [i for i, (a, b) in enumerate(zip(two, three, strict=True)) if a != b]
    same = len(changed) == 1 and (two[changed[0]], three[changed[0]]) == (2, 3)
    return changed[0] if same else None


def _flops(model: nn.Module, x: Tensor) -> float:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # What is fused, as encoders are without gradients and attention is by its device, would not
        # be counted, or not everywhere.
        with (
            random_stream(x.device, 0),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            model(x)
    finally:
        for module, training in modes:
            module.training = training
    return float(counter.get_total_flops())


def _whole(shape: Sequence[int | None] | None) -> tuple[int, ...] | None:
    """A shape that is known before a call, or None."""
    if shape is None or None in shape:
        return None
    return tuple(size for size in shape if size is not None)


_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def site_signature(layer: SeededLayer, site: Site | str) -> KernelSignature:
    """What a kernel of a layer takes and gives: by the layer's own sizes, else by the call.

    Linear layers take kernels of vectors, whatever axes lie around them.

    Raises:
        InputError: for a layer that no kernel can be compiled for.
    """
    where, own = f"layer {layer.layer_name!r}", layer.shapes
    inputs, outputs, dtype = _whole(own.inputs), _whole(own.outputs), own.dtype
    if inputs is None or outputs is None:
        if isinstance(site, str):
            raise InputError(
                f"no kernel can be compiled for {where}: {site}. Let kernels be grafted elsewhere,"
                " by `grow_at`"
            )
        if site.batch_axis != 0:
            raise InputError(
                f"no kernel can be compiled for {where}: the batch is axis {site.batch_axis} of"
                " its input, and kernels expect it first. Let kernels be grafted elsewhere, by"
                " `grow_at`"
            )
        inputs, outputs = site.input_shape, site.output_shape
        dtype = _DTYPES.get(site.output_dtype)
        if site.input_dtype != site.output_dtype:
            dtype = None
    if dtype not in _DTYPES.values():
        found = dtype or "of another dtype, or of several"
        raise InputError(
            f"no kernel can be compiled for {where}: kernels take and give float32 or bfloat16,"
            f" and the layer is {found}. Cast the host, or let kernels be grafted elsewhere, by"
            " `grow_at`"
        )
    try:
        return KernelSignature(
            input_shape=inputs,
            output_shape=outputs,
            dtype=dtype,  # pyright: ignore[reportArgumentType]
        )
    except ValidationError as error:
        raise InputError(
            f"no kernel can be compiled for {where}, which takes {list(inputs)} and returns"
            f" {list(outputs)}: {error.errors()[0]['msg'].lower()}"
        ) from error
