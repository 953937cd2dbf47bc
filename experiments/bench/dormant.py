"""What a dormant seed costs: `python -m experiments.bench.dormant`.

A wrapped network in which nothing is grafted is set against its bare twin: the
same layers on the same parameters. In JAX the compiled programs are compared as
text, in torch the captured graphs; then both are timed. The second bare twin
shows what the measurement cannot tell apart. Nothing fails here: a target that
is not met is printed as not met.

JAX runs each step in the calling thread, to its end: what is compared is a
step's cost, none of it hidden behind the step before.
"""

import argparse
import copy
import dataclasses
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import torch
from torch import nn

import esper_adapters.equinox
import esper_adapters.pytorch
from esper_adapters.pytorch import KasminaLayer
from esper_functional import (
    Site,
    bare,
    forward,
    gather,
    init_linear,
    init_seeds,
    linear,
    plan,
    run,
)
from experiments.bench._paired import (
    Check,
    Row,
    Sampling,
    Twins,
    compare,
    console,
    machine,
    one_core,
    print_checks,
    print_rows,
    write_json,
)

PACKAGES = ("esper-morphogenetic", "numpy", "jax", "jaxlib", "equinox", "torch")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The work, and the targets of the design (§8)."""

    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    width: int = 64
    batch: int = 32
    depth: int = 12
    seeds_per_layer: int = 4
    learning_rate: float = 0.01
    seed: int = 0
    jax_target: float = 1.01
    torch_layer_target: float = 1.02
    torch_stack_target: float = 1.02
    torch_compiled_target: float = 1.01


@dataclasses.dataclass
class Results:
    """What has been measured so far."""

    rows: list[Row] = dataclasses.field(default_factory=list)
    checks: list[Check] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)


# ---- JAX: the compiled program, then its time ----


def program_text(program: Any, *arguments: Any) -> str:
    """The optimised HLO, without the module's name and the places in the source."""
    text: str = program.lower(*arguments).compile().as_text()
    text = re.sub(r"^HloModule [^,\s]+", "HloModule _", text)
    text = re.sub(r"\n(FileNames|FunctionNames|FileLocations|StackFrames)\n(\d+ .*\n)*", "", text)
    return re.sub(r', metadata=\{("(\\.|[^"\\])*"|[^"}])*\}', "", text)


def sgd(apply: Callable[..., Any], rate: float) -> Callable[..., Any]:
    """A training step of `apply(params, x) -> y`."""

    def loss(params: Any, x: Any, target: Any) -> Any:
        return jnp.mean((apply(params, x) - target) ** 2)

    def step(params: Any, x: Any, target: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(params, x, target)
        return jax.tree.map(lambda p, g: p - rate * g, params, grads), value

    return step


def sgd_live(apply: Callable[..., Any], rate: float) -> Callable[..., Any]:
    """A training step of `apply(params, live, x) -> (y, rest)`."""

    def loss(params: Any, live: Any, x: Any, target: Any) -> Any:
        y, rest = apply(params, live, x)
        return jnp.mean((y - target) ** 2), rest

    def step(params: Any, live: Any, x: Any, target: Any) -> Any:
        (value, rest), grads = jax.value_and_grad(loss, has_aux=True)(params, live, x, target)
        return jax.tree.map(lambda p, g: p - rate * g, params, grads), rest, value

    return step


def compare_jax(
    results: Results,
    settings: Settings,
    name: str,
    bare_function: Callable[..., Any],
    bare_arguments: tuple[Any, ...],
    dormant_function: Callable[..., Any],
    dormant_arguments: tuple[Any, ...],
) -> None:
    """The compiled programs of two forms of one computation, and their times."""
    same = program_text(jax.jit(bare_function), *bare_arguments) == program_text(
        jax.jit(dormant_function), *dormant_arguments
    )
    results.checks.append(Check(f"{name}: HLO as bare's", "yes", "yes" if same else "no"))

    def build() -> Twins:
        # A partial is a function object of its own: each twin is traced and compiled.
        return Twins(
            reference=partial(jax.jit(partial(bare_function)), *bare_arguments),
            again=partial(jax.jit(partial(bare_function)), *bare_arguments),
            candidate=partial(jax.jit(partial(dormant_function)), *dormant_arguments),
        )

    target = settings.jax_target
    results.rows.append(compare(name, target, build, settings.sampling, jax.block_until_ready))


def jax_data(settings: Settings) -> Any:
    """Inputs and targets."""
    shape = (2, settings.batch, settings.width)
    return jax.random.normal(jax.random.key(settings.seed), shape)


def measure_core(results: Results, settings: Settings, depth: int) -> None:
    """The functional form, in the two ways to write a planned step.

    `forward()` takes the live part and returns the faults, as the trainer uses
    it; `run()` returns the next live part.
    """
    names = tuple(f"layer {i}" for i in range(depth))
    keys = jax.random.split(jax.random.key(settings.seed), depth)
    params = [init_linear(key, settings.width, settings.width) for key in keys]
    x, target = jax_data(settings)
    rate = settings.learning_rate

    def net(params: Any, site: Site, x: Any) -> Any:
        for name, own in zip(names[:-1], params[:-1], strict=True):
            x = jax.nn.relu(site(name, linear, own, x))
        return site(names[-1], linear, params[-1], x)

    seeds = init_seeds(depth, settings.seeds_per_layer)
    planned = plan(seeds, {}, names)
    live = gather(seeds, {}, planned)

    def bare_apply(params: Any, x: Any) -> Any:
        return net(params, bare, x)

    def forward_apply(params: Any, live: Any, x: Any) -> Any:
        y, observed = forward(net, planned, params, live, x)
        return y, observed.faults

    def run_apply(params: Any, live: Any, x: Any) -> Any:
        return run(net, planned, params, live, x)

    for way, apply in {"forward()": forward_apply, "run()": run_apply}.items():
        title = f"JAX core {way}, {shape(settings, depth)}"
        compare_jax(
            results, settings, f"{title}, forward",
            bare_apply, (params, x),
            apply, (params, live, x),
        )  # fmt: skip
        compare_jax(
            results, settings, f"{title}, training step",
            sgd(bare_apply, rate), (params, x, target),
            sgd_live(apply, rate), (params, live, x, target),
        )  # fmt: skip


def measure_equinox(results: Results, settings: Settings, depth: int) -> None:
    """The Equinox face: the module that `wrap` gives, under plain `jax.jit`."""
    width, rate = settings.width, settings.learning_rate
    mlp = eqx.nn.MLP(width, width, width, depth - 1, key=jax.random.key(settings.seed))
    module = esper_adapters.equinox.wrap(mlp, seeds_per_layer=settings.seeds_per_layer).module
    x, target = jax_data(settings)

    def flat(model: Any) -> tuple[Any, Callable[..., Any]]:
        params, static = eqx.partition(model, eqx.is_inexact_array)
        return params, lambda params, x: jax.vmap(eqx.combine(params, static))(x)

    bare_params, bare_apply = flat(mlp)
    params, apply = flat(module)
    title = f"Equinox, {shape(settings, depth)}"
    compare_jax(
        results, settings, f"{title}, forward",
        bare_apply, (bare_params, x),
        apply, (params, x),
    )  # fmt: skip
    compare_jax(
        results, settings, f"{title}, training step",
        sgd(bare_apply, rate), (bare_params, x, target),
        sgd(apply, rate), (params, x, target),
    )  # fmt: skip


def shape(settings: Settings, depth: int) -> str:
    width = settings.width
    return f"{width}×{width}" if depth == 1 else f"{depth} × {width}×{width}"


# ---- torch ----

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

    with torch.no_grad():
        row = compare(f"{name}, forward", target, build_forward, settings.sampling)
    results.rows.append(row)
    row = compare(f"{name}, forward + backward", target, build_step, settings.sampling)
    results.rows.append(row)


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
    name = f"torch compiled, {shape(settings, settings.depth)}"
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


# ---- the run ----


def main() -> None:
    parser = argparse.ArgumentParser(prog="experiments.bench.dormant", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="90 rounds: a rough look")
    parser.add_argument("--rounds", type=int, help="how often every variant is timed")
    parser.add_argument("--json", type=Path, default=Path("runs/bench/dormant.json"))
    options = parser.parse_args()
    rounds: int = 90 if options.quick else Sampling.rounds
    if options.rounds is not None:
        rounds = options.rounds
    if rounds < 1:
        parser.error(f"--rounds must be at least 1, got {rounds}")
    settings = Settings(sampling=Sampling(rounds=rounds))

    core = one_core()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    torch.set_num_threads(1)
    torch.manual_seed(settings.seed)
    out = console()
    started = time.perf_counter()
    before = machine(core, PACKAGES)
    results = Results()

    for depth in (1, settings.depth):
        measure_core(results, settings, depth)
        measure_equinox(results, settings, depth)
    name, target = f"torch eager, {shape(settings, 1)}", settings.torch_layer_target
    compare_torch(results, settings, name, target, torch_layer)
    name, target = f"torch eager, {shape(settings, settings.depth)}", settings.torch_stack_target
    compare_torch(results, settings, name, target, torch_stack)
    measure_torch_compiled(results, settings)

    print_checks(out, "Dormant programs", results.checks)
    print_rows(
        out,
        f"Dormant times: median of paired ratios over {rounds} rounds (interquartile range),"
        f" batch {settings.batch}",
        results.rows,
        ("bare", "dormant"),
    )
    for note in results.notes:
        out.print(note, markup=False)
    write_json(
        options.json,
        benchmark="dormant",
        settings=settings,
        machine=before,
        rows=results.rows,
        checks=results.checks,
        notes=results.notes,
    )
    outcomes = [entry.met for entry in (*results.checks, *results.rows)]
    out.print(
        f"{sum(outcomes)} of {len(outcomes)} targets met, {time.perf_counter() - started:.0f} s on"
        f" {before['cpu']}, core {core}; {options.json}",
        markup=False,
    )


if __name__ == "__main__":
    main()
