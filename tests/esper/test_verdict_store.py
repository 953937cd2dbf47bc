"""The store of verdicts: a dictionary that outlives its processes, or forgets; nothing else."""

import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from esper.artifacts import (
    Check,
    Verdict,
    VerdictsInMemoryWarning,
    VerdictStore,
    default_verdicts,
)
from esper.artifacts._verdicts import cache_folder


@pytest.fixture
def verdicts(tmp_path: Path) -> Iterator[VerdictStore]:
    with VerdictStore(tmp_path / "verdicts") as store:
        yield store


CHECKS = st.builds(
    Check,
    name=st.text(max_size=20),
    outcome=st.sampled_from(["passed", "refused", "noted", "skipped"]),
    detail=st.text(max_size=50),
    milliseconds=st.floats(0, 1e6),
)
VERDICTS = st.builds(
    Verdict,
    kernel_id=st.text("0123456789abcdef", min_size=64, max_size=64),
    accepted=st.booleans(),
    checks=st.lists(CHECKS, max_size=4).map(tuple),
    protections=st.lists(st.text(max_size=9), max_size=3).map(tuple),
    missing=st.lists(st.text(max_size=9), max_size=3).map(tuple),
    versions=st.dictionaries(st.text(max_size=9), st.text(max_size=9), max_size=3),
    remembered=st.booleans(),
)


@given(verdict=VERDICTS)
def test_a_verdict_is_what_was_written_of_it(verdict: Verdict):
    assert Verdict.from_json(verdict.to_json()) == verdict


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"checks": 1}', '{"checks": [{"a": 1}]}'])
def test_texts_that_are_no_verdict(text: str):
    with pytest.raises(ValueError, match="no verdict|Expecting value"):
        Verdict.from_json(text)


def verdict_of(number: int, accepted: bool = True) -> Verdict:
    outcome = "passed" if accepted else "refused"
    return Verdict(f"{number:064x}", accepted, (Check("scan", outcome, f"number {number}"),))


class StoreLaws(RuleBasedStateMachine):
    """The store is a dictionary that outlives its processes, or forgets all; never another one."""

    folder: Path

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.place = tempfile.TemporaryDirectory()
        self.stores = [VerdictStore(self.place.name)]
        self.known: dict[str, Verdict] = {}
        self.aside = 0

    @rule(key=st.integers(0, 4), number=st.integers(0, 9), accepted=st.booleans(), by=st.integers())
    def put(self, key: int, number: int, accepted: bool, by: int) -> None:
        verdict = verdict_of(number, accepted)
        self.stores[by % len(self.stores)].put(f"{key:064x}", verdict)
        self.known[f"{key:064x}"] = verdict

    @precondition(lambda self: len(self.stores) < 3)
    @rule()
    def open_another(self) -> None:
        self.stores.append(VerdictStore(self.place.name))

    @precondition(lambda self: len(self.stores) > 1)
    @rule()
    def close_one(self) -> None:
        self.stores.pop().close()

    @rule(place=st.floats(0, 1), bit=st.integers(0, 7))
    def close_all_flip_a_bit_and_open(self, place: float, bit: int) -> None:
        for store in self.stores:
            store.close()
        path = self.stores[0].path
        data = bytearray(path.read_bytes())
        data[int(place * (len(data) - 1))] ^= 1 << bit
        path.write_bytes(data)
        self.stores = [VerdictStore(self.place.name)]
        # Each that is still there is the right one, or it is not there.
        held = {key: self.stores[0].get(key) for key in list(self.known)}
        for key, verdict in held.items():
            assert verdict in (None, self.known[key]), (place, bit)
        self.known = {key: verdict for key in held if (verdict := self.stores[0].get(key))}

    @invariant()
    def all_stores_agree(self) -> None:
        for store in self.stores:
            assert store.reason == ""
            assert {key: store.get(key) for key in self.known} == self.known
            assert store.get("f" * 64) is None

    def teardown(self) -> None:
        for store in self.stores:
            store.close()
        self.place.cleanup()


TestStoreLaws = StoreLaws.TestCase
TestStoreLaws.settings = settings(max_examples=40, stateful_step_count=15, deadline=None)


@pytest.mark.parametrize(
    "content", [b"not a database", b"SQLite format 3\0" + b"\xff" * 5000, b"\0" * 8192]
)
def test_a_damaged_database_is_set_aside(tmp_path: Path, content: bytes):
    path = tmp_path / "verdicts.sqlite"
    path.write_bytes(content)
    with VerdictStore(tmp_path) as store:
        assert store.reason == ""
        assert len(store) == 0
        store.put("0" * 64, verdict_of(1))
    assert (tmp_path / "verdicts.sqlite.damaged-0").read_bytes() == content
    with VerdictStore(tmp_path) as store:
        assert store.get("0" * 64) == verdict_of(1)
    assert not (tmp_path / "verdicts.sqlite.damaged-1").exists()


def test_every_bit_of_the_databases_version_and_some_of_its_header(tmp_path: Path):
    with VerdictStore(tmp_path / "good") as store:
        store.put("0" * 64, verdict_of(1))
    good = store.path.read_bytes()
    for place in sorted({*range(16 * 8, 21 * 8), *range(0, 100 * 8, 17)}):
        folder = tmp_path / str(place)
        folder.mkdir()
        data = bytearray(good)
        data[place // 8] ^= 1 << place % 8
        (folder / store.path.name).write_bytes(data)
        with VerdictStore(folder) as again:
            assert again.get("0" * 64) in (None, verdict_of(1)), place
            again.put("1" * 64, verdict_of(2))
            assert again.get("1" * 64) == verdict_of(2), place
            assert again.reason == "", place


def test_a_row_that_was_changed_is_not_believed(tmp_path: Path):
    with VerdictStore(tmp_path) as store:
        store.put("0" * 64, verdict_of(1, accepted=False))
    with sqlite3.connect(tmp_path / "verdicts.sqlite") as database:
        text = verdict_of(1, accepted=True).to_json()
        database.execute("UPDATE verdicts SET verdict = ?", (text,))
    database.close()
    with VerdictStore(tmp_path) as store:
        assert store.get("0" * 64) is None
        assert len(store) == 0
    assert (tmp_path / "verdicts.sqlite.damaged-0").exists()


def test_another_table_of_that_name_is_damage(tmp_path: Path):
    with sqlite3.connect(tmp_path / "verdicts.sqlite") as database:
        database.execute("CREATE TABLE verdicts (a)")
    database.close()
    with VerdictStore(tmp_path) as store:
        store.put("0" * 64, verdict_of(1))
        assert store.get("0" * 64) == verdict_of(1)
    assert (tmp_path / "verdicts.sqlite.damaged-0").exists()


def test_a_folder_that_cannot_be_used(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    message = "kept in memory alone, because .*cannot be used.* ESPER_CACHE_DIR"
    with pytest.warns(VerdictsInMemoryWarning, match=message):
        store = VerdictStore(tmp_path / "file" / "below")
    with store:
        assert "cannot be used" in store.reason
        store.put("0" * 64, verdict_of(1))
        assert store.get("0" * 64) == verdict_of(1)
        assert len(store) == 1


@pytest.mark.parametrize("writable", ["", "verdicts.sqlite"])
def test_what_others_may_write_is_not_believed(tmp_path: Path, writable: str):
    folder = tmp_path / "shared"
    with VerdictStore(folder) as store:
        store.put("0" * 64, verdict_of(1))
    (folder / writable).chmod(0o775)
    with pytest.warns(VerdictsInMemoryWarning, match=r"others may write .*mode is 775; chmod go-w"):
        store = VerdictStore(folder)
    with store:
        assert store.get("0" * 64) is None


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("theirs", ["", "verdicts.sqlite", "verdicts.sqlite-wal"])
def test_what_another_user_wrote_is_not_believed(tmp_path: Path, theirs: str):
    folder = tmp_path / "shared"
    with VerdictStore(folder) as store:
        store.put("0" * 64, verdict_of(1))
    (folder / theirs).touch()
    os.chown(folder / theirs, 12345, 12345)
    with pytest.warns(VerdictsInMemoryWarning, match=r"belongs to another user \(12345\)"):
        store = VerdictStore(folder)
    with store:
        assert store.get("0" * 64) is None


def test_a_closed_store_stays_closed(tmp_path: Path):
    store = VerdictStore(tmp_path)
    store.put("0" * 64, verdict_of(1))
    for _ in range(2):
        store.close()
    for ask in (
        lambda: store.get("0" * 64),
        lambda: store.put("0" * 64, verdict_of(2)),
        lambda: len(store),
    ):
        with pytest.raises(ValueError, match="the store of verdicts in .* is closed: open another"):
            ask()
    with VerdictStore(tmp_path) as again:
        assert again.get("0" * 64) == verdict_of(1)


def test_a_folder_that_is_read_only(small_disk: Any):
    place = small_disk(256)
    place.chmod(0o700)
    with VerdictStore(place) as store:
        store.put("0" * 64, verdict_of(1))
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    with pytest.warns(VerdictsInMemoryWarning, match="Read-only file system|readonly"):
        store = VerdictStore(place)
    with store:
        store.put("1" * 64, verdict_of(2))
        assert store.get("1" * 64) == verdict_of(2)
    assert not list(place.glob("*.damaged-*"))


def test_a_full_disk(small_disk: Any):
    place = small_disk(64)
    place.chmod(0o700)

    def fill(store: VerdictStore) -> None:
        for number in range(2000):
            store.put(f"{number:064x}", verdict_of(number))
            assert store.get(f"{number:064x}") == verdict_of(number)

    with VerdictStore(place) as store:
        with pytest.warns(VerdictsInMemoryWarning, match="full|I/O"):
            fill(store)
        assert store.reason
    with VerdictStore(place) as again:
        for number in range(2000):
            assert again.get(f"{number:064x}") in (None, verdict_of(number))


WRITER = """
import sys
from esper.artifacts import VerdictStore
from tests.esper.test_verdict_store import verdict_of
own = int(sys.argv[2])
with VerdictStore(sys.argv[1]) as store:
    assert store.reason == "", store.reason
    for number in range(200):
        store.put(f"{number:064x}", verdict_of(number))
        store.put(f"{1000 * own + number:064x}", verdict_of(number))
    assert all(store.get(f"{1000 * own + n:064x}") == verdict_of(n) for n in range(200))
"""


def test_many_processes_and_one_database_that_begins_damaged(tmp_path: Path):
    (tmp_path / "verdicts.sqlite").write_bytes(b"not a database")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(own)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for own in range(1, 5)
    ]
    for writer in writers:
        _, errors = writer.communicate(timeout=200)
        assert writer.returncode == 0, errors
    with VerdictStore(tmp_path) as store:
        assert len(store) == 200 * 5
    assert [p.name for p in tmp_path.glob("*.damaged-*")] == ["verdicts.sqlite.damaged-0"]


def test_many_threads_and_one_store(verdicts: VerdictStore):
    def write(own: int) -> None:
        for number in range(100):
            verdicts.put(f"{number:064x}", verdict_of(number))
            assert verdicts.get(f"{number:064x}") == verdict_of(number), own

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert len(verdicts) == 100


def test_where_the_store_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("ESPER_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "esper"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "esper"
    monkeypatch.setenv("ESPER_CACHE_DIR", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    store = default_verdicts()
    assert store is default_verdicts()
    assert store.path == tmp_path / "own" / "verdicts.sqlite"
    assert store.path.stat().st_mode & 0o077 == 0
    store.close()
