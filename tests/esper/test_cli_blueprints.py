"""`esper blueprints` as a user meets it."""

import json
import re
import socket
from pathlib import Path

import pytest

from esper.contracts import BlueprintChanged, BlueprintState, Topic, payload_of
from esper.oona import open_broker
from esper.tezzeret import compile_blueprint, load_blueprint
from esper.urza import Library
from tests.esper.test_cli import esper_here


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def here(*arguments, check=0) -> str:
    return esper_here("blueprints", *arguments, check=check).output


def ids(text: str) -> list[str]:
    return re.findall(r"^[0-9a-f]{64}$", text, re.MULTILINE)


LOW_RANK = ("submit", "low_rank", "--in", 3, "--out", 4, "--library", "lib")


def test_what_is_submitted_waits_once_with_what_was_said_of_it():
    found = ids(here(*LOW_RANK, "--seeds", 2, "--size", "rank=2", "--tag", "a", "--priority", 5))
    assert len(found) == 2
    assert ids(here(*LOW_RANK, "--seeds", 2, "--size", "rank=2")) == found
    lines = here("list", "--library", "lib", "--json").splitlines()
    records = {record["blueprint_id"]: record for record in map(json.loads, lines)}
    assert set(records) == set(found)
    first = records[found[0]]
    assert first["state"] == "unvalidated"
    assert (first["sizes"], first["init_seed"]) == ({"rank": 2}, 0)
    assert (first["tags"], first["priority"]) == (["a"], 5)
    table = here("list", "--library", "lib", "--tag", "a", "--state", "unvalidated", "--limit", 1)
    assert re.search(rf"{found[0][:16]}|{found[1][:16]}", table)
    assert "1 blueprint, and more: see --limit" in table
    assert "0 blueprints" in here("list", "--library", "lib", "--state", "INVALID")
    shown = here("show", found[1][:20], "--library", "lib")
    for words in (found[1], "low_rank", "3->4 float32", "rank=2", "unvalidated"):
        assert words in shown
    assert json.loads(here("show", found[0], "--library", "lib", "--json")) == first


def test_what_is_submitted_is_told_on_the_bus_and_what_is_done_already_is_not():
    topics = [Topic.BLUEPRINT_CHANGED]
    with open_broker("sqlite:bus.db") as bus, bus.consumer("test", topics) as consumer:
        (found,) = ids(here(*LOW_RANK, "--bus", "sqlite:bus.db"))
        (heard,) = consumer.receive()
        changed = payload_of(heard.message)
        assert isinstance(changed, BlueprintChanged)
        assert (changed.blueprint_id, changed.after) == (found, BlueprintState.UNVALIDATED)
        consumer.acknowledge([heard])
        library = Library("lib")
        (claim,) = library.claim("a worker")
        kernel = compile_blueprint(
            load_blueprint("low_rank"), claim.blueprint.signature, init_seed=0
        )
        library.complete(claim, library.put(kernel))
        assert ids(here(*LOW_RANK, "--bus", "sqlite:bus.db", "--wait", 60)) == [kernel.kernel_id]
        assert not consumer.receive()


def test_a_bus_that_is_away_keeps_nothing_from_being_submitted(tmp_path):
    blocked = tmp_path / "bus.db"
    blocked.mkdir()
    text = here(*LOW_RANK, "--bus", f"sqlite:{blocked}")
    assert len(ids(text)) == 1
    assert "not announced on the bus, which delays it by seconds" in text


@pytest.mark.parametrize(
    ("command", "bus"), [(LOW_RANK[:-2], "blocked"), (("retry", "--all"), "bus.db")]
)
def test_a_library_that_is_away_is_told_of_and_not_the_bus(command, bus, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = f"http://127.0.0.1:{taken.getsockname()[1]}"
    (tmp_path / "blocked").mkdir()
    text = here(*command, "--library", place, "--bus", f"sqlite:{bus}", check=1)
    assert f"the library at {place} cannot be reached" in text
    assert "Nothing was done." in text
    assert "announced" not in text
    assert not (tmp_path / "bus.db").exists()


def test_what_failed_is_told_by_who_waits_and_can_be_tried_again():
    (found,) = ids(here(*LOW_RANK))
    library = Library("lib")
    (claim,) = library.claim("a worker")
    library.fail(claim, "the programs disagree")
    text = here(*LOW_RANK, "--wait", 60, check=1)
    assert not ids(text)
    assert "low_rank 3->4 float32, seed 0: the programs disagree" in text
    assert "the programs disagree" in here("list", "--library", "lib")
    assert ids(here("retry", found[:12], "--library", "lib")) == [found]
    record = library.blueprint(found)
    assert (record.state, record.attempts) == (BlueprintState.UNVALIDATED, 0)
    # Again leaves it as it is.
    assert ids(here("retry", found, "--library", "lib")) == [found]
    assert ids(here("retry", "--all", "--library", "lib")) == []
    (claim,) = library.claim("a worker")
    library.fail(claim, "once more")
    assert ids(here("retry", "--all", "--library", "lib")) == [found]


def test_who_waits_in_vain_is_told_how_it_stands():
    text = here(*LOW_RANK, "--wait", 0, check=1)
    words = "low_rank 3->4 float32, seed 0: unvalidated after 0 s, and waited for no longer"
    assert words in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("submit", "low_rank", "--in", 3), "--in and --out go together"),
        (("submit", "low_rank"), "--in and --out, or --signature is missing"),
        (("submit", "lowrank", "--in", 3, "--out", 3), r"did you mean 'low_rank'\?"),
        ((*LOW_RANK, "--size", "rnk=3"), "has no size rnk"),
        ((*LOW_RANK, "--tag", ""), r"cannot be submitted: .*tags"),
        ((*LOW_RANK, "--priority", 1 << 30), r"cannot be submitted: .*priority"),
        ((*LOW_RANK, "--bus", "carrier-pigeon:"), "names no bus: expected memory:, sqlite:PATH"),
        (("submit", "attention", "--in", 3, "--out", 4), "takes"),
        (("list", "--state", "done"), "no state 'done': expected one of unvalidated, compiling"),
        (("list", "--library", "nowhere"), "there is no library in .*nowhere"),
        (
            ("list", "--library", "htp://a:b@lab"),
            "not opened by htp:// here: expected a folder, or",
        ),
        ((*LOW_RANK[:-1], "postgresql://a:hunter2@b"), "not opened by postgresql:// here"),
        (("show", "abc", "--library", "nowhere"), "there is no library in .*nowhere"),
        (("retry",), "which blueprints are to be tried again: their ids, or --all"),
        (("retry", "0" * 64, "--all"), "which blueprints are to be tried again"),
    ],
)
def test_what_is_asked_wrongly_is_refused_and_leaves_nothing_behind(arguments, message):
    text = here(*arguments, check=2)
    assert re.search(message, " ".join(text.split())), text
    assert not Path("nowhere").exists()
    assert not Path("lib").exists()


def test_a_beginning_that_names_none_or_several_is_told():
    found = ids(here(*LOW_RANK, "--seeds", 20))
    for command, unknown in (
        ("show", "x"),
        ("show", "0" * 64),
        ("retry", "x"),
        ("retry", "0" * 64),
    ):
        assert "holds no blueprint" in here(command, unknown, "--library", "lib", check=2)
    digits = [each[0] for each in found]
    twice = next(digit for digit in digits if digits.count(digit) > 1)
    text = here("show", twice, "--library", "lib", check=2)
    assert f"several blueprints begin with '{twice}'" in text
    assert "give more of the id" in text
