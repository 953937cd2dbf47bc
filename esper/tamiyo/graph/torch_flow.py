"""The data flow of a host on torch, as a pass through it shows.

`torch.export` refuses hosts whose Python depends on values. So the host is run, and every
operation notes by which sites the memory that it writes to came. Memory and not tensors: views
and operations in place are seen then, at the price that parts of one tensor are not told apart.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from esper.tamiyo.graph._topology import Flow

_NONE: frozenset[int] = frozenset()


class FlowRecorder(TorchDispatchMode):
    """While it is entered, notes which values come by which sites.

    `leave` is to be called where a site's layer has returned, as by a forward hook.
    """

    def __init__(self) -> None:
        super().__init__()
        self._labels: dict[int, frozenset[int]] = {}
        self._alive: list[Tensor] = []
        """All that was labelled: memory that is freed would come again as another's."""
        self._order: dict[int, None] = {}
        self._edges: set[tuple[int, int]] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation, and label what it returns and writes to."""
        result = func(*args, **(kwargs or {}))
        labels = self._of(args) | self._of(kwargs)
        if labels:
            self._label(result, labels)
            for place, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    given = args[place] if place < len(args) else (kwargs or {}).get(argument.name)
                    self._label(given, labels)
        return result

    def leave(self, row: int, result: Any) -> None:
        """A site's layer has returned: what comes of it from here on, came by this site."""
        self._order.setdefault(row)
        self._edges |= {(sender, row) for sender in self._of(result)}
        self._label(result, frozenset({row}))

    @property
    def flow(self) -> Flow:
        """What was noted so far."""
        return Flow(tuple(self._order), frozenset(self._edges))

    def _of(self, values: Any) -> frozenset[int]:
        found = [
            self._labels[key]
            for leaf in tree_leaves(values)
            if isinstance(leaf, Tensor) and (key := _memory(leaf)) in self._labels
        ]
        return _NONE.union(*found)

    def _label(self, values: Any, labels: frozenset[int]) -> None:
        for leaf in tree_leaves(values):
            if isinstance(leaf, Tensor):
                self._labels[_memory(leaf)] = labels
                self._alive.append(leaf)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
