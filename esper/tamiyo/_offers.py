"""The kernels of a run as a policy is offered them: one row for all that are alike."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int

from esper.tamiyo._controller import Cost
from esper.tamiyo.graph import KERNEL, bucket, describe_kernel
from esper.urza import KernelRecord
from esper_functional import kernel_id_words

if TYPE_CHECKING:
    from esper.tezzeret import BlueprintIR

LEAST_OFFERS = 4
"""Rows of the smallest bucket."""

FindBlueprint = Callable[[KernelRecord], "BlueprintIR | None"]
"""The blueprint that a kernel was compiled from; None where that is not known."""


def built_in_blueprint(record: KernelRecord) -> "BlueprintIR | None":
    """The blueprint of that name which ships with Esper."""
    from esper.tezzeret import blueprint_names, load_blueprint

    return load_blueprint(record.blueprint) if record.blueprint in blueprint_names() else None


class Offers:
    """Candidates by what describes them: variants of one blueprint and cost share a row.

    Args:
        candidates: by layer row, as in an `Observation`.
        host: cost of the bare host.
        find: the blueprints of kernels.
    """

    def __init__(
        self,
        candidates: Mapping[int, Sequence[KernelRecord]],
        host: Cost,
        find: FindBlueprint = built_in_blueprint,
    ) -> None:
        self._kernels: dict[tuple[int, int], list[KernelRecord]] = {}
        rows: dict[tuple[str, int, int], int] = {}
        described: list[np.ndarray] = []
        row_of: dict[int, int] = {}
        for layer, records in candidates.items():
            for record in records:
                key = (record.blueprint, record.parameter_count, record.flops)
                if key not in rows:
                    rows[key] = len(rows)
                    described.append(describe_kernel(record, host, find(record)))
                self._kernels.setdefault((rows[key], layer), []).append(record)
                row_of[int(_packed(kernel_id_words(record.kernel_id)))] = rows[key]
        self.count = len(rows)
        """Rows that are there; the others fill up."""
        self.described: Float[np.ndarray, "kernels features"] = np.zeros(
            (bucket(self.count, LEAST_OFFERS), KERNEL), np.float32
        )
        """f32 `[kernels, KERNEL]`; rows of 0 fill up."""
        if described:
            self.described[: self.count] = np.stack(described)
        layers = max(candidates, default=-1) + 1
        self.fits: Bool[np.ndarray, "layers kernels"] = np.zeros(
            (layers, len(self.described)), np.bool_
        )
        """bool `[layers, kernels]`: which may be grafted where, up to the last layer that grows."""
        for row, layer in self._kernels:
            self.fits[layer, row] = True
        ids = sorted(row_of)
        self._ids = np.array(ids, np.int64)
        self._rows = np.array([row_of[own] for own in ids], np.int64)

    def kernel(self, row: int, layer: int, turn: int) -> KernelRecord:
        """One of the kernels of a row that fit a layer, in turn.

        Raises:
            KeyError: where none does.
        """
        own = self._kernels[row, layer]
        return own[turn % len(own)]

    def held(self, words: Int[np.ndarray, "held 2"]) -> Float[np.ndarray, "held features"]:
        """Descriptions of the kernels that seeds hold; 0 for kernels that are no candidates.

        Args:
            words: i32 `[held, 2]`, as `SeedState.kernel_id`.
        """
        if not len(self._ids):
            return np.zeros((len(words), KERNEL), np.float32)
        packed = _packed(words)
        at = np.minimum(np.searchsorted(self._ids, packed), len(self._ids) - 1)
        known = self._ids[at] == packed
        found = self.described[self._rows[at]]
        found[~known] = 0.0
        return found


def _packed(words: Int[np.ndarray, "*places 2"] | tuple[int, int]) -> np.ndarray:
    """Both words as one i64, so that ids can be looked for all at once."""
    own = np.asarray(words).astype(np.int64)
    return (own[..., 0] << 32) | (own[..., 1] & 0xFFFFFFFF)
