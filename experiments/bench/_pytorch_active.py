"""One kernel at work in torch: against the blend by hand, against peft, and by each route."""

import copy
import importlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.execution import Route
from esper_adapters.pytorch import (
    AsyncKasminaConv2dLayer,
    KasminaConv2dLayer,
    kernel_from_function,
    kernel_from_module,
    wrap,
)
from experiments.bench._paired import Call, contest
from experiments.bench._results import Check, Results
from experiments.bench.pytorch import Settings

ALPHA = 0.3

ROUTES: dict[str, Route] = {
    "native": "native",
    "again": "native",
    "torchscript": "torchscript",
    "bridge": "bridge",
}
"""How an artifact's kernel runs, by the names of rows."""


class ByHand(nn.Module):
    """The blend of a linear layer and a kernel of low rank, as one would write it."""

    def __init__(self, host: nn.Linear, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.host = host
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.rest, self.alpha = torch.tensor(1.0 - ALPHA), torch.tensor(ALPHA)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, in]` to `[batch, out]`."""
        return self.host(x) * self.rest + low_rank(self.a, self.b, x) * self.alpha


def low_rank(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """x·aᵀ·bᵀ."""
    return F.linear(F.linear(x, a), b)


def forward(model: nn.Module, x: Tensor) -> Tensor:
    """One pass without gradients."""
    with torch.no_grad():
        return model(x)


def train(model: nn.Module, params: list[nn.Parameter], x: Tensor) -> Tensor:
    """A pass and its gradients, to the input as well, as within a network."""
    for p in params:
        p.grad = None
    x.grad = None
    loss = model(x).square().mean()
    loss.backward()
    return loss


def lora(host: nn.Linear, rank: int) -> nn.Module | None:
    """The same by peft, all of it training; None where that is not installed."""
    try:
        peft: Any = importlib.import_module("peft")
    except ImportError:
        return None
    config = peft.LoraConfig(r=rank, target_modules=["0"], bias="none")
    model = peft.get_peft_model(nn.Sequential(host), config)
    return model.requires_grad_()


def measure_active(results: Results, settings: Settings) -> None:
    """Forward pass and training step, for each size."""
    for inputs, outputs, batch, target in settings.active:
        size = f"{inputs}×{outputs} batch {batch}, low rank {settings.rank}"
        names = {what: f"active, {size}, {what}" for what in ("forward", "training step")}
        peers = {what: f"active, {size}, {what}, peft as reference" for what in names}
        wanted = [results.wants(name) for name in (*names.values(), *peers.values())]
        if not any(wanted):
            continue
        x = torch.randn(batch, inputs)

        def build(inputs: int = inputs, outputs: int = outputs) -> dict[str, nn.Module]:
            host = nn.Linear(inputs, outputs)
            a = torch.randn(settings.rank, inputs) * inputs**-0.5
            b = torch.randn(outputs, settings.rank) * settings.rank**-0.5
            ours: Any = wrap(nn.Sequential(copy.deepcopy(host)))
            ours.load_kernel_sync(
                "0", 0, kernel_from_function(low_rank, {"a": a, "b": b}), alpha=ALPHA
            )
            models: dict[str, nn.Module] = {
                name: nn.Sequential(ByHand(copy.deepcopy(host), a.clone(), b.clone()))
                for name in ("by hand", "again")
            }
            models["esper"] = ours
            free: Any = wrap(nn.Sequential(copy.deepcopy(host)), contain=False)
            free.load_kernel_sync(
                "0", 0, kernel_from_function(low_rank, {"a": a, "b": b}), alpha=ALPHA
            )
            models["esper, gradients uncontained"] = free
            peer = lora(copy.deepcopy(host), settings.rank)
            return models if peer is None else models | {"peft": peer}

        first = build()
        apart = float((first["esper"](x) - first["by hand"](x)).abs().max().detach())
        results.checks.append(
            Check(f"active, {size}: output as by hand", "yes", "yes" if apart < 1e-4 else "no")
        )

        def forwards(x: Tensor = x) -> Mapping[str, Call]:
            return {name: partial(forward, model, x) for name, model in build().items()}

        def steps(x: Tensor = x) -> Mapping[str, Call]:
            source = x.clone().requires_grad_()
            return {
                name: partial(train, model, list(model.parameters()), source)
                for name, model in build().items()
            }

        for what, calls in (("forward", forwards), ("training step", steps)):
            own: dict[str, float | None] = {"esper": target, "esper, gradients uncontained": None}
            own |= {"peft": None} if "peft" in first else {}
            if results.wants(names[what]):
                results.rows += contest(names[what], own, calls, settings.sampling)
            if "peft" not in first:
                results.notes.append("peft is not installed: nothing is held against it.")
            elif results.wants(peers[what]):
                results.rows += contest(
                    peers[what],
                    {"esper": 1.0, "esper, gradients uncontained": 1.0},
                    partial(peer_first, calls),
                    settings.sampling,
                )


def peer_first(calls: Any) -> Mapping[str, Call]:
    """The peer as the reference, and a second one of it."""
    found, again = calls(), calls()
    own = {name: call for name, call in found.items() if name.startswith("esper")}
    return {"peft": found["peft"], "again": again["peft"], **own}


def measure_routes(results: Results, settings: Settings) -> None:
    """The same artifact by its blueprint in torch, by TorchScript, and by jax over the bridge."""
    from esper.contracts import KernelSignature
    from esper.execution import load_torch_kernel
    from esper.tezzeret import compile_blueprint, load_blueprint

    for width in settings.widths[:2]:
        names = {
            what: f"routes, {width}×{width} batch 32, low rank {settings.rank}, {what}"
            for what in ("forward", "training step")
        }
        wanted = [results.wants(name) for name in names.values()]
        if not any(wanted):
            continue
        signature = KernelSignature(input_shape=(width,), output_shape=(width,))
        artifact = compile_blueprint(
            load_blueprint("low_rank"), signature, sizes={"rank": settings.rank}
        )
        x = torch.randn(32, width)

        def build(artifact: Any = artifact, width: int = width) -> dict[str, nn.Module]:
            models: dict[str, nn.Module] = {}
            for name, route in ROUTES.items():
                model: Any = wrap(nn.Sequential(nn.Linear(width, width)))
                kernel = load_torch_kernel(artifact, route=route)
                model.load_kernel_sync("0", 0, kernel, alpha=ALPHA)
                models[name] = model
            return models

        def forwards(build: Any = build, x: Tensor = x) -> Mapping[str, Call]:
            return {name: partial(forward, model, x) for name, model in build().items()}

        def steps(build: Any = build, x: Tensor = x) -> Mapping[str, Call]:
            source = x.clone().requires_grad_()
            return {
                name: partial(train, model, list(model.parameters()), source)
                for name, model in build().items()
            }

        for what, calls in (("forward", forwards), ("training step", steps)):
            if results.wants(names[what]):
                others = {"torchscript": None, "bridge": None}
                results.rows += contest(names[what], others, calls, settings.sampling)


def measure_streams(results: Results, settings: Settings) -> None:
    """Kernels on side streams against none, and host synchronisations; needs a GPU."""
    name = "streams, Conv2d 64 batch 32, 4 kernels, training step"
    if not results.wants(name):
        return
    if not torch.cuda.is_available():
        results.notes.append("No CUDA device: streams, and host synchronisations, not measured.")
        return
    x = torch.randn(32, 64, 32, 32, device="cuda")

    def build() -> Mapping[str, Call]:
        models = {}
        kinds = {"one stream": KasminaConv2dLayer, "again": KasminaConv2dLayer}
        for key, kind in {**kinds, "side streams": AsyncKasminaConv2dLayer}.items():
            torch.manual_seed(settings.seed)
            layer = kind(64, 64, 3, padding=1, num_seeds=4).cuda()
            for seed in range(4):
                kernel = kernel_from_module(nn.Conv2d(64, 64, 3, padding=1), example_rank=3)
                layer.load_kernel_sync(seed, kernel, alpha=0.2)
            models[key] = layer
        source = x.clone().requires_grad_()
        return {k: partial(train, m, list(m.parameters()), source) for k, m in models.items()}

    def wait(_: Any) -> None:
        torch.cuda.synchronize()

    results.rows += contest(name, {"side streams": None}, build, settings.sampling, wait)
    call = dict(build())["side streams"]
    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
        found = "0"
    except RuntimeError:
        found = "some"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    results.checks.append(Check(f"{name}: host synchronisations", "0", found))
