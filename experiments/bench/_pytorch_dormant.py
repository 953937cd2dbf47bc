"""Dormant seeds in every kind of torch's layers, and in a transformer of 100 million parameters."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from esper_adapters.pytorch import wrap
from experiments.bench._dormant_torch import compile_alone, shared_copy
from experiments.bench._paired import Twins, compare
from experiments.bench._results import Check, Results
from experiments.bench.pytorch import Settings


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of layer at one size."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    several: bool = False
    """Whether it is called as attention is, and returns as it does."""


def kinds(settings: Settings, size: int, batch: int) -> list[Kind]:
    """All kinds at the size of that index."""
    width, channels = settings.widths[size], settings.channels[size]
    image, length = settings.image, settings.length
    heads = width // 16 if width <= 512 else 16
    rows, words = f"batch {batch}", f"{batch} × {length}"
    return [
        Kind(
            f"nn.Linear {width}, {rows}", partial(nn.Linear, width, width), (batch, width)
        ),
        Kind(f"nn.LayerNorm {width}, {rows}", partial(nn.LayerNorm, width), (batch, width)),
        Kind(
            f"nn.Conv2d {channels}, {rows}",
            partial(nn.Conv2d, channels, channels, 3, padding=1),
            (batch, channels, image, image),
        ),
        Kind(
            f"nn.BatchNorm2d {channels}, {rows}",
            partial(nn.BatchNorm2d, channels),
            (batch, channels, image, image),
        ),
        Kind(
            f"nn.MultiheadAttention {width}, {words}",
            partial(nn.MultiheadAttention, width, heads, batch_first=True),
            (batch, length, width),
            several=True,
        ),
    ]  # fmt: skip


def output(run: Any, several: bool, x: torch.Tensor) -> torch.Tensor:
    """What a layer gives for a batch."""
    return run(x, x, x, need_weights=False)[0] if several else run(x)


def step(run: Any, params: list[Any], several: bool, x: torch.Tensor) -> Any:
    """Forward and backward."""
    return torch.autograd.grad(output(run, several, x).square().mean(), params)


def compare_layer(
    results: Results, settings: Settings, kind: Kind, compiled: bool, target: float
) -> None:
    """Forward without gradients, and forward with backward."""
    how = "compiled" if compiled else "eager"
    names = [f"dormant {how}, {kind.name}, {what}" for what in ("forward", "forward + backward")]
    wanted = [results.wants(name) for name in names]
    if not any(wanted):
        return
    x = torch.randn(*kind.shape)
    # Compiling takes longer than timing.
    sampling = settings.sampling
    sampling = dataclasses.replace(sampling, builds=1) if compiled else sampling

    def models() -> list[Any]:
        host = nn.Sequential(kind.make())
        ours = wrap(
            host, target_layers=[type(host[0])], seeds_per_layer=settings.seeds_per_layer
        )  # fmt: skip
        layers = [host[0], shared_copy(host)[0], ours[0]]
        if compiled:
            torch.compiler.reset()
        return [compile_alone(m, i) if compiled else m for i, m in enumerate(layers)]

    def forward() -> Twins:
        return Twins(*(partial(output, run, kind.several, x) for run in models()))

    def backward() -> Twins:
        runs = models()
        parameters = list(kind_parameters(runs[0], compiled))
        return Twins(*(partial(step, run, parameters, kind.several, x) for run in runs))

    if wanted[0]:
        with torch.no_grad():
            results.rows.append(compare(names[0], target, forward, sampling))
    if wanted[1]:
        results.rows.append(compare(names[1], target, backward, sampling))


def kind_parameters(run: Any, compiled: bool) -> Any:
    """The parameters of a layer, which all three have in common."""
    if not compiled:
        return run.parameters()
    (model,) = [cell.cell_contents for cell in run._torchdynamo_orig_callable.__closure__]
    return model.parameters()


def measure_layers(results: Results, settings: Settings) -> None:
    """Every kind, eager and compiled."""
    for size, width in enumerate(settings.widths):
        for batch in settings.batches:
            for kind in kinds(settings, size, batch):
                compare_layer(results, settings, kind, False, settings.eager_target)
                widest = batch == max(settings.batches)
                if width in settings.compiled_widths and widest and not kind.several:
                    compare_layer(results, settings, kind, True, settings.compiled_target)


class Words(nn.Module):
    """A transformer over words, with the words' embedding and a head."""

    def __init__(self, width: int, inner: int, layers: int, words: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, width // 64, inner, 0.0, batch_first=True)
        self.embed = nn.Embedding(words, width)
        self.body = nn.TransformerEncoder(layer, layers)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """`[batch, tokens]` to logits `[batch, tokens, words]`."""
        return self.head(self.body(self.embed(ids)))


def measure_transformer(results: Results, settings: Settings) -> None:
    """All linear and attention layers of a transformer with seeds."""
    width, inner, layers, words = settings.transformer
    name = f"dormant eager, transformer of {layers} × {width}"
    names = [f"{name}, forward", f"{name}, forward + backward"]
    wanted = [results.wants(own) for own in names]
    if not any(wanted):
        return
    host = Words(width, inner, layers, words)
    ours = wrap(
        host,
        target_layers=[nn.Linear, nn.MultiheadAttention, nn.LayerNorm],
        seeds_per_layer=settings.seeds_per_layer,
    )
    models = (host, shared_copy(host), ours)
    ids = torch.randint(words, (1, settings.tokens))
    sampling = dataclasses.replace(settings.sampling, builds=1, budget=60.0, warmup=2)
    with torch.no_grad():
        same = "yes" if torch.equal(host(ids), ours(ids)) else "no"
    million = sum(p.numel() for p in host.parameters()) / 1e6
    found = f"{name}: {million:.0f} M parameters, {len(ours.kasmina_layers)} layers: output as bare"
    results.checks.append(Check(found, "yes", same))
    if wanted[0]:
        for model in models:
            model.eval()
        with torch.no_grad():
            build = lambda: Twins(*(partial(m, ids) for m in models))  # noqa: E731
            results.rows.append(compare(names[0], settings.eager_target, build, sampling))
        for model in models:
            model.train()
    if wanted[1]:
        params = list(host.parameters())
        build = lambda: Twins(*(partial(step, m, params, False, ids) for m in models))  # noqa: E731
        results.rows.append(compare(names[1], settings.eager_target, build, sampling))
