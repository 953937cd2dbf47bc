"""Workers of a library's queue of blueprints."""

from esper.tezzeret.service._announcements import submitted
from esper.tezzeret.service._asked import job_of, request_of
from esper.tezzeret.service._late_bus import LateBus, WorkerBus
from esper.tezzeret.service._patience import Patience
from esper.tezzeret.service._queue import BlueprintQueue
from esper.tezzeret.service._statistics import WorkerStatistics
from esper.tezzeret.service._worker import QueueWorker

__all__ = [
    "BlueprintQueue",
    "LateBus",
    "Patience",
    "QueueWorker",
    "WorkerBus",
    "WorkerStatistics",
    "job_of",
    "request_of",
    "submitted",
]
