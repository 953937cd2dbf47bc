"""How long wrapping takes, and how much memory."""

import os
import time
import tracemalloc
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from esper_adapters.pytorch import wrap
from experiments.bench._results import Check, Figure, Results
from experiments.bench.pytorch import Settings

TARGETS = [nn.Linear, nn.MultiheadAttention, nn.LayerNorm]


def body(width: int, inner: int, layers: int) -> nn.Module:
    """A transformer without its words, its memory not yet given."""
    with torch.device("meta"):
        layer = nn.TransformerEncoderLayer(width, width // 64, inner, 0.0, batch_first=True)
        return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def resident() -> int:
    """Bytes that the process holds in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def free_memory() -> int:
    """Bytes that can be had; 0 where that is not known."""
    info = Path("/proc/meminfo")
    if not info.exists():
        return 0
    rows = dict(line.split(":", 1) for line in info.read_text().splitlines())
    return int(rows["MemAvailable"].split()[0]) << 10


def measure_wrapping(results: Results, settings: Settings) -> None:
    """Each size without memory behind it, and with it where there is enough."""
    for label, width, inner, layers in settings.wrapped:
        for real in (False, True):
            where = "real" if real else "on meta"
            name = f"wrap, {label} {where}"
            if not results.wants(name):
                continue
            host = body(width, inner, layers)
            size = sum(p.numel() for p in host.parameters())
            if real:
                if free_memory() < max(2 * 4 * size, min(settings.real_memory, 3 * 4 * size)):
                    results.notes.append(f"{name}: not enough free memory, not measured.")
                    continue
                host = host.to_empty(device="cpu")
                with torch.no_grad():
                    for p in host.parameters():
                        p.fill_(0.01)
            seconds = []
            for _ in range(5):
                started = time.perf_counter()
                model: Any = wrap(host, target_layers=TARGETS)
                seconds.append(time.perf_counter() - started)
            tracemalloc.start()
            before = resident()
            model = wrap(host, target_layers=TARGETS)
            traced = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            grown = max(resident() - before, 0)
            count = f"{size / 1e6:,.0f} M parameters in {len(model.kasmina_layers)} layers"
            shared = all(
                a is b for a, b in zip(host.parameters(), model.parameters(), strict=True)
            )  # fmt: skip
            results.checks.append(
                Check(f"{name}: parameters are shared", "yes", "yes" if shared else "no")
            )
            results.figures += [
                Figure(f"{name}: {count}", median(seconds), "s", 1.0),
                Figure(
                    f"{name}: Python memory of the model's", 100 * traced / (4 * size), "%", 1.0
                ),
                Figure(
                    f"{name}: resident memory of the model's", 100 * grown / (4 * size), "%", 1.0
                ),
            ]
            del host, model
