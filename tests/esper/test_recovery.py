"""Errors are told apart, counted, and what is said to be recovered was."""

import asyncio
import errno
import gc
import json
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from esper.errors import (
    ArtifactError,
    CircuitBreakerOpenError,
    InputError,
    KernelCompilationError,
    KernelExecutionError,
    KernelNotFoundError,
    LibraryError,
)
from esper.oona import InProcessBus, Topic
from esper.recovery import (
    STRATEGIES,
    CircuitState,
    Classifier,
    ErrorRecoveryManager,
    ErrorTracker,
    ErrorType,
    RecoveryStrategy,
    RetryPolicy,
    create_error_context,
)
from esper_functional import KernelMismatchError
from tests.esper.recovery_clock import Hand, context, failing, managed

TOPICS = (Topic.ERROR, Topic.RECOVERY, Topic.CIRCUIT, Topic.HEALTH)


# ---- telling them apart ----


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def raised_by(action) -> BaseException:
    try:
        action()
    except Exception as error:
        return error
    raise AssertionError("it did not raise")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (KernelNotFoundError("none"), None),
        (ArtifactError("damaged"), ErrorType.KERNEL_VALIDATION),
        (KernelMismatchError("shape"), ErrorType.KERNEL_VALIDATION),
        (KernelCompilationError("parity"), ErrorType.KERNEL_VALIDATION),
        (LibraryError("disk"), ErrorType.KERNEL_LOADING),
        (caused(LibraryError("away"), ConnectionResetError()), ErrorType.NETWORK_ERROR),
        (caused(LibraryError("slow"), TimeoutError()), ErrorType.TIMEOUT),
        (OSError(errno.EIO, "disk"), ErrorType.KERNEL_LOADING),
        (OSError(errno.ENOMEM, "memory"), ErrorType.MEMORY_OVERFLOW),
        (OSError(errno.EHOSTUNREACH, "route"), ErrorType.NETWORK_ERROR),
        (BrokenPipeError(), ErrorType.NETWORK_ERROR),
        (TimeoutError(), ErrorType.TIMEOUT),
        (MemoryError(), ErrorType.MEMORY_OVERFLOW),
        (torch.OutOfMemoryError("CUDA out of memory"), ErrorType.MEMORY_OVERFLOW),
        (torch.AcceleratorError("lost"), ErrorType.DEVICE_ERROR),
        (RuntimeError("CUDA error: unspecified launch failure"), ErrorType.DEVICE_ERROR),
        (FloatingPointError("nan"), ErrorType.KERNEL_EXECUTION),
        (KernelExecutionError("raised"), ErrorType.KERNEL_EXECUTION),
        (caused(KernelExecutionError("x"), MemoryError()), ErrorType.MEMORY_OVERFLOW),
        (caused(KernelExecutionError("x"), ValueError()), ErrorType.KERNEL_EXECUTION),
        (CircuitBreakerOpenError("open"), ErrorType.CIRCUIT_BREAKER),
        (RuntimeError("anything"), ErrorType.UNKNOWN),
        (KeyError("k"), ErrorType.UNKNOWN),
    ],
    ids=lambda value: value.name if isinstance(value, ErrorType) else type(value).__name__,
)
def test_each_class_has_its_type(error, kind):
    assert Classifier()(error) is kind


def test_memory_that_torch_and_xla_do_not_get():
    classify = Classifier()
    found = raised_by(lambda: torch.empty(1 << 50))
    assert classify(found) is ErrorType.MEMORY_OVERFLOW, found
    found = raised_by(lambda: jnp.zeros(1 << 45).block_until_ready())
    assert classify(found) is ErrorType.MEMORY_OVERFLOW, found
    xla = jax.errors.JaxRuntimeError
    assert classify(xla("DEADLINE_EXCEEDED: collective")) is ErrorType.TIMEOUT
    assert classify(xla("INTERNAL: device")) is ErrorType.DEVICE_ERROR
    assert classify(xla("INVALID_ARGUMENT: shapes")) is ErrorType.KERNEL_EXECUTION


def test_users_add_classes_and_change_those_there_are():
    class Throttled(ConnectionError):
        pass

    rules = {
        Throttled: ErrorType.TIMEOUT,
        KeyError: lambda error: ErrorType.KERNEL_LOADING if error.args == ("k",) else None,
        "decimal:DivisionByZero": ErrorType.KERNEL_EXECUTION,
    }
    classify = Classifier(rules)
    assert classify(Throttled()) is ErrorType.TIMEOUT
    assert classify(KeyError("k")) is ErrorType.KERNEL_LOADING
    assert classify(KeyError("other")) is None
    import decimal

    assert classify(decimal.DivisionByZero()) is ErrorType.KERNEL_EXECUTION
    for key in ("decimal.DivisionByZero", int):
        with pytest.raises(InputError, match="cannot be classified: expected a class of excep"):
            classify.add(key, ErrorType.UNKNOWN)


def test_both_spellings_are_one_member():
    assert ErrorType.KERNEL_LOAD_FAILURE is ErrorType.KERNEL_LOADING
    assert ErrorType.KERNEL_EXECUTION_ERROR is ErrorType.KERNEL_EXECUTION
    assert ErrorType.OUT_OF_MEMORY is ErrorType.MEMORY_OVERFLOW
    assert ErrorType.VALIDATION_ERROR is ErrorType.KERNEL_VALIDATION
    for name, member in ErrorType.__members__.items():
        assert ErrorType(name.lower()) is member
    with pytest.raises(ValueError, match="'flat_tyre' is not a valid ErrorType"):
        ErrorType("flat_tyre")
    assert set(STRATEGIES) == set(ErrorType)


def test_importing_it_pulls_in_neither_torch_nor_jax():
    script = (
        "import sys, esper.recovery as r\n"
        "m = r.ErrorRecoveryManager(sleep=lambda s: None)\n"
        "m.handle_error_sync(r.create_error_context('c', exception=OSError()), lambda: 1)\n"
        "print(sorted({'torch', 'jax', 'jaxlib', 'prometheus_client'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_context_finds_its_own_type():
    found = create_error_context("c", layer_name="0", exception=MemoryError("full"), seed_idx=2)
    assert (found.error_type, found.message) == (ErrorType.OUT_OF_MEMORY, "MemoryError: full")
    assert found.place == ("c", "0", 2)
    assert create_error_context("c", error_type=ErrorType.TIMEOUT).error_type is ErrorType.TIMEOUT
    with pytest.raises(InputError, match="got a KernelNotFoundError, which is none: treat it as"):
        create_error_context("c", exception=KernelNotFoundError("none"))
    with pytest.raises(InputError, match="an error of c needs an error_type.* got neither"):
        create_error_context("c")


# ---- counting them ----


@given(
    events=st.lists(
        st.tuples(st.sampled_from(list(ErrorType)), st.sampled_from([0.0, 1.0, 100.0])),
        max_size=60,
    ),
    window=st.sampled_from([1.0, 50.0, 300.0]),
)
def test_rates_are_those_of_a_list(events, window):
    hand = Hand()
    tracker = ErrorTracker(clock=hand)
    seen = []
    for kind, pause in events:
        hand.now += pause
        tracker.record_error(context(kind))
        seen.append((kind, hand.now))
    for kind in (None, *ErrorType):
        inside = [k for k, at in seen if hand.now - at < window and kind in (None, k)]
        assert tracker.get_error_rate(kind, window) == pytest.approx(len(inside) / window)
    stats = tracker.stats()
    assert stats["total_errors"] == len(events)
    assert sum(stats["errors_by_type"].values()) == len(events)


def test_a_rate_above_what_is_remembered_is_not_too_low():
    hand = Hand()
    tracker = ErrorTracker(max_history=100, clock=hand)
    for _ in range(1000):
        hand.now += 0.1
        tracker.record_error(context())
    assert tracker.get_error_rate() == pytest.approx(10.0, rel=0.02)
    assert tracker.get_error_rate(ErrorType.TIMEOUT) == 0.0
    assert len(tracker.history) == 100
    assert tracker.stats()["total_errors"] == 1000
    with pytest.raises(InputError, match="time_window must be above 0 seconds, got 0"):
        tracker.get_error_rate(time_window=0)


def test_a_kernel_is_problematic_at_its_third_error():
    hand = Hand()
    tracker = ErrorTracker(clock=hand, max_kernels=2)
    found = []
    for _ in range(3):
        tracker.record_error(context(kernel_id="a" * 64))
        tracker.record_error(context(kernel_id=None))
        found.append(tracker.is_problematic_kernel("a" * 64))
        hand.now += 10
    assert found == [False, False, True]
    assert tracker.problematic_kernels() == ["a" * 64]
    assert not tracker.is_problematic_kernel("a" * 64, time_window=15)
    assert tracker.is_problematic_kernel("a" * 64, threshold=1, time_window=15)
    tracker.forget_kernel("a" * 64)
    assert not tracker.is_problematic_kernel("a" * 64)
    for name in "abc":
        tracker.record_error(context(kernel_id=name))
    assert tracker.errors_of_kernel("a") == 0
    assert tracker.stats()["kernels_with_errors"] == 2
    for threshold in (0, 101):
        with pytest.raises(InputError, match=f"judged by {threshold} errors: expected 1 to 100"):
            tracker.is_problematic_kernel("b", threshold)


def test_a_history_keeps_no_traceback_alive():
    """It would keep the locals of its frames: a model's activations."""

    class Large:
        pass

    def run():
        large = Large()
        manager.handle_error_sync(
            create_error_context("c", exception=raised_by(use), metadata={"x": large})
        )
        return weakref.ref(large)

    def use():
        activations = Large()
        refs.append(weakref.ref(activations))
        raise ValueError("boom")

    refs: list[weakref.ref] = []
    manager, _ = managed()
    refs.append(run())
    gc.collect()
    assert [ref() for ref in refs] == [None, None]
    (kept,) = manager.error_tracker.history
    assert (kept.message, kept.metadata) == ("ValueError: boom", {"x": "Large"})


# ---- retrying ----


@pytest.mark.parametrize("failures", range(5))
def test_a_retry_retries_and_counts_exactly(failures):
    """Three attempts: it works if at most two of them fail."""
    manager, hand = managed()
    action = failing(failures)
    recovered = manager.handle_error_sync(context(), retry_action=action)
    assert recovered == (failures < 3)
    assert action.calls == min(failures + 1, 3)
    stats = manager.get_recovery_stats()
    assert (stats["total_recoveries"], stats["retries"]) == (1, action.calls)
    assert stats["recovery_success_rate"] == float(recovered)
    assert len(hand.slept) == action.calls
    for delay, base in zip(hand.slept, (0.1, 0.2, 0.4), strict=False):
        assert base <= delay <= base * 1.1


def test_delays_double_up_to_the_longest_and_depend_on_the_seed_alone():
    policy = RetryPolicy(base_delay=1.0, max_delay=5.0, jitter=0.0)
    manager, _ = managed(retry=policy)
    delays = policy.delays(manager.draws)
    assert [next(delays) for _ in range(5)] == [1.0, 2.0, 4.0, 5.0, 5.0]

    def slept(seed):
        manager, hand = managed(seed=seed)
        manager.handle_error_sync(context(), retry_action=failing(9))
        return hand.slept

    assert slept(1) == slept(1) != slept(2)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (RetryPolicy, {"attempts": 0}, "attempts of a retry must be a whole number of at least 1"),
        (RetryPolicy, {"attempts": 2.5}, "attempts .* a whole number of at least 1, got 2.5"),
        (RetryPolicy, {"factor": 0.5}, "factor of a retry must be a number of at least 1, got 0.5"),
        (RetryPolicy, {"base_delay": -1.0}, "base_delay .* a number of at least 0, got -1.0"),
        (RetryPolicy, {"base_delay": float("inf")}, "base_delay .* at least 0, got inf"),
        (RetryPolicy, {"max_delay": float("nan")}, "max_delay .* at least 0, got nan"),
        (RetryPolicy, {"jitter": -0.1}, "jitter of a retry must be a number of at least 0"),
        (ErrorTracker, {"max_history": -1}, "max_history of an error tracker must be a whole"),
        (ErrorTracker, {"max_kernels": 0}, "max_kernels of an error tracker must be a whole"),
        (ErrorTracker, {"max_per_kernel": 1.5}, "max_per_kernel .* at least 1, got 1.5"),
        (ErrorRecoveryManager, {"problematic_after": 0}, "at least 1 and at most 100, got 0"),
        (ErrorRecoveryManager, {"problematic_after": 101}, "problematic_after of .* got 101"),
        (ErrorRecoveryManager, {"escalate_after": 0}, "escalate_after of an .* at least 1, got 0"),
        (ErrorRecoveryManager, {"max_history": -1}, "max_history .* at least 1, got -1"),
        (ErrorRecoveryManager, {"max_retries": 2.5}, "attempts of a retry .*, got 2.5"),
        (ErrorRecoveryManager, {"failure_threshold": 0}, "of a circuit breaker .*, got 0"),
        (
            ErrorRecoveryManager,
            {"strategies": {"timeoutt": "retry"}},
            "'timeoutt' is not a valid ErrorType: expected a type of kernel_execution, .* one of",
        ),
        (
            ErrorRecoveryManager,
            {"strategies": {ErrorType.TIMEOUT: "hope"}},
            "'hope' is not a valid RecoveryStrategy: expected .* for it one of retry, fallback",
        ),
    ],
)
def test_arguments_that_would_fail_later_or_mean_nothing_are_refused(make, options, message):
    with pytest.raises(InputError, match=message):
        make(**options)


def test_the_users_random_generator_is_left_alone():
    import random

    state = random.getstate()
    manager, _ = managed()
    manager.handle_error_sync(context(), retry_action=failing(9))
    assert random.getstate() == state


def test_what_there_is_no_function_for_is_not_recovered():
    """Whatever the type and its strategy."""
    for kind in ErrorType:
        manager, _ = managed()
        assert manager.handle_error_sync(context(kind)) is False
        (recovery,) = manager.recoveries
        assert (recovery.recovered, recovery.action, recovery.attempts) == (False, "nothing", 0)
        assert "no function was given by which to" in recovery.detail


@pytest.mark.parametrize("kind", ErrorType)
@pytest.mark.parametrize("works", [True, False])
def test_a_fallback_counts_by_whether_it_worked(kind, works):
    manager, _ = managed()
    for action in (lambda: works, failing(0 if works else 9)):
        assert manager.handle_error_sync(context(kind), action) is works
        assert manager.recoveries[-1].action == "fallback"
    assert manager.get_recovery_stats()["by_type"] == {
        kind.value: {"attempted": 2, "recovered": 2 * works}
    }


def test_failures_in_a_row_are_those_without_a_success_that_the_caller_tells_of():
    """Of the component: a fallback that works says nothing of it."""
    manager, hand = managed()
    full = context(ErrorType.MEMORY_OVERFLOW)
    breaker = manager.breaker(full.component, full.error_type)
    for _ in range(10):
        for _ in range(4):
            assert manager.handle_error_sync(full, lambda: True)
        breaker.record_success()
    assert breaker.state is CircuitState.CLOSED
    for made in range(1, 7):
        assert manager.handle_error_sync(full, lambda: True)
        assert breaker.can_proceed() == (made < 5)
    hand.now += 60
    assert breaker.can_proceed()
    assert manager.handle_error_sync(full, lambda: True)  # the call that probed has failed
    assert breaker.state is CircuitState.OPEN


def test_a_failure_counts_while_another_is_recovered():
    manager, _ = managed()
    full = context(ErrorType.MEMORY_OVERFLOW)

    def fallback():
        for _ in range(4):
            assert not manager.handle_error_sync(full, lambda: True)

    assert manager.handle_error_sync(full, fallback)
    assert manager.breaker(full.component, full.error_type).state is CircuitState.OPEN


def test_less_is_done_before_something_else():
    manager, _ = managed()
    validation = context(ErrorType.KERNEL_VALIDATION)
    fallback = failing(0)
    assert manager.handle_error_sync(validation, fallback, degrade_action=lambda: None)
    assert (manager.recoveries[-1].action, fallback.calls) == ("degrade", 0)
    assert manager.handle_error_sync(validation, fallback, degrade_action=failing(9))
    assert (manager.recoveries[-1].action, fallback.calls) == ("fallback", 1)
    assert "degrade: ConnectionError: away" in manager.recoveries[-1].detail
    assert manager.handle_error_sync(context(), fallback, retry_action=lambda: False)
    assert manager.recoveries[-1].attempts == 4
    assert "retry: it returned False" in manager.recoveries[-1].detail


def test_one_place_is_recovered_by_one_at_a_time():
    manager, _ = managed()
    inner = []

    def fallback():
        inner.append(manager.handle_error_sync(context(), lambda: inner.append("called")))
        inner.append(manager.handle_error_sync(context(layer_name="other"), lambda: True))
        assert manager.get_recovery_stats()["active_recoveries"] == 1

    assert manager.handle_error_sync(context(), fallback)
    assert inner == [False, True]
    assert "under way already" in manager.recoveries[0].detail
    assert [r.tried for r in manager.recoveries] == [False, True, True]
    assert manager.get_recovery_stats()["active_recoveries"] == 0


def test_what_was_not_tried_has_not_failed_and_alarms_nobody():
    told, registry = [], CollectorRegistry()
    manager, _ = managed(on_escalate=told.append, registry=registry)

    def fallback():
        for _ in range(5):  # as by other threads, which find this one under way
            assert not manager.handle_error_sync(context(), lambda: True)
        # Of the same type and at the same place but for the seed, where nothing is under way.
        assert manager.handle_error_sync(context(seed_idx=1), lambda: True)

    assert manager.handle_error_sync(context(), fallback)
    assert not told
    stats = manager.get_recovery_stats()
    assert (stats["total_recoveries"], stats["untried_recoveries"]) == (2, 5)
    assert stats["recent_recoveries"] == 2
    assert (stats["recovery_success_rate"], stats["escalations"]) == (1.0, 0)
    assert stats["by_type"] == {"network_error": {"attempted": 2, "recovered": 2}}

    def value(outcome):
        labels = {"type": "network_error", "strategy": "retry", "outcome": outcome}
        return registry.get_sample_value("esper_recoveries_total", labels)

    assert (value("untried"), value("recovered"), value("failed")) == (5, 2, None)


def test_an_interruption_leaves_nothing_under_way():
    manager, _ = managed()

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        manager.handle_error_sync(context(), retry_action=interrupted)
    assert manager.get_recovery_stats()["active_recoveries"] == 0
    assert manager.breaker("kernel_cache", ErrorType.NETWORK_ERROR).state is CircuitState.CLOSED
    assert manager.handle_error_sync(context(), lambda: True)


# ---- recovering a result ----


def test_what_recovers_gives_its_result():
    manager, hand = managed()
    assert (
        manager.recover_from_error_sync(OSError("disk"), {"component": "c"}, failing(2)) == "done"
    )
    assert len(hand.slept) == 3
    assert manager.recoveries[-1].recovered


def test_what_does_not_recover_raises_the_first_error_with_a_note():
    manager, _ = managed()
    error = OSError("disk")
    action = failing(9, LibraryError("still away"))
    with pytest.raises(OSError, match="disk") as caught:
        manager.recover_from_error_sync(error, {"component": "c", "shard": 3}, action)
    assert caught.value is error
    assert action.calls == 3
    assert error.__notes__ == ["recovery failed after 3 attempts: LibraryError: still away"]
    assert manager.error_tracker.history[-1].metadata == {"shard": 3}


def test_a_type_that_is_not_retried_is_recovered_once_and_at_once():
    manager, hand = managed()
    action = failing(9)
    with pytest.raises(ArtifactError):
        manager.recover_from_error_sync(ArtifactError("damaged"), {"component": "c"}, action)
    assert (action.calls, hand.slept) == (1, [])
    assert manager.get_recovery_stats()["retries"] == 0


def test_an_answer_is_no_error():
    manager, _ = managed()
    action = failing(0)
    with pytest.raises(KernelNotFoundError) as caught:
        manager.recover_from_error_sync(KernelNotFoundError("none"), {"component": "c"}, action)
    assert not hasattr(caught.value, "__notes__")
    assert action.calls == 0
    assert manager.get_recovery_stats()["error_stats"]["total_errors"] == 0


def test_an_open_breaker_stops_the_trying():
    """The fifth failure opens it: in the second recovery, after two attempts."""
    manager, hand = managed()
    action = failing(99)
    for made in (3, 5, 5):
        with pytest.raises(OSError, match="disk"):
            manager.recover_from_error_sync(OSError("disk"), {"component": "c"}, action)
        assert action.calls == made
    slept = len(hand.slept)
    assert slept == 5  # nobody waits for what is not tried
    assert "the circuit breaker of c:kernel_loading is open" in manager.recoveries[-1].detail
    hand.now += 60
    assert manager.recover_from_error_sync(OSError(), {"component": "c"}, lambda: 1) == 1
    assert manager.breaker("c", ErrorType.KERNEL_LOADING).state is CircuitState.HALF_OPEN
    assert manager.recover_from_error_sync(OSError(), {"component": "c"}, lambda: 2) == 2
    assert manager.breaker("c", ErrorType.KERNEL_LOADING).state is CircuitState.CLOSED


def test_memory_errors_open_the_breaker_of_their_component():
    manager, _ = managed()
    breaker = manager.breaker("executor", ErrorType.OUT_OF_MEMORY)
    for _ in range(5):
        assert breaker.can_proceed()
        manager.handle_error_sync(create_error_context("executor", exception=MemoryError()))
    assert not breaker.can_proceed()


def test_the_async_forms_do_the_same():
    async def run():
        manager, hand = managed()
        action = failing(2)

        async def slow():
            await asyncio.sleep(0)
            return action()

        assert await manager.handle_error(context(), retry_action=slow)
        assert len(hand.slept) == 3
        assert await manager.recover_from_error(OSError(), {"component": "c"}, slow) == "done"
        assert await manager.recover_from_error(OSError(), {"component": "c"}, lambda: 5) == 5
        assert await manager.handle_error(context(), fallback_action=lambda: False) is False
        assert await manager.guard("urza").call_async(slow) == "done"
        return manager.get_recovery_stats()

    assert asyncio.run(run())["total_recoveries"] == 4


def test_a_cancelled_recovery_is_let_go_of():
    async def run():
        manager, _ = managed()
        guard = manager.guard("urza")
        guard.breaker.trip()
        manager.clock.now += 60
        probe = asyncio.create_task(guard.call_async(asyncio.Event().wait))
        task = asyncio.create_task(manager.handle_error(context(), asyncio.Event().wait))
        await asyncio.sleep(0)
        for each in (probe, task):
            each.cancel()
            with pytest.raises(asyncio.CancelledError):
                await each
        assert manager.get_recovery_stats()["active_recoveries"] == 0
        # The probe that was cancelled has been given back.
        assert [guard.breaker.can_proceed() for _ in range(3)] == [True, True, False]

    asyncio.run(run())


def test_what_would_have_to_be_awaited_is_refused_without_a_loop():
    manager, _ = managed()

    async def slow():
        return 1

    with pytest.raises(OSError, match="disk") as caught:
        manager.recover_from_error_sync(OSError("disk"), {"component": "c"}, slow)
    assert "give a plain function, or await the async form" in caught.value.__notes__[0]
    assert manager.handle_error_sync(context(), slow) is False


# ---- guarding a service ----


def test_a_guard_retries_and_then_raises_what_was_raised():
    manager, hand = managed()
    guard = manager.guard("urza")
    assert guard(failing(2)) == "done"
    assert len(hand.slept) == 2
    action = failing(9, LibraryError("down"))
    with pytest.raises(LibraryError, match="down") as caught:
        guard(action)
    assert action.calls == 3
    assert caught.value.__notes__ == ["tried 3 times; the circuit breaker of urza is closed"]
    assert [r.recovered for r in manager.recoveries] == [True, False]
    assert manager.get_recovery_stats()["error_stats"]["total_errors"] == 5


def test_a_guard_leaves_alone_what_keeps_failing():
    manager, hand = managed()
    guard = manager.guard("urza")
    action = failing(99)
    for made in (3, 5):
        with pytest.raises(ConnectionError, match="away"):
            guard(action)
        assert action.calls == made
    with pytest.raises(CircuitBreakerOpenError, match="circuit breaker of urza is open"):
        guard(action)
    assert action.calls == 5
    hand.now += 60
    assert [guard(lambda: 1), guard(lambda: 2)] == [1, 2]
    assert guard.breaker.state is CircuitState.CLOSED


def test_not_found_passes_through_a_guard_as_an_answer():
    manager, _ = managed()
    guard = manager.guard("urza")
    for _ in range(4):
        guard.breaker.record_failure()
    for _ in range(10):
        with pytest.raises(KernelNotFoundError):
            guard(failing(9, KernelNotFoundError("none")))
    assert guard.breaker.stats()["failures_in_a_row"] == 0
    before = manager.get_recovery_stats()["error_stats"]["total_errors"]
    for _ in range(10):
        action = failing(9, ArtifactError("damaged"))
        with pytest.raises(ArtifactError):
            guard(action)
        assert action.calls == 1
    # Recorded, but the service has answered.
    assert manager.get_recovery_stats()["error_stats"]["total_errors"] == before + 10
    assert guard.breaker.state is CircuitState.CLOSED


@pytest.mark.parametrize("strategy", [None, RecoveryStrategy.RETRY])
@pytest.mark.parametrize(
    ("last", "recovered"),
    [
        (None, [True]),
        (KernelNotFoundError("none"), [True]),  # answers: the service is there again
        (ArtifactError("damaged"), [True]),
        (MemoryError(), [False]),  # another failure, of a type that is not retried
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_a_retry_comes_to_is_a_recovery_or_none(last, recovered, strategy):
    """As many recoveries as errors that were retried, whatever ends it."""
    retried = {} if strategy is None else {ErrorType.KERNEL_VALIDATION: strategy}
    manager, _ = managed(strategies=retried, max_retries=2)
    raised = [ConnectionError("away"), *([last] if last else [])]

    def action():
        if raised:
            raise raised.pop(0)
        return "done"

    guard = manager.guard("urza")
    if last is None:
        assert guard(action) == "done"
    else:
        with pytest.raises(type(last)):
            guard(action)
    stats = manager.get_recovery_stats()
    assert stats["retries"] == 1
    found = [r.recovered for r in manager.recoveries]
    tired = strategy is not None and isinstance(last, ArtifactError)
    assert found == [*recovered, *([False] if tired else [])]
    assert manager.recoveries[0].attempts == 1
    wanted = ErrorType.MEMORY_OVERFLOW if recovered == [False] else ErrorType.NETWORK_ERROR
    assert manager.recoveries[0].error.error_type is wanted


def test_threads_that_probe_a_service_are_two():
    manager, hand = managed()
    guard = manager.guard("urza")
    guard.breaker.trip()
    hand.now += 60
    start, done, calls, refused = threading.Barrier(12), threading.Event(), [], []

    def ask():
        start.wait()
        try:
            guard(lambda: (calls.append(1), done.wait()))
        except CircuitBreakerOpenError:
            refused.append(1)
            if len(refused) == 10:
                done.set()

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(calls), len(refused)) == (2, 10)
    assert guard.breaker.state is CircuitState.CLOSED


def test_one_name_has_one_breaker_also_among_threads():
    manager, _ = managed()
    found = []
    threads = [threading.Thread(target=lambda: found.append(manager.breaker("x"))) for _ in "1" * 8]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, found))) == 1
    assert manager.breaker("x", ErrorType.TIMEOUT) is not found[0]


# ---- what is told of it ----


def test_every_decision_is_an_event_and_a_metric():
    bus, registry = InProcessBus(), CollectorRegistry()
    heard = bus.subscribe(*TOPICS)
    manager, _ = managed(bus=bus, registry=registry)
    other = ErrorRecoveryManager(registry=registry)  # may share one
    assert other.handle_error_sync(context(ErrorType.UNKNOWN), lambda: True)
    guard = manager.guard("urza")
    for _ in range(2):
        with pytest.raises(ConnectionError):
            guard(failing(9))
    manager.handle_error_sync(context(seed_idx=1, kernel_id="k"), retry_action=failing(0))
    messages = heard.drain()
    for message in messages:
        json.dumps(dict(message.payload))
    by_topic = {topic: [m.payload for m in messages if m.topic is topic] for topic in TOPICS}
    assert [e["type"] for e in by_topic[Topic.ERROR]] == ["network_error"] * 6
    last = by_topic[Topic.ERROR][-1]
    assert (last["component"], last["seed"], last["kernel"]) == ("kernel_cache", 1, "k")
    assert last["at"] > 1000
    assert [r["recovered"] for r in by_topic[Topic.RECOVERY]] == [False, False, True]
    (opened,) = by_topic[Topic.CIRCUIT]
    assert (opened["name"], opened["before"], opened["after"]) == ("urza", "closed", "open")

    def value(metric, **labels):
        return registry.get_sample_value(metric, labels)

    assert value("esper_errors_total", type="network_error", component="urza") == 5
    assert value("esper_retries_total", component="urza") == 3
    assert value("esper_circuit_state", name="urza") == 2
    assert value("esper_circuit_changes_total", name="urza", to="open") == 1
    recoveries = {"type": "network_error", "strategy": "retry"}
    assert value("esper_recoveries_total", **recoveries, outcome="failed") == 2
    assert value("esper_recoveries_total", **recoveries, outcome="recovered") == 1
    assert value("esper_escalations_total", type="network_error") is None
    json.dumps(manager.get_recovery_stats())


def test_statistics_say_what_is_recent():
    manager, hand = managed()
    assert manager.get_recovery_stats()["recovery_success_rate"] is None
    for recovered in (True, False, True, True):
        manager.handle_error_sync(context(ErrorType.UNKNOWN), lambda ok=recovered: ok)
        hand.now += 1500
    stats = manager.get_recovery_stats()
    assert (stats["total_recoveries"], stats["recent_recoveries"]) == (4, 2)
    assert stats["recovery_success_rate"] == 0.75
    assert stats["active_recoveries"] == 0


def test_what_is_remembered_is_bounded():
    manager, _ = managed(max_history=5)
    for i in range(50):
        manager.handle_error_sync(context(ErrorType.UNKNOWN, layer_name=str(i), kernel_id=str(i)))
    assert len(manager.recoveries) == len(manager.error_tracker.history) == 5
    assert manager.get_recovery_stats()["total_recoveries"] == 50


@pytest.mark.parametrize(
    "strategies",
    [{ErrorType.NETWORK_ERROR: RecoveryStrategy.FALLBACK}, {"network_error": "fallback"}],
    ids=["members", "values"],
)
def test_strategies_are_the_users_to_change(strategies):
    manager, hand = managed(strategies=strategies)
    assert manager.strategies[ErrorType.NETWORK_ERROR] is RecoveryStrategy.FALLBACK
    assert manager.strategies[ErrorType.TIMEOUT] is STRATEGIES[ErrorType.TIMEOUT]
    action = failing(9)
    with pytest.raises(ConnectionError):
        manager.guard("urza")(action)
    assert (action.calls, hand.slept) == (1, [])


def test_threads_lose_no_recovery():
    manager, _ = managed()

    def work(name):
        for _ in range(200):
            manager.handle_error_sync(context(ErrorType.UNKNOWN, layer_name=name), lambda: True)

    threads = [threading.Thread(target=work, args=(str(i),)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = manager.get_recovery_stats()
    assert stats["total_recoveries"] == stats["error_stats"]["total_errors"] == 1600
    assert stats["recovery_success_rate"] == 1.0


def test_the_page_says_what_the_code_does():
    page = (Path(__file__).parents[2] / "docs" / "recovery.md").read_text()
    for kind in ErrorType:
        others = [n for n, m in ErrorType.__members__.items() if m is kind and n != kind.name]
        also = "".join(f" `{name}`" for name in others)
        assert f"| `{kind.name}` |{also} | {STRATEGIES[kind].value} |" in page, kind
    registry = CollectorRegistry()
    ErrorRecoveryManager(registry=registry)
    for metric in registry.collect():
        name = f"{metric.name}_total" if metric.type == "counter" else metric.name
        labels = page.split(f"| `{name}` | ")[1].split("\n")[0]
        assert labels, name
    for topic in TOPICS:
        assert f"`{topic.value}`" in page
