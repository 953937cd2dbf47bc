"""Hosts of many kinds on jax, small tasks for them, and what happens to their trainees."""

import equinox as eqx
import jax
import numpy as np
from flax import nnx

from esper.tezzeret import compile_blueprint, load_blueprint
from esper.tolaria._jax_trainee import JaxTrainee
from esper.tolaria._trainee import Optimisation, Rates
from esper.tolaria.tasks import CustomHost, Loss, Split, Task, load_task
from esper_functional import Event, EventKind
from tests.esper.trainee_life import draw

RATES = Rates(0.05, {})
BATCH = np.arange(16, dtype=np.int32)
BATCH.setflags(write=False)  # as loaders give them
SGD = Optimisation("sgd", momentum=0.9, ema_decay=0.9)


class Normed(nnx.Module):
    """Running statistics, and dropout of a stream of its own."""

    def __init__(self, seed):
        rngs = nnx.Rngs(seed)
        self.first = nnx.Linear(6, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.3, rngs=rngs)
        self.last = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.drop(jax.nn.relu(self.norm(self.first(x)))))


class Dropped(eqx.Module):
    """Dropout by keys; takes one example."""

    first: eqx.nn.Linear
    drop: eqx.nn.Dropout
    last: eqx.nn.Linear

    def __init__(self, seed):
        one, other = jax.random.split(jax.random.key(seed))
        self.first = eqx.nn.Linear(6, 8, key=one)
        self.drop = eqx.nn.Dropout(0.3)
        self.last = eqx.nn.Linear(8, 1, key=other)

    def __call__(self, x, *, key=None):
        return self.last(self.drop(jax.nn.relu(self.first(x)), key=key))


class Positions(eqx.Module):
    """Logits at every position; what calls it maps it over the batch."""

    first: eqx.nn.Linear
    last: eqx.nn.Linear

    def __init__(self, seed):
        one, other = jax.random.split(jax.random.key(seed))
        self.first = eqx.nn.Linear(4, 8, key=one)
        self.last = eqx.nn.Linear(8, 3, key=other)

    def __call__(self, x):
        return jax.vmap(self.last)(jax.nn.relu(jax.vmap(self.first)(x)))


def call_mapped(module, x):
    return jax.vmap(module)(x)


def make_task(name, host, example, labels=(), loss: Loss = "cross_entropy"):
    random = np.random.default_rng(0)

    def split():
        x = random.normal(size=(48, *example)).astype(np.float32)
        if loss == "cross_entropy":
            return Split(x, random.integers(0, 3, (48, *labels)).astype(np.int32))
        return Split(x, random.normal(size=(48, *labels)).astype(np.float32))

    return Task(name, split(), split(), split(), host, loss)


NORMED = CustomHost("normed", jax=Normed)
DROPPED = CustomHost("dropped", jax=Dropped, keyed=True)
POSITIONS = CustomHost("positions", jax=Positions, call=call_mapped)


def small(task, count=48):
    """So few examples that a check of all of them costs nothing."""
    parts = [Split(part.x[:count], part.y[:count]) for part in task.splits.values()]
    return Task(task.name, *parts, host=task.host, loss=task.loss)


VECTORS = "residual_mlp", {"width": 4}
IMAGES = "conv_low_rank", {"rank": 2}
TASKS = {
    "normed": (lambda: make_task("normed", NORMED, (6,)), "first", VECTORS),
    "dropped": (lambda: make_task("dropped", DROPPED, (6,), (), "mean_squared_error"), "first",
                VECTORS),
    "positions": (lambda: make_task("positions", POSITIONS, (5, 4), (5,)), "first", VECTORS),
    "shapes": (lambda: small(load_task("shapes")), "blocks.1.conv", IMAGES),
    "grammar": (lambda: small(load_task("grammar")), "hidden", VECTORS),
}  # fmt: skip
"""By name: a task, the layer that kernels are grafted into, and what they are compiled from."""


def make(task, **options):
    return JaxTrainee(task, **{"seed": 0, "seeds_per_layer": 2, "blend": "residual", **options})


def kernel_for(own, row, of):
    blueprint, sizes = of
    return compile_blueprint(load_blueprint(blueprint), own.signature(row), sizes=sizes)


def graft(own, row, kernel, seed, alpha, step=0, params=None):
    slot = row * own.seeds.shape[1] + seed
    own.apply(Event(step, row, seed, EventKind.LOAD, kernel.kernel_id, float(slot)))
    active = Event(step, row, seed, EventKind.ACTIVATE, kernel.kernel_id, alpha)
    own.apply(active, kernel, draw(kernel, seed, 0.3) if params is None else params)


def run(own, begin, end, rates=RATES, batch=BATCH):
    losses = []
    for step in range(begin, end):
        own.advance(step)
        losses.append(own.step(batch, rates, step))
    return own.read_losses(losses)
