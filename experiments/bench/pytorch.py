"""Seeds in PyTorch: what they cost asleep, at work, and when a model is wrapped.

`python -m experiments.bench.pytorch`. Asleep: every kind of layer with four dormant seeds against
the bare one, on the same parameters, in eager mode and through `torch.compile`, and a transformer
of 100 million parameters. At work: one kernel of low rank against the same blend written by hand,
where nothing contains a fault and nothing counts one, and against a LoRA of the same rank by
`peft`; and the three routes by which an artifact's kernel runs. Wrapping: seconds and memory, at
100 million parameters and at a billion.
"""

import dataclasses
import sys

from experiments.bench._command import Benchmark, run
from experiments.bench._paired import Sampling
from experiments.bench._results import Results


@dataclasses.dataclass(frozen=True)
class Settings:
    """The work, and the targets of the design (§8)."""

    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    widths: tuple[int, ...] = (64, 512, 2048)
    batches: tuple[int, ...] = (1, 32)
    channels: tuple[int, ...] = (16, 64, 256)
    """Of convolutions and of their norms, in the place of widths."""
    image: int = 16
    length: int = 16
    """Of a sequence that attention takes."""
    compiled_widths: tuple[int, ...] = (64, 512)
    seeds_per_layer: int = 4
    seed: int = 0
    eager_target: float = 1.02
    compiled_target: float = 1.01
    active: tuple[tuple[int, int, int, float | None], ...] = (
        (64, 64, 32, None),
        (512, 256, 32, 1.10),
        (1024, 1024, 64, 1.02),
        (2048, 2048, 32, None),
    )
    """Inputs, outputs, batch, and the greatest ratio to the blend by hand."""
    rank: int = 16
    transformer: tuple[int, int, int, int] = (768, 3072, 12, 32000)
    """Width, inner width, layers and words: 110 million parameters."""
    tokens: int = 64
    wrapped: tuple[tuple[str, int, int, int], ...] = (
        ("100M", 1024, 4096, 8),
        ("1B", 2048, 8192, 20),
    )
    """Name, width, inner width and layers of the transformers that are wrapped."""
    real_memory: int = 12 << 30
    """Least free memory, in bytes, with which a billion parameters are wrapped for real."""


def measure(settings: Settings, only: str = "") -> Results:
    """All comparisons."""
    # torch reads the number of cores when it is imported.
    import torch

    from experiments.bench._pytorch_active import measure_active, measure_routes, measure_streams
    from experiments.bench._pytorch_dormant import measure_layers, measure_transformer
    from experiments.bench._pytorch_wrap import measure_wrapping

    torch.set_num_threads(1)
    torch.manual_seed(settings.seed)
    results = Results(only=only)
    measure_layers(results, settings)
    measure_transformer(results, settings)
    measure_active(results, settings)
    measure_routes(results, settings)
    measure_streams(results, settings)
    measure_wrapping(results, settings)
    return results


BENCHMARK = Benchmark(
    name="pytorch",
    doc=__doc__,
    settings=Settings,
    measure=measure,
    title="PyTorch: median of paired ratios (interquartile range)",
    names=("reference", "ours"),
    packages=("esper-morphogenetic", "numpy", "jax", "torch", "peft", "transformers"),
    quick=30,
    standard=Sampling(rounds=240, builds=3, budget=6.0),
)


if __name__ == "__main__":
    sys.exit(run(BENCHMARK))
