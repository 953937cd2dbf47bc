"""Somebody is told: of devices, of kernels that keep failing, and where nothing helps."""

import asyncio
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.oona import InProcessBus, Topic
from esper.recovery import ErrorType
from tests.esper.recovery_clock import context, managed


def test_somebody_is_told_of_devices_of_bad_kernels_and_of_what_does_not_recover():
    told = []
    manager, _ = managed(on_escalate=told.append)
    assert manager.handle_error_sync(context(ErrorType.DEVICE_ERROR), lambda: True)
    assert [c.error_type for c in told] == [ErrorType.DEVICE_ERROR]
    for _ in range(5):
        manager.handle_error_sync(
            context(ErrorType.KERNEL_EXECUTION, kernel_id="k" * 64), lambda: True
        )
    assert len(told) == 2  # at its third error, and not at each one after it
    for _ in range(8):
        manager.handle_error_sync(context(ErrorType.UNKNOWN, layer_name="7"))
    # After three that failed; the fourth is told of, and the count begins anew.
    assert [c.layer_name for c in told[2:]] == ["7", "7"]
    assert manager.get_recovery_stats()["escalations"] == 4


BAD = ErrorType.KERNEL_EXECUTION


def only_recorded(manager, where):
    manager.record_error(where)


def handled(manager, where):
    manager.handle_error_sync(where, lambda: True)


def awaited(manager, where):
    asyncio.run(manager.handle_error(where, lambda: True))


def recovered(manager, where):
    manager.recover_from_error_sync(FloatingPointError(), where, lambda: True)


def while_another_recovers(manager, where):
    manager.handle_error_sync(
        context(BAD), lambda: manager.handle_error_sync(where, lambda: True) or True
    )


WAYS = [only_recorded, handled, awaited, recovered, while_another_recovers]


@given(ways=st.lists(st.sampled_from(WAYS), max_size=8), after=st.integers(1, 4))
def test_a_bad_kernel_is_told_of_once_however_its_errors_are_recorded(ways, after):
    told = []
    manager, _ = managed(on_escalate=told.append, problematic_after=after)
    for made, way in enumerate(ways, 1):
        way(manager, context(BAD, kernel_id="k" * 64))
        manager.record_error(context(BAD))
        assert [c.kernel_id for c in told] == ["k" * 64] * (made >= after)
        assert manager.get_recovery_stats()["escalations"] == len(told)
    manager.error_tracker.forget_kernel("k" * 64)
    for _ in range(after):
        manager.record_error(context(BAD, kernel_id="k" * 64))
    assert len(told) == 1 + (len(ways) >= after)
    last = manager.recoveries[-1]
    assert (last.tried, last.escalated) == (False, True)
    assert last.detail == f"escalated: kernel kkkkkkkkkkkk failed {after} times"


class Together(InProcessBus):
    """Holds those who publish an error until there are as many as are waited for."""

    barrier = threading.Barrier(1)

    def publish(self, topic, payload):
        if topic is Topic.ERROR:
            self.barrier.wait()
        return super().publish(topic, payload)


def test_a_bad_kernel_whose_errors_are_counted_at_once_is_told_of_once():
    told, bus = [], Together()
    manager, _ = managed(on_escalate=told.append, bus=bus)
    manager.record_error(context(BAD, kernel_id="k"))
    bus.barrier = threading.Barrier(8)
    threads = [
        threading.Thread(
            target=handled, args=(manager, context(BAD, layer_name=str(i), kernel_id="k"))
        )
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [c.kernel_id for c in told] == ["k"]
    assert manager.get_recovery_stats()["escalations"] == 1


@pytest.mark.parametrize("after", [1, 100])
def test_every_number_of_errors_that_may_be_asked_for_is_reached(after):
    told = []
    manager, _ = managed(on_escalate=told.append, problematic_after=after)
    for made in range(1, 150):
        manager.record_error(context(BAD, kernel_id="k"))
        assert len(told) == (made >= after)


def test_a_bad_kernel_that_nobody_could_be_told_of_is_told_of_at_its_next_error():
    told = []

    def tell(where):
        told.append(where)
        if len(told) == 1:
            raise ConnectionError("away")
        if len(told) == 2:
            raise KeyboardInterrupt

    manager, _ = managed(on_escalate=tell)
    for made in range(1, 8):
        if made == 4:
            with pytest.raises(KeyboardInterrupt):
                manager.record_error(context(BAD, kernel_id="k"))
        else:
            manager.record_error(context(BAD, kernel_id="k"))
    assert len(told) == 3  # at the third, fourth and fifth error
    assert [r.detail.partition(", and ")[2] for r in manager.recoveries] == [
        "on_escalate raised ConnectionError: away", ""
    ]  # fmt: skip


def test_what_tells_in_an_event_loop_is_refused_where_an_error_is_only_recorded():
    told = []

    async def tell(where):
        told.append(where)

    manager, _ = managed(on_escalate=tell, problematic_after=1)
    manager.record_error(context(BAD, kernel_id="k"))
    assert "give a plain function, or await the async form" in manager.recoveries[-1].detail
    awaited(manager, context(BAD, kernel_id="k"))
    assert len(told) == 1


def test_whoever_is_told_and_raises_stops_nothing():
    def tell(_):
        raise ConnectionError("away")

    manager, _ = managed(on_escalate=tell)
    assert manager.handle_error_sync(context(ErrorType.DEVICE_ERROR), lambda: True)
    assert "on_escalate raised ConnectionError: away" in manager.recoveries[-1].detail
    alone, _ = managed()
    alone.handle_error_sync(context(ErrorType.DEVICE_ERROR))
    assert "there is no on_escalate to tell" in alone.recoveries[-1].detail
