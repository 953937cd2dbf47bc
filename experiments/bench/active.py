"""What a kernel at work costs: `python -m experiments.bench.active`.

A host with one to four kernels is set against the same blend of the same kernels
written by hand in plain jax, where nothing contains a fault and nothing counts
one. *output* contains and returns the output alone; *planned* and *dynamic* also
count faults and return what the next step needs, as a training loop does. Two
peers do the same job by other means: a LoRA layer put in by Equinox surgery, and
slots for four kernels that are always computed and masked.

JAX runs each step in the calling thread, to its end. Where jax finds a GPU, all
of it is measured there too, and held against what the device can do.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esper_functional import (
    Blend,
    Event,
    EventKind,
    Kernel,
    SeedState,
    advance,
    apply_event,
    difference,
    gather,
    gather_weights,
    make_bank,
    plan,
)
from experiments.bench._command import Benchmark, run
from experiments.bench._networks import (
    Host,
    TransformerShape,
    feed_forward_rows,
    grafted,
    make_kernels,
    make_stack,
    make_transformer,
)
from experiments.bench._paired import Call, Sampling, contest, starting_with
from experiments.bench._peers import Peering, measure_lora, measure_slots
from experiments.bench._results import Check, Results
from experiments.bench._roofline import measure_roofline
from experiments.bench._steps import (
    Apply,
    by_hand,
    dynamic,
    fresh,
    hand_weights,
    on_device,
    planned,
    planned_output,
    sgd_with,
    with_nothing,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One host with kernels at work, and how it is run."""

    width: int
    batch: int
    kernel: str = "low rank"
    count: int = 1
    blend: Blend = "convex"
    dynamic: bool = False

    def __str__(self) -> str:
        """As rows name it."""
        many = "" if self.count == 1 else f"{self.count} × "
        return f"{self.width}×{self.width} batch {self.batch}, {many}{self.kernel}, {self.blend}"


def standard_cases() -> tuple[Case, ...]:
    """One kernel over all sizes, then more kernels, other blends, the dynamic mode."""
    sizes = [(width, batch) for width in (64, 512, 2048) for batch in (1, 32, 512)]
    return (
        *(
            Case(width, batch, kernel, dynamic=kernel == "low rank" and (batch == 32))
            for kernel in ("low rank", "residual MLP")
            for width, batch in sizes
        ),
        *(
            Case(width, 32, count=count, dynamic=count == 4)
            for width in (64, 512)
            for count in (2, 3, 4)
        ),
        *(Case(512, 32, count=2, blend=blend) for blend in ("residual", "sequential")),
    )


@dataclasses.dataclass(frozen=True)
class Settings:
    """The work, and the target of the design (§8)."""

    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    cases: tuple[Case, ...] = dataclasses.field(default_factory=standard_cases)
    rank: int = 16
    seeds_per_layer: int = 4
    learning_rate: float = 0.01
    seed: int = 0
    target: float = 1.05
    transformer: TransformerShape = dataclasses.field(default_factory=TransformerShape)
    grown_blocks: tuple[int, ...] = (1, 4)
    """In how many blocks of the transformer a kernel works."""
    peer_widths: tuple[int, ...] = (64, 512, 2048)
    peer_batch: int = 32
    ramp_width: int = 512


@dataclasses.dataclass(frozen=True)
class Work:
    """A host with kernels at work, and a batch."""

    name: str
    host: Host
    state: SeedState
    kernels: Mapping[int, Kernel]
    blend: Blend
    x: jax.Array
    target: jax.Array
    dynamic: bool


def measure(settings: Settings, only: str = "", where: str = "") -> Results:
    """All comparisons, on jax's default device; `where` goes before every name."""
    results = Results(only=only)
    for case in settings.cases:
        compare_work(results, settings, make_work(settings, case, where))
    for count in settings.grown_blocks:
        compare_work(results, settings, transformer_work(settings, count, where))
    if settings.cases:
        compare_ramp(results, settings, where)
    for width in settings.peer_widths:
        name = f"{where}{width}×{width} batch {settings.peer_batch}, rank {settings.rank}"
        x, target = random_batch(settings, settings.peer_batch, width)
        peering = Peering(
            name, width, settings.rank, settings.seeds_per_layer, x, target,
            settings.sampling, settings.learning_rate, settings.seed,
        )  # fmt: skip
        measure_lora(results, peering)
        measure_slots(results, peering)
    return results


def random_batch(settings: Settings, *shape: int) -> tuple[jax.Array, jax.Array]:
    """Inputs and targets."""
    x, target = jax.random.normal(jax.random.key(settings.seed + 1), (2, *shape))
    return x, target


def make_work(settings: Settings, case: Case, where: str = "") -> Work:
    """One linear layer with kernels in its first seeds, their alphas adding up to 0.6."""
    kernels = make_kernels(case.kernel, case.count, case.width, settings.rank, settings.seed)
    places = [(0, seed) for seed in range(case.count)]
    state = grafted(1, max(settings.seeds_per_layer, case.count), places, 0.6 / case.count)
    x, target = random_batch(settings, case.batch, case.width)
    host = make_stack(1, case.width, settings.seed)
    return Work(f"{where}{case}", host, state, kernels, case.blend, x, target, case.dynamic)


def transformer_work(settings: Settings, count: int, where: str = "") -> Work:
    """A transformer with a kernel at the feed-forward layer of some of its blocks."""
    shape = settings.transformer
    host = make_transformer(shape, settings.seed)
    kernels = make_kernels("low rank", count, shape.features, settings.rank, settings.seed)
    places = [(row, 0) for row in feed_forward_rows(shape, count)]
    state = grafted(len(host.sites), settings.seeds_per_layer, places, 0.6)
    x, target = random_batch(settings, shape.batch, shape.length, shape.features)
    blocks = "1 block" if count == 1 else f"{count} blocks"
    name = f"{where}{shape}, low rank in {blocks}"
    return Work(name, host, state, kernels, "convex", x, target, dynamic=False)


def compare_work(results: Results, settings: Settings, work: Work) -> None:
    """Forward pass and training step, by hand and by Esper, and whether they agree."""
    forward_name, step_name = f"{work.name}, forward", f"{work.name}, training step"
    if not (results.wants(forward_name) or results.wants(step_name)):
        return
    own = plan(work.state, work.kernels, work.host.sites, blend=work.blend)
    gathered = gather(work.state, work.kernels, own)
    assert gathered is not None
    live = on_device(gathered)
    params = (work.host.params, gathered.params)
    weights = hand_weights(own, live)
    functions = {
        name: [run.program.apply for run in runs] for name, runs in own.sites if runs
    }  # fmt: skip
    hand = by_hand(work.host.net, work.blend, functions)
    step = partial(sgd_with, rate=settings.learning_rate)
    ours: dict[str, tuple[Apply, tuple[Any, ...]]] = {
        "planned": (planned(work.host.net, own), (params, live, work.x)),
    }
    if work.dynamic:
        slots = work.state.shape[1]
        bank = make_bank(work.kernels, slots=slots)
        control = (bank.code, jax.tree.map(jnp.asarray, work.state))
        ours["dynamic"] = (
            dynamic(work.host.net, bank, work.host.sites, work.blend),
            ((work.host.params, bank.params), control, work.x),
        )

    def build_forward() -> Mapping[str, Call]:
        twins: dict[str, Call] = {
            name: partial(fresh(hand), params, weights, work.x) for name in ("by hand", "again")
        }
        output = planned_output(work.host.net, own)
        twins["output"] = partial(fresh(output), params, live, work.x)
        return twins | {name: partial(fresh(apply), *args) for name, (apply, args) in ours.items()}

    def build_step() -> Mapping[str, Call]:
        by_hand_step = step(with_nothing(hand))
        twins: dict[str, Call] = {
            name: partial(fresh(by_hand_step), params, weights, work.x, work.target)
            for name in ("by hand", "again")
        }
        return twins | {
            name: partial(fresh(step(apply)), *args, work.target)
            for name, (apply, args) in ours.items()
        }

    first = build_forward()
    check_equal(results, work.name, first)
    # The dynamic mode costs what it costs; it has no target.
    targets = {"planned": settings.target, "dynamic": None}
    measured = {name: targets[name] for name in ours}
    if results.wants(forward_name):
        results.rows += contest(
            forward_name, {"output": settings.target} | measured,
            starting_with(first, build_forward), settings.sampling, jax.block_until_ready,
        )  # fmt: skip
    if results.wants(step_name):
        results.rows += contest(
            step_name, measured, build_step, settings.sampling, jax.block_until_ready
        )


def check_equal(results: Results, name: str, calls: Mapping[str, Call]) -> None:
    """Every variant's output is the first one's, within the table of tolerances."""
    outputs = {variant: np.asarray(jax.tree.leaves(call())[0]) for variant, call in calls.items()}
    expected = next(iter(outputs.values()))
    apart = [v for v, found in outputs.items() if not difference(found, expected).within]
    found = ", ".join(apart) if apart else "none"
    results.checks.append(Check(f"{name}: variants whose output is another", "none", found))


def compare_ramp(results: Results, settings: Settings, where: str) -> None:
    """A training loop whose alpha moves in every step, on the host."""
    width = settings.ramp_width
    name = f"{where}{width}×{width} batch 32, low rank, convex, training step on a ramp"
    if not results.wants(name):
        return
    work = make_work(settings, Case(width, 32))
    ramp = Event(0, 0, 0, EventKind.RAMP, value=1.0, span=1_000_000)
    state = apply_event(work.state, ramp)
    own = plan(state, work.kernels, work.host.sites)
    gathered = gather(state, work.kernels, own)
    assert gathered is not None
    params = (work.host.params, gathered.params)
    bare_live = on_device(gathered)

    def hand_call() -> Call:
        function = by_hand(work.host.net, "convex", {"layer 0": [work.kernels[0].program.apply]})
        step = fresh(sgd_with(with_nothing(function), settings.learning_rate))
        at = iter(range(1, 1_000_000))

        def call() -> Any:
            alpha = 0.6 + 0.4 * next(at) / 1_000_000
            return step(params, np.array([1.0 - alpha, alpha], np.float32), work.x, work.target)

        return call

    def our_call() -> Call:
        step = fresh(sgd_with(planned(work.host.net, own), settings.learning_rate))
        at = iter(range(1, 1_000_000))

        def call() -> Any:
            weights = gather_weights(advance(state, next(at)), own)
            live = dataclasses.replace(
                bare_live, host_weights=weights.host_weights, weights=weights.weights
            )
            return step(params, live, work.x, work.target)

        return call

    def build() -> Mapping[str, Call]:
        return {"by hand": hand_call(), "again": hand_call(), "planned": our_call()}

    # What the host computes here is the same for one layer and for hundreds.
    results.rows += contest(
        name, {"planned": None}, build, settings.sampling, jax.block_until_ready
    )


def widest(cases: Sequence[Case]) -> Case:
    """The case with most to do."""
    return max(cases, key=lambda case: (case.width, case.batch, case.kernel))


def gpu() -> Any:
    """The GPU that jax runs on, or None."""
    first = jax.devices()[0]
    return first if first.platform == "gpu" else None


def on_gpu(results: Results, settings: Settings, only: str) -> None:
    """Everything once more on a GPU, and the widest case against the device's own peaks."""
    device = gpu()
    if device is None:
        results.notes.append("No GPU: jax runs on the CPU alone here; nothing measured on one.")
        return
    with jax.default_device(device):
        found = measure(settings, only, where="GPU, ")
        if found.wants("GPU, widest training step"):
            work = make_work(settings, dataclasses.replace(widest(settings.cases), dynamic=False))
            found.figures += measure_roofline(work_step(settings, work), str(device.device_kind))
    for kind in ("rows", "figures", "checks", "notes", "offered"):
        getattr(results, kind).extend(getattr(found, kind))


def work_step(settings: Settings, work: Work) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A planned training step, and its arguments."""
    own = plan(work.state, work.kernels, work.host.sites, blend=work.blend)
    gathered = gather(work.state, work.kernels, own)
    assert gathered is not None
    live = on_device(gathered)
    step = sgd_with(planned(work.host.net, own), settings.learning_rate)
    return step, ((work.host.params, gathered.params), live, work.x, work.target)


def measure_everywhere(settings: Settings, only: str = "") -> Results:
    """All comparisons on the CPU, and on a GPU where there is one."""
    with jax.default_device(jax.devices("cpu")[0]):
        results = measure(settings, only)
    on_gpu(results, settings, only)
    return results


BENCHMARK = Benchmark(
    name="active",
    doc=__doc__,
    settings=Settings,
    measure=measure_everywhere,
    title="Kernels at work: median of paired ratios (interquartile range)",
    names=("reference", "ours"),
    packages=("esper-morphogenetic", "numpy", "jax", "jaxlib", "equinox"),
    quick=60,
    standard=Sampling(rounds=300),
    gpu=True,
)


if __name__ == "__main__":
    sys.exit(run(BENCHMARK))
