"""What the payload of a message on each topic is."""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from esper.contracts._changes import BlueprintChanged, KernelChanged
from esper.contracts._columns import Columns
from esper.contracts._data import Data
from esper.contracts._decisions import AdaptationDecision, AdaptationDecisionBatch
from esper.contracts._health import HealthSignal, HealthSignalBatch
from esper.contracts._kernels import KernelOutcome
from esper.contracts._ledger_entry import SeedEvent
from esper.contracts._message import OonaMessage
from esper.contracts._metrics import TrainingMetrics
from esper.contracts._model_report import ModelReport
from esper.contracts._recovery import (
    CircuitChanged,
    ErrorOccurred,
    HealthMeasured,
    RecoveryDone,
)
from esper.contracts._topics import Topic
from esper.contracts._versions import explained, upgraded

PAYLOADS: Mapping[Topic, type[Data]] = {
    Topic.SEED_EVENT: SeedEvent,
    Topic.METRICS: TrainingMetrics,
    Topic.ERROR: ErrorOccurred,
    Topic.RECOVERY: RecoveryDone,
    Topic.CIRCUIT: CircuitChanged,
    Topic.HEALTH: HealthMeasured,
    Topic.SEED_HEALTH: HealthSignal,
    Topic.DECISION: AdaptationDecision,
    Topic.ADVICE: AdaptationDecision,
    Topic.MODEL_REPORT: ModelReport,
    Topic.BLUEPRINT_CHANGED: BlueprintChanged,
    Topic.KERNEL_CHANGED: KernelChanged,
    Topic.KERNEL_OUTCOME: KernelOutcome,
}

BATCHES: Mapping[Topic, type[Columns[Any]]] = {
    Topic.SEED_HEALTH: HealthSignalBatch,
    Topic.DECISION: AdaptationDecisionBatch,
    Topic.ADVICE: AdaptationDecisionBatch,
}
"""What the payload may be instead, where many are sent as one: it has lists for values."""


def payload_model(topic: Topic, payload: Mapping[str, Any]) -> type[Data]:
    """Of what model a payload is: one item, or a batch."""
    batch = BATCHES.get(topic)
    if batch is not None and isinstance(payload.get("layer_id", payload.get("layer")), list):
        return batch
    return PAYLOADS[topic]


def payload_of(message: OonaMessage) -> Data:
    """The payload of a message, as its topic's model in `PAYLOADS` or `BATCHES`.

    Raises:
        MessageError: where it is none, naming each thing that is wrong.
        SchemaVersionError: where it is of a newer version.
    """
    model = payload_model(message.topic, message.payload)
    try:
        return model.model_validate_json(json.dumps(upgraded(model, message.payload)))
    except ValidationError as error:
        from esper.errors import MessageError

        raise MessageError(
            f"message {message.message_id} about {message.topic} from {message.sender_id!r} holds"
            f" no {model.__name__}: {explained(error)}"
        ) from error
