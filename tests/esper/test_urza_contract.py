"""What every library does, wherever its database and its files are."""

import json
import threading

import pytest
from pydantic import ValidationError

from esper.artifacts import rewrite_artifact
from esper.contracts import (
    MOST_TAGS,
    BlueprintQuery,
    BlueprintState,
    KernelOutcome,
    KernelQuery,
    KernelState,
    KernelUsage,
    RetentionPolicy,
)
from esper.errors import (
    ArtifactError,
    BlueprintNotFoundError,
    ConflictError,
    IllegalTransitionError,
    InputError,
    KernelNotFoundError,
    LeaseLostError,
)
from esper.urza import KernelLibrary
from esper.urza._cursors import write_cursor
from tests.esper.cache_kernels import variant
from tests.esper.urza_kinds import (
    KINDS,
    OTHER_SIGNATURE,
    SIGNATURE,
    blueprint_request,
    make_place,
    outcome,
    stranger,
)

NO_ID = "ab" * 32
B, K = BlueprintState, KernelState


@pytest.fixture(params=KINDS)
def library_kind(request):
    return request.param


@pytest.fixture
def place(library_kind, tmp_path, request):
    return make_place(library_kind, tmp_path, request)


@pytest.fixture
def library(place):
    opened = place.open()
    yield opened
    opened.close()


def ids(page):
    return [record.kernel_id for record in page.items]


# Kernels.


def test_it_has_the_whole_interface(library):
    assert isinstance(library, KernelLibrary)


def test_what_is_put_is_found_got_and_removed(library, place, artifact):
    kernel_id = library.put(artifact, tags=("b", "a", "b"))
    record = library.record(kernel_id)
    assert (record.kernel_id, record.signature) == (artifact.kernel_id, str(SIGNATURE))
    assert (record.tags, record.state) == (("a", "b"), K.VALIDATED)
    assert record.platforms == ("cpu", "cuda")
    assert record.created == place.clock.seconds
    assert library.find() == library.find(SIGNATURE) == [record]
    assert library.find(OTHER_SIGNATURE) == []
    assert library.full_id(kernel_id[:7]) == kernel_id
    assert library.get(kernel_id).data == library.read_bytes(kernel_id) == artifact.data
    other = place.open()
    assert other.find() == [record]
    other.close()
    library.remove(kernel_id)
    library.remove(kernel_id)
    assert library.find() == []
    for ask in (library.get, library.read_bytes, library.iter_bytes, library.record):
        with pytest.raises(KernelNotFoundError, match=f"holds no kernel {kernel_id[:12]}"):
            ask(kernel_id)


def test_what_is_no_id_is_not_there(library, artifact):
    library.put(artifact)
    asks = (library.get, library.read_bytes, library.iter_bytes, library.record)
    for text in ("", "abc", "../../secret", "AB" * 32, "ab" * 33, "ü" * 64):
        for ask in asks:
            with pytest.raises(KernelNotFoundError, match="an id is 64 hexadecimal digits"):
                ask(text)
        library.remove(text)
    assert len(library.find()) == 1


def test_an_id_is_completed_where_it_is_the_only_one(library, artifact):
    made = sorted(library.put(variant(artifact, i)) for i in range(17))
    first = {made_id[0] for made_id in made}
    shared = next(c for c in first if sum(m[0] == c for m in made) > 1)
    with pytest.raises(InputError, match=f"several kernels begin with '{shared}'.*give more"):
        library.full_id(shared)
    assert [library.full_id(m[:16]) for m in made] == made
    for text in ("%", "_" * 64, made[0][:8].upper() + "G", NO_ID):
        with pytest.raises(KernelNotFoundError):
            library.full_id(text)


def test_a_file_is_read_from_any_byte_on(library, artifact):
    kernel_id = library.put(artifact)
    size = len(artifact.data)
    for start in (0, 1, size // 2, size - 1, size):
        assert b"".join(library.iter_bytes(kernel_id, start)) == artifact.data[start:]
    for start in (-1, size + 1):
        with pytest.raises(InputError, match=f"has {size} bytes and cannot be read from byte"):
            library.iter_bytes(kernel_id, start)


def test_a_kernel_that_nobody_here_trusts_is_tested_first(library, artifact):
    unknown = stranger(artifact)
    kernel_id = library.put(unknown)
    assert library.record(kernel_id).state is K.TESTING
    kept = library.put(variant(artifact, 1), state=K.DEPLOYED)
    assert library.record(kept).state is K.DEPLOYED
    # Who does not trust it changes nothing by putting it again; who does has looked at it.
    library.put(unknown)
    assert library.record(kernel_id).state is K.TESTING
    for _ in range(2):
        tested = library.put(variant(artifact, 2), state=K.TESTING)
        assert library.record(tested).state is K.TESTING
    library.put(variant(artifact, 2))
    assert library.record(tested).state is K.VALIDATED
    library.put(variant(artifact, 1))
    assert library.record(kept).state is K.DEPLOYED


def test_states_follow_one_another_as_the_table_says(library, artifact):
    kernel_id = library.put(artifact)
    assert library.set_state(kernel_id, K.DEPLOYED).state is K.DEPLOYED
    assert library.set_state(kernel_id, K.DEPLOYED, expected=K.VALIDATED).state is K.DEPLOYED
    with pytest.raises(
        IllegalTransitionError,
        match="is deployed and cannot become testing: it may become validated, deprecated, invalid",
    ):
        library.set_state(kernel_id, K.TESTING)
    with pytest.raises(ConflictError, match="is deployed, and was to become invalid from testing"):
        library.set_state(kernel_id, K.INVALID, expected=K.TESTING)
    library.set_state(kernel_id, K.DEPRECATED, expected=K.DEPLOYED, reason="slow\x00")
    assert library.find() == []
    assert library.search(KernelQuery()).items == ()
    assert [r.kernel_id for r in library.find(states=[K.DEPRECATED])] == [kernel_id]
    assert ids(library.search(KernelQuery(states=(K.DEPRECATED, K.INVALID)))) == [kernel_id]
    assert library.get(kernel_id).kernel_id == kernel_id
    library.set_state(kernel_id, K.INVALID)
    with pytest.raises(IllegalTransitionError, match="is invalid.*nothing follows"):
        library.set_state(kernel_id, K.VALIDATED)
    with pytest.raises(KernelNotFoundError):
        library.set_state(NO_ID, K.INVALID)


def test_of_many_who_move_a_kernel_from_one_state_one_succeeds(library, artifact):
    kernel_id = library.put(artifact)
    done, refused = [], []

    def move(state):
        try:
            done.append(library.set_state(kernel_id, state, expected=K.VALIDATED).state)
        except ConflictError:
            refused.append(state)

    threads = [threading.Thread(target=move, args=[s]) for s in (K.DEPLOYED, K.DEPRECATED) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Those who wanted what it has become are told so; the others are refused.
    assert len(set(done)) == 1
    assert (len(done), len(refused)) == (4, 4)
    assert library.record(kernel_id).state is done[0]


def test_tags(library, artifact):
    kernel_id = library.put(artifact, tags=["one"])
    library.put(artifact, tags=["two"])
    assert library.record(kernel_id).tags == ("one", "two")
    assert library.tag(kernel_id, add=["three"], remove=["one", "none"]).tags == ("three", "two")
    assert library.tag(kernel_id, add=["x"], remove=["x"]).tags == ("three", "two", "x")
    for tags in ([""], ["a\nb"], ["a" * 65], [7]):
        with pytest.raises(InputError, match="is no tag: expected 1 to 64 characters"):
            library.tag(kernel_id, add=tags)
    with pytest.raises(InputError, match="tags are several texts, got the text 'abc'"):
        library.tag(kernel_id, add="abc")
    with pytest.raises(InputError, match=f"would have {MOST_TAGS + 3} tags, and may have"):
        library.tag(kernel_id, add=[str(i) for i in range(MOST_TAGS)])
    assert library.record(kernel_id).tags == ("three", "two", "x")
    with pytest.raises(KernelNotFoundError):
        library.tag(NO_ID, add=["a"])
    # With the kernel its tags are gone.
    library.remove(kernel_id)
    library.put(artifact)
    assert library.record(kernel_id).tags == ()


def test_what_was_measured_replaces_what_was_measured_before(library, artifact):
    kernel_id = library.put(artifact)
    first = {"kernel_id": kernel_id, "backend": "jax", "device": "cpu", "batch": 1, "us": 2.5}
    library.record_measurement(first)
    library.record_measurement({**first, "us": 2.0})
    library.record_measurement({**first, "batch": 8})
    found = library.measurements(kernel_id)
    assert found == [{**first, "us": 2.0}, {**first, "batch": 8}]
    assert library.measurements(NO_ID) == []
    with pytest.raises(InputError, match="a measurement names .*: device is missing"):
        library.record_measurement({"kernel_id": kernel_id, "backend": "jax", "batch": 1})
    for wrong in (
        {"kernel_id": [1]}, {"backend": "x" * 100_000}, {"device": ""}, {"batch": "many"},
        {"batch": 10**30},
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"{next(iter(wrong))} is "):
            library.record_measurement({**first, **wrong})
    assert library.measurements(kernel_id) == found


# Searching.


@pytest.fixture
def many(library, place, artifact):
    """Twelve kernels that differ in all that is searched for."""
    made = []
    for number in range(12):
        kernel = variant(artifact, number)
        if number % 3 == 0:
            kernel = rewrite_artifact(kernel, ancestor=artifact.kernel_id)
        if number % 4 == 0:
            kernel = rewrite_artifact(kernel, blueprint_name="B" if number else "a")
        place.clock.seconds += 1.0
        made.append(library.put(kernel, tags=[f"t{number % 2}", f"u{number % 3}"]))
    library.record_outcomes([outcome(made[i], gain=i / 4 - 1.0) for i in range(6)])
    return made


def test_a_search_by_pages_finds_each_once(library, many):
    records = {record.kernel_id: record for record in library.find()}
    gains = {kernel_id: index for index, kernel_id in enumerate(many[:6])}
    orders = {
        "name": lambda r: (r.blueprint, r.init_seed, r.kernel_id),
        "created": lambda r: many.index(r.kernel_id) * -1,
        "flops": lambda r: (r.flops, r.kernel_id),
        "parameters": lambda r: (r.parameter_count, r.kernel_id),
        "gain": lambda r: (-gains.get(r.kernel_id, -1), [-ord(c) for c in r.kernel_id]),
    }
    for order, key in orders.items():
        expected = [r.kernel_id for r in sorted(records.values(), key=key)]
        assert ids(library.search(KernelQuery(order=order))) == expected, order
        for limit in (1, 5, 12):
            query, found = KernelQuery(order=order, limit=limit), []
            while True:
                page = library.search(query)
                assert len(page.items) <= limit
                found += ids(page)
                if page.next_cursor is None:
                    break
                query = query.model_copy(update={"cursor": page.next_cursor})
            assert found == expected, (order, limit)


SEARCHES = [
    ({"signature": SIGNATURE}, range(12)),
    ({"signature": OTHER_SIGNATURE}, ()),
    ({"blueprint": "B"}, (4, 8)),
    ({"blueprint": "b"}, ()),
    ({"recipe": "0" * 64}, ()),
    ({"tags": ("t1",)}, (1, 3, 5, 7, 9, 11)),
    ({"tags": ("t1", "u0")}, (3, 9)),
    ({"tags": ("t1", "T1")}, ()),
    ({"platform": "cuda"}, range(12)),
    ({"platform": "CUDA"}, ()),
    ({"platform": "cpu,cuda"}, range(12)),
    ({"platform": "tpu"}, ()),
    ({"max_flops": 0}, ()),
    ({"max_parameters": 1 << 62, "max_bytes": 1 << 62, "max_flops": 1 << 62}, range(12)),
    ({"max_bytes": 10}, ()),
    ({"min_gain": 0.0}, (4, 5)),
    ({"min_gain": -9.0}, range(6)),
    ({"states": (K.TESTING,)}, ()),
]


def test_a_search_finds_what_it_was_asked_for(library, many):
    for query, expected in SEARCHES:
        found = ids(library.search(KernelQuery(**query)))
        assert sorted(found) == sorted(many[i] for i in expected), query


def test_a_search_by_ancestor(library, many, artifact):
    found = ids(library.search(KernelQuery(ancestor=artifact.kernel_id)))
    assert sorted(found) == sorted(many[i] for i in (0, 3, 6, 9))


def test_what_is_put_and_removed_between_pages_disturbs_nothing(library, artifact):
    made = {variant(artifact, i).kernel_id: i for i in range(8)}
    for number in range(8):
        library.put(variant(artifact, number))
    first = library.search(KernelQuery(limit=3, order="created"))
    library.remove(ids(first)[0])
    library.put(variant(artifact, 99))
    rest = library.search(KernelQuery(limit=100, order="created", cursor=first.next_cursor))
    found = [*ids(first), *ids(rest)]
    assert len(found) == len(set(found))
    assert set(made) <= set(found)


def test_cursors_that_are_none(library, many):
    cursor = library.search(KernelQuery(limit=2)).next_cursor
    with pytest.raises(InputError, match="the cursor is that of another query; ask without"):
        library.search(KernelQuery(limit=2, order="flops", cursor=cursor))
    assert len(library.search(KernelQuery(limit=3, cursor=cursor)).items) == 3
    for text in ("x", "!", "WyJhIl0", cursor[:-4], "W10", "bnVsbA", "eyJhIjoxfQ"):
        with pytest.raises(InputError, match="cursor"):
            library.search(KernelQuery(limit=2, cursor=text))
    for order, values in (("name", ["\ud800", 0, "x"]), ("name", ["x", 10**30, "x"])):
        query = KernelQuery(limit=2, order=order)
        query = query.model_copy(update={"cursor": write_cursor(query, values)})
        with pytest.raises(InputError, match="no cursor of a library's"):
            library.search(query)
    with pytest.raises(ValidationError):
        KernelQuery(limit=2, cursor="")


# Outcomes, usage, references.


def test_usage_is_what_runs_told(library, place, artifact):
    kernel_id = library.put(artifact)
    assert library.usage(kernel_id) == KernelUsage(kernel_id=kernel_id, runs=0, outcomes=0, kept=0)
    told = [outcome(kernel_id, gain, layer=i) for i, gain in enumerate((1.0, 2.0, 4.0, -1.0))]
    place.clock.seconds += 5.0
    library.record_outcomes(told)
    library.record_outcomes([outcome(kernel_id, 3.0, run_id="other", site="ü", at=7.0)])
    found = library.outcomes(kernel_id)
    now = place.clock.seconds
    expected = [o.model_copy(update={"at": o.at or now}) for o in told]
    assert [o for o in found if o.run_id == "run"] == expected
    assert next(o for o in found if o.run_id == "other").site == "ü"
    usage = library.usage(kernel_id)
    assert (usage.runs, usage.outcomes, usage.kept, usage.last_used) == (2, 5, 4, now)
    # Student's t at four degrees of freedom, and s / √5.
    assert usage.mean_gain == pytest.approx(1.8)
    assert usage.low == pytest.approx(1.8 - 2.7764451 * 1.9235384 / 5**0.5)
    assert usage.high == pytest.approx(1.8 + 2.7764451 * 1.9235384 / 5**0.5)
    # One that is told again replaces the other.
    library.record_outcomes([outcome(kernel_id, 6.0, layer=3), outcome(kernel_id, 5.0, layer=3)])
    assert library.usage(kernel_id).outcomes == 5
    assert library.usage(kernel_id).mean_gain == pytest.approx(3.0)
    library.record_outcomes([])
    # What is known of a kernel outlives it.
    library.remove(kernel_id)
    library.put(artifact)
    assert library.usage(kernel_id).mean_gain == pytest.approx(3.0)
    assert ids(library.search(KernelQuery(min_gain=2.9))) == [kernel_id]


def test_an_interval_takes_two_outcomes(library, artifact):
    kernel_id = library.put(artifact)
    library.record_outcomes([outcome(kernel_id, 1.0)])
    assert (library.usage(kernel_id).mean_gain, library.usage(kernel_id).low) == (1.0, None)
    library.record_outcomes([outcome(kernel_id, 1.0, seed=1)])
    assert (library.usage(kernel_id).low, library.usage(kernel_id).high) == (1.0, 1.0)
    assert library.usage(NO_ID).outcomes == 0
    assert library.outcomes(NO_ID) == []


def test_outcomes_are_kept_as_they_were_told(library, artifact):
    kernel_id = library.put(artifact)
    told = outcome(kernel_id, 1e-300, low=None, high=1e300, at=1.5, site="layers.0")
    library.record_outcomes([told])
    (found,) = library.outcomes(kernel_id)
    assert found == told
    assert isinstance(found, KernelOutcome)


def test_runs_refer_to_kernels(library, artifact):
    made = [library.put(variant(artifact, i)) for i in range(3)]
    library.refer("one", made[:2])
    library.refer("one", iter(made[:2]))
    library.refer("two", made[1:])
    assert [library.references(m) for m in made] == [["one"], ["one", "two"], ["two"]]
    assert library.usage(made[1]).references == 2
    with pytest.raises(KernelNotFoundError, match="run three cannot refer to kernel abababababab"):
        library.refer("three", [made[0], NO_ID])
    assert library.references(made[0]) == ["one"]
    for name in ("", "a\nb", "a" * 201):
        with pytest.raises(InputError, match="is no name of a run"):
            library.refer(name, made)
    library.release_run("one")
    library.release_run("one")
    assert [library.references(m) for m in made] == [[], ["two"], ["two"]]


# Retention.

ALL = (K.TESTING, K.VALIDATED, K.DEPLOYED, K.DEPRECATED, K.INVALID)


def test_what_is_not_needed_goes(library, place, artifact):
    made = [library.put(variant(artifact, i)) for i in range(6)]
    library.set_state(made[0], K.INVALID)
    library.set_state(made[1], K.DEPRECATED)
    library.set_state(made[2], K.DEPRECATED)
    library.set_state(made[3], K.INVALID)
    library.refer("run", [made[2]])
    place.clock.seconds += 7_200.0
    # It was completed to this one before, and waits to be compiled again.
    library.submit(blueprint_request())
    (claim,) = library.claim("worker")
    library.complete(claim, made[3])
    library.set_blueprint_state(claim.blueprint.blueprint_id, B.UNVALIDATED)
    dry = library.collect_garbage(RetentionPolicy(dry_run=True))
    assert sorted(dry.removed) == sorted(made[:2])
    assert len(library.find(states=ALL)) == 6
    report = library.collect_garbage(RetentionPolicy())
    assert report == dry.model_copy(update={"dry_run": False})
    assert (report.referenced, report.young, report.kernels_left) == (2, 0, 4)
    assert sorted(r.kernel_id for r in library.find(states=ALL)) == sorted(made[2:])
    for gone in made[:2]:
        with pytest.raises(KernelNotFoundError):
            library.get(gone)
    for kept in made[2:]:
        assert library.get(kept).kernel_id == kept
    assert library.collect_garbage(RetentionPolicy()).removed == ()


def test_what_is_young_stays(library, place, artifact):
    kernel_id = library.put(artifact)
    library.set_state(kernel_id, K.INVALID)
    report = library.collect_garbage(RetentionPolicy())
    assert (report.removed, report.young) == ((), 1)
    place.clock.seconds += 3_601.0
    # What a run told of it lately is in use.
    library.record_outcomes([outcome(kernel_id, 1.0)])
    assert library.collect_garbage(RetentionPolicy()).young == 1
    place.clock.seconds += 3_601.0
    assert library.collect_garbage(RetentionPolicy()).removed == (kernel_id,)


def test_what_is_too_old_too_many_or_too_large_goes(library, place, artifact):
    made = []
    for number in range(6):
        made.append(library.put(variant(artifact, number)))
        place.clock.seconds += 10_000.0
    sizes = {r.kernel_id: r.size_bytes for r in library.find()}

    def goes(**limits):
        report = library.collect_garbage(RetentionPolicy(states=ALL, dry_run=True, **limits))
        assert report.kernels_left == 6 - len(report.removed)
        return sorted(made.index(m) for m in report.removed)

    assert goes(max_age_seconds=35_000.0) == [0, 1, 2]
    assert goes(keep_per_signature=2) == [0, 1, 2, 3]
    assert goes(keep_per_signature=2, max_age_seconds=55_000.0) == [0, 1, 2, 3]
    assert goes(max_bytes=sum(sizes.values())) == []
    assert goes(max_bytes=sum(sizes.values()) - 1) == [0]
    # The least recently used goes first.
    library.record_outcomes([outcome(made[0], 1.0)])
    place.clock.seconds += 10_000.0
    assert goes(max_bytes=sum(sizes.values()) - 1) == [1]
    library.refer("run", [made[1]])
    place.clock.seconds += 10_000.0
    assert goes(max_bytes=0) == [0, 2, 3, 4, 5]
    assert goes() == [0, 2, 3, 4, 5]


# Blueprints.


def test_a_blueprint_is_submitted_once(library, place):
    request = blueprint_request(1, tags=("a",), sizes={"width": 8}, init_seed=3)
    record = library.submit(request)
    assert record.blueprint_id == request.blueprint_id
    assert (record.name, record.state, record.attempts) == ("blueprint-001", B.UNVALIDATED, 0)
    assert (record.source, record.signature) == (request.source, SIGNATURE)
    assert (record.sizes, record.init_seed, record.created) == (
        {"width": 8},
        3,
        place.clock.seconds,
    )
    place.clock.seconds += 1.0
    assert library.submit(request) == record
    raised = request.model_copy(update={"priority": 5, "tags": ("b",)})
    again = library.submit(raised)
    assert (again.priority, again.tags, again.created) == (5, ("a", "b"), record.created)
    assert library.submit(request).priority == 5
    assert library.blueprint(record.blueprint_id) == again
    with pytest.raises(BlueprintNotFoundError, match="holds no blueprint 'abababababab'.*submit"):
        library.blueprint(NO_ID)


def test_the_most_urgent_goes_first_and_of_these_the_oldest(library, place):
    for number, priority in enumerate((0, 5, 0, 5, -1)):
        place.clock.seconds += 1.0
        library.submit(blueprint_request(number, priority=priority))
    order = [c.blueprint.name[-1] for c in library.claim("worker", most=3)]
    order += [c.blueprint.name[-1] for c in library.claim("worker", most=10)]
    assert order == ["1", "3", "0", "2", "4"]
    assert library.claim("worker", most=10) == []


def test_a_blueprint_is_claimed_and_completed(library, place, artifact):
    submitted = library.submit(blueprint_request(tags=("t",)))
    (claim,) = library.claim("worker", lease_seconds=30.0)
    assert claim.blueprint.state is B.COMPILING
    assert claim.blueprint.tags == ("t",)
    assert (claim.worker, claim.attempt, claim.seconds) == ("worker", 1, 30.0)
    assert claim.blueprint.blueprint_id == submitted.blueprint_id
    with pytest.raises(KernelNotFoundError, match="does not hold: put it first"):
        library.complete(claim, artifact.kernel_id)
    library.put(artifact)
    place.clock.seconds += 1.0
    done = library.complete(claim, artifact.kernel_id)
    assert (done.state, done.kernel_id) == (B.VALIDATED, artifact.kernel_id)
    assert done.changed == place.clock.seconds
    # Told again, because the answer was lost.
    assert library.complete(claim, artifact.kernel_id) == done
    other = library.put(variant(artifact, 1))
    with pytest.raises(LeaseLostError, match="worker holds blueprint .* no longer: it is valid"):
        library.complete(claim, other)
    for ask in (library.renew, library.give_back, lambda c: library.fail(c, "late")):
        with pytest.raises(LeaseLostError, match="claim it again"):
            ask(claim)
    # Submitted again it is compiled again only where its kernel is gone.
    assert library.submit(blueprint_request()).state is B.VALIDATED
    library.remove(artifact.kernel_id)
    again = library.submit(blueprint_request())
    assert (again.state, again.attempts) == (B.UNVALIDATED, 0)


def test_a_lease_that_has_run_out_goes_to_another(library, place, artifact):
    kernel_id = library.put(artifact)
    library.submit(blueprint_request())
    (slow,) = library.claim("slow", lease_seconds=10.0)
    place.clock.seconds += 9.0
    assert library.claim("quick") == []
    assert library.renew(slow) == slow
    place.clock.seconds += 9.0
    assert library.claim("quick") == []
    place.clock.seconds += 1.0
    (quick,) = library.claim("quick")
    assert quick.attempt == 2
    assert quick.token != slow.token
    for ask in (
        library.renew,
        library.give_back,
        lambda c: library.fail(c, "late"),
        lambda c: library.complete(c, kernel_id),
    ):
        with pytest.raises(
            LeaseLostError, match="slow holds .*: it is compiling, claimed by quick"
        ):
            ask(slow)
    assert library.complete(quick, kernel_id).state is B.VALIDATED
    # The other one has come to the same kernel: that is no error.
    assert library.complete(slow, kernel_id).kernel_id == kernel_id


def test_who_was_only_slow_completes_what_nobody_else_has_claimed(library, place, artifact):
    kernel_id = library.put(artifact)
    library.submit(blueprint_request())
    (claim,) = library.claim("slow", lease_seconds=10.0)
    place.clock.seconds += 1_000.0
    library.renew(claim)
    place.clock.seconds += 1_000.0
    assert library.complete(claim, kernel_id).state is B.VALIDATED


def test_a_lease_of_a_time_that_has_not_come_yet_is_none(library, place):
    library.submit(blueprint_request())
    (claim,) = library.claim("before", lease_seconds=60.0)
    place.clock.seconds -= 100_000.0
    (again,) = library.claim("after")
    assert again.attempt == 2
    with pytest.raises(LeaseLostError):
        library.renew(claim)


def test_a_blueprint_that_nobody_comes_back_from_is_given_up(place):
    library = place.open(max_attempts=2)
    library.submit(blueprint_request())
    library.submit(blueprint_request(1))
    for attempt in (1, 2):
        claims = library.claim(f"worker-{attempt}", lease_seconds=5.0)
        assert [c.attempt for c in claims] == [attempt]
        place.clock.seconds += 6.0
    (other,) = library.claim("last", most=5)
    assert other.blueprint.name == "blueprint-001"
    given_up = library.blueprint(claims[0].blueprint.blueprint_id)
    assert given_up.state is B.INVALID
    assert "2 workers took it and none came back; the last was worker-2" in given_up.reason
    # By hand it waits again, with all its attempts.
    again = library.set_blueprint_state(given_up.blueprint_id, B.UNVALIDATED, reason="once more")
    assert (again.state, again.attempts, again.reason) == (B.UNVALIDATED, 0, "once more")
    library.close()


def test_failures_are_kept_with_their_reason(place):
    library = place.open(max_attempts=2)
    library.submit(blueprint_request())
    (claim,) = library.claim("worker")
    waits = library.fail(claim, "the worker\x00died", retry=True)
    assert (waits.state, waits.attempts) == (B.UNVALIDATED, 1)
    assert waits.reason == "the worker\N{REPLACEMENT CHARACTER}died"
    assert library.fail(claim, "told again", retry=True) == waits
    (claim,) = library.claim("worker")
    assert claim.attempt == 2
    # It is not tried for ever.
    failed = library.fail(claim, "it died again", retry=True)
    assert (failed.state, failed.reason) == (B.INVALID, "it died again")
    assert library.claim("worker") == []
    library.submit(blueprint_request(1))
    (claim,) = library.claim("worker")
    assert library.fail(claim, "does not fit").state is B.INVALID
    library.close()


def test_what_is_given_back_was_not_tried(library):
    library.submit(blueprint_request())
    for _ in range(9):
        (claim,) = library.claim("worker")
        assert claim.attempt == 1
        back = library.give_back(claim)
        assert (back.state, back.attempts) == (B.UNVALIDATED, 0)
        assert library.give_back(claim) == back


def test_blueprints_are_moved_by_hand_as_the_table_says(library):
    blueprint_id = library.submit(blueprint_request()).blueprint_id
    for state, by in ((B.COMPILING, "by `claim` alone"), (B.VALIDATED, "cannot become validated")):
        with pytest.raises(IllegalTransitionError, match=by):
            library.set_blueprint_state(blueprint_id, state)
    with pytest.raises(ConflictError, match="is unvalidated, and was to become invalid from comp"):
        library.set_blueprint_state(blueprint_id, B.INVALID, expected=B.COMPILING)
    (claim,) = library.claim("worker")
    with pytest.raises(IllegalTransitionError, match="`complete`, which names its kernel alone"):
        library.set_blueprint_state(blueprint_id, B.VALIDATED)
    # What was claimed is lost to its worker.
    library.set_blueprint_state(blueprint_id, B.INVALID, reason="not wanted")
    assert library.set_blueprint_state(blueprint_id, B.INVALID).reason == "not wanted"
    with pytest.raises(LeaseLostError, match="it is invalid"):
        library.renew(claim)
    with pytest.raises(BlueprintNotFoundError):
        library.set_blueprint_state(NO_ID, B.INVALID)


def test_blueprints_are_found_by_pages(library, place):
    made = []
    for number in range(7):
        place.clock.seconds += 1.0
        signature = OTHER_SIGNATURE if number % 2 else SIGNATURE
        request = blueprint_request(number, tags=(f"t{number % 3}", "all"), signature=signature)
        made.append(library.submit(request).blueprint_id)
    library.claim("worker", most=2)

    def found(**query):
        result, cursor = [], None
        while True:
            page = library.blueprints(BlueprintQuery(limit=2, cursor=cursor, **query))
            result += [made.index(record.blueprint_id) for record in page.items]
            cursor = page.next_cursor
            if cursor is None:
                return result

    assert found() == list(range(7))
    assert found(states=(B.COMPILING,)) == [0, 1]
    assert found(states=(B.COMPILING, B.UNVALIDATED), signature=SIGNATURE) == [0, 2, 4, 6]
    assert found(tags=("t1", "all")) == [1, 4]
    assert found(name="blueprint-003") == [3]
    assert found(name="none") == []


def test_large_blueprints_come_fewer_at_once(library, place):
    made = []
    # Eight of them would be 8 MiB at most, were it not for the sizes of the third.
    sizes = {f"{number:03d}".ljust(200, "ä"): 1 for number in range(256)}
    for number in range(11):
        place.clock.seconds += 1.0
        data = {"name": f"large-{number:03d}", "note": "x" * 1_020_000}
        source = json.dumps(data, sort_keys=True, indent=1)
        request = blueprint_request(source=source, sizes=sizes if number == 2 else {})
        made.append(library.submit(request).blueprint_id)

    pages, cursor = [], None
    while True:
        page = library.blueprints(BlueprintQuery(limit=1_000, cursor=cursor))
        pages.append(page.items)
        cursor = page.next_cursor
        if cursor is None:
            break
    assert [record.blueprint_id for page in pages for record in page] == made
    assert [len(page) for page in pages] == [7, 4]
    claims = []
    while found := library.claim("worker", most=1_000):
        claims.append([claim.blueprint for claim in found])
    assert [record.blueprint_id for batch in claims for record in batch] == made
    assert [len(batch) for batch in claims] == [7, 4]


NO_CLAIMS = [
    ({"most": 0}, "1 to 1000 blueprints are claimed at once, got 0"),
    ({"most": 1_001}, "got 1001"),
    ({"lease_seconds": 0.0}, "a lease lasts more than 0 and at most 86400 seconds, got 0"),
    ({"lease_seconds": float("nan")}, "got nan"),
    ({"lease_seconds": 1e9}, "got 1000000000"),
    ({"worker": ""}, "'' is no name of a worker"),
]


def test_claims_that_cannot_be(library):
    for arguments, message in NO_CLAIMS:
        with pytest.raises(InputError, match=message):
            library.claim(**{"worker": "worker", **arguments})


def test_a_token_is_not_shown(library):
    library.submit(blueprint_request())
    (claim,) = library.claim("worker")
    assert claim.token not in repr(claim)
    assert claim.token not in json.dumps(
        library.blueprint(claim.blueprint.blueprint_id).model_dump(mode="json")
    )


def test_a_damaged_file_is_told_of_and_mended(library, place, artifact):
    kernel_id = library.put(artifact)
    data = bytearray(artifact.data)
    data[len(data) // 2] ^= 4
    # As whoever damages it would, past the library.
    import obstore

    from esper.urza._blobs import blob_name, open_blobs

    store = open_blobs(place.blobs, s3=place.s3)._store
    obstore.put(store, blob_name(kernel_id), bytes(data))
    with pytest.raises(ArtifactError, match=r"is damaged.*compile it again"):
        library.get(kernel_id)
    assert library.read_bytes(kernel_id) == bytes(data)
    library.put(artifact)
    assert library.get(kernel_id).data == artifact.data
