"""Tamiyo on a bus: a loop that collects, decides, tells and learns."""

import dataclasses
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from esper.contracts import (
    AdaptationDecision,
    AdaptationDecisionBatch,
    HealthSignal,
    HealthSignalBatch,
    ModelReport,
    OonaMessage,
    Topic,
    payload_of,
    reason_text,
)
from esper.errors import EsperError, InputError, LeaseLostError, SchemaVersionError
from esper.oona import Broker, Consumer, Delivery
from esper.recovery import RetryPolicy
from esper.tamiyo._check import require
from esper.tamiyo.service._tamiyo import Advice, Tamiyo
from esper.tamiyo.service._ticks import Ticks

GROUP = "tamiyo"
SHADOW_GROUP = "tamiyo-shadow"
"""A service in shadow has a group of its own: it hears all that the acting one hears."""

_LEAST_AT_ONCE, _MOST_AT_ONCE = 16, 128
"""Messages of one call of the bus, which decodes them: time is looked at between calls. More at
once are more in a second, where a call takes long; so they become more while there are as many."""
_MOST_HELD = 20_000
"""Messages that are not settled yet, beyond which no more are received."""
_MOST_UNSENT = 10_000
_POLICY = RetryPolicy(base_delay=0.1, factor=2.0, max_delay=5.0, jitter=1.0)
_SHARE = 0.8
"""Of the time between two turns of collecting, what one of them may take."""

_log = logging.getLogger("esper.tamiyo.service")


@dataclasses.dataclass
class Traffic:
    """What came and went on the bus, counted in messages."""

    received: int = 0
    malformed: int = 0
    """That are none of what their topic is about; they are dead letters with the reason."""
    newer: int = 0
    """Of a schema version that is not known here; the same."""
    refused: int = 0
    """Of more models than are looked after, or without a name of one; the same."""
    published: int = 0
    unsent: int = 0
    """Messages that were let go of because the bus was away for too long."""
    unwritable: int = 0
    """Decisions that are no message, because of what the advisor put into them."""
    taken_over: int = 0
    """Messages whose lease ran out before they were settled: they are received again."""
    away: int = 0
    """Calls of the bus that had no answer."""


class TamiyoService:
    """Collects from a bus every 50 ms, decides every 100 ms, and tells the bus what was decided.

    Messages are settled once what they led to was decided and told, so that a service that is
    killed hears them again: each signal is looked at at least once. Decisions are published on
    `Topic.DECISION`, or in shadow on `Topic.ADVICE`, with the model's name for a key and the id of
    its report for a `trace_id`. Each report is answered by one message, if only by a batch of no
    decisions, but in shadow; what health that must pass asks for later is told by more. While the
    bus is away, the loop goes on and tries again.

    There is one service of a group at a time: one that is started takes the place of the one
    before, whose `run` then raises.

    Args:
        tamiyo: decides.
        broker: the bus; who gives it closes it.
        collect_seconds: between two turns of collecting.
        decide_seconds: between two decisions.
        clock: seconds.

    Raises:
        InputError: for times that are not above 0.
    """

    def __init__(
        self,
        tamiyo: Tamiyo,
        broker: Broker,
        *,
        collect_seconds: float = 0.05,
        decide_seconds: float = 0.1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        require("collect_seconds of the service", collect_seconds, 1e-3)
        require("decide_seconds of the service", decide_seconds, 1e-3)
        self.tamiyo = tamiyo
        self.traffic = Traffic()
        self.collecting = Ticks(collect_seconds)
        self.deciding = Ticks(decide_seconds)
        self.last_error = ""
        """What the bus said when it did not answer last; empty once it does."""
        self._broker = broker
        self._clock = clock
        self._topic = Topic.ADVICE if tamiyo.shadow else Topic.DECISION
        self._consumer: Consumer | None = None
        self._waiting: deque[Delivery] = deque()
        """What was received and not looked at."""
        self._held: list[Delivery] = []
        """What was looked at and not settled."""
        self._useless: deque[tuple[Delivery, str]] = deque()
        """What is to become a dead letter, and why."""
        self._unsent: deque[OonaMessage] = deque()
        self._at_once = _LEAST_AT_ONCE
        self._draws = random.Random(_POLICY.seed)
        self._delays: Iterator[float] = _POLICY.delays(self._draws)
        self._again = float("-inf")
        """When the bus is asked again."""
        self._stopping = False
        self._began = clock()
        self._decided = self._began

    @property
    def healthy(self) -> bool:
        """Whether the bus answers, and decisions are made at all."""
        behind = self._clock() - self._decided
        return not self.last_error and behind < max(2.0, 10.0 * self.deciding.seconds)

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return self._clock() - self._began

    def stop(self) -> None:
        """End after this turn; may be called from another thread or the handler of a signal."""
        self._stopping = True

    def run(self) -> None:
        """Work until told to stop.

        Raises:
            LeaseLostError: where another service was started in its place.
            InputError: where the bus cannot be used as it is.
        """
        mode = {"shadow": self.tamiyo.shadow, "learning": self.tamiyo.learning}
        _log.info("Tamiyo begins", extra=mode)
        try:
            while not self._stopping:
                self.turn()
                left = min(
                    ticks.wait(self._clock()) for ticks in (self.collecting, self.deciding)
                )  # fmt: skip
                time.sleep(left)
            # What was heard is decided upon, and what was decided is told.
            self.decide()
        finally:
            self._leave()
        _log.info("Tamiyo has ended", extra=mode | dataclasses.asdict(self.traffic))

    def turn(self) -> None:
        """Collect and decide, where it is time to."""
        if self.collecting.is_due(self._clock()):
            self.collect()
        if self.deciding.is_due(self._clock()):
            self.decide()

    def collect(self) -> None:
        """One turn of collecting; what there is no time for is left for the next one."""
        began = self._clock()
        self.collecting.begin(began)
        until = began + _SHARE * self.collecting.seconds
        while self._clock() < until and (self._waiting or self._receive()):
            while self._waiting and self._clock() < until:
                self._take(self._waiting.popleft())
        self.collecting.end(self._clock() - began)

    def decide(self) -> None:
        """One decision about all models of which there is news; then there is time to learn."""
        began = self._clock()
        self.deciding.begin(began)
        for advice in self.tamiyo.decide(began):
            self._tell(advice)
        self._send()
        self._decided = self._clock()
        self.deciding.end(self._decided - began)
        if self.tamiyo.learning:
            next_turn = min(ticks.wait(self._decided) for ticks in (self.collecting, self.deciding))
            self.tamiyo.learn(next_turn)

    def _receive(self) -> bool:
        """Receive what there is; whether there was anything."""
        if self._clock() < self._again or len(self._held) >= _MOST_HELD:
            return False
        try:
            if self._consumer is None:
                group = SHADOW_GROUP if self.tamiyo.shadow else GROUP
                # Of one name: who is started again goes on at once with what was not settled.
                self._consumer = self._broker.consumer(
                    group, [Topic.SEED_HEALTH, Topic.MODEL_REPORT], name="tamiyo"
                )
            found = self._consumer.receive(self._at_once)
        except (LeaseLostError, InputError):
            raise
        except (EsperError, OSError) as error:
            self._away("receiving", error)
            return False
        self._back()
        full = len(found) == self._at_once
        self._at_once = min(2 * self._at_once, _MOST_AT_ONCE) if full else _LEAST_AT_ONCE
        self._waiting.extend(found)
        self.traffic.received += len(found)
        return bool(found)

    def _take(self, delivery: Delivery) -> None:
        """Look at a message; what it does not hold is a dead letter, and no reason to stop."""
        message, traffic = delivery.message, self.traffic
        model = _model_of(message)
        try:
            payload = payload_of(message)
        except SchemaVersionError as error:
            traffic.newer += 1
            self._reject(delivery, error)
            return
        except InputError as error:
            traffic.malformed += 1
            self._reject(delivery, error)
            return
        try:
            if isinstance(payload, HealthSignal | HealthSignalBatch):
                self.tamiyo.collect(model, payload)
            elif isinstance(payload, ModelReport):
                self.tamiyo.report(model, payload, trace_id=message.message_id)
        except InputError as error:
            traffic.refused += 1
            self._reject(delivery, error)
            return
        self._held.append(delivery)

    def _reject(self, delivery: Delivery, error: Exception) -> None:
        _log.warning(
            "a message is no use: %s", error, extra={"message_id": delivery.message.message_id}
        )
        self._useless.append((delivery, reason_text(str(error))))

    def _tell(self, advice: Advice) -> None:
        """All that is said of a report in one message, so that who waits for it has it whole."""
        items: list[AdaptationDecision] = []
        for decision in advice.decisions:
            try:
                item = AdaptationDecision(step=advice.step, **_fields(decision))
                self._message(advice, [item]).to_bytes()
            except (ValueError, InputError) as error:
                self._unwritable(advice, 1, error)
                continue
            items.append(item)
        # Each by itself is a message, and all of them may be more than one holds.
        while len(items) > 1:
            try:
                self._message(advice, items).to_bytes()
                break
            except InputError as error:
                kept = len(items) // 2
                self._unwritable(advice, len(items) - kept, error)
                items = items[:kept]
        if not items and (advice.shadow or not advice.answers):
            return
        self._unsent.append(self._message(advice, items))
        while len(self._unsent) > _MOST_UNSENT:
            self._unsent.popleft()
            self.traffic.unsent += 1

    def _unwritable(self, advice: Advice, count: int, error: Exception) -> None:
        self.traffic.unwritable += count
        _log.warning("a decision cannot be told: %s", error, extra={"model": advice.model})

    def _message(self, advice: Advice, items: list[AdaptationDecision]) -> OonaMessage:
        payload = items[0] if len(items) == 1 else AdaptationDecisionBatch.of(items)
        return OonaMessage(
            topic=self._topic,
            key=advice.model,
            sender_id="tamiyo",
            trace_id=advice.trace_id,
            payload=payload.model_dump(mode="json"),
        )

    def _send(self) -> None:
        """Publish what was decided; then what led to it is settled.

        What was put off is not: whoever comes after this service is to hear it.
        """
        if self._clock() < self._again:
            return
        if self._unsent:
            try:
                self._broker.publish(list(self._unsent))
            except (EsperError, OSError) as error:
                self._away("publishing", error)
                return
            self.traffic.published += len(self._unsent)
            self._unsent.clear()
            self._back()
        later = self.tamiyo.postponed
        held = [own for own in self._held if _model_of(own.message) not in later]
        if not held or self._settle(lambda consumer: consumer.acknowledge(held)):
            self._held = [own for own in self._held if _model_of(own.message) in later]
        while self._useless:
            delivery, reason = self._useless[0]
            if not self._settle(lambda own, it=[delivery], why=reason: own.reject(it, why)):
                return
            self._useless.popleft()

    def _settle(self, action: Callable[[Consumer], None]) -> bool:
        """Whether messages were settled, or are another's by now."""
        if self._consumer is None:
            return True
        try:
            action(self._consumer)
        except LeaseLostError:
            self.traffic.taken_over += 1
        except (EsperError, OSError) as error:
            self._away("settling messages", error)
            return False
        return True

    def _away(self, what: str, error: Exception) -> None:
        self.traffic.away += 1
        self._again = self._clock() + next(self._delays)
        # One line for each time that it goes away.
        level = logging.DEBUG if self.last_error else logging.WARNING
        _log.log(level, "the bus does not answer while %s, and is asked again: %s", what, error)
        self.last_error = f"{what}: {error}"

    def _back(self) -> None:
        if self.last_error:
            self._delays = _POLICY.delays(self._draws)
            self.last_error = ""

    def _leave(self) -> None:
        if self._consumer is not None:
            with suppress(EsperError, OSError):
                self._consumer.close()


def _model_of(message: OonaMessage) -> str:
    return message.key or message.sender_id


def _fields(decision: Any) -> dict[str, Any]:
    return {field.name: getattr(decision, field.name) for field in dataclasses.fields(decision)}
