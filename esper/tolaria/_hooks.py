"""What a user may have called while a run trains."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


def _never() -> bool:
    return False


@dataclasses.dataclass(frozen=True)
class Hooks:
    """Functions that a run calls; what one of them raises ends the run, which can be resumed.

    None of them may change what is trained: a resumed run has to find the same.
    """

    stop: Callable[[], bool] = _never
    """Asked before every step whether to stop: the run is then saved, and `Interrupted` raised.
    Before every call only, where a small network that has long been still trains several steps in
    one."""
    on_step: Callable[[int, Any], None] | None = None
    """Called after every step with its number and its loss, which is still on the device: reading
    it waits for the device. No two steps are then trained in one call."""
    on_entry: Callable[[Mapping[str, Any]], None] | None = None
    """Called with every entry of the ledger, when it is written."""
    on_boundary: Callable[[Mapping[str, Any]], None] | None = None
    """Called with the measurements of every decision boundary."""
