"""What is learnt from more than once: a bounded store, drawn from by what surprised most."""

from typing import Any, NamedTuple

import jax
import numpy as np

from esper.errors import InputError
from esper.tamiyo.learning._sum_tree import SumTree

_LEAST = 1e-6
"""Added to every priority, so that all are drawn some time."""
_WORD = (1 << 64) - 1


class Transition(NamedTuple):
    """One step; what it leads to is to be estimated."""

    graph: Any
    choice: Any
    reward: Any
    """f32 `[]`."""
    done: Any
    """bool `[]`: whether the episode ended with it."""
    next_graph: Any


class Drawn(NamedTuple):
    """What was drawn from a store; numpy, with the leading axis `[size]`."""

    transitions: Any
    serials: np.ndarray
    """i64: which ones they are, counted from the first that was ever added."""
    weights: np.ndarray
    """f32, in (0, 1]: what each is to count, since it was not drawn as often as any other."""


class ReplayStore:
    """Transitions, or whatever pytrees, by proportional priorities (Schaul et al., 2016).

    Of a priority p_i, the i-th is drawn with P(i) = p_i^α / sum_k p_k^α, and counts
    (N P(i))^-β over the largest such weight. When the store is full, the oldest go. What is drawn
    follows from the seed and from what was done before.

    Args:
        example: one transition; others have its structure, shapes and dtypes.
        capacity: transitions, from 1.
        exponent: α, from 0 (all are alike) to 1.
        seed: of the draws, from 0.

    Raises:
        InputError: for a capacity, exponent or seed outside of its range.
    """

    def __init__(
        self, example: Any, capacity: int, *, exponent: float = 0.6, seed: int = 0
    ) -> None:
        if capacity < 1:
            raise InputError(f"a store holds at least 1 transition; its capacity is {capacity}")
        if not 0.0 <= exponent <= 1.0:
            raise InputError(f"the exponent of priorities is from 0 to 1, and not {exponent}")
        if seed < 0:
            raise InputError(f"the seed is a whole number from 0, and not {seed}")
        leaves, self._structure = jax.tree.flatten(example)
        self._columns = [np.zeros((capacity, *np.shape(leaf)), _dtype(leaf)) for leaf in leaves]
        self._names = [
            jax.tree_util.keystr(path, simple=True, separator=".") or "transition"
            for path, _ in jax.tree_util.tree_leaves_with_path(example)
        ]
        self._capacity, self._exponent = capacity, exponent
        self._tree = SumTree(capacity)
        self._added = 0
        self._largest = 1.0
        self._generator = np.random.Generator(np.random.PCG64(seed))

    def __len__(self) -> int:
        """How many there are now."""
        return min(self._added, self._capacity)

    @property
    def capacity(self) -> int:
        """How many there may be."""
        return self._capacity

    def add(self, transitions: Any, priorities: np.ndarray | None = None) -> np.ndarray:
        """Keep transitions; the oldest go where there is no room.

        Args:
            transitions: of the example's structure, every leaf with the leading axis `[count]`.
            priorities: `[count]`, from 0; None gives them the largest that there has been, so
                that new ones are drawn soon.

        Returns:
            Their serials, i64 `[count]`.

        Raises:
            InputError: for another structure, shape or dtype, by the leaf's name, and for
                priorities that are not finite or below 0. Nothing was kept then.
        """
        count, leaves = self._checked(transitions)
        chosen = np.full(count, self._largest) if priorities is None else _priorities(
            priorities, count
        )  # fmt: skip
        serials = np.arange(self._added, self._added + count)
        # Of more than fit, the last.
        kept = slice(max(0, count - self._capacity), None)
        places = serials[kept] % self._capacity
        for column, leaf in zip(self._columns, leaves, strict=True):
            column[places] = leaf[kept]
        self._added += count
        self._weigh(places, chosen[kept])
        return serials

    def draw(self, size: int, *, correction: float = 0.4) -> Drawn:
        """Draw transitions, one from each of `size` equal parts of all priorities.

        Args:
            size: from 1; some may be drawn twice.
            correction: β, from 0 (every one counts alike) to 1 (as if all were drawn alike).

        Raises:
            InputError: for an empty store, and a size or correction outside of its range.
        """
        if not len(self):
            raise InputError("the store is empty: add transitions before they are drawn")
        if size < 1:
            raise InputError(f"at least 1 transition is drawn, and not {size}")
        if not 0.0 <= correction <= 1.0:
            raise InputError(f"the correction is from 0 to 1, and not {correction}")
        parts = (np.arange(size) + self._generator.random(size)) / size
        places = self._tree.find(parts * self._tree.total)
        values = self._tree.values
        # (N P)^-β over that of the least P: N and the total cancel.
        weights = (values[places] / values[: len(self)].min()) ** -correction
        newest = self._added - 1
        serials = newest - (newest - places) % self._capacity
        leaves = [column[places] for column in self._columns]
        transitions = jax.tree.unflatten(self._structure, leaves)
        return Drawn(transitions, serials, weights.astype(np.float32))

    def update(self, serials: np.ndarray, priorities: np.ndarray) -> None:
        """Give priorities anew, such as the error that was found; of those gone by now, nothing.

        Raises:
            InputError: for serials that were never given, and for priorities that are not finite
                or below 0.
        """
        serials = np.asarray(serials, np.int64)
        chosen = _priorities(priorities, len(serials))
        if len(serials) and not 0 <= serials.min() <= serials.max() < self._added:
            raise InputError(
                f"serials are from 0 to {self._added - 1}, those that `add` gave; these go from"
                f" {serials.min()} to {serials.max()}"
            )
        there = serials >= self._added - self._capacity
        self._weigh(serials[there] % self._capacity, chosen[there])

    def all(self) -> Any:
        """All that there are, oldest first; numpy, with the leading axis `[len(store)]`."""
        places = np.arange(self._added - len(self), self._added) % self._capacity
        return jax.tree.unflatten(self._structure, [column[places] for column in self._columns])

    def state(self) -> dict[str, Any]:
        """All that the next draws depend on, as a pytree that a checkpoint holds; copies."""
        own = self._generator.bit_generator.state["state"]
        words = [own[name] >> shift & _WORD for name in ("state", "inc") for shift in (64, 0)]
        return {
            "columns": [column.copy() for column in self._columns],
            "priorities": self._tree.values.copy(),
            "added": self._added,
            "largest": self._largest,
            "generator": np.array(words, np.uint64),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state of a store of the same example and capacity.

        Raises:
            InputError: for one of another example or capacity, by the leaf's name.
        """
        found = [np.asarray(column) for column in state["columns"]]
        if len(found) != len(self._columns):
            raise InputError(
                f"the state has {len(found)} leaves, and transitions of this store have"
                f" {len(self._columns)}: make the store with the example of the one saved"
            )
        for name, own, other in zip(self._names, self._columns, found, strict=True):
            if (own.shape, own.dtype) != (other.shape, other.dtype):
                raise InputError(
                    f"{name} is {other.dtype}{list(other.shape)} in the state and"
                    f" {own.dtype}{list(own.shape)} in this store: make the store with the example"
                    " and capacity of the one saved"
                )
        for own, other in zip(self._columns, found, strict=True):
            own[:] = other
        self._tree.set(np.arange(self._capacity), np.asarray(state["priorities"]))
        self._added, self._largest = int(state["added"]), float(state["largest"])
        words = [int(word) for word in state["generator"]]
        self._generator.bit_generator.state = {
            "bit_generator": "PCG64",
            "state": {"state": words[0] << 64 | words[1], "inc": words[2] << 64 | words[3]},
            "has_uint32": 0,
            "uinteger": 0,
        }

    def _weigh(self, places: np.ndarray, priorities: np.ndarray) -> None:
        self._largest = max(self._largest, float(priorities.max(initial=0.0)))
        self._tree.set(places, (priorities + _LEAST) ** self._exponent)

    def _checked(self, transitions: Any) -> tuple[int, list[np.ndarray]]:
        leaves, structure = jax.tree.flatten(transitions)
        if structure != self._structure:
            raise InputError(
                f"transitions have the structure {structure}; this store's have {self._structure}"
            )
        arrays = [np.asarray(leaf) for leaf in leaves]
        count = len(arrays[0]) if arrays and arrays[0].ndim else 0
        for name, column, array in zip(self._names, self._columns, arrays, strict=True):
            if array.shape != (count, *column.shape[1:]) or array.dtype != column.dtype:
                raise InputError(
                    f"{name} is {array.dtype}{list(array.shape)}; {count} transitions of this"
                    f" store have {column.dtype}{[count, *column.shape[1:]]}"
                )
        return count, arrays


def _dtype(leaf: Any) -> np.dtype:
    return np.asarray(leaf).dtype


def _priorities(values: Any, count: int) -> np.ndarray:
    found = np.asarray(values, np.float64)
    if found.shape != (count,):
        raise InputError(f"priorities have the shape {found.shape}; {(count,)} is expected")
    if not (np.isfinite(found) & (found >= 0)).all():
        worst = found[~(np.isfinite(found) & (found >= 0))][0]
        raise InputError(f"priorities are finite and from 0; one is {worst}")
    return found
