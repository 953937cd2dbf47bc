"""The health score by hand, and when somebody has to step in."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from esper.errors import InputError
from esper.oona import InProcessBus, Topic
from esper.recovery import ErrorRecoveryManager, ErrorType, HealthMonitor


def test_the_score_by_hand():
    monitor = HealthMonitor()
    assert monitor.compute_health_score() == 1.0
    monitor.update_metrics(errors=1, total=10, latency_ms=2.0, memory_percent=45.0)
    monitor.update_metrics(errors=0, total=0, latency_ms=4.0, memory_percent=45.0)
    # Errors 0.05, latency 3/10, memory 45/90: 0.5·0.95 + 0.3·0.7 + 0.2·0.5
    assert monitor.compute_health_score() == pytest.approx(0.785)
    monitor.update_metrics(errors=5, total=5, latency_ms=94.0, memory_percent=90.0)
    # Errors 1.1/3, latency 100/30 and so 0, memory 60/90
    assert monitor.compute_health_score() == pytest.approx(0.5 * (1 - 1.1 / 3) + 0.2 / 3)


measurements = st.lists(
    st.tuples(
        st.integers(0, 20), st.integers(0, 20), st.floats(0.0, 100.0), st.floats(0.0, 100.0)
    ).map(lambda m: (min(m[0], m[1]), *m[1:])),
    max_size=30,
)


@given(seen=measurements, window=st.integers(1, 10))
def test_the_score_is_of_the_window_and_within_its_bounds(seen, window):
    monitor, last = HealthMonitor(window), HealthMonitor(window)
    for measured in seen:
        monitor.update_metrics(*measured)
    for measured in seen[-window:]:
        last.update_metrics(*measured)
    assert monitor.compute_health_score() == pytest.approx(last.compute_health_score())
    assert 0.0 <= monitor.compute_health_score() <= 1.0


@pytest.mark.parametrize(
    ("measured", "reason"),
    [
        ((0, 10, 1.0, 10.0), None),
        ((1, 10, 10.0, 90.0), None),
        ((2, 10, 1.0, 10.0), "high error rate: 20.00%"),
        ((0, 10, 12.0, 10.0), "high latency: 12.0 ms, above 10.0 ms"),
        ((0, 10, 1.0, 95.0), "high memory usage: 95.0 %"),
        ((10, 10, 50.0, 99.0), "critical health score: 0.00"),
    ],
)
def test_when_to_step_in_and_why(measured, reason):
    monitor = HealthMonitor()
    assert monitor.should_intervene() == (False, "nothing was measured yet")
    monitor.update_metrics(*measured)
    assert monitor.should_intervene() == ((False, "healthy") if reason is None else (True, reason))


def test_a_latency_by_what_this_machine_does():
    """Ten times the first median: no matter how fast the machine is."""
    monitor = HealthMonitor(latency_factor=10.0)
    for _ in range(20):
        monitor.update_metrics(0, 1, 0.05, 10.0)
    assert monitor.latency_threshold_ms == pytest.approx(0.5)
    monitor.update_metrics(0, 1, 0.4, 10.0)
    assert not monitor.should_intervene().should_intervene
    monitor.update_metrics(0, 1, 0.6, 10.0)
    assert monitor.should_intervene().reason == "high latency: 0.6 ms, above 0.5 ms"


def test_what_is_out_of_bounds_goes_to_the_manager():
    bus, registry = InProcessBus(), CollectorRegistry()
    heard = bus.subscribe(Topic.HEALTH, Topic.ERROR)
    manager = ErrorRecoveryManager(bus=bus, registry=registry)
    monitor = HealthMonitor(recovery=manager)
    called = []
    monitor.update_metrics(0, 1, 1.0, 10.0)
    assert monitor.check_system_health_sync(lambda: called.append(1)).reason == "healthy"
    assert not called
    monitor.update_metrics(0, 1, 1.0, 99.0)
    verdict = asyncio.run(monitor.check_system_health(lambda: called.append(1)))
    assert verdict.should_intervene
    assert called == [1]
    (error,) = manager.error_tracker.history
    assert (error.error_type, error.component) == (ErrorType.OUT_OF_MEMORY, "system")
    assert error.message == "high memory usage: 99.0 %"
    assert [m.topic for m in heard.drain()] == [Topic.HEALTH, Topic.HEALTH, Topic.ERROR]
    score = monitor.stats()["health_score"]
    assert registry.get_sample_value("esper_health_score") == pytest.approx(score)
    monitor.update_metrics(5, 5, 1.0, 10.0)
    assert monitor.check_system_health_sync().reason == "high error rate: 100.00%"
    assert manager.error_tracker.history[-1].error_type is ErrorType.UNKNOWN
    assert manager.recoveries[-1].recovered is False


@pytest.mark.parametrize(
    "measured",
    [(-1, 1, 1.0, 1.0), (2, 1, 1.0, 1.0), (0, 1, float("nan"), 1.0), (0, 1, -1.0, 1.0),
     (0, 1, 1.0, 101.0), (0, 1, float("inf"), 1.0)],
)  # fmt: skip
def test_numbers_that_cannot_be_are_refused(measured):
    monitor = HealthMonitor()
    with pytest.raises(InputError, match="a health monitor takes errors from 0 to total"):
        monitor.update_metrics(*measured)
    assert monitor.compute_health_score() == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"window_size": 0},
            "window_size of a health monitor must be a whole number of at least 1",
        ),
        ({"window_size": 2.5}, "must be a whole number of at least 1, got 2.5"),
        ({"error_threshold": 0.0}, "error_threshold of a health monitor must be a number above 0"),
        (
            {"latency_threshold_ms": 0.0},
            "latency_threshold_ms .* must be a number above 0, got 0.0",
        ),
        ({"memory_threshold_percent": -1}, "memory_threshold_percent .* a number above 0, got -1"),
        ({"latency_factor": -1.0}, "latency_factor .* must be a number above 0, got -1.0"),
        ({"latency_factor": 0.0}, "latency_factor .* must be a number above 0, got 0.0"),
        ({"latency_factor": float("nan")}, "latency_factor .* must be a number above 0, got nan"),
        ({"weights": (0.5, 0.5, 0.5)}, "takes three weights from 0 that add up to 1, got"),
        ({"weights": (0.5, 0.5)}, "takes three weights from 0 that add up to 1, got"),
        ({"weights": (1.5, -0.5, 0.0)}, "takes three weights from 0 that add up to 1, got"),
    ],
)
def test_monitors_that_cannot_be_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        HealthMonitor(**options)


def test_a_threshold_that_nothing_exceeds():
    monitor = HealthMonitor(latency_threshold_ms=float("inf"))
    monitor.update_metrics(0, 1, 1e9, 45.0)
    assert monitor.should_intervene() == (False, "healthy")
    assert monitor.compute_health_score() == pytest.approx(0.9)
