"""One process from its start to the first training step with a kernel: what `compile` starts.

`python -m experiments.bench._first_step_process FACE LIBRARY KERNEL KERNEL BEGUN`, where BEGUN is
`time.monotonic()` when it was asked for, prints one line of JSON: for each stage its seconds, and
what happened in it that has no clock.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

FEATURES, BATCH, CLASSES = 64, 32, 10

REQUESTS = "/jax/compilation_cache/compile_requests_use_cache"
HITS = "/jax/compilation_cache/cache_hits"
PROGRAMS = "/jax/core/compile/backend_compile_duration"

Session = Iterator[tuple[str, float]]
"""The stage that has just ended, and the loss where it was a step, else 0."""


def in_torch(folder: str, first: str, second: str) -> Session:
    """Three linear layers in eager torch, a kernel's TorchScript beside the first."""
    import torch
    from torch import nn

    import esper
    from esper import execution  # noqa: F401  (esper.wrap imports it where it is needed)
    from esper.urza import Library
    from esper_adapters.pytorch import carry_optimizer

    yield "imports", 0.0
    random = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, FEATURES, generator=random)
    y = torch.randint(CLASSES, (BATCH,), generator=random)

    def host() -> tuple[Any, Any]:
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(FEATURES, FEATURES), nn.ReLU(),
            nn.Linear(FEATURES, FEATURES), nn.ReLU(),
            nn.Linear(FEATURES, CLASSES),
        )  # fmt: skip
        return net, torch.optim.SGD(net.parameters(), 1e-2)

    def loaded(net: Any, optimizer: Any, library: Library, kernel_id: str) -> tuple[Any, Any]:
        model = esper.wrap(net, blend="residual", library=library)
        if not model.load_kernel_sync("0", 0, kernel_id, alpha=0.5):
            raise LookupError(f"the library in {folder} holds no kernel {kernel_id}")
        carry_optimizer(optimizer, model)
        return model, optimizer

    def step(model: Any, optimizer: Any) -> float:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    hosts = host(), host()
    yield "host", 0.0
    library = Library(folder, create=False)
    trained = loaded(*hosts[0], library, first)
    yield "load", 0.0
    yield "first step", step(*trained)
    yield "second step", step(*trained)
    trained = loaded(*hosts[1], library, second)
    yield "load, program known", 0.0
    yield "first step, program known", step(*trained)


def in_jax(folder: str, first: str, second: str) -> Session:
    """Three linear layers of Equinox, a kernel's StableHLO beside the first."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    import esper
    from esper import execution  # noqa: F401  (esper.wrap imports it where it is needed)
    from esper.urza import Library
    from esper_adapters import equinox as face  # noqa: F401  (so too)

    yield "imports", 0.0
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (BATCH, FEATURES))
    y = jax.random.normal(keys[1], (BATCH, CLASSES))
    host = eqx.nn.MLP(FEATURES, CLASSES, FEATURES, 2, key=keys[2])
    jax.block_until_ready(eqx.filter((x, y, host), eqx.is_array))
    yield "host", 0.0

    def loaded(library: Library, kernel_id: str) -> Any:
        model = esper.wrap(host, blend="residual", library=library)
        return model.load_kernel("layers.0", 0, kernel_id, alpha=0.5).module

    @eqx.filter_jit
    def step(module: Any) -> tuple[Any, Any]:
        def loss_of(module: Any) -> Any:
            return jnp.mean((jax.vmap(module)(x) - y) ** 2)

        loss, grads = eqx.filter_value_and_grad(loss_of)(module)
        return eqx.apply_updates(module, jax.tree.map(lambda g: -1e-2 * g, grads)), loss

    library = Library(folder, create=False)
    module = loaded(library, first)
    yield "load", 0.0
    module, loss = jax.block_until_ready(step(module))
    yield "first step", float(loss)
    module, loss = jax.block_until_ready(step(module))
    yield "second step", float(loss)
    module = loaded(library, second)
    yield "load, program known", 0.0
    module, loss = jax.block_until_ready(step(module))
    yield "first step, program known", float(loss)


FACES: dict[str, Callable[[str, str, str], Session]] = {"torch": in_torch, "jax": in_jax}


def child_seconds() -> float:
    """Processor time of child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(face: str, folder: str, first: str, second: str, begun: str) -> None:
    """Go through all stages of a face, and print what was found."""
    counts: dict[str, int] = {}

    def heard(event: str, *_: Any, **__: Any) -> None:
        counts[event] = counts.get(event, 0) + 1

    now = time.monotonic()
    stages = {"start": {"seconds": now - float(begun)}}
    children = child_seconds()
    for stage, loss in FACES[face](folder, first, second):
        ended = time.monotonic()
        stages[stage] = {
            "seconds": ended - now,
            "loss": loss,
            "in children": child_seconds() - children,
            **{event: counts.get(event, 0) for event in (REQUESTS, HITS, PROGRAMS)},
        }
        if stage == "imports":
            # Esper's core is of jax, so that it is imported for torch as well.
            import jax

            jax.monitoring.register_event_listener(heard)
            jax.monitoring.register_event_duration_secs_listener(heard)
        counts.clear()
        children = child_seconds()
        now = time.monotonic()
    print(json.dumps(stages))


if __name__ == "__main__":
    main(*sys.argv[1:])
