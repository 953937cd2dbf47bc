"""Families of small classification tasks, drawn inside a compiled program.

Some cannot be learned by the small hosts of the gym and can with growth, some need none, and in one
the labels are drawn by lot, so that nothing can be learned at all. Each draws new data at every
reset: a policy cannot know a task by heart.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

INPUTS = 8
"""Features of an example; those that a family has no use for are 0."""

CLASSES = 2

_CLUSTERS = 8


class Family(NamedTuple):
    """A family of tasks."""

    draw: Callable[[jax.Array, int], tuple[jax.Array, jax.Array]]
    """`draw(key, count)`: examples f32 `[count, inputs]` in about [-1, 1], labels bool."""
    inputs: int
    """Features that an example of it has, 1 to `INPUTS`."""
    needs_growth: bool
    """Whether hosts of a few units fall short of what there is to learn."""


def _plane(key: jax.Array, count: int) -> jax.Array:
    return jax.random.uniform(key, (count, 2), minval=-1.0, maxval=1.0)


def _turned(key: jax.Array, x: jax.Array) -> jax.Array:
    angle = jax.random.uniform(key, maxval=2.0 * jnp.pi)
    c, s = jnp.cos(angle), jnp.sin(angle)
    return x @ jnp.stack([jnp.stack([c, -s]), jnp.stack([s, c])])


def _blobs(key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Two clouds that a line divides, but for a few points."""
    keys = jax.random.split(key, 3)
    labels = jax.random.bernoulli(keys[0], 0.5, (count,))
    centres = jnp.where(labels[:, None], 0.5, -0.5) * jnp.array([1.0, 0.0])
    x = centres + 0.25 * jax.random.normal(keys[1], (count, 2))
    return _turned(keys[2], x), labels


def _ring(key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The inside of a circle and what is around it."""
    keys = jax.random.split(key)
    x = _plane(keys[0], count)
    radius = jax.random.uniform(keys[1], minval=0.6, maxval=0.9)
    return x, jnp.sum(x**2, axis=1) < radius**2


def _checkers(key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """A board of two or three fields a side."""
    keys = jax.random.split(key, 4)
    x = _plane(keys[0], count)
    fields = jax.random.randint(keys[1], (), 2, 4).astype(jnp.float32)
    shift = jax.random.uniform(keys[2], (2,))
    at = jnp.floor((x + 1.0) / 2.0 * fields + shift)
    return _turned(keys[3], x), jnp.mod(jnp.sum(at, axis=1), 2.0) < 0.5


def _stripes(key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Parallel stripes, three to six of them."""
    keys = jax.random.split(key, 4)
    x = _plane(keys[0], count)
    often = jax.random.uniform(keys[1], minval=3.0, maxval=6.0)
    wave = jnp.sin(often * x[:, 0] + jax.random.uniform(keys[2], maxval=6.28))
    return _turned(keys[3], x), wave > 0.0


def _wedges(key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Slices around the middle, four to eight."""
    keys = jax.random.split(key, 3)
    x = _plane(keys[0], count)
    slices = 2.0 * jax.random.randint(keys[1], (), 2, 5).astype(jnp.float32)
    turn = jax.random.uniform(keys[2])
    at = jnp.floor((jnp.arctan2(x[:, 1], x[:, 0]) / (2.0 * jnp.pi) + turn) * slices)
    return x, jnp.mod(at, 2.0) < 0.5


def _teacher(key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """What a network of 16 units with drawn weights says, in four dimensions."""
    keys = jax.random.split(key, 3)
    x = jax.random.uniform(keys[0], (count, 4), minval=-1.0, maxval=1.0)
    inner = 3.0 * jax.random.normal(keys[1], (5, 16))
    hidden = jnp.tanh(x @ inner[:4] + inner[4])
    value = hidden @ jax.random.normal(keys[2], (16,))
    return x, value > jnp.median(value)


def _clusters(key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Small clouds around drawn places, each of one label that is drawn too."""
    keys = jax.random.split(key, 4)
    places = 0.9 * _plane(keys[0], _CLUSTERS)
    own = jax.random.randint(keys[1], (count,), 0, _CLUSTERS)
    labels = jax.random.permutation(keys[2], jnp.arange(_CLUSTERS) % 2 == 0)
    return places[own] + 0.1 * jax.random.normal(keys[3], (count, 2)), labels[own]


def _noise(key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Labels by lot."""
    keys = jax.random.split(key)
    return _plane(keys[0], count), jax.random.bernoulli(keys[1], 0.5, (count,))


def _spirals(key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Two arms of one and a half turns (after Lang and Witbrock, 1988)."""
    keys = jax.random.split(key, 4)
    labels = jax.random.bernoulli(keys[0], 0.5, (count,))
    way = jnp.sqrt(jax.random.uniform(keys[1], (count,)))
    angle = way * 3.0 * jnp.pi + jnp.where(labels, jnp.pi, 0.0)
    arm = way[:, None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)
    return _turned(keys[2], arm + 0.02 * jax.random.normal(keys[3], (count, 2))), labels


def _parity(key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The parity of three of six bits; the others mean nothing."""
    keys = jax.random.split(key)
    x = jnp.where(jax.random.bernoulli(keys[0], 0.5, (count, 6)), 1.0, -1.0)
    counting = jax.random.permutation(keys[1], 6)[:3]
    return x, jnp.prod(x[:, counting], axis=1) > 0.0


def _moons(key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Two half circles that reach into each other."""
    keys = jax.random.split(key, 4)
    labels = jax.random.bernoulli(keys[0], 0.5, (count,))
    angle = jnp.pi * jax.random.uniform(keys[1], (count,))
    upper = jnp.stack([jnp.cos(angle) - 0.5, jnp.sin(angle) - 0.25], axis=1)
    x = jnp.where(labels[:, None], upper, -upper) * 0.65
    return _turned(keys[2], x + 0.06 * jax.random.normal(keys[3], (count, 2))), labels


def _halves(key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The two sides of a plane in six dimensions."""
    keys = jax.random.split(key)
    x = jax.random.uniform(keys[0], (count, 6), minval=-1.0, maxval=1.0)
    return x, x @ jax.random.normal(keys[1], (6,)) > 0.0


def _overlap(key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Two clouds that lie over each other: the best line is wrong about one point in five."""
    keys = jax.random.split(key, 3)
    labels = jax.random.bernoulli(keys[0], 0.5, (count,))
    centres = jnp.where(labels[:, None], 0.34, -0.34) * jnp.array([1.0, 0.0])
    return _turned(keys[2], centres + 0.4 * jax.random.normal(keys[1], (count, 2))), labels


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "blobs": Family(_blobs, 2, False),
        "ring": Family(_ring, 2, True),
        "checkers": Family(_checkers, 2, True),
        "stripes": Family(_stripes, 2, True),
        "wedges": Family(_wedges, 2, True),
        "teacher": Family(_teacher, 4, True),
        "clusters": Family(_clusters, 2, True),
        "noise": Family(_noise, 2, False),
        "spirals": Family(_spirals, 2, True),
        "parity": Family(_parity, 6, True),
        "moons": Family(_moons, 2, True),
        "halves": Family(_halves, 6, False),
        "overlap": Family(_overlap, 2, False),
    }
)
"""By name."""

TRAINING = ("blobs", "ring", "checkers", "stripes", "wedges", "teacher", "clusters", "noise")
HELD_OUT = ("spirals", "parity", "moons", "halves", "overlap")
"""Never trained on: of the last two there is nothing to learn that a host cannot."""


def draw_examples(
    family: Int32[Array, ""], names: tuple[str, ...], key: jax.Array, count: int
) -> tuple[Float[Array, "count inputs"], Int32[Array, " count"]]:
    """Examples of one family.

    Args:
        family: index into `names`; may be traced.
        names: of `FAMILIES`.
    """

    def drawer(family: Family) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
        def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            x, labels = family.draw(key, count)
            filled = jnp.zeros((count, INPUTS), jnp.float32).at[:, : family.inputs].set(x)
            return filled, labels.astype(jnp.int32)

        return draw

    return jax.lax.switch(family, [drawer(FAMILIES[name]) for name in names], key)
