"""An entry of a run's ledger, as it is published."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from esper.contracts._data import Count, Data, Sha256

SeedStage = Annotated[int, Field(ge=0, le=4)]
"""The value of a `SeedLifecycleState`."""

_ABOUT_SEEDS = {"step", "layer", "seed", "kernel", "value", "span", "reason"}

_KINDS = (
    "load", "activate", "cancel", "fail", "unload", "fossilize", "reset", "alpha", "ramp", "errors",
    "health", "latency", "incubate", "fold", "uncalled",
)  # fmt: skip

ENTRY_FIELDS: Mapping[str, frozenset[str]] = {
    **{kind: frozenset(_ABOUT_SEEDS) for kind in _KINDS},
    "ramp": frozenset(_ABOUT_SEEDS | {"shape"}),
    "mark": frozenset({"step", "name"}),
    "veto": frozenset({"step", "layer", "seed", "action", "kernel", "rule", "reason"}),
    "worth": frozenset({"step", "layer", "seed", "value", "low", "high"}),
    "rollback": frozenset({"step", "to", "lines", "cause", "remedy"}),
    "note": frozenset({"step", "reason"}),
    "decision": frozenset(
        {
            "step",
            "layer",
            "seed",
            "action",
            "kernel",
            "confidence",
            "uncertainty",
            "features",
            "value",
            "low",
            "high",
        }
    ),
}
"""What an entry of each kind holds besides `kind`. The first ones are the core's `EventKind`."""

_MAY = {"mark": frozenset({"seeds", "arrays", "measurements"})}
_IN_0_TO_1 = frozenset({"activate", "alpha", "ramp", "health"})
_WHOLE = frozenset({"load", "errors"})
_FROM_0 = frozenset({"latency"})


class SeedEvent(Data):
    """An entry of a run's ledger: a seed changed, or what the run notes between such changes.

    Which of the fields an entry has depends on its kind; see `ENTRY_FIELDS`. No others are
    written.
    """

    schema_version: Literal[1] = 1
    kind: Literal[
        "load", "activate", "cancel", "fail", "unload", "fossilize", "reset", "alpha", "ramp",
        "errors", "health", "latency", "incubate", "fold", "uncalled",
        "mark", "veto", "worth", "rollback", "note", "decision",
    ]  # fmt: skip
    step: Count
    """The step before which it takes effect."""
    layer: Count = 0
    seed: Count = 0
    kernel: Sha256 | Literal[""] = ""
    """The kernel concerned, where there is one."""
    value: float | None = None
    """See `EventKind`; of `worth`, the removal cost, and of `decision`, what it is expected to
    bring; None where it is not finite."""
    span: Count = 0
    """Length of a ramp in steps."""
    shape: Literal["linear", "cosine", "sigmoid"] = "linear"
    """The curve of a ramp."""
    reason: str = ""
    name: str = ""
    """What a mark marks, such as `end`."""
    seeds: Sha256 | None = None
    """Digest of the seed state at a mark."""
    arrays: Sha256 | None = None
    """Digest of all parameters at a mark."""
    measurements: Sha256 | None = None
    """Digest of all measurements before a mark."""
    action: str = ""
    """Of a decision, refused or done."""
    rule: str = ""
    """Which refused it."""
    confidence: float | None = None
    uncertainty: float | None = None
    """Standard deviation of a decision's effect for want of data."""
    features: tuple[tuple[str, float | None], ...] = ()
    """What moved a decision most, each with its part."""
    low: float | None = None
    high: float | None = None
    to: Count = 0
    """The step that the run is taken back to."""
    lines: Count = 0
    """How many lines of the ledger lead to there."""
    cause: str = ""
    remedy: str = ""

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        must, given = ENTRY_FIELDS[self.kind], self.model_fields_set - {"kind", "schema_version"}
        missing, extra = must - given, given - must - _MAY.get(self.kind, frozenset())
        if missing:
            raise ValueError(f"an entry of kind {self.kind} lacks {', '.join(sorted(missing))}")
        if extra:
            raise ValueError(
                f"an entry of kind {self.kind} has no {', '.join(sorted(extra))}: it holds"
                f" {', '.join(sorted(must))}"
            )
        self._check_value()
        return self

    @model_serializer(mode="wrap")
    def _only_what_it_holds(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        kept = self.model_fields_set | {"schema_version"}
        return {name: value for name, value in write(self).items() if name in kept}

    def _check_value(self) -> None:
        kind, value = self.kind, self.value
        if kind in _KINDS and value is None:
            raise ValueError(f"an entry of kind {kind} has a number for its value")
        if value is None:
            return
        if kind in _IN_0_TO_1 and not 0.0 <= value <= 1.0:
            raise ValueError(f"the value of an entry of kind {kind} lies in [0, 1], got {value}")
        if kind in _WHOLE and not (value >= 0.0 and value.is_integer()):
            raise ValueError(f"the value of an entry of kind {kind} is counted from 0, got {value}")
        if kind in _FROM_0 and value < 0.0:
            raise ValueError(f"the value of an entry of kind {kind} is at least 0, got {value}")
