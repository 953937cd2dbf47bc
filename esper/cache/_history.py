"""Which kernel tends to be asked for after which."""

from collections import OrderedDict

_SEEN_BEFORE = 2
"""How often one must have followed another to be expected again."""


class FollowTable:
    """How often each id came right after another, of bounded size.

    What it expects follows from the order of the ids that it saw, and from nothing else.

    Args:
        rows: ids whose followers are counted; those seen longest ago are forgotten.
        width: followers of one id; a new one replaces the rarest.
    """

    def __init__(self, rows: int = 1024, width: int = 8) -> None:
        self._rows = rows
        self._width = width
        self._followers: OrderedDict[str, dict[str, int]] = OrderedDict()
        self._last: str | None = None

    def __len__(self) -> int:
        return len(self._followers)

    def saw(self, kernel_id: str) -> None:
        """Count an ask; one for the same id again says nothing new."""
        before, self._last = self._last, kernel_id
        if before is None or before == kernel_id:
            return
        row = self._followers.get(before)
        if row is None:
            row = self._followers[before] = {}
            if len(self._followers) > self._rows:
                self._followers.popitem(last=False)
        else:
            self._followers.move_to_end(before)
        if kernel_id not in row and len(row) >= self._width:
            # Of several, min takes the one that came first.
            del row[min(row, key=row.__getitem__)]
        row[kernel_id] = row.get(kernel_id, 0) + 1

    def expected(self, kernel_id: str, count: int) -> list[str]:
        """What came most often after an id, at most `count`; of equals, what came first."""
        row = self._followers.get(kernel_id)
        if not row:
            return []
        if count == 1:
            best = max(row, key=row.__getitem__)
            return [best] if row[best] >= _SEEN_BEFORE else []
        often = [other for other, times in row.items() if times >= _SEEN_BEFORE]
        return sorted(often, key=row.__getitem__, reverse=True)[:count]
