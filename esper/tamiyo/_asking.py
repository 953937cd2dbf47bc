"""A controller that asks a service: the run reports on a bus, and does what comes back.

What it says is of the service, and whether it is done is for the run's own rules of safety: a
decision that has become illegal meanwhile is refused there. A bus that is away stops nothing.
"""

import functools
import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from esper.contracts import HealthSignalBatch, ModelReport, OonaMessage, Topic
from esper.errors import InputError
from esper.oona import Broker, check_bus_url, open_broker
from esper.tamiyo._answers import asked_in, decision_of, sort_messages
from esper.tamiyo._check import require
from esper.tamiyo._controller import Decision, Observation, Veto
from esper.tamiyo._correspondence import Correspondence
from esper.tamiyo._recorder import ReadingsRecorder
from esper.tamiyo._telling import report_of
from esper.tamiyo.graph import Readings
from esper_functional import SeedLifecycleState

_MOST_REPORTS = 4_096
"""Own reports that are remembered; decisions about older ones are not for this run any more."""
_LONGEST_NAME = 200


class ServiceController:
    """See the module. What was recorded of a boundary is done again, and nobody is asked.

    Without `wait_seconds`, what the service says is done at the first boundary after it came, so
    that it depends on how fast the service is.

    Args:
        bus: where the service hears; its address, which is opened at the first boundary; or None
            to ask nobody, where all that is to be done was recorded.
        name: of the run, by which the service knows it, in 1 to 200 letters.
        wait_seconds: how long a boundary waits for the answer to its own report at most, from 0. A
            service in shadow does not answer.
        bound_seconds: how long a boundary waits for the bus, from 0.
        offset: where to begin among kernels of one description, from 0, so that runs of other
            seeds meet other ones.

    Raises:
        InputError: for values out of range, or an address that names no bus.
    """

    def __init__(
        self,
        *,
        bus: Broker | str | None = None,
        name: str = "run",
        wait_seconds: float = 0.0,
        bound_seconds: float = 5.0,
        offset: int = 0,
    ) -> None:
        require("wait_seconds of the service controller", wait_seconds, 0.0)
        require("bound_seconds of the service controller", bound_seconds, 0.0)
        if not name.isprintable() or not 0 < len(name) <= _LONGEST_NAME:
            raise InputError(
                "a service knows a run by its name, a printable text of 1 to"
                f" {_LONGEST_NAME} letters; got {name!r:.80}"
            )
        self._name = name
        self._wait = wait_seconds
        self._line: Correspondence | None = None
        if bus is not None:
            own = (
                functools.partial(open_broker, check_service_bus(bus))
                if isinstance(bus, str)
                else bus
            )
            self._line = Correspondence(own, name=name, bound_seconds=bound_seconds)
        self._recorder = ReadingsRecorder(offset=offset)
        self._reports: deque[str] = deque(maxlen=_MOST_REPORTS)
        """The ids of those of this process."""
        self._counts = Counter[str]()
        self._failed = False
        self._remarks: Sequence[str] = ()

    @property
    def counts(self) -> Mapping[str, int]:
        """What became of what the service said, counted since this process began.

        Decisions that were taken are `asked`, those that were only noted `advised`; what was left
        out is `malformed`, `stray`, `misplaced` or `unknown`. How often the bus went away: `away`.
        """
        return dict(sorted(self._counts.items()))

    def decide(self, observation: Observation) -> list[Decision]:
        """What the service asked for.

        Raises:
            InputError: for an observation without a topology.
        """
        readings = self._recorder.read(observation)
        # What the readings measured is recorded first.
        recorded = None if observation.recorded is None else observation.recorded()
        if recorded is not None:
            self._remarks = tuple(recorded)
            return [decision_of(item) for item in asked_in(self._remarks)]
        self._remarks = ()
        if self._line is None:
            return []
        try:
            told = self._told(observation, readings)
        except ValueError as error:
            # A report has bounds that a run that goes wrong may leave, and must not end by.
            self._remarks = self._failing(f"no report can be made: {_first_line(error)}")
            return []
        awaited = self._reports[-1] if self._wait else ""
        heard = self._line.exchange(told, answer_to=awaited, wait=self._wait)
        answers = sort_messages(heard.messages, self._reports, observation)
        self._counts += answers.left_out
        self._counts += Counter(asked=len(answers.asked), advised=len(answers.advised))
        self._remarks = (*answers.remarks(observation), *self._failing(heard.error))
        return [decision_of(item) for item in answers.asked]

    def _told(self, observation: Observation, readings: Readings) -> list[OonaMessage]:
        """The health of the seeds, and the report, which is remembered as this run's."""
        assert observation.topology is not None
        kernel = functools.partial(self._recorder.kernel, observation)
        report = report_of(observation, observation.topology(), readings, kernel)
        health = health_of(observation)
        told = [] if health is None else [self._message(Topic.SEED_HEALTH, health)]
        told.append(self._message(Topic.MODEL_REPORT, report))
        self._reports.append(told[-1].message_id)
        return told

    def _failing(self, error: str) -> tuple[str, ...]:
        """What is to be recorded of what went wrong: when it begins, not while it lasts."""
        began = bool(error) and not self._failed
        self._failed = bool(error)
        if not began:
            return ()
        self._counts["away"] += 1
        return (f"the service could not be asked, and is at later boundaries: {error}",)

    def _message(self, topic: Topic, payload: ModelReport | HealthSignalBatch) -> OonaMessage:
        return OonaMessage(
            topic=topic,
            key=self._name,
            sender_id=self._name,
            payload=payload.model_dump(mode="json"),
        )

    def remarks(self) -> Sequence[str]:
        """See `Remarking`: what the service asked for or would have, and what went wrong."""
        return self._remarks

    def told(
        self, observation: Observation, applied: Sequence[Decision], vetoed: Sequence[Veto]
    ) -> None:
        """See `Controller.told`."""
        self._recorder.told(applied)

    def state(self) -> dict[str, Any]:
        """See `Controller.state`."""
        return {"recorder": self._recorder.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Controller.restore`."""
        self._recorder.restore(state["recorder"])

    def close(self) -> None:
        """See `Closing`: leave the bus."""
        if self._line is not None:
            self._line.close()


def health_of(observation: Observation) -> HealthSignalBatch | None:
    """How the seeds are that hold a kernel; None where none does.

    A run measures no statistics of activations at a boundary: they are told as 0.
    """
    seeds = observation.seeds
    stage = np.asarray(seeds.stage)
    places = np.argwhere(stage != int(SeedLifecycleState.DORMANT)).tolist()
    if not places:
        return None
    health, errors = np.asarray(seeds.health), np.asarray(seeds.error_count)
    nothing = (0.0,) * len(places)
    scores = [float(health[layer, seed]) for layer, seed in places]
    return HealthSignalBatch(
        layer_id=tuple(layer for layer, _ in places),
        seed_id=tuple(seed for _, seed in places),
        chunk_id=(0,) * len(places),
        epoch=(0,) * len(places),
        step=(observation.step,) * len(places),
        stage=tuple(int(stage[layer, seed]) for layer, seed in places),
        activation_variance=nothing,
        dead_neuron_ratio=nothing,
        avg_correlation=nothing,
        # As a signal has it that does not say: what was never measured is no reason to act.
        health_score=tuple(1.0 if math.isnan(score) else score for score in scores),
        error_count=tuple(int(errors[layer, seed]) for layer, seed in places),
        is_ready_for_transition=(False,) * len(places),
    )


def check_service_bus(url: str) -> str:
    """The address of a bus on which a service can be asked.

    Raises:
        InputError: for one that names no bus, or one within this process.
    """
    check_bus_url(url)
    if url.startswith("memory:"):
        raise InputError(
            "a bus in memory is in one process, where no service hears it: name one that the"
            " service is on, such as redis://HOST:PORT/0 or sqlite:PATH"
        )
    return url


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
