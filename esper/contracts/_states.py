"""The states of blueprints and kernels, and which may follow which.

What is not in a table is refused, a state after itself included: nothing would change.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import overload


class BlueprintState(StrEnum):
    """How far the compilation of a blueprint has come."""

    UNVALIDATED = "unvalidated"
    """Waits to be compiled."""
    COMPILING = "compiling"
    """A worker has claimed it."""
    VALIDATED = "validated"
    """Compiled, and its kernel has passed the gates."""
    INVALID = "invalid"
    """It was compiled and did not pass, or was given up; the reason is with it."""


class KernelState(StrEnum):
    """What a kernel may be used for."""

    TESTING = "testing"
    """There, and nobody has said yet that it is good."""
    VALIDATED = "validated"
    """It has passed the gates."""
    DEPLOYED = "deployed"
    """In use where it is not to go away."""
    DEPRECATED = "deprecated"
    """To be used by what uses it already, and by nothing new."""
    INVALID = "invalid"
    """Not to be used by anything."""


_B, _K = BlueprintState, KernelState

BLUEPRINT_MOVES: Mapping[BlueprintState, tuple[BlueprintState, ...]] = {
    _B.UNVALIDATED: (_B.COMPILING, _B.INVALID),
    _B.COMPILING: (_B.VALIDATED, _B.INVALID, _B.UNVALIDATED),
    _B.VALIDATED: (_B.UNVALIDATED,),
    _B.INVALID: (_B.UNVALIDATED,),
}

KERNEL_MOVES: Mapping[KernelState, tuple[KernelState, ...]] = {
    _K.TESTING: (_K.VALIDATED, _K.INVALID),
    _K.VALIDATED: (_K.DEPLOYED, _K.DEPRECATED, _K.INVALID),
    _K.DEPLOYED: (_K.VALIDATED, _K.DEPRECATED, _K.INVALID),
    _K.DEPRECATED: (_K.VALIDATED, _K.INVALID),
    _K.INVALID: (),
}

CURRENT_KERNELS = (KernelState.TESTING, KernelState.VALIDATED, KernelState.DEPLOYED)
"""The states of kernels that a search finds where it asks for no others."""


@overload
def moves_from(state: BlueprintState) -> tuple[BlueprintState, ...]: ...
@overload
def moves_from(state: KernelState) -> tuple[KernelState, ...]: ...
def moves_from(
    state: BlueprintState | KernelState,
) -> tuple[BlueprintState, ...] | tuple[KernelState, ...]:
    """The states that may follow a state, in the table's order."""
    if isinstance(state, BlueprintState):
        return BLUEPRINT_MOVES[state]
    return KERNEL_MOVES[state]


@overload
def check_move(subject: str, state: BlueprintState, to: BlueprintState) -> None: ...
@overload
def check_move(subject: str, state: KernelState, to: KernelState) -> None: ...
def check_move(
    subject: str, state: BlueprintState | KernelState, to: BlueprintState | KernelState
) -> None:
    """Check that a state may follow another.

    Args:
        subject: what is to be moved, for the message: `kernel 3f2a…`.

    Raises:
        IllegalTransitionError: where it may not, naming the states that may.
    """
    if type(state) is type(to) and to in moves_from(state):
        return
    from esper.errors import IllegalTransitionError

    legal = ", ".join(move.value for move in moves_from(state))
    may = f"it may become {legal}" if legal else "nothing follows that state"
    raise IllegalTransitionError(
        f"{subject} is {state.value} and cannot become {str(to)[:80]}: {may}"
    )
