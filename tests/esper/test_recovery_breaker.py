"""The circuit breaker against a model that is obviously right, and among threads."""

import threading
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from esper.errors import CircuitBreakerOpenError, InputError
from esper.recovery import MOVES, CircuitBreaker, CircuitEvent, CircuitState
from tests.esper.recovery_clock import Hand

CLOSED, OPEN, HALF_OPEN = CircuitState


class BreakerMachine(RuleBasedStateMachine):
    """Every call, success, failure, release and late report, with time turned by hand."""

    FAILURES, TIMEOUT, PROBES = 3, 8.0, 2

    def __init__(self) -> None:
        super().__init__()
        self.clock = Hand()
        self.heard = []
        self.breaker = CircuitBreaker(
            self.FAILURES, self.TIMEOUT, self.PROBES, clock=self.clock, on_change=self.heard.append
        )
        # The model: a state, when it began, failures in a row, and the calls that are out.
        self.state, self.since, self.failures, self.succeeded = CLOSED, self.clock(), 0, 0
        self.mine: list[int] = []  # permits of this state
        self.slow: list[int] = []  # of this state too, but not waited for any more
        self.late: list[int] = []  # permits of earlier states
        self.changes: list[tuple[CircuitState, CircuitState]] = []

    def go(self, state: CircuitState) -> None:
        self.changes.append((self.state, state))
        self.state = state
        self.since, self.succeeded = self.clock(), 0
        self.late += self.mine + self.slow
        self.mine, self.slow = [], []
        if state is CLOSED:
            self.failures = 0

    def full(self) -> bool:
        return len(self.mine) + self.succeeded >= self.PROBES

    @rule(seconds=st.sampled_from([0.5, 3.0, 8.0, 20.0]))
    def wait(self, seconds):
        self.clock.now += seconds

    @rule()
    def ask(self):
        over = self.clock() - self.since >= self.TIMEOUT
        if self.state is OPEN and over:
            self.go(HALF_OPEN)
        elif self.state is HALF_OPEN and self.full() and over:
            self.since = self.clock()
            self.slow += self.mine
            self.mine = []
        free = self.state is CLOSED or (self.state is HALF_OPEN and not self.full())
        permit = self.breaker.try_acquire()
        assert (permit is not None) == free
        if permit is not None:
            self.mine.append(permit)

    def one_of_this_state(self, data) -> int:
        out = data.draw(st.sampled_from([each for each in (self.mine, self.slow) if each]))
        return out.pop(data.draw(st.integers(0, len(out) - 1)))

    @precondition(lambda self: self.mine or self.slow)
    @rule(data=st.data())
    def succeed(self, data):
        self.breaker.record_success(self.one_of_this_state(data))
        if self.state is CLOSED:
            self.failures = 0
        else:
            self.succeeded += 1
            if self.succeeded == self.PROBES:
                self.go(CLOSED)

    @precondition(lambda self: self.mine or self.slow)
    @rule(data=st.data())
    def fail(self, data):
        self.breaker.record_failure(self.one_of_this_state(data))
        self.failures += self.state is CLOSED
        if self.state is HALF_OPEN or self.failures == self.FAILURES:
            self.go(OPEN)

    @precondition(lambda self: self.mine or self.slow)
    @rule(data=st.data())
    def interrupted(self, data):
        self.breaker.release(self.one_of_this_state(data))

    @precondition(lambda self: self.late)
    @rule(report=st.sampled_from(["record_success", "record_failure", "release"]))
    def report_late(self, report):
        getattr(self.breaker, report)(self.late.pop())

    @rule(trip=st.booleans())
    def by_hand(self, trip):
        if trip:
            self.breaker.trip()
            if self.state is not OPEN:
                self.go(OPEN)
        else:
            self.breaker.reset()
            self.failures = 0
            if self.state is not CLOSED:
                self.go(CLOSED)

    @rule()
    def half_open(self):
        """Otherwise rare, and most of what there is happens there."""
        self.by_hand(True)
        self.wait(self.TIMEOUT)
        self.ask()

    @invariant()
    def they_agree(self):
        assert self.breaker.state is self.state
        assert [(c.before, c.after) for c in self.heard] == self.changes
        assert [c.number for c in self.heard] == list(range(1, len(self.heard) + 1))
        left = max(0.0, self.TIMEOUT - (self.clock() - self.since))
        waits = self.state is OPEN or (self.state is HALF_OPEN and self.full())
        assert self.breaker.retry_after == pytest.approx(left if waits else 0.0)


TestBreaker = BreakerMachine.TestCase
TestBreaker.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


def test_every_move_is_made_by_somebody_and_no_other():
    """All pairs of state and event: those in the table move, the others leave it as it is."""
    reach = {
        CLOSED: lambda b: None,
        OPEN: lambda b: b.trip(),
        HALF_OPEN: lambda b: (b.trip(), b.can_proceed()),
    }
    act = {
        CircuitEvent.TRIP: lambda b: b.trip(),
        CircuitEvent.PROBE: lambda b: b.can_proceed(),
        CircuitEvent.RECOVER: lambda b: b.record_success(),
        CircuitEvent.RELAPSE: lambda b: b.record_failure(),
        CircuitEvent.RESET: lambda b: b.reset(),
    }
    for state in CircuitState:
        for event in CircuitEvent:
            breaker = CircuitBreaker(5, 0.0, 1, clock=lambda: 0.0)
            reach[state](breaker)
            assert breaker.state is state
            act[event](breaker)
            assert breaker.state is MOVES.get((state, event), state), (state, event)


def test_five_failures_open_it_for_a_minute_and_two_calls_probe():
    clock = Hand()
    breaker = CircuitBreaker(name="urza", clock=clock)
    for _ in range(5):
        assert breaker.can_proceed()
        breaker.record_failure()
    clock.now += 59.5
    with pytest.raises(
        CircuitBreakerOpenError,
        match=r"circuit breaker of urza is open, because calls failed: .* another 0\.5 s\."
        r" Do without it until then, or reset\(\)",
    ):
        breaker.acquire()
    clock.now += 0.5
    assert [breaker.can_proceed() for _ in range(3)] == [True, True, False]
    with pytest.raises(ConnectionError, match="is half_open, .* 60.0 s; the calls that probe it"):
        breaker.acquire()
    breaker.record_success()
    assert breaker.state is HALF_OPEN
    breaker.record_success()
    assert breaker.state is CLOSED
    stats = breaker.stats()
    assert (stats["times_opened"], stats["calls_refused"]) == (1, 3)


def test_a_success_between_failures_begins_the_count_anew():
    breaker = CircuitBreaker(2)
    for _ in range(10):
        breaker.record_failure()
        breaker.record_success()
    assert breaker.state is CLOSED


def test_it_counts_anew_once_it_has_closed():
    clock = Hand()
    breaker = CircuitBreaker(2, 60.0, 1, clock=clock)
    breaker.record_failure()
    breaker.record_failure()
    clock.now += 60
    assert breaker.can_proceed()
    breaker.record_success()
    breaker.record_failure()
    assert breaker.state is CLOSED
    breaker.record_failure()
    assert breaker.state is OPEN


@pytest.mark.parametrize("report", ["record_success", "record_failure", "release"])
def test_what_a_call_of_an_earlier_state_reports_changes_nothing(report):
    clock = Hand()
    breaker = CircuitBreaker(1, 60.0, 2, clock=clock)
    early = breaker.acquire()
    breaker.record_failure()
    clock.now += 60
    lost = breaker.acquire()
    breaker.trip()
    clock.now += 60
    assert breaker.can_proceed()
    assert breaker.can_proceed()
    for permit in (early, lost):
        getattr(breaker, report)(permit)
    assert breaker.state is HALF_OPEN
    assert not breaker.can_proceed()


@pytest.mark.parametrize(
    ("report", "state"),
    [("record_success", CLOSED), ("record_failure", OPEN), ("release", HALF_OPEN)],
)
def test_probes_that_report_late_are_not_waited_for_but_count(report, state):
    clock = Hand()
    breaker = CircuitBreaker(1, 60.0, 2, clock=clock)
    breaker.record_failure()
    clock.now += 60
    slow = [breaker.try_acquire() for _ in range(2)]
    clock.now += 59
    assert not breaker.can_proceed()
    clock.now += 1
    assert [breaker.can_proceed() for _ in range(3)] == [True, True, False]
    for permit in slow:
        getattr(breaker, report)(permit)
    assert breaker.state is state
    # Only those that are waited for are in the way of others.
    assert breaker.can_proceed() == (state is CLOSED)


@pytest.mark.parametrize("lasts", [10, 59, 60, 70, 600])
@pytest.mark.parametrize("probes", [1, 2, 5])
def test_it_closes_where_every_call_succeeds_however_long_calls_last(lasts, probes):
    """A call every ten seconds, of which none fails any more."""
    clock = Hand()
    breaker = CircuitBreaker(1, 60.0, probes, clock=clock)
    breaker.record_failure()
    end, out = clock.now + 60 + lasts + 10 * probes, []
    while clock.now < end:
        clock.now += 10
        while out and out[0][0] <= clock.now:
            breaker.record_success(out.pop(0)[1])
        permit = breaker.try_acquire()
        if permit is not None:
            out.append((clock.now + lasts, permit))
    assert breaker.state is CLOSED
    assert breaker.stats()["times_opened"] == 1


@pytest.mark.parametrize("probes", [1, 2, 5])
def test_of_many_threads_exactly_as_many_probe_as_may(probes):
    clock = Hand()
    breaker = CircuitBreaker(1, 60.0, probes, clock=clock)
    for _ in range(20):
        breaker.trip()
        clock.now += 60
        start, end = threading.Barrier(16), threading.Barrier(16)
        passed = Counter()

        def call(start=start, end=end, passed=passed):
            start.wait()
            permit = breaker.try_acquire()
            end.wait()  # nobody reports before everybody has asked
            if permit is not None:
                passed[threading.get_ident()] += 1
                breaker.record_success(permit)

        threads = [threading.Thread(target=call) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(passed.values()) == probes
        assert breaker.state is CLOSED


def test_threads_lose_no_failure():
    breaker = CircuitBreaker(10_000_000)

    def fail():
        for _ in range(5000):
            breaker.record_failure()

    threads = [threading.Thread(target=fail) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert breaker.stats()["failures_in_a_row"] == 40_000


def test_a_listener_may_ask_the_breaker():
    """It is told outside of the lock."""
    seen = []
    breaker = CircuitBreaker(1, on_change=lambda change: seen.append(breaker.stats()["state"]))
    breaker.record_failure()
    assert seen == ["open"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"failure_threshold": 0}, "a whole number of at least 1, got 0"),
        ({"failure_threshold": 2.5}, "a whole number of at least 1, got 2.5"),
        ({"half_open_max_calls": 0}, "a whole number of at least 1, got 0"),
        ({"half_open_max_calls": True}, "a whole number of at least 1, got True"),
        ({"recovery_timeout": -1.0}, "a number of at least 0, got -1.0"),
        ({"recovery_timeout": float("nan")}, "a number of at least 0, got nan"),
        ({"recovery_timeout": "60"}, "a number of at least 0, got '60'"),
    ],
)
def test_what_makes_no_breaker_is_refused(options, expected):
    (name,) = options
    with pytest.raises(InputError, match=f"^{name} of a circuit breaker must be {expected}"):
        CircuitBreaker(**options)


def test_a_breaker_that_stays_open_until_it_is_closed_by_hand():
    clock = Hand()
    breaker = CircuitBreaker(1, float("inf"), clock=clock)
    breaker.record_failure()
    clock.now += 1e12
    with pytest.raises(CircuitBreakerOpenError, match="another inf s"):
        breaker.acquire()
    breaker.reset()
    assert breaker.can_proceed()
