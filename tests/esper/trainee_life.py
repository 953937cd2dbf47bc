"""What happens to a trainee in tests: grafts, steps, and what is read off it.

`make(**options)` gives a trainee of the two spirals (host 2-8-2) by the options of a trainee's
constructor; `artifact` is a kernel of its first layer.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from esper.artifacts import Artifact
from esper.tolaria._trainee import Optimisation, Rates, Trainee
from esper_functional import Event, EventKind

Make = Callable[..., Trainee]
RATES = Rates(0.01, {})
EVERYTHING = Optimisation(
    optimizer="adamw", weight_decay=0.01, clip_norm=0.5, ema_decay=0.9, accumulate=2
)
"""All that is kept of parameters besides themselves."""
BATCH = np.arange(3, 99, 3, dtype=np.int32)
BATCH.setflags(write=False)  # as loaders give them


def draw(artifact: Artifact, seed: int = 0, scale: float = 0.5) -> dict[str, np.ndarray]:
    """First parameters with which a kernel gives something."""
    random = np.random.default_rng(seed)
    return {
        name: random.normal(0.0, scale, p.shape).astype(np.float32)
        for name, p in artifact.params.items()
    }


def graft(
    own: Trainee,
    artifact: Artifact,
    *,
    step: int = 0,
    seed: int = 0,
    alpha: float = 0.0,
    ramp: int = 0,
    incubate: bool = False,
    params: Mapping[str, np.ndarray] | None = None,
) -> None:
    """A kernel in the first layer."""
    own.apply(Event(step, 0, seed, EventKind.LOAD, artifact.kernel_id, float(seed)))
    active = Event(step, 0, seed, EventKind.ACTIVATE, artifact.kernel_id, alpha)
    own.apply(active, artifact, draw(artifact, seed) if params is None else params)
    if ramp:
        own.apply(Event(step, 0, seed, EventKind.RAMP, value=1.0, span=ramp))
    if incubate:
        own.apply(Event(step, 0, seed, EventKind.INCUBATE))


def train(own: Trainee, begin: int, end: int, rates: Rates = RATES) -> bytes:
    """The losses of some steps, as bytes."""
    losses = []
    for step in range(begin, end):
        own.advance(step)
        losses.append(own.step(BATCH, rates, step))
    return own.read_losses(losses).tobytes()


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """The arrays of nested mappings by path."""
    out: dict[str, np.ndarray] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{name}/")
        else:
            out[prefix + name] = np.asarray(value)
    return out


def bits(tree: Mapping[str, Any], of: tuple[str, ...] = ()) -> dict[str, tuple[Any, ...]]:
    """Shape, dtype and bytes of every array, or of those whose paths begin so."""
    return {
        path: (a.shape, a.dtype, a.tobytes())
        for path, a in flat(tree).items()
        if not of or path.startswith(of)
    }


def grown(make: Make, artifact: Artifact, **options: Any) -> Trainee:
    """A trainee in the middle of everything: a ramp, a fossil, an incubation, failures."""
    own = make(**{"optimisation": EVERYTHING, "seeds_per_layer": 4, **options})
    graft(own, artifact, seed=1, alpha=1.0)
    graft(own, artifact, seed=2, ramp=20)
    graft(own, artifact, seed=0, incubate=True)
    train(own, 0, 3)
    own.apply(Event(3, 0, 1, EventKind.FOSSILIZE))
    train(own, 3, 5)
    return own


def averaged_like(
    tree: Mapping[str, Any], prefix: str, history: Mapping[str, list[np.ndarray]], decay: float
) -> dict[str, Any]:
    """The tree with the average of what each of its arrays has been."""
    out: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            out[name] = averaged_like(value, f"{prefix}{name}/", history, decay)
            continue
        first, *later = history[prefix + name]
        count = len(later)
        powers = [decay**count, *((1 - decay) * decay ** (count - i) for i in range(1, count + 1))]
        terms = zip(powers, (first, *later), strict=True)
        out[name] = np.sum([w * p.astype(np.float64) for w, p in terms], axis=0).astype(np.float32)
    return out
