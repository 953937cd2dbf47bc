"""The loops that Tolaria's is measured against, and the work that both do."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from esper.tolaria import GrowConfig, Task, make_config, make_trainee
from esper.tolaria.tasks import ConvHost, Host, MLPHost, make_loader, make_task


class Loop:
    """Trains the steps from the first number to before the second; returns the last loss.

    Args:
        train: does that.
        evaluate: judges the network by the parts that are held out.
        every: after how many steps that is done; 0 for never.
    """

    def __init__(
        self, train: Callable[[int, int], float], evaluate: Callable[[], Any], every: int
    ) -> None:
        self._train = train
        self._evaluate = evaluate
        self._every = every
        self.evaluated = 0.0
        """Seconds, in all."""

    def __call__(self, first: int, last: int) -> float:
        loss = 0.0
        for begin in range(first, last, self._every or last - first):
            loss = self._train(begin, min(last, begin + (self._every or last)))
            if self._every:
                began = time.perf_counter()
                self._evaluate()
                self.evaluated += time.perf_counter() - began
        return loss


@dataclasses.dataclass(frozen=True)
class Work:
    """A network and its batches."""

    name: str
    host: Host
    example: tuple[int, ...]
    batch: int
    blueprint: str
    """Of the kernel that is grafted, at the last of the host's own places."""


def mlp(sizes: tuple[int, ...], batch: int) -> Work:
    """An MLP; its kernel goes beside the first layer."""
    return Work(
        f"MLP {'-'.join(map(str, sizes))}", MLPHost(sizes), sizes[:1], batch, "residual_mlp"
    )


def conv(size: int, widths: tuple[int, ...], batch: int) -> Work:
    """A `ConvHost` for images of one channel; its kernel goes beside the last convolution."""
    host = ConvHost(1, size, widths, 6)
    return Work(f"ConvHost {host.name[5:]}", host, (1, size, size), batch, "conv_bottleneck")


def make_data(work: Work, examples: int, seed: int) -> Task:
    """Random examples with random labels: what is learnt is nothing, and costs the same."""
    random = np.random.default_rng(seed)

    def part(count: int) -> tuple[np.ndarray, np.ndarray]:
        x = random.normal(size=(count, *work.example)).astype(np.float32)
        return x, random.integers(0, 6, count)

    return make_task(
        "random",
        train=part(examples),
        validation=part(examples // 8),
        test=part(examples // 8),
        host=work.host,
    )


def configure(backend: str, work: Work, library: Path, **values: Any) -> GrowConfig:
    """A run of this work, by Adam, with the defaults of everything else."""
    return make_config(
        **{
            "task": "random",
            "backend": backend,
            "batch_size": work.batch,
            "learning_rate": 1e-3,
            "grow_at": [work.host.grow_at[0]],
            "blueprints": [work.blueprint],
            "variants": 1,
            "divergence": None,
            "library": library,
            **values,
        }
    )


def bare_loop(task: Task, config: GrowConfig, evaluate_every: int = 0) -> Loop:
    """The same host, batches and optimiser in the framework's own loop."""
    bare = _bare_torch if config.backend == "torch" else _bare_jax
    return bare(task, config, evaluate_every)


def _bare_jax(task: Task, config: GrowConfig, evaluate_every: int) -> Loop:
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import optax

    loader = make_loader(task, batch_size=config.batch_size, seed=config.seed)
    x, y = jnp.asarray(task.train.x), jnp.asarray(task.train.y)
    params, static = eqx.partition(task.host.jax(config.seed), eqx.is_inexact_array)
    optimizer = optax.adam(config.learning_rate)
    moments = optimizer.init(params)

    @jax.jit
    def step(params: Any, moments: Any, x: Any, y: Any, indices: Any) -> Any:
        def loss_of(params: Any) -> Any:
            logits = jax.vmap(eqx.combine(params, static))(x[indices])
            return optax.softmax_cross_entropy_with_integer_labels(logits, y[indices]).mean()

        loss, grads = jax.value_and_grad(loss_of)(params)
        # optax raises floats to integer powers, which strict promotion forbids.
        with jax.numpy_dtype_promotion("standard"):
            updates, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, loss

    def loop(first: int, last: int) -> float:
        nonlocal params, moments
        loss: Any = 0.0
        for now in range(first, last):
            params, moments, loss = step(params, moments, x, y, loader.batch(now))
        return float(loss)

    @jax.jit
    def judge(params: Any, x: Any, y: Any) -> Any:
        logits = jax.vmap(eqx.combine(params, static))(x)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.mean(), (logits.argmax(axis=1) == y).mean()

    held_out = [(jnp.asarray(p.x), jnp.asarray(p.y)) for p in (task.validation, task.test)]
    return Loop(
        loop,
        lambda: [[float(found) for found in judge(params, *part)] for part in held_out],
        evaluate_every,
    )


def _bare_torch(task: Task, config: GrowConfig, evaluate_every: int) -> Loop:
    import torch

    torch.set_num_threads(config.threads)
    loader = make_loader(task, batch_size=config.batch_size, seed=config.seed)
    x, y = torch.from_numpy(task.train.x), torch.from_numpy(task.train.y).long()
    model = task.host.torch(config.seed)
    optimizer = torch.optim.Adam(model.parameters(), config.learning_rate, fused=True)

    def loop(first: int, last: int) -> float:
        loss = torch.zeros(())
        for now in range(first, last):
            indices = np.asarray(loader.batch(now))
            chosen = torch.from_numpy(indices.copy())
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x[chosen]), y[chosen])
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    held_out = [
        (torch.from_numpy(p.x), torch.from_numpy(p.y).long()) for p in (task.validation, task.test)
    ]

    def judge() -> None:
        model.eval()
        with torch.no_grad():
            for x, y in held_out:
                logits = model(x)
                float(torch.nn.functional.cross_entropy(logits, y))
                float((logits.argmax(dim=1) == y).float().mean())
        model.train()

    return Loop(loop, judge, evaluate_every)


def steps_alone(task: Task, config: GrowConfig, kernel: Any, evaluate_every: int = 0) -> Loop:
    """The steps of a network with a kernel at alpha 1, without anything around them."""
    from esper.tolaria import Rates
    from esper_functional import Event, EventKind

    trainee = make_trainee(task, config)
    assert config.grow_at is not None
    row = trainee.sites.index(config.grow_at[0])
    slot = float(row * config.seeds_per_layer)
    trainee.apply(Event(0, row, 0, EventKind.LOAD, kernel.kernel_id, slot))
    trainee.apply(Event(0, row, 0, EventKind.ACTIVATE, kernel.kernel_id, 1.0), kernel)
    loader = make_loader(task, batch_size=config.batch_size, seed=config.seed)
    rates = Rates(config.learning_rate, {})

    def loop(first: int, last: int) -> float:
        loss: Any = 0.0
        for now in range(first, last):
            loss = trainee.step(loader.batch(now), rates, now)
        return float(loss)

    return Loop(
        loop, lambda: [trainee.evaluate(part) for part in ("validation", "test")], evaluate_every
    )


def arrays_of(tree: Mapping[str, Any]) -> Iterator[np.ndarray]:
    """The arrays of nested mappings."""
    for value in tree.values():
        if isinstance(value, Mapping):
            yield from arrays_of(value)
        else:
            yield np.asarray(value)
