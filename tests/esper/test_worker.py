"""A worker of a queue: a real library, real processes that compile, and a bus."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from esper.contracts import (
    BlueprintChanged,
    BlueprintQuery,
    BlueprintRequest,
    BlueprintState,
    KernelChanged,
    KernelSignature,
    KernelState,
    Topic,
    payload_of,
)
from esper.errors import AccessDeniedError, LeaseLostError, ServiceUnavailableError
from esper.oona import MemoryBroker
from esper.recovery import RetryPolicy
from esper.tezzeret import (
    CompileJob,
    CompilePool,
    compile_blueprint,
    load_blueprint,
    parse_blueprint,
)
from esper.tezzeret.service import QueueWorker, WorkerStatistics, request_of, submitted
from esper.urza import Library
from tests.esper.test_compile_pool import SLOW, _slow
from tests.esper.test_worker_parts import until

SIGNATURE = KernelSignature(input_shape=(3,), output_shape=(4,))
QUICK = RetryPolicy(base_delay=0.02, max_delay=0.2)

LIES = parse_blueprint(
    load_blueprint("low_rank").canonical_json().decode().replace('"zeros"', '"fan_in"'),
    "a blueprint that lies about its birth",
)


def asked(name: str = "low_rank", seed: int = 0, **more) -> BlueprintRequest:
    return request_of(CompileJob(load_blueprint(name), SIGNATURE, {}, seed), **more)


@pytest.fixture(scope="module")
def pool() -> Iterator[CompilePool]:
    """One process, which takes seconds to start."""
    with CompilePool(workers=1, measure=("torch",)) as workers:
        yield workers


@pytest.fixture
def store(tmp_path) -> Iterator[Library]:
    library = Library(tmp_path / "library")
    yield library
    library.close()


class _Wrapped:
    """A library whose calls can be answered otherwise: `answers` has a function for each name."""

    def __init__(self, library) -> None:
        self.library = library
        self.answers: dict[str, Callable] = {}

    def __getattr__(self, name):
        own = getattr(self.library, name)
        instead = self.answers.get(name)
        return own if instead is None else lambda *given, **more: instead(own, *given, **more)


@contextmanager
def working(queue, pool, **options) -> Iterator[QueueWorker]:
    """A worker in a thread of its own, until the block ends."""
    worker = QueueWorker(
        queue, "the-worker", pool=pool, policy=QUICK, **{"grace_seconds": 60.0, **options}
    )
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        yield worker
    finally:
        worker.stop()
        thread.join(120.0)
        assert not thread.is_alive()


def states(library, ids) -> list[BlueprintState]:
    return [library.blueprint(each).state for each in ids]


VALIDATED = BlueprintState.VALIDATED
INVALID = BlueprintState.INVALID
UNVALIDATED = BlueprintState.UNVALIDATED


def test_once_a_worker_compiles_what_waits_fails_what_is_wrong_and_tells_of_it(store, pool, caplog):
    caplog.set_level(logging.INFO, "esper.tezzeret.worker")
    requests = [
        asked(seed=1, tags=["a", "b"]),
        asked(seed=2),
        request_of(CompileJob(LIES, SIGNATURE)),
    ]
    ids = [store.submit(request).blueprint_id for request in requests]
    # No blueprint, though it is JSON: the library does not look into what is submitted.
    other = asked().model_copy(update={"source": '{\n "name": "none"\n}'})
    ids.append(store.submit(other).blueprint_id)
    registry = CollectorRegistry()
    with MemoryBroker() as bus, bus.consumer("test", list(Topic), start="all") as consumer:
        worker = QueueWorker(store, "the-worker", pool=pool, bus=bus, registry=registry)
        done = worker.run(once=True)
        heard = [payload_of(each.message) for each in consumer.receive(100)]
    assert done == WorkerStatistics(
        claimed=4, compiled=2, failed=2, seconds=done.seconds, announced=6
    )
    assert done.seconds > 0.0
    here = [
        compile_blueprint(load_blueprint("low_rank"), SIGNATURE, init_seed=seed) for seed in (1, 2)
    ]
    found = [store.blueprint(each) for each in ids]
    assert [record.state for record in found] == [VALIDATED, VALIDATED, INVALID, INVALID]
    assert [record.kernel_id for record in found[:2]] == [each.kernel_id for each in here]
    assert store.get(here[0].kernel_id).data == here[0].data
    assert store.record(here[0].kernel_id).tags == ("a", "b")
    assert store.record(here[0].kernel_id).state is KernelState.VALIDATED
    assert [m["backend"] for m in store.measurements(here[1].kernel_id)] == ["torch"]
    assert "claims to be born zero" in found[2].reason
    assert "of the library is not a blueprint" in found[3].reason
    kernels = {each.kernel_id for each in heard if isinstance(each, KernelChanged)}
    assert kernels == {each.kernel_id for each in here}
    changes = {each.blueprint_id: each for each in heard if isinstance(each, BlueprintChanged)}
    assert {key: each.after for key, each in changes.items()} == dict(
        zip(ids, [record.state for record in found], strict=True)
    )
    assert changes[ids[0]].kernel_id == here[0].kernel_id
    assert changes[ids[2]].reason == found[2].reason
    assert {(each.worker, each.attempt) for each in changes.values()} == {("the-worker", 1)}
    metrics = generate_latest(registry).decode()
    for line in (
        'esper_worker_blueprints_total{outcome="compiled"} 2.0',
        'esper_worker_blueprints_total{outcome="failed"} 2.0',
        "esper_worker_compile_seconds_count 3.0",
        "esper_worker_waiting 0.0",
        "esper_worker_held 0.0",
    ):
        assert line in metrics
    told = [record for record in caplog.records if "blueprint_id" in record.__dict__]
    assert {record.__dict__["blueprint_id"] for record in told} == set(ids)


def test_a_worker_is_woken_by_the_bus_and_asks_by_itself_without_one(store, pool):
    with MemoryBroker() as bus, working(store, pool, bus=bus) as worker:
        # It has found the queue empty, and waits.
        until(lambda: worker._listener is not None)
        first = store.submit(asked(seed=3))
        bus.publish([submitted(first, "test")])
        until(lambda: states(store, [first.blueprint_id]) == [VALIDATED], 60)
        # Nobody tells of this one.
        second = store.submit(asked(seed=4))
        until(lambda: states(store, [second.blueprint_id]) == [VALIDATED], 60)


def test_a_library_that_goes_away_is_waited_for_and_then_everything_goes_on(store, pool):
    library = _Wrapped(store)
    away = threading.Event()

    def unless_away(call, *given, **more):
        if away.is_set():
            raise ServiceUnavailableError("no route to the library")
        return call(*given, **more)

    def put_once(call, *given, **more):
        # It goes away when the first kernel comes.
        away.set()
        library.answers["put"] = unless_away
        return unless_away(call, *given, **more)

    library.answers = dict.fromkeys(
        ("claim", "renew", "complete", "fail", "give_back", "put"), unless_away
    )
    library.answers["put"] = put_once
    ids = [store.submit(asked(seed=seed)).blueprint_id for seed in range(3)]
    with working(library, pool, lease_seconds=0.6) as worker:
        until(away.is_set, 60)
        # Longer than the lease: nobody else has claimed it meanwhile.
        time.sleep(1.0)
        assert VALIDATED not in states(store, ids)
        away.clear()
        until(lambda: states(store, ids) == [VALIDATED] * 3, 60)
        # And when nothing is held, too.
        away.set()
        count = worker.statistics().library_away
        until(lambda: worker.statistics().library_away > count + 2, 60)
        away.clear()
        later = store.submit(asked(seed=9)).blueprint_id
        until(lambda: states(store, [later]) == [VALIDATED], 60)
    assert worker.statistics().compiled == 4
    assert worker.statistics().lost == 0


def test_a_bus_that_is_away_stops_nothing_and_what_is_told_is_kept_for_it(store, pool):
    bus = MemoryBroker()
    wrapped = _Wrapped(bus)

    def away(*_, **__):
        raise ServiceUnavailableError("no route to the bus")

    wrapped.answers = {"publish": away, "consumer": away}
    ids = [store.submit(asked(seed=seed)).blueprint_id for seed in range(2)]
    with bus.consumer("test", list(Topic), start="all") as consumer:
        with working(store, pool, bus=wrapped) as worker:
            until(lambda: states(store, ids) == [VALIDATED] * 2, 60)
            until(lambda: worker.statistics().bus_away > 2)
            assert not consumer.receive(100)
            wrapped.answers = {}
            until(lambda: worker.statistics().announced == 4)
        assert len(consumer.receive(100)) == 4
    assert worker.statistics().unannounced == 0


def test_a_lease_is_renewed_while_its_blueprint_is_compiled_however_long(tmp_path, pool):
    now, lease = [1e9], 0.6
    store = Library(tmp_path / "library", clock=lambda: now[0])
    library, renewed = _Wrapped(store), []

    def renew(call, claim):
        done = call(claim)
        renewed.append(claim)
        return done

    library.answers["renew"] = renew
    ids = [store.submit(request_of(SLOW)).blueprint_id]
    with working(library, pool, lease_seconds=lease):
        until(lambda: states(store, ids) == [BlueprintState.COMPILING], 60)
        begun = now[0]
        while states(store, ids) != [VALIDATED]:
            # The second renewal from here begins after the clock went on.
            count = len(renewed)
            until(lambda c=count: len(renewed) > c + 1 or states(store, ids) == [VALIDATED], 60)
            now[0] += lease * 0.9
            assert not store.claim("another", lease_seconds=lease)
    assert now[0] > begun + lease
    assert store.blueprint(ids[0]).attempts == 1
    store.close()


def test_a_blueprint_that_two_workers_have_compiled_is_one_kernel_and_no_error(store, pool):
    library, taken = _Wrapped(store), []

    def claim_twice(call, worker, *, most, lease_seconds):
        claims = call(worker, most=most, lease_seconds=0.01)
        if claims and not taken:
            # Before it has begun, another worker finds its lease run out.
            until(lambda: taken.extend(store.claim("another", lease_seconds=60.0)) or taken)
            kernel_id = store.put(compile_blueprint(load_blueprint("low_rank"), SIGNATURE))
            store.complete(taken[0], kernel_id)
        return claims

    library.answers["claim"] = claim_twice
    blueprint_id = store.submit(asked()).blueprint_id
    # Renewed before it is done, or completed after it is lost: either way.
    done = QueueWorker(library, "the-worker", pool=pool, lease_seconds=60.0).run(once=True)
    assert (done.claimed, done.failed, done.left) == (1, 0, 0)
    assert done.compiled + done.lost == 1
    assert states(store, [blueprint_id]) == [VALIDATED]
    assert len(store.find()) == 1


def test_a_claim_that_is_lost_is_left_to_who_has_it(store, pool):
    library = _Wrapped(store)

    def lost(call, claim, *_, **__):
        raise LeaseLostError("another worker has it")

    library.answers["complete"] = lost
    blueprint_id = store.submit(asked()).blueprint_id
    worker = QueueWorker(library, "the-worker", pool=pool, lease_seconds=30.0)
    ended = threading.Timer(0, lambda: until(lambda: worker.statistics().lost, 60) or worker.stop())
    ended.start()
    done = worker.run()
    ended.join()
    assert (done.claimed, done.lost, done.failed) == (1, 1, 0)
    assert states(store, [blueprint_id]) == [BlueprintState.COMPILING]


def test_who_is_told_to_end_finishes_what_is_begun_and_gives_back_the_rest(store, pool):
    ids = [store.submit(request_of(_slow(71))).blueprint_id]
    # Of another program than what was compiled last, which would come first.
    ids += [store.submit(asked("gated", seed)).blueprint_id for seed in range(3)]
    with working(store, pool) as worker:
        until(lambda: worker.statistics().held == 4, 60)
        time.sleep(1.0)
    done = worker.statistics()
    assert (done.compiled, done.given_back) == (1, 3)
    assert states(store, ids) == [VALIDATED] + [UNVALIDATED] * 3
    assert {store.blueprint(each).attempts for each in ids[1:]} == {0}


def test_who_is_told_to_end_twice_gives_back_what_is_begun_too(store, pool):
    blueprint_id = store.submit(request_of(_slow(72))).blueprint_id
    with working(store, pool, grace_seconds=3600.0) as worker:
        until(lambda: worker.statistics().held == 1, 60)
        worker.stop()
        until(lambda: worker.stopping)
    assert worker.statistics().given_back == 1
    record = store.blueprint(blueprint_id)
    assert (record.state, record.attempts) == (UNVALIDATED, 0)


def test_what_was_tried_before_is_compiled_alone(store, pool):
    ids = [store.submit(asked(seed=seed)).blueprint_id for seed in range(4)]
    store.claim("one that dies", most=2, lease_seconds=0.01)
    time.sleep(0.05)
    library, held = _Wrapped(store), []

    def claim(call, *given, **more):
        claims = call(*given, **more)
        held.append([each.attempt for each in claims])
        return claims

    library.answers["claim"] = claim
    done = QueueWorker(library, "the-worker", pool=pool).run(once=True)
    assert states(store, ids) == [VALIDATED] * 4
    assert [store.blueprint(each).attempts for each in ids] == [2, 2, 1, 1]
    assert (done.compiled, done.claimed) == (4, 9)
    assert held == [[2, 2, 1, 1], [2, 1, 1], [1, 1], []]


def test_a_worker_that_is_refused_ends_with_an_error(store, pool):
    library = _Wrapped(store)

    def refuse(*_, **__):
        raise AccessDeniedError("the token has no write scope")

    library.answers["claim"] = refuse
    with pytest.raises(AccessDeniedError, match="no write scope"):
        QueueWorker(library, "the-worker", pool=pool).run()
    # What is claimed by then is given back where that can be.
    library.answers = {"complete": refuse}
    blueprint_id = store.submit(asked()).blueprint_id
    with pytest.raises(AccessDeniedError, match="no write scope"):
        QueueWorker(library, "the-worker", pool=pool).run()
    assert not store.blueprints(BlueprintQuery(states=(VALIDATED,))).items
    assert states(store, [blueprint_id]) != [INVALID]


def test_a_worker_that_is_to_end_when_all_is_done_does_not_wait_for_a_library(store, pool):
    library = _Wrapped(store)

    def away(*_, **__):
        raise ServiceUnavailableError("no route to the library")

    library.answers["claim"] = away
    with pytest.raises(ServiceUnavailableError, match="no route"):
        QueueWorker(library, "the-worker", pool=pool).run(once=True)


@pytest.mark.parametrize(
    "options", [{"lease_seconds": 0.0}, {"grace_seconds": -1.0}, {"patience_seconds": -1.0}]
)
def test_what_a_worker_may_not_be(store, pool, options):
    with pytest.raises(ValueError, match=rf"{next(iter(options))} of a worker must be at least"):
        QueueWorker(store, "the-worker", pool=pool, **options)
