import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.errors import LedgerError
from esper.tolaria._ledger import Ledger, entry_event, event_entry, read_ledger
from esper_functional import Event, EventKind

GENESIS = "0" * 64

events = st.builds(
    Event,
    step=st.integers(0, 10**6),
    layer=st.integers(0, 99),
    seed=st.integers(0, 99),
    kind=st.sampled_from(EventKind),
    kernel_id=st.sampled_from(["", "ab" * 32]),
    value=st.floats(width=32, allow_nan=False, allow_infinity=False),
    span=st.integers(0, 1000),
)


@given(event=events, reason=st.text(max_size=20))
def test_an_event_survives_its_entry(event, reason):
    assert entry_event(event_entry(event, reason)) == event


@given(several=st.lists(events, min_size=1, max_size=8))
def test_what_was_appended_is_read(tmp_path_factory, several):
    path = tmp_path_factory.mktemp("ledger") / "events.jsonl"
    ledger = Ledger(path, GENESIS)
    for event in several:
        ledger.append([event_entry(event)])
    ledger.close()
    read = list(read_ledger(path, GENESIS))
    assert [entry_event(entry.data) for entry in read] == several
    assert read[-1].after == ledger.cursor


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "events.jsonl"
    ledger = Ledger(path, GENESIS)
    for step in range(5):
        ledger.append([event_entry(Event(step, 0, 0, EventKind.HEALTH, value=0.5), "why")])
    ledger.close()
    return path


@given(data=st.data())
def test_every_flipped_bit_is_found_and_its_line_named(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("ledger") / "events.jsonl"
    ledger = Ledger(path, GENESIS)
    ledger.append([event_entry(Event(s, 0, 0, EventKind.HEALTH, value=0.5)) for s in range(4)])
    ledger.close()
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, 8 * len(content) - 1))
    line = content[: place // 8].count(b"\n") + 1
    content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)
    # A flipped newline joins two lines, or, the last, leaves a torn one, which a
    # ledger's cursor (in the checkpoint) finds missing.
    if place // 8 == len(content) - 1:
        assert len(list(read_ledger(path, GENESIS))) == 3
    else:
        with pytest.raises(LedgerError, match=f"is damaged at line {line}"):
            list(read_ledger(path, GENESIS))


def test_a_line_that_was_taken_out_or_moved(written):
    lines = written.read_bytes().splitlines(keepends=True)
    for changed, number in ((lines[:1] + lines[2:], 2), (lines[:2] + lines[3:1:-1], 3)):
        written.write_bytes(b"".join(changed))
        with pytest.raises(LedgerError, match=f"line {number}: its hash"):
            list(read_ledger(written, GENESIS))


def test_a_ledger_of_another_run(written):
    with pytest.raises(LedgerError, match="line 1"):
        list(read_ledger(written, "1" * 64))


def test_a_missing_ledger(tmp_path):
    with pytest.raises(LedgerError, match="cannot be read"):
        list(read_ledger(tmp_path / "none", GENESIS))


def test_a_torn_last_line_is_cut_off(written):
    whole = written.read_bytes()
    written.write_bytes(whole + b'{"entry":{"st')
    assert len(list(read_ledger(written, GENESIS))) == 5
    cursor = list(read_ledger(written, GENESIS))[-1].after
    ledger = Ledger(written, GENESIS, cursor)
    ledger.append([event_entry(Event(5, 0, 0, EventKind.HEALTH, value=0.25))])
    ledger.close()
    assert written.read_bytes().startswith(whole)
    assert len(list(read_ledger(written, GENESIS))) == 6


def test_a_resumed_run_writes_the_lines_it_wrote_before(written):
    whole = written.read_bytes()
    at = list(read_ledger(written, GENESIS))[1].after
    ledger = Ledger(written, GENESIS, at)
    same = [event_entry(Event(s, 0, 0, EventKind.HEALTH, value=0.5), "why") for s in (2, 3, 4)]
    ledger.append(same)
    assert written.read_bytes() == whole
    ledger.append([event_entry(Event(5, 0, 0, EventKind.HEALTH, value=0.25))])
    ledger.close()
    assert written.read_bytes().startswith(whole)
    assert len(list(read_ledger(written, GENESIS))) == 6


def test_a_resumed_run_that_does_otherwise_is_stopped(written):
    whole = written.read_bytes()
    at = list(read_ledger(written, GENESIS))[1].after
    ledger = Ledger(written, GENESIS, at)
    with pytest.raises(LedgerError, match="does otherwise than its record: line 3"):
        ledger.append([event_entry(Event(2, 0, 0, EventKind.HEALTH, value=0.75), "why")])
    ledger.close()
    assert written.read_bytes() == whole


def test_values_that_json_has_no_word_for_are_refused(tmp_path):
    ledger = Ledger(tmp_path / "events.jsonl", GENESIS)
    with pytest.raises(ValueError, match="not JSON compliant"):
        ledger.append([event_entry(Event(0, 0, 0, EventKind.HEALTH, value=math.nan))])
    ledger.close()
