"""Oona, the message bus."""

from typing import TYPE_CHECKING, Any

from esper.contracts import Topic, TopicNames
from esper.oona._batching import BatchingPublisher, PublisherStatistics
from esper.oona._broker import Broker, Consumer, DeadLetter, Delivery, Place
from esper.oona._bus import Bus, InProcessBus, Message, Subscription
from esper.oona._memory import MemoryBroker
from esper.oona._open import open_broker
from esper.oona._sqlite import SqliteBroker
from esper.oona._statistics import BusStatistics, GroupStatistics, TopicStatistics
from esper.oona._telemetry import DropReason, TelemetryBus, TelemetryStatistics

if TYPE_CHECKING:
    from esper.oona._redis import RedisBroker

__all__ = [
    "BatchingPublisher",
    "Broker",
    "Bus",
    "BusStatistics",
    "Consumer",
    "DeadLetter",
    "Delivery",
    "DropReason",
    "GroupStatistics",
    "InProcessBus",
    "MemoryBroker",
    "Message",
    "Place",
    "PublisherStatistics",
    "RedisBroker",
    "SqliteBroker",
    "Subscription",
    "TelemetryBus",
    "TelemetryStatistics",
    "Topic",
    "TopicNames",
    "TopicStatistics",
    "open_broker",
]


def __getattr__(name: str) -> Any:
    # Its package is there only where it was asked for, and takes long to import.
    if name == "RedisBroker":
        from esper.oona._redis import RedisBroker

        return RedisBroker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
