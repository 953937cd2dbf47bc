"""Dormant seeds in jax: compiled programs and times."""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
from flax import nnx

import esper_adapters.equinox
import esper_adapters.flax
from esper_functional import (
    Network,
    attention,
    batch_norm,
    conv2d,
    forward,
    gather,
    init_attention,
    init_batch_norm,
    init_conv2d,
    init_layer_norm,
    init_seeds,
    layer_norm,
    plan,
    run,
    seeded,
)
from experiments.bench._dormant import Settings
from experiments.bench._networks import make_stack, make_transformer
from experiments.bench._paired import Twins, compare
from experiments.bench._results import Check, Results
from experiments.bench._steps import Apply, bare_apply, fresh, program_text, sgd, sgd_with


def compare_programs(
    results: Results,
    settings: Settings,
    name: str,
    bare_form: tuple[Apply, tuple[Any, ...]],
    dormant_form: tuple[Apply, tuple[Any, ...]],
) -> None:
    """The compiled programs of two forms (function, arguments) of one computation, and times."""
    if not results.wants(name):
        return
    (bare_function, bare_arguments), (function, arguments) = bare_form, dormant_form
    same = program_text(fresh(bare_function), *bare_arguments) == program_text(
        fresh(function), *arguments
    )
    results.checks.append(Check(f"{name}: HLO as bare's", "yes", "yes" if same else "no"))

    def build() -> Twins:
        return Twins(
            reference=partial(fresh(bare_function), *bare_arguments),
            again=partial(fresh(bare_function), *bare_arguments),
            candidate=partial(fresh(function), *arguments),
        )

    target = settings.jax_target
    results.rows.append(compare(name, target, build, settings.sampling, jax.block_until_ready))


def jax_data(settings: Settings, *shape: int) -> Any:
    """Inputs and targets."""
    return jax.random.normal(jax.random.key(settings.seed), (2, *shape))


def compare_network(
    results: Results,
    settings: Settings,
    title: str,
    net: Network,
    sites: tuple[str, ...],
    params: Any,
    data: Any,
    ways: tuple[str, ...] = ("forward()",),
) -> None:
    """A network of the core, in the ways there are to write a planned step.

    `forward()` takes the live part and returns the faults, as the trainer uses
    it; `run()` returns the next live part.
    """
    x, target = data
    rate = settings.learning_rate
    seeds = init_seeds(len(sites), settings.seeds_per_layer)
    planned = plan(seeds, {}, sites)
    live = gather(seeds, {}, planned)

    def forward_apply(params: Any, live: Any, x: Any) -> Any:
        y, observed = forward(net, planned, params, live, x)
        return y, observed.faults

    def run_apply(params: Any, live: Any, x: Any) -> Any:
        return run(net, planned, params, live, x)

    bare_function = bare_apply(net)
    applies: dict[str, Apply] = {"forward()": forward_apply, "run()": run_apply}
    for way in ways:
        name = title.format(way=way)
        compare_programs(
            results, settings, f"{name}, forward",
            (bare_function, (params, x)),
            (applies[way], (params, live, x)),
        )  # fmt: skip
        compare_programs(
            results, settings, f"{name}, training step",
            (sgd(bare_function, rate), (params, x, target)),
            (sgd_with(applies[way], rate), (params, live, x, target)),
        )  # fmt: skip


def measure_core(results: Results, settings: Settings, depth: int) -> None:
    """Linear layers in the functional form."""
    net, sites, params = make_stack(depth, settings.width, settings.seed)
    data = jax_data(settings, settings.batch, settings.width)
    title = f"JAX core {{way}}, {settings.shape(depth)}"
    ways = ("forward()", "run()")
    compare_network(results, settings, title, net, sites, params, data, ways)


def measure_layers(results: Results, settings: Settings) -> None:
    """The other layers of the core, each by itself."""
    key = jax.random.key(settings.seed)
    width, channels = settings.width, settings.channels
    image = (settings.batch, channels, settings.image, settings.image)
    sequence = (settings.batch_sequences, settings.length, width)
    norm, stats = init_batch_norm(width)

    def normalised(params: Any, x: Any) -> Any:
        # Running statistics are a second result; here they are left behind.
        return batch_norm(params, x, stats, train=True)

    def first(net: Network) -> Network:
        return lambda params, site, x: net(params, site, x)[0]

    layers: dict[str, tuple[Network, Any, tuple[int, ...]]] = {
        f"conv2d {channels}×{channels}×3×3": (
            seeded(conv2d, padding=1),
            init_conv2d(key, channels, channels, 3),
            image,
        ),
        f"attention {width}, {settings.heads} heads": (
            seeded(attention, num_heads=settings.heads),
            init_attention(key, width, settings.heads),
            sequence,
        ),
        f"layer norm {width}": (seeded(layer_norm), init_layer_norm(width), sequence),
        f"batch norm {width}": (first(seeded(normalised)), norm, (settings.batch, width)),
    }
    for kind, (net, params, shape) in layers.items():
        title = f"JAX core {{way}}, {kind}"
        compare_network(
            results, settings, title, net, ("layer",), params, jax_data(settings, *shape)
        )


def measure_transformer(results: Results, settings: Settings) -> None:
    """Blocks of four sites each."""
    shape = settings.transformer
    net, sites, params = make_transformer(shape, settings.seed)
    data = jax_data(settings, shape.batch, shape.length, shape.features)
    compare_network(results, settings, f"JAX core {{way}}, {shape}", net, sites, params, data)


def compare_faces(
    results: Results,
    settings: Settings,
    title: str,
    bare_form: tuple[Any, Apply],
    dormant_form: tuple[Any, Apply],
) -> None:
    """A framework's model and its dormant form, each as parameters and a function of them."""
    x, target = jax_data(settings, settings.batch, settings.width)
    rate = settings.learning_rate
    (bare_params, bare_function), (params, function) = bare_form, dormant_form
    compare_programs(
        results, settings, f"{title}, forward",
        (bare_function, (bare_params, x)),
        (function, (params, x)),
    )  # fmt: skip
    compare_programs(
        results, settings, f"{title}, training step",
        (sgd(bare_function, rate), (bare_params, x, target)),
        (sgd(function, rate), (params, x, target)),
    )  # fmt: skip


def measure_equinox(results: Results, settings: Settings, depth: int) -> None:
    """The Equinox face: the module that `wrap` gives, under plain `jax.jit`."""
    width = settings.width
    mlp = eqx.nn.MLP(width, width, width, depth - 1, key=jax.random.key(settings.seed))
    wrapped = esper_adapters.equinox.wrap(mlp, seeds_per_layer=settings.seeds_per_layer)

    def flat(model: Any) -> tuple[Any, Apply]:
        params, static = eqx.partition(model, eqx.is_inexact_array)
        return params, lambda params, x: jax.vmap(eqx.combine(params, static))(x)

    title = f"Equinox, {settings.shape(depth)}"
    compare_faces(results, settings, title, flat(mlp), flat(wrapped.module))


def measure_flax(results: Results, settings: Settings, depth: int) -> None:
    """The Flax NNX face: the module that `wrap` gives, split, and merged under `jax.jit`."""
    width = settings.width

    class Stack(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.layers = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(depth)])

        def __call__(self, x: jax.Array) -> jax.Array:
            for layer in self.layers[:-1]:
                x = jax.nn.relu(layer(x))
            return self.layers[-1](x)

    host = Stack(nnx.Rngs(settings.seed))
    wrapped = esper_adapters.flax.wrap(host, seeds_per_layer=settings.seeds_per_layer)

    def flat(model: Any) -> tuple[Any, Callable[..., Any]]:
        graph, state = nnx.split(model)
        return state, lambda state, x: nnx.merge(graph, state)(x)

    title = f"Flax NNX, {settings.shape(depth)}"
    compare_faces(results, settings, title, flat(host), flat(wrapped.module))
