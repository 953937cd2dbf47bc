"""Which kinds of inputs were seen lately."""

from collections.abc import Hashable

MOST = 256


class Seen:
    """The kinds that were added last, up to `MOST`; one that is forgotten is looked at anew."""

    def __init__(self) -> None:
        self._kinds: dict[Hashable, None] = {}

    def __len__(self) -> int:
        return len(self._kinds)

    def __contains__(self, kind: Hashable) -> bool:
        return kind in self._kinds

    def add(self, kind: Hashable) -> None:
        """Know one more, in place of the one that was added first."""
        self._kinds[kind] = None
        # A list is taken in one step: other threads add meanwhile.
        for first in list(self._kinds)[:-MOST]:
            self._kinds.pop(first, None)
