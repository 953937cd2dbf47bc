"""What messages are about."""

import difflib
from enum import StrEnum


class Topic(StrEnum):
    """What is spoken about."""

    SEED_EVENT = "seed.event"
    """A seed changed; the payload is the ledger's entry."""
    METRICS = "training.metrics"
    """A measurement at a decision boundary."""
    ERROR = "error.occurred"
    """Something failed; the payload says of which type, where, and what was raised."""
    RECOVERY = "error.recovery"
    """What was done about an error, and whether it helped."""
    CIRCUIT = "circuit.changed"
    """A circuit breaker went from one state to another."""
    HEALTH = "health.measured"
    """A health score, and whether somebody has to step in."""
    SEED_HEALTH = "telemetry.seed.health"
    """How the seeds of a whole model are."""
    DECISION = "control.adaptation"
    """What a controller asks for; the message's key is the model that it is for."""
    ADVICE = "control.advice"
    """What a controller in shadow would ask for: to be looked at, and acted upon by nobody."""
    MODEL_REPORT = "model.report"
    """A growing model as it is at a decision boundary, for whoever decides elsewhere."""
    BLUEPRINT_CHANGED = "blueprint.changed"
    """A blueprint was submitted, or went from one state to another."""
    KERNEL_CHANGED = "kernel.changed"
    """A kernel was put or removed, or went from one state to another."""
    KERNEL_OUTCOME = "kernel.outcome"
    """What a kernel did in a run."""

    TELEMETRY_SEED_HEALTH = SEED_HEALTH


TopicNames = Topic


def topic_of(name: str) -> Topic:
    """The topic of that name.

    Raises:
        UnknownTopicError: where there is none, naming the nearest.
    """
    try:
        return Topic(name)
    except ValueError:
        pass
    from esper.errors import UnknownTopicError

    near = difflib.get_close_matches(str(name), [topic.value for topic in Topic], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UnknownTopicError(
        f"there is no topic {str(name)[:80]!r}: expected one of {', '.join(Topic)}{hint}"
    )
