"""A small network with two sites, kernels for it, and ways to look at what is compiled."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esper_functional import (
    Event,
    EventKind,
    Kernel,
    SeedState,
    fold_events,
    init_linear,
    init_seeds,
    kernel_from_function,
    linear,
)

SITES = ("hidden", "out")
WIDTHS = (3, 4, 2)


def mlp(params: Any, site: Any, x: Any) -> Any:
    h = jax.nn.relu(site("hidden", linear, params["hidden"], x))
    return site("out", linear, params["out"], h)


def host_params(seed: int = 0) -> Any:
    first, second = jax.random.split(jax.random.key(seed))
    return {
        "hidden": init_linear(first, WIDTHS[0], WIDTHS[1]),
        "out": init_linear(second, WIDTHS[1], WIDTHS[2]),
    }


def dense(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params["w"] + params["b"])


def dense_kernel(seed: int, site: str = "hidden") -> Kernel:
    """A kernel that fits a site of `mlp`; all share one program."""
    i = SITES.index(site)
    random = np.random.default_rng(seed)
    w = random.normal(size=(WIDTHS[i], WIDTHS[i + 1])).astype(np.float32)
    b = random.normal(size=WIDTHS[i + 1]).astype(np.float32)
    return kernel_from_function(dense, {"w": jnp.asarray(w), "b": jnp.asarray(b)})


def filled(kernel: Kernel, value: float) -> Kernel:
    """The kernel with every parameter set to one value, such as NaN."""
    return Kernel(kernel.program, jax.tree.map(lambda p: jnp.full_like(p, value), kernel.params))


def batch(seed: int = 0, size: int = 5) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(size, WIDTHS[0])), jnp.float32)


def grafted_state(*grafts: tuple[int, int, int, float], seeds: int = 3) -> SeedState:
    """A state in which each (layer, seed, slot, alpha) is ACTIVE."""
    events = []
    for layer, seed, slot, alpha in grafts:
        events.append(Event(0, layer, seed, EventKind.LOAD, value=float(slot)))
        events.append(Event(0, layer, seed, EventKind.ACTIVATE, value=alpha))
    return fold_events(init_seeds(len(SITES), seeds), events)


def fossilise(state: SeedState, layer: int, seed: int) -> SeedState:
    return fold_events(state, [Event(0, layer, seed, EventKind.FOSSILIZE)])


def optimised_hlo(function: Callable[..., Any], *args: Any) -> str:
    """What XLA makes of a function, without its name and its source locations."""
    text = jax.jit(function).lower(*args).compile().as_text()
    header, program = text.split("\n", 1)
    layout = re.sub(r"^HloModule [^,]*,", "", header)
    body = program[min(i for i in (program.find("\n%"), program.find("\nENTRY")) if i >= 0) :]
    return layout + re.sub(r",? ?metadata=\{[^}]*\}", "", body)


_compilations: list[str] = []


def _count(event: str, duration: float, **_: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compilations.append(event)


jax.monitoring.register_event_duration_secs_listener(_count)


@contextmanager
def compilations() -> Iterator[Callable[[], int]]:
    """Yields a function that says how many programs XLA has compiled since."""
    before = len(_compilations)
    yield lambda: len(_compilations) - before


def exact_params(seed: int = 0) -> Any:
    """Host parameters in eighths: sums of products with `exact_batch` are free of rounding.

    So they are equal to the last bit in whatever order a compiler adds.
    """
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: jnp.asarray(random.integers(-8, 9, p.shape) / 8, jnp.float32), host_params()
    )


def exact_batch(seed: int = 0, size: int = 5) -> jax.Array:
    """Inputs that are small integers."""
    random = np.random.default_rng(seed)
    return jnp.asarray(random.integers(-3, 4, (size, WIDTHS[0])), jnp.float32)
