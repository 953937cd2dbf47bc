"""Oona, the message bus."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from esper.contracts import Topic, TopicNames
from esper.oona._bus import Bus, InProcessBus, Message, Subscription

if TYPE_CHECKING:
    from esper.oona._batching import BatchingPublisher, PublisherStatistics
    from esper.oona._broker import Broker, Consumer, DeadLetter, Delivery, Place
    from esper.oona._memory import MemoryBroker
    from esper.oona._open import check_bus_url, open_broker
    from esper.oona._redis import RedisBroker
    from esper.oona._sqlite import SqliteBroker
    from esper.oona._statistics import BusStatistics, GroupStatistics, TopicStatistics
    from esper.oona._telemetry import DropReason, TelemetryBus, TelemetryStatistics

_HOMES = {
    "_batching": ("BatchingPublisher", "PublisherStatistics"),
    "_broker": ("Broker", "Consumer", "DeadLetter", "Delivery", "Place"),
    "_memory": ("MemoryBroker",),
    "_open": ("check_bus_url", "open_broker"),
    "_redis": ("RedisBroker",),
    "_sqlite": ("SqliteBroker",),
    "_statistics": ("BusStatistics", "GroupStatistics", "TopicStatistics"),
    "_telemetry": ("DropReason", "TelemetryBus", "TelemetryStatistics"),
}
"""What is imported when it is first asked for: listeners within a process need none of it."""

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
    "check_bus_url",
    "open_broker",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"esper.oona.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
