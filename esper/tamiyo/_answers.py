"""What a service says to a run: which of it is of use, and how it stands in the run's record.

A record leads to the same decisions again without anybody who is asked: what was asked for at a
boundary is one note, of which the decisions are read back.
"""

import dataclasses
from collections import Counter
from collections.abc import Container, Sequence

from pydantic import TypeAdapter, ValidationError

from esper.contracts import (
    Action,
    AdaptationDecision,
    AdaptationDecisionBatch,
    OonaMessage,
    Topic,
    payload_of,
)
from esper.errors import EsperError, InputError
from esper.tamiyo._controller import Decision, Observation, Worth

_ASKS = "the service asks for "
_LONGEST = 500
"""Letters of a reason that are kept."""
_ITEMS = TypeAdapter(tuple[AdaptationDecision, ...])

_LEFT_OUT = {
    "malformed": "no decision",
    "stray": "about no report of this run",
    "misplaced": "of a place that there is not",
    "unknown": "of a kernel that is not on offer",
}
"""Why something is left out, and how that is told."""


@dataclasses.dataclass(frozen=True)
class Answers:
    """What came since the last boundary, sorted."""

    asked: tuple[AdaptationDecision, ...] = ()
    """To be done, as far as it is legal now."""
    advised: tuple[AdaptationDecision, ...] = ()
    """Of a service in shadow: to be noted, and never done."""
    left_out: Counter[str] = dataclasses.field(default_factory=Counter[str])
    """`malformed`, `stray`, `misplaced` and `unknown`: how many of each."""
    first: str = ""
    """What was wrong with the first that was malformed."""

    def remarks(self, observation: Observation) -> list[str]:
        """How it is recorded; nothing where nothing came."""
        found: list[str] = []
        if self.asked:
            found.append(_ASKS + _ITEMS.dump_json(self.asked, exclude_defaults=True).decode())
        if self.advised:
            told = "; ".join(_described(own, observation) for own in self.advised)
            found.append(f"in shadow, the service would have: {told}")
        if self.left_out:
            told = "; ".join(f"{n} {_LEFT_OUT[why]}" for why, n in sorted(self.left_out.items()))
            why = f"; the first: {self.first}" if self.first else ""
            found.append(f"left out of what the service said: {told}{why}")
        return found


def sort_messages(
    messages: Sequence[OonaMessage], reports: Container[str], observation: Observation
) -> Answers:
    """Sort what came for a run.

    Args:
        reports: the ids of its own reports.
        observation: of the boundary at which it came.
    """
    asked, advised = list[AdaptationDecision](), list[AdaptationDecision]()
    left_out, first = Counter[str](), ""
    for message in messages:
        if message.trace_id not in reports:
            left_out["stray"] += 1
            continue
        try:
            payload = payload_of(message)
        except EsperError as error:
            left_out["malformed"] += 1
            first = first or _short(str(error))
            continue
        items = payload.items() if isinstance(payload, AdaptationDecisionBatch) else [payload]
        for item in items:
            assert isinstance(item, AdaptationDecision)
            why = _useless(item, observation)
            if why:
                left_out[why] += 1
            else:
                own = item.model_copy(update={"reason": _short(item.reason)})
                (advised if message.topic is Topic.ADVICE else asked).append(own)
    return Answers(tuple(asked), tuple(advised), left_out, first)


def asked_in(notes: Sequence[str]) -> tuple[AdaptationDecision, ...]:
    """What was asked for at a boundary of which these are the notes.

    Raises:
        InputError: for a note that was written by hand.
    """
    for note in notes:
        if note.startswith(_ASKS):
            try:
                return _ITEMS.validate_json(note.removeprefix(_ASKS))
            except ValidationError as error:
                raise InputError(
                    "a note of a run's record says what a service asked for, and holds no"
                    f" decisions: {note[:200]!r}. Restore the record from a copy."
                ) from error
    return ()


def decision_of(item: AdaptationDecision) -> Decision:
    """A decision as controllers make them."""
    fields = {own.name: getattr(item, own.name) for own in dataclasses.fields(Decision)}
    effect = None if item.effect is None else Worth(*item.effect)
    return Decision(**{**fields, "effect": effect})


def _useless(item: AdaptationDecision, observation: Observation) -> str:
    """Why a decision can never be done in this run; "" where that is for the rules to say."""
    layers, seeds = observation.seeds.shape
    if item.layer >= layers or item.seed >= seeds:
        return "misplaced"
    offered = observation.candidates.get(item.layer, ())
    known = any(record.kernel_id == item.kernel_id for record in offered)
    return "unknown" if item.action is Action.GRAFT and not known else ""


def _described(item: AdaptationDecision, observation: Observation) -> str:
    kernel = f" kernel {item.kernel_id[:12]} in" if item.action is Action.GRAFT else ""
    reason = f" ({item.reason})" if item.reason else ""
    return (
        f"{item.action}{kernel} seed {item.seed} of {observation.sites[item.layer]}, about step"
        f" {item.step}{reason}"
    )


def _short(text: str) -> str:
    return text.partition("\n")[0][:_LONGEST]
