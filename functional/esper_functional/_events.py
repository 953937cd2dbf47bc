"""Every change of a seed is an event, and a state is a fold of events.

An event holds all that its effect depends on, so folding the recorded events
over the initial state gives the very state that the live run had.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Any

import numpy as np

from esper_functional._errors import KasminaException, SeedIndexError, SeedLifecycleError
from esper_functional._lifecycle import SeedLifecycleState, legal_moves
from esper_functional._plan import check_counts, running_seeds
from esper_functional._ramp import ramp_shape
from esper_functional._state import SeedState, kernel_id_words, running
from esper_functional._transition import (
    Outcome,
    advance,
    incubate,
    observe_health,
    observe_latency,
    record_errors,
    release,
    set_alpha,
    start_ramp,
    transition,
)


class EventKind(StrEnum):
    """What happened to a seed."""

    LOAD = "load"
    """A kernel was asked for; value is its slot."""
    ACTIVATE = "activate"
    """The kernel is ready and runs; value is its first alpha."""
    CANCEL = "cancel"
    """The kernel was not found or does not fit: back to DORMANT."""
    FAIL = "fail"
    """The load failed: to ERROR_RECOVERY."""
    UNLOAD = "unload"
    """An ACTIVE seed was emptied."""
    FOSSILIZE = "fossilize"
    """Frozen into the network for good."""
    RESET = "reset"
    """A seed in ERROR_RECOVERY was emptied."""
    ALPHA = "alpha"
    """Alpha was set to value."""
    RAMP = "ramp"
    """Alpha began to run to value over span steps."""
    ERRORS = "errors"
    """The count of consecutive failures became value."""
    HEALTH = "health"
    """A health score, value, was observed."""
    LATENCY = "latency"
    """An execution time of value µs was observed."""
    INCUBATE = "incubate"
    """An ACTIVE seed at alpha 0 began to train in a shadow of the forward pass."""
    FOLD = "fold"
    """The kernel was folded into the host's weights, and its slot freed."""
    UNCALLED = "uncalled"
    """The kernel runs, and forward passes went by its layer: told, and nothing is changed."""


def event_kind(kind: Any) -> EventKind:
    """A kind that may have been read from text, which is equal to its member and is not it.

    Raises:
        KasminaException: for an unknown one.
    """
    if kind not in set(EventKind):
        near = difflib.get_close_matches(str(kind), [str(known) for known in EventKind], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise KasminaException(
            f"unknown kind of event {str(kind)!r}: expected one of {', '.join(EventKind)}{hint}"
        )
    return EventKind(kind)


@dataclasses.dataclass(frozen=True)
class Event:
    """One change of one seed."""

    step: int
    """The step before which it takes effect."""
    layer: int
    seed: int
    kind: EventKind
    kernel_id: str = ""
    """SHA-256 of the kernel concerned, where there is one."""
    value: float | int = 0.0
    """See `EventKind`."""
    span: int = 0
    """Length of a ramp in steps."""
    shape: str = "linear"
    """The curve of a ramp: "linear", "cosine" or "sigmoid"."""

    def __post_init__(self) -> None:
        if self.shape != "linear":
            object.__setattr__(self, "shape", ramp_shape(self.shape).name.lower())
        object.__setattr__(self, "kind", event_kind(self.kind))
        object.__setattr__(self, "value", float(self.value))


_TARGETS: dict[EventKind, tuple[SeedLifecycleState, tuple[SeedLifecycleState, ...]]] = {
    EventKind.LOAD: (
        SeedLifecycleState.LOADING,
        (SeedLifecycleState.DORMANT, SeedLifecycleState.ERROR_RECOVERY),
    ),
    EventKind.ACTIVATE: (SeedLifecycleState.ACTIVE, (SeedLifecycleState.LOADING,)),
    EventKind.CANCEL: (SeedLifecycleState.DORMANT, (SeedLifecycleState.LOADING,)),
    EventKind.FAIL: (SeedLifecycleState.ERROR_RECOVERY, (SeedLifecycleState.LOADING,)),
    EventKind.UNLOAD: (SeedLifecycleState.DORMANT, (SeedLifecycleState.ACTIVE,)),
    EventKind.FOSSILIZE: (SeedLifecycleState.FOSSILIZED, (SeedLifecycleState.ACTIVE,)),
    EventKind.RESET: (SeedLifecycleState.DORMANT, (SeedLifecycleState.ERROR_RECOVERY,)),
}
"""For each kind that moves a seed: where to, and from which stages."""


_RANGES: dict[EventKind, Callable[[float], bool]] = {
    EventKind.LOAD: lambda value: value >= 0 and value == int(value),
    EventKind.ACTIVATE: lambda value: 0.0 <= value <= 1.0,
    EventKind.ALPHA: lambda value: 0.0 <= value <= 1.0,
    EventKind.RAMP: lambda value: 0.0 <= value <= 1.0,
    EventKind.ERRORS: lambda value: value >= 0 and value == int(value),
    EventKind.HEALTH: lambda value: 0.0 <= value <= 1.0,
    EventKind.LATENCY: lambda value: value >= 0.0,
}
"""For each kind that has a value: which are allowed."""


_OF_RUNNING = {EventKind.ERRORS, EventKind.HEALTH, EventKind.LATENCY, EventKind.UNCALLED}
"""The kinds that concern seeds whose kernels run, and no others."""


_RULES: dict[EventKind, str] = {
    EventKind.LOAD: "a slot is a whole number, from 0",
    EventKind.ACTIVATE: "alpha takes values in [0, 1]",
    EventKind.ALPHA: "alpha takes values in [0, 1], while ACTIVE",
    EventKind.RAMP: "alpha takes values in [0, 1], while ACTIVE, and a ramp at least 1 step",
    EventKind.ERRORS: "failures are counted from 0, of seeds that run",
    EventKind.HEALTH: "health takes values in [0, 1], of seeds that run",
    EventKind.LATENCY: "latency is counted in µs from 0, of seeds that run",
    EventKind.UNCALLED: "forward passes can go by seeds that run alone",
    EventKind.INCUBATE: "a seed incubates while ACTIVE at alpha 0, with no ramp under way",
}
"""What else a kind asks for."""


def _name(layers: Any, layer: int) -> str:
    return f"layer {layers[layer]!r}" if layers is not None else f"layer {layer}"


def _refusal(state: SeedState, event: Event, layers: Any) -> SeedLifecycleError:
    stage = SeedLifecycleState(int(state.stage[event.layer, event.seed]))
    legal = [kind.value for kind, (_, sources) in _TARGETS.items() if stage in sources]
    targets = [s.name for s in legal_moves(stage)]
    detail = f" with value {event.value!r}" if event.kind in _RANGES else ""
    detail += f" over {event.span} steps" if event.kind is EventKind.RAMP else ""
    folds = stage in (SeedLifecycleState.ACTIVE, SeedLifecycleState.FOSSILIZED)
    legal += [EventKind.FOLD.value] if folds else []
    rule = _RULES.get(event.kind)
    return SeedLifecycleError(
        f"seed {event.seed} of {_name(layers, event.layer)} is {stage.name} and cannot"
        f" {event.kind.value}{detail}: it may {', '.join(legal) or 'do nothing'}"
        f" (to {', '.join(targets) or 'no other stage'}){'; ' + rule if rule else ''}"
    )


def apply_event(state: SeedState, event: Event, *, layers: Any = None) -> SeedState:
    """The state after one event; ramps are brought to the event's step first.

    Args:
        state: `[layers, seeds]`, in numpy.
        layers: the layers' names, for messages.

    Raises:
        SeedIndexError: for a layer or seed that is not there.
        SeedLifecycleError: for an event that the seed's stage does not allow.
    """
    rows, columns = state.shape
    if not 0 <= event.layer < rows:
        raise SeedIndexError(f"no layer {event.layer}: this model has {rows}, counted from 0")
    if not 0 <= event.seed < columns:
        raise SeedIndexError(
            f"no seed {event.seed} in {_name(layers, event.layer)}: it has {columns}, counted"
            " from 0"
        )
    state = advance(state, event.step)
    where = np.zeros(state.shape, np.bool_)
    where[event.layer, event.seed] = True
    at: dict[str, Any] = {"step": event.step}

    def done(outcome: Outcome) -> SeedState:
        if outcome.refused.any():
            raise _refusal(state, event, layers)
        return outcome.state

    allowed = _RANGES.get(event.kind)
    if allowed is not None and not (math.isfinite(event.value) and allowed(event.value)):
        raise _refusal(state, event, layers)
    runs = bool(running(state)[event.layer, event.seed])
    if event.kind in _OF_RUNNING and not runs:
        raise _refusal(state, event, layers)
    if event.kind in _TARGETS:
        target, sources = _TARGETS[event.kind]
        if SeedLifecycleState(int(state.stage[event.layer, event.seed])) not in sources:
            raise _refusal(state, event, layers)
        if event.kind is EventKind.LOAD:
            at |= {"slot": int(event.value), "kernel_id": kernel_id_words(event.kernel_id)}
        if event.kind is EventKind.ACTIVATE:
            at["alpha"] = event.value
        return done(transition(state, where, target, **at))

    def folded() -> Outcome:
        if state.stage[event.layer, event.seed] == SeedLifecycleState.FOSSILIZED:
            return release(state, where, **at)
        if state.stage[event.layer, event.seed] == SeedLifecycleState.ACTIVE:
            return transition(state, where, SeedLifecycleState.DORMANT, **at)
        return Outcome(state, where)

    simple: dict[EventKind, Callable[[], SeedState]] = {
        EventKind.ALPHA: lambda: done(set_alpha(state, where, event.value, **at)),
        EventKind.RAMP: lambda: done(
            start_ramp(state, where, event.value, event.span, shape=event.shape, **at)
        ),
        EventKind.ERRORS: lambda: record_errors(state, where, int(event.value), **at),
        EventKind.HEALTH: lambda: observe_health(state, where, event.value, **at),
        EventKind.LATENCY: lambda: observe_latency(state, where, event.value),
        EventKind.UNCALLED: lambda: state,
        EventKind.INCUBATE: lambda: done(incubate(state, where, **at)),
        EventKind.FOLD: lambda: done(folded()),
    }
    return simple[event.kind]()


def fold_events(state: SeedState, events: Iterable[Event]) -> SeedState:
    """The state after all events, in order."""
    for event in events:
        state = apply_event(state, event)
    return state


def fault_events(state: SeedState, errors: Any, *, step: int) -> list[Event]:
    """The events that bring a live part's failure counts into the state it came from.

    Args:
        errors: i32 `[running seeds]`, in plan order.

    Raises:
        KasminaException: for the counts of another state.
    """
    counts = np.asarray(state.error_count)
    at = running_seeds(state)
    check_counts("fault_events", at, errors)
    return [
        Event(step, layer, seed, EventKind.ERRORS, value=float(count))
        for (layer, seed), count in zip(at, np.asarray(errors), strict=True)
        if counts[layer, seed] != count
    ]
