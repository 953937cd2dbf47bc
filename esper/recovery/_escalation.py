"""Who is told of errors: of devices, of kernels that keep failing, and where nothing helps."""

from collections.abc import Callable
from typing import Any

from esper.recovery._account import Account
from esper.recovery._attempts import once
from esper.recovery._effects import Effects
from esper.recovery._tracker import ErrorTracker
from esper.recovery._types import ErrorContext, RecoveryStrategy


class Escalation:
    """Tells somebody.

    Args:
        on_escalate: tells, or None where nobody is to be told.
        problematic_after: errors of a kernel from which on it is told of, once.
        escalate_after: recoveries in a row without success.
    """

    def __init__(
        self,
        on_escalate: Callable[[ErrorContext], Any] | None,
        problematic_after: int,
        escalate_after: int,
        tracker: ErrorTracker,
        account: Account,
    ) -> None:
        self._on_escalate = on_escalate
        self._problematic_after = problematic_after
        self._escalate_after = escalate_after
        self._tracker = tracker
        self._account = account

    def reasons(self, kept: ErrorContext, strategy: RecoveryStrategy) -> list[str]:
        """Why to tell of an error that is about to be handled, whatever its kernel."""
        in_a_row = self._account.unsuccessful_in_a_row(kept) >= self._escalate_after
        return [
            *(["its type asks for it"] if strategy is RecoveryStrategy.ESCALATE else []),
            *([f"{self._escalate_after} recoveries in a row failed"] if in_a_row else []),
        ]

    def tell(self, context: ErrorContext, reasons: list[str]) -> Effects[tuple[bool, str]]:
        """Tell of an error for these reasons, and of its kernel where that keeps failing.

        Returns:
            Whether there was a reason; and the reasons, and what went wrong.
        """
        bad = self._bad_kernel(context.kernel_id)
        if not (reasons or bad):
            return False, ""
        detail = f"escalated: {', '.join([*reasons, *bad])}"
        tell = self._on_escalate
        if tell is None:
            return True, f"{detail}, and there is no on_escalate to tell"
        worked = False
        try:
            worked, _, _, error = yield from once(lambda: tell(context), lambda _: True)
        finally:
            # The next error of the kernel is a reason again; so it is after an interruption.
            if bad and not worked and context.kernel_id is not None:
                self._tracker.not_told(context.kernel_id)
        return True, detail if worked else f"{detail}, and on_escalate raised {error}"

    def _bad_kernel(self, kernel_id: str | None) -> list[str]:
        if kernel_id is None:
            return []
        errors = self._tracker.newly_problematic(kernel_id, self._problematic_after)
        return [f"kernel {kernel_id[:12]} failed {errors} times"] if errors else []
