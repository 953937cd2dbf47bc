"""What a worker is made of: leases that are renewed, calls that are made again, an outbox."""

import random
import threading
import time

import pytest

from esper.contracts import (
    BlueprintRecord,
    BlueprintState,
    Claim,
    KernelSignature,
    OonaMessage,
    Topic,
)
from esper.errors import (
    BlueprintError,
    CircuitBreakerOpenError,
    KernelNotFoundError,
    LeaseLostError,
    LibraryError,
    MessageError,
    ServiceUnavailableError,
)
from esper.recovery import RetryPolicy
from esper.tezzeret import CompileJob, load_blueprint
from esper.tezzeret.service import job_of, request_of
from esper.tezzeret.service._bell import Bell
from esper.tezzeret.service._ending import Ending
from esper.tezzeret.service._leases import Leases
from esper.tezzeret.service._outbox import Outbox
from esper.tezzeret.service._patience import Patience, is_away

QUICK = RetryPolicy(base_delay=0.01, max_delay=0.05)
SIGNATURE = KernelSignature(input_shape=(3,), output_shape=(4,))


def request(seed: int = 0):
    return request_of(CompileJob(load_blueprint("low_rank"), SIGNATURE, {"rank": 2}, seed))


def claim(seconds: float = 0.3, token: str = "0" * 32) -> Claim:
    asked = request()
    record = BlueprintRecord(
        blueprint_id=asked.blueprint_id,
        name=asked.name,
        source=asked.source,
        signature=asked.signature,
        sizes=asked.sizes,
        state=BlueprintState.COMPILING,
    )
    return Claim(blueprint=record, worker="w", token=token, attempt=1, seconds=seconds)


def until(true, seconds: float = 20.0) -> None:
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit, "it did not come true"
        time.sleep(0.01)


def test_a_job_that_is_submitted_is_the_job_that_is_claimed():
    asked = request(seed=7)
    record = BlueprintRecord(
        blueprint_id=asked.blueprint_id,
        name=asked.name,
        source=asked.source,
        signature=asked.signature,
        sizes=asked.sizes,
        init_seed=asked.init_seed,
    )
    assert job_of(record) == CompileJob(load_blueprint("low_rank"), SIGNATURE, {"rank": 2}, 7)
    other = record.model_copy(update={"source": '{\n "name": "none"\n}'})
    with pytest.raises(BlueprintError, match=r"blueprint [0-9a-f]{12} of the library is not a"):
        job_of(other)


def test_a_bell_that_was_rung_ends_the_next_wait_and_only_that():
    bell = Bell()
    bell.ring()
    bell.ring()
    assert bell.wait(60.0)
    assert not bell.wait(0.0)
    threading.Timer(0.05, bell.ring).start()
    assert bell.wait(60.0)
    bell.ring()
    assert bell.heard()
    assert not bell.heard()


@pytest.mark.parametrize(
    ("error", "away"),
    [
        (LibraryError("the database is locked"), True),
        (ServiceUnavailableError("no route"), True),
        (CircuitBreakerOpenError("left alone"), True),
        (OSError("cut"), True),
        (KernelNotFoundError("none"), False),
        (LeaseLostError("another has it"), False),
        (BlueprintError("no blueprint"), False),
    ],
)
def test_what_an_answer_is_and_what_is_none(error, away):
    assert is_away(error) is away


def test_a_call_is_made_again_until_there_is_an_answer():
    told = []
    patience = Patience(lambda *what: told.append(what), policy=QUICK)
    answers = [ServiceUnavailableError("first"), LibraryError("second"), "an answer"]

    def call():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert patience("asking", call, 60.0) == "an answer"
    assert [(what, str(error), missed) for what, error, missed in told] == [
        ("asking", "first", 1),
        ("asking", "second", 2),
    ]


def test_an_answer_that_is_an_error_is_not_asked_for_again():
    calls = []

    def call():
        calls.append(1)
        raise LeaseLostError("another worker has it")

    with pytest.raises(LeaseLostError):
        Patience(lambda *_: None, policy=QUICK)("asking", call, 60.0)
    assert calls == [1]


def test_patience_ends_by_its_time_or_when_it_is_told_to():
    def away():
        raise ServiceUnavailableError("gone")

    patience = Patience(lambda *_: None, policy=QUICK)
    with pytest.raises(ServiceUnavailableError, match="gone"):
        patience("asking", away, 0.1)
    slow = Patience(lambda *_: None, policy=RetryPolicy(base_delay=3600.0, max_delay=3600.0))
    threading.Timer(0.1, slow.end_by, (time.monotonic() + 0.2,)).start()
    with pytest.raises(ServiceUnavailableError, match="gone"):
        slow("asking", away, 1e6)


def test_ending_comes_in_two_steps_and_the_second_at_once_where_it_is_asked_for_again():
    steps = []
    ending = Ending(3600.0, steps.append)
    assert not ending.asked
    ending.ask()
    until(lambda: steps == [False])
    assert ending.asked
    ending.ask()
    until(lambda: steps == [False, True])
    ending.close()
    short = Ending(0.02, steps.append)
    short.ask()
    until(lambda: steps == [False, True, False, True])
    short.close()
    Ending(1.0, steps.append).close()
    assert len(steps) == 4


class _Library:
    """Renews, or does what it is told to."""

    def __init__(self) -> None:
        self.renewed = []
        self.error: Exception | None = None

    def renew(self, claim: Claim) -> Claim:
        self.renewed.append(claim.token)
        if self.error is not None:
            raise self.error
        return claim


@pytest.fixture
def library():
    return _Library()


@pytest.fixture
def leases(library):
    lost, away = [], []
    made = Leases(
        library.renew,
        on_lost=lambda claim, error: lost.append((claim.token, str(error))),
        on_away=lambda *what: away.append(what),
    )
    yield made, lost, away
    made.close()


def test_claims_are_renewed_until_they_are_dropped(library, leases):
    held, lost, _ = leases
    first, second = claim(token="1" * 32), claim(token="2" * 32)
    held.hold([first, second])
    assert len(held) == 2
    until(lambda: library.renewed.count("1" * 32) > 2 and library.renewed.count("2" * 32) > 2)
    assert held.settle(first) == first
    held.drop(first)
    held.drop(first)
    # One renewal may be on its way.
    count = library.renewed.count("1" * 32)
    until(lambda: library.renewed.count("2" * 32) > 6)
    assert library.renewed.count("1" * 32) <= count + 1
    assert held.all() == [second]
    assert held.current(first) is None
    assert not lost


def test_a_claim_that_is_lost_is_told_once_and_renewed_no_more(library, leases):
    held, lost, _ = leases
    library.error = LeaseLostError("another worker has it")
    held.hold([claim()])
    until(lambda: lost)
    assert lost == [("0" * 32, "another worker has it")]
    assert held.settle(claim()) is None
    assert held.all() == []
    time.sleep(0.3)
    assert library.renewed == ["0" * 32]


def test_a_claim_that_ends_while_it_is_renewed_is_not_lost(library, leases):
    held, lost, _ = leases
    held.hold([claim()])
    assert held.settle(claim()) is not None
    library.error = LeaseLostError("it is completed")
    until(lambda: library.renewed)
    time.sleep(0.1)
    assert not lost


def test_renewals_go_on_when_the_library_is_back(library, leases):
    held, lost, away = leases
    library.error = ServiceUnavailableError("restarting")
    held.hold([claim()])
    until(lambda: len(away) > 2)
    assert [what[2] for what in away[:3]] == [1, 2, 3]
    assert held.current(claim()) is not None
    library.error = None
    count = len(library.renewed)
    until(lambda: len(library.renewed) > count + 2)
    assert not lost


def test_an_error_that_nobody_foresaw_does_not_end_renewals(library, leases):
    held, lost, away = leases
    library.error = ValueError("half an answer")
    held.hold([claim()])
    until(lambda: len(away) > 1)
    assert [(type(error), missed) for _, error, missed in away[:2]] == [
        (ValueError, 1),
        (ValueError, 2),
    ]
    library.error = None
    count = len(library.renewed)
    until(lambda: len(library.renewed) > count + 2)
    assert held.current(claim()) is not None
    assert not lost


def message(number: int) -> OonaMessage:
    return OonaMessage(topic=Topic.BLUEPRINT_CHANGED, sender_id="w", payload={"number": number})


class _Bus:
    def __init__(self) -> None:
        self.taken: list[int] = []
        self.error: Exception | None = None
        self.refuses: int | None = None

    def publish(self, messages) -> None:
        if self.error is not None:
            raise self.error
        numbers = [message.payload["number"] for message in messages]
        if self.refuses in numbers:
            raise MessageError("refused")
        self.taken += numbers


def test_an_outbox_publishes_in_order_and_keeps_what_a_bus_that_is_away_does_not_take():
    bus, away = _Bus(), []
    outbox = Outbox(bus, capacity=50, on_away=lambda *what: away.append(what), policy=QUICK)
    outbox.put(message(0))
    until(lambda: bus.taken == [0])
    bus.error = ServiceUnavailableError("restarting")
    for number in range(1, 41):
        outbox.put(message(number))
    until(lambda: len(away) > 2)
    bus.error = None
    outbox.close()
    assert bus.taken == list(range(41))
    assert (outbox.published, outbox.dropped) == (41, 0)


def test_an_error_that_nobody_foresaw_does_not_end_an_outbox():
    bus, away = _Bus(), []
    outbox = Outbox(bus, on_away=lambda *what: away.append(what), policy=QUICK)
    bus.error = ValueError("half an answer")
    outbox.put(message(0))
    until(lambda: len(away) > 1)
    bus.error = None
    outbox.close()
    assert type(away[0][1]) is ValueError
    assert (bus.taken, outbox.published, outbox.dropped) == ([0], 1, 0)


def test_an_outbox_is_bounded_and_counts_what_it_drops():
    bus = _Bus()
    bus.error = ServiceUnavailableError("away for good")
    outbox = Outbox(bus, capacity=5, on_away=lambda *_: None, policy=QUICK)
    outbox.put(message(0))
    until(lambda: len(outbox) == 1 and not outbox._waiting)
    for number in range(1, 21):
        outbox.put(message(number))
    assert len(outbox) == 5
    assert outbox.dropped == 16
    outbox.close(seconds=0.1)
    assert (outbox.published, outbox.dropped, len(outbox)) == (0, 21, 0)


def test_a_message_that_is_refused_keeps_no_other_one_back():
    bus = _Bus()
    bus.refuses = 0
    away: list[str] = []
    outbox = Outbox(bus, on_away=lambda _, error, __: away.append(str(error)), policy=QUICK)
    outbox.put(message(0))
    until(lambda: away == ["refused"])
    outbox.put(message(1))
    outbox.close()
    assert bus.taken == [1]
    assert outbox.dropped == 1


def test_without_a_bus_nothing_waits_and_nothing_is_counted():
    outbox = Outbox(None, on_away=lambda *_: None, draws=random.Random(0))
    outbox.put(message(0))
    outbox.close()
    assert (outbox.published, outbox.dropped, len(outbox)) == (0, 0, 0)
