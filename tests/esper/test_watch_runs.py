"""Runs as they are watched: what is kept of them, and what a page is told."""

import dataclasses
import fcntl
import json
import math
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.errors import InputError
from esper.nissa._catalogue import Catalogue
from esper.nissa._entries import NO_EVENTS, describe_entry, explain_entry, kept_rows, standing
from esper.nissa._history import BANDED, History
from esper.nissa._messages import Cursor, message, seed_history
from esper.nissa._run_files import MOST_RUNS, QUIET, State, describe_run, find_runs, is_held
from esper.nissa._tail import Line
from esper.nissa._watched import ENTRIES, PROBLEMS, WatchedRun
from esper.tolaria._ledger import read_ledger
from esper_functional import fold_events, init_seeds, state_digest
from tests.esper.watch_runs import Plan, RunMaker, long_rows, make_run


def watched(path: Path) -> WatchedRun:
    run = WatchedRun(path, "run")
    run.poll_to_end()
    return run


def row(step: int, loss: float | None = 0.5, **more: Any) -> dict[str, Any]:
    return {
        "step": step, "train_loss": loss, "stages": [[0, 2]], "alphas": [[0.0, 0.5]],
        "seconds": {"train": step / 100},
    } | more  # fmt: skip


# The made runs are what the trainer writes


def test_a_made_run_is_a_ledger_and_folds(tmp_path):
    from esper.tolaria._ledger import entry_event

    maker = RunMaker(tmp_path / "run", Plan(steps=600, busy=0.2))
    genesis = maker.ledger.cursor.hash
    maker.finish()
    entries = [entry.data for entry in read_ledger(tmp_path / "run" / "events.jsonl", genesis)]
    kinds = {entry["kind"] for entry in entries}
    assert {"load", "activate", "ramp", "health", "fossilize", "veto", "worth", "mark"} <= kinds
    events = [entry for entry in entries if entry["kind"] not in NO_EVENTS]
    folded = fold_events(init_seeds(4, 2), map(entry_event, events))
    assert state_digest(folded) == state_digest(maker.state)


# History


@given(
    losses=st.lists(st.none() | st.floats(0.0, 9.0), min_size=1, max_size=200),
    points=st.integers(2, 20),
)
def test_points_are_few_and_hold_the_extremes(losses, points):
    history = History(points)
    for i, loss in enumerate(losses):
        history.append(row(10 * i, loss))
    assert len(history.points) <= points
    assert sum(point.count for point in history.points) == history.rows == len(losses)
    assert all(point.count == history.each for point in history.points[:-1])
    steps = [point.step for point in history.points]
    assert steps == sorted(set(steps))
    assert steps[-1] == 10 * (len(losses) - 1)
    known = [loss for loss in losses if loss is not None]
    lows = [point.low["train_loss"] for point in history.points]
    highs = [point.high["train_loss"] for point in history.points]
    assert min((v for v in lows if v is not None), default=None) == min(known, default=None)
    assert max((v for v in highs if v is not None), default=None) == max(known, default=None)


@given(steps=st.lists(st.integers(0, 30), max_size=40))
def test_what_a_run_took_back_is_gone(steps):
    rows = [row(step, float(i)) for i, step in enumerate(steps)]
    history = History(100)
    for one in rows:
        history.append(one)
    kept = kept_rows(rows)
    assert [one["step"] for one in kept] == sorted({one["step"] for one in kept})
    assert [(point.step, point.values["train_loss"]) for point in history.points] == [
        (one["step"], one["train_loss"]) for one in kept
    ]


def test_speed_is_of_the_time_since_the_measurement_before():
    history = History()
    for step, seconds in ((0, 1.0), (100, 3.0), (200, 3.0), (300, 4.0), (250, 1.0), (260, 2.0)):
        history.append(row(step, seconds={"train": seconds / 2, "evaluate": seconds / 2}))
    # No time passed before step 200, and 250 is behind a rollback.
    assert [point.values["speed"] for point in history.points] == [None, 50.0, None, None, 10.0]


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"step": -1}, "its step is -1, expected a whole number from 0"),
        ({"step": True}, "its step is True"),
        ({"step": 5, "stages": [0]}, "1 axes, expected layers and seeds"),
        ({"step": 5, "stages": [[0]]}, r"differ in shape: \(1, 1\), \(1, 2\)"),
        ({"step": 5, "stages": [[300, 0]]}, "300"),
        ({"step": 5, "alphas": [["a", 0]]}, "could not convert"),
    ],
)
def test_a_bad_measurement_changes_nothing(bad, match):
    history = History()
    history.append(row(0))
    before = (list(history.points), history.rows, history.generation)
    with pytest.raises((ValueError, OverflowError), match=match):
        history.append(row(10) | bad)
    assert (history.points, history.rows, history.generation) == before


def test_a_run_without_seeds_and_one_of_many_measurements(tmp_path):
    path = make_run(tmp_path / "run", layers=2, steps=40)
    long_rows(path, 5_000)
    run = watched(path)
    assert run.problems == []
    assert run.history.rows == 5_000
    assert run.history.each == 8
    assert max(point.high["train_loss"] for point in run.history.points) == 9.0
    history = History()
    history.append(row(0, stages=[], alphas=[]))
    assert history.points[0].seeds.shape == (0, 0)


# Messages


class Mirror:
    """A page that knows nothing but what it is told."""

    def __init__(self) -> None:
        self.known: dict[str, Any] = {}

    def take(self, told: dict[str, Any]) -> None:
        told = json.loads(json.dumps(told, allow_nan=False))
        if "head" in told:
            self.known = {"entries": [], "kernels": {}, "worths": {}, "problems": []}
            self.known["series"] = {}
        if "series" in told:
            start = told["series"].pop("from")
            for key in ("each", "rows"):
                self.known[key] = told["series"].pop(key)
            for key, values in told["series"].items():
                column = self.known["series"].setdefault(key, [])
                column[start:] = values
        if "grid" in told:
            at, shape = told["grid"].pop("at"), told["grid"].pop("shape")
            if at is None:
                self.known["grid"] = {key: list(values) for key, values in told["grid"].items()}
                self.known["shape"] = shape
            else:
                assert shape == self.known["shape"]
                for key, values in told["grid"].items():
                    for i, value in zip(at, values, strict=True):
                        self.known["grid"][key][i] = value
        if "entries" in told:
            self.known["entries"][told["entries"]["from"] :] = told["entries"]["list"]
        for key in ("kernels", "worths"):
            for layer, seed, *has in told.get(key, ()):
                if has == [None]:
                    del self.known[key][layer, seed]
                else:
                    self.known[key][layer, seed] = has
        for key in ("now", "problems"):
            if key in told:
                self.known[key] = told[key]


@given(
    moves=st.lists(
        st.sampled_from(["boundary"] * 6 + ["back", "damage", "look", "look", "anew"]),
        min_size=5, max_size=60,
    ),
    seed=st.integers(0, 5),
)  # fmt: skip
def test_what_has_changed_adds_up_to_all(tmp_path_factory, moves, seed):
    path = tmp_path_factory.mktemp("runs") / "run"
    maker = RunMaker(path, Plan(layers=2, steps=10_000, busy=0.3, seed=seed))
    run, cursor, mirror = WatchedRun(path, "run"), Cursor(), Mirror()
    run.history = History(8)
    for move in [*moves, "look"]:
        if move == "boundary":
            maker.boundary()
        elif move == "back" and len(maker._marks) > 3:
            maker.go_back(3)
        elif move == "damage":
            with (path / "metrics.jsonl").open("a") as file:
                file.write('{"step": "nine"}\n')
        elif move == "anew":
            lines = (path / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
            kept = b"".join(line + b"\n" for line in lines[: len(lines) // 2])
            (path / "metrics.partial").write_bytes(kept)
            (path / "metrics.partial").replace(path / "metrics.jsonl")
            maker._metrics.close()
            maker._metrics = (path / "metrics.jsonl").open("ab")
        elif move == "look":
            run.poll_to_end()
            mirror.take(message(run, cursor, State.TRAINING))
            whole = Mirror()
            whole.take(message(run, Cursor(), State.TRAINING))
            assert mirror.known == whole.known
    maker.close()


def test_a_page_that_knows_all_is_told_how_the_run_stands_and_no_more(tmp_path):
    run, cursor = watched(make_run(tmp_path / "run")), Cursor()
    first = message(run, cursor, State.ENDED)
    assert {"head", "series", "grid", "entries", "now", "kernels", "worths"} <= set(first)
    assert first["head"]["sites"][0] == "blocks.0.linear"
    assert set(message(run, cursor, State.ENDED)) == {"state", "idle"}


def test_one_changed_seed_is_told_alone(tmp_path):
    maker = RunMaker(tmp_path / "run", Plan(layers=50, busy=0.0))
    maker.boundary()
    run, cursor = watched(tmp_path / "run"), Cursor()
    message(run, cursor, State.TRAINING)
    maker.kernels[3, 1] = "ab" * 32
    from esper_functional import EventKind

    maker.ledger.append([maker._event(20, (3, 1), EventKind.LOAD, "because")])
    maker.boundary()
    maker.close()
    run.poll_to_end()
    told = message(run, cursor, State.TRAINING)
    assert {key: told["grid"][key] for key in ("shape", "at", "stages", "alphas")} == {
        "shape": [50, 2], "at": [7], "stages": "2", "alphas": [0],
    }  # fmt: skip
    assert told["kernels"] == [[3, 1, "ab" * 32, 20]]
    reasons = [entry["reason"] for entry in told["entries"]["list"]]
    assert reasons == ["because", "", ""]


def test_the_history_of_a_seed(tmp_path):
    run = watched(make_run(tmp_path / "run", steps=600, busy=0.3))
    history = seed_history(run.history.points, 1, 1)
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert history["step"] == [one["step"] for one in rows]
    assert history["stages"] == [one["stages"][1][1] for one in rows]
    assert history["alphas"] == pytest.approx([one["alphas"][1][1] for one in rows], rel=1e-5)
    assert any(history["health"])
    assert seed_history(run.history.points, 9, 0)["stages"] == [None] * len(rows)


# The ledger


def test_a_rollback_takes_back_what_came_after(tmp_path):
    maker = RunMaker(tmp_path / "run", Plan(layers=8, steps=2_000))
    for _ in range(20):
        maker.boundary()
    before = watched(tmp_path / "run")
    for _ in range(10):
        maker.boundary()
    assert watched(tmp_path / "run").kernels != before.kernels
    maker.go_back(10)
    maker.close()
    after = watched(tmp_path / "run")
    assert after.kernels == before.kernels
    assert after.worths == before.worths
    last = after.entries[-1].data
    assert last["what"] == "rolled back to step 400"
    assert last["reason"] == "the training loss is not finite; half the learning rate"
    # What happened stays told, and the page can mark it.
    undone = [e for e in after.entries if last["lines"] < e.line < last["line"]]
    assert len(undone) == len(after.entries) - len(before.entries) - 1
    assert not after.ended


def test_a_worth_is_of_the_kernel_that_was_measured(tmp_path):
    path = make_run(tmp_path / "run", steps=1_500)
    run, measured, kinds = WatchedRun(path, "run"), set(), []
    for number, line in enumerate((path / "events.jsonl").read_bytes().splitlines(), start=1):
        entry = json.loads(line)["entry"]
        run._take_event(Line(number, line))
        place = (entry.get("layer"), entry.get("seed"))
        if entry["kind"] == "worth":
            measured.add(place)
        elif entry["kind"] in ("load", "unload", "reset"):
            measured.discard(place)
        kinds.append(entry["kind"])
        assert set(run.worths) == measured
    assert kinds.count("worth") > kinds.count("fossilize") > 0


def test_lines_that_cannot_be_relied_on_are_told_and_the_rest_goes_on(tmp_path):
    path = make_run(tmp_path / "run", steps=300, busy=0.3)
    events = (path / "events.jsonl").read_bytes().split(b"\n")
    whole = len(watched(path).entries)
    events[2] = events[2].replace(b'"reason":"', b'"reason":"x')
    events[5] = b"{"
    (path / "events.jsonl").write_bytes(b"\n".join(events))
    with (path / "metrics.jsonl").open("a") as file:
        file.write('[]\n{"step": 320}\n{"step": 3')
    run = watched(path)
    told = [(problem.file, problem.line, problem.what) for problem in run.problems]
    assert [what[:2] for what in told] == [
        ("events.jsonl", 3), ("events.jsonl", 6),
        ("metrics.jsonl", 17), ("metrics.jsonl", 18),
    ]  # fmt: skip
    assert "its hash does not follow from the line before" in told[0][2]
    assert "it cannot be read" in told[1][2]
    assert told[2][2] == "it cannot be read (it is no measurement)"
    assert told[3][2] == "it lacks 'stages'"
    assert len(run.entries) >= whole - 1
    assert run.history.rows == 16
    assert run.state is State.ENDED


def test_a_flipped_bit_in_a_measured_health_is_found(tmp_path):
    path = make_run(tmp_path / "run", steps=300, busy=0.3)
    text = (path / "events.jsonl").read_text()
    healths = [i for i, line in enumerate(text.split("\n")) if '"kind":"health"' in line]
    lines = text.split("\n")
    lines[healths[3]] = lines[healths[3]].replace('"value":0.', '"value":0.1', 1)
    (path / "events.jsonl").write_text("\n".join(lines))
    assert [problem.line for problem in watched(path).problems] == [healths[3] + 1]


def test_a_line_in_another_form_is_told(tmp_path):
    path = make_run(tmp_path / "run", steps=40)
    with (path / "events.jsonl").open("a") as file:
        file.write(json.dumps({"entry": {"kind": "load", "step": 3}, "hash": "0" * 64}) + "\n")
        file.write('{"entry":{"kind":"load"},"hash":"' + "0" * 64 + '"}\n')
    told = [problem.what for problem in watched(path).problems]
    assert told == [
        "it cannot be read (it is not in the form of a ledger's lines)",
        "it cannot be read (it is no entry of a ledger)",
    ]


def test_so_many_problems_and_entries_are_kept(tmp_path):
    path = make_run(tmp_path / "run", steps=40)
    (path / "metrics.jsonl").write_text("{\n" * (PROBLEMS + 10))
    entry = '{"entry":{"kind":"veto","layer":0,"seed":0,"step":%d},"hash":"' + "0" * 64 + '"}'
    (path / "events.jsonl").write_text("".join(entry % i + "\n" for i in range(2 * ENTRIES)))
    run = watched(path)
    damaged = [problem for problem in run.problems if problem.file == "metrics.jsonl"]
    assert len(damaged) == PROBLEMS
    assert damaged[-1].line == PROBLEMS + 10
    assert damaged[-1].what == "the last of more lines than are shown"
    assert ENTRIES <= len(run.entries) <= ENTRIES + ENTRIES // 10
    assert run.forgotten + len(run.entries) == 2 * ENTRIES
    told = message(run, Cursor(), State.STALE)["entries"]
    assert (told["forgotten"], told["from"], len(told["list"])) == (
        run.forgotten, run.forgotten, len(run.entries),
    )  # fmt: skip


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.just(10**400)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
KEYS = ("step", "layer", "seed", "kind", "value", "span", "lines", "to", "low", "kernel", "reason")


@given(
    entries=st.lists(
        st.fixed_dictionaries(
            {"kind": st.sampled_from(["load", "ramp", "rollback", "worth", "veto", "mark"]) | JSON},
            optional={key: st.integers(-1, 9) | JSON for key in KEYS if key != "kind"},
        ),
        max_size=8,
    ),
    rows=st.lists(
        st.fixed_dictionaries({"step": st.integers(0, 9), "stages": st.just([[2]]) | JSON},
                              optional={"alphas": st.just([[1.0]]) | JSON, "seconds": JSON,
                                        "health": JSON, "train_loss": JSON, "flops": JSON})
        | JSON,
        max_size=8,
    ),
    noise=st.binary(max_size=20),
)  # fmt: skip
def test_whatever_stands_in_the_files_is_read_or_told(tmp_path_factory, entries, rows, noise):
    path = tmp_path_factory.mktemp("odd") / "run"
    path.mkdir()
    (path / "run.json").write_text('{"schema_version": 2, "config": {"steps": null}}')
    text = [json.dumps(entry, sort_keys=True, separators=(",", ":")) for entry in entries]
    lines = [f'{{"entry":{entry},"hash":"{"0" * 64}"}}'.encode() for entry in text]
    (path / "events.jsonl").write_bytes(b"\n".join([*lines, noise, b""]))
    measured = [json.dumps(one).encode() for one in rows]
    (path / "metrics.jsonl").write_bytes(b"\n".join([*measured, noise, b""]))
    run = watched(path)
    told = json.dumps(message(run, Cursor(), run.state), allow_nan=False)
    assert json.loads(told)["head"]["name"] == "run"
    written = (path / "metrics.jsonl").read_bytes().count(b"\n")
    damaged = [problem for problem in run.problems if problem.file == "metrics.jsonl"]
    assert run.history.rows + len(damaged) == written
    seed_history(run.history.points, 0, 0)


@pytest.mark.parametrize(
    ("entry", "what", "why"),
    [
        ({"kind": "load", "reason": "stuck"}, "graft asked for", "stuck"),
        ({"kind": "errors", "value": 3.0}, "3 failures in a row", ""),
        ({"kind": "ramp", "value": 1.0, "span": 100}, "ramp to 1 over 100 steps", ""),
        ({"kind": "ramp", "value": 0.5, "span": 9, "shape": "cosine"},
         "cosine ramp to 0.5 over 9 steps", ""),
        ({"kind": "alpha", "value": 0.25}, "alpha set to 0.25", ""),
        ({"kind": "veto", "action": "graft", "rule": "cooldown", "reason": "too soon"},
         "vetoed: graft", "cooldown: too soon"),
        ({"kind": "rollback", "to": 1000, "cause": "NaN", "remedy": ""},
         "rolled back to step 1,000", "NaN"),
        ({"kind": "worth", "value": 0.12345, "low": 0.1, "high": 0.2},
         "worth 0.1235 (0.1 to 0.2)", ""),
        ({"kind": "worth", "value": None, "low": None}, "worth ?", ""),
        ({"kind": "mark", "name": "end"}, "mark: end", ""),
        ({"kind": "sprout"}, "sprout", ""),
    ],
)  # fmt: skip
def test_entries_in_words(entry, what, why):
    assert describe_entry(entry) == what
    assert explain_entry(entry) == why


def test_which_entries_stand():
    back = {"kind": "rollback", "lines": 1}
    assert standing([{}, {}, {}, back, {}, back, {}]) == [
        True, False, False, False, False, True, True,
    ]  # fmt: skip
    assert standing([{}, {"kind": "rollback", "lines": 99}]) == [True, True]
    assert standing([{}, {"kind": "rollback"}]) == [True, True]


# Folders


def test_runs_are_found_by_their_place(tmp_path):
    for name in ("study/seed-10", "study/seed-2", "single", "checkpoints/not", ".hidden/not"):
        make_run(tmp_path / name, steps=20, layers=1, seeds=1)
    make_run(tmp_path / "single" / "inside", steps=20)
    (tmp_path / "link").symlink_to(tmp_path / "study")
    assert list(find_runs(tmp_path)) == ["single", "study/seed-2", "study/seed-10"]
    assert find_runs(tmp_path / "single") == {".": tmp_path / "single"}
    assert MOST_RUNS >= 1_000


def test_folders_without_runs(tmp_path):
    (tmp_path / "file").touch()
    for path, match in (
        (tmp_path / "none", f"there is no folder {tmp_path}/none: give the folder of a run"),
        (tmp_path / "file", "file is a file"),
        (tmp_path, f"no run in {tmp_path}: neither it nor a folder in it holds a run.json"),
        (tmp_path / ("x" * 300), "xxx cannot be read: File name too long"),
    ):
        with pytest.raises(InputError, match=re.escape(match)):
            find_runs(path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ('{"schema_version": 3}', "has schema version 3, this Esper reads up to 2: it was written"),
        ('{"schema_version": "2"}', "its schema_version is '2', expected a whole number"),
        ('{"schema_version": 2}', "run.json is damaged: it lacks 'config'. Restore it"),
        ("{", "run.json is damaged: Expecting property name"),
        ("[]", "run.json is damaged: list indices"),
    ],
)
def test_runs_that_cannot_be_read(tmp_path, content, match):
    path = make_run(tmp_path / "run", steps=20)
    (path / "run.json").write_text(content)
    with pytest.raises(InputError, match=re.escape(match)):
        describe_run(path)
    catalogue = Catalogue(tmp_path)
    catalogue.refresh()
    (summary,) = catalogue.summaries
    assert summary.state is State.UNREADABLE
    assert match in summary.trouble


def test_a_run_json_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"run\.json cannot be read: No such file"):
        describe_run(tmp_path)


def test_older_runs_do_without_names(tmp_path):
    about = describe_run(make_run(tmp_path / "run", steps=20, schema=1))
    assert about.sites == ()
    assert about.label == "spirals · jax · seed 0"
    assert watched(tmp_path / "run").problems == []


def aged(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    for file in path.iterdir():
        os.utime(file, (then, then))


def test_how_a_run_stands(tmp_path):
    maker = RunMaker(tmp_path / "run", Plan(steps=100))
    maker.boundary()
    catalogue = Catalogue(tmp_path)

    def stands() -> tuple[State, State]:
        catalogue.refresh()
        return catalogue.summaries[0].state, watched(tmp_path / "run").state

    assert stands() == (State.TRAINING, State.TRAINING)
    aged(tmp_path / "run", QUIET + 5)
    assert stands() == (State.STALE, State.STALE)
    with (tmp_path / "run" / "run.json").open("rb") as file:
        assert not is_held(tmp_path / "run")
        fcntl.flock(file, fcntl.LOCK_EX)
        assert is_held(tmp_path / "run")
        assert stands() == (State.TRAINING, State.TRAINING)
        # Asking does not take the lock.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert stands() == (State.STALE, State.STALE)
    maker.finish()
    aged(tmp_path / "run", QUIET + 5)
    assert stands() == (State.ENDED, State.ENDED)


def test_a_list_of_runs_follows_the_folder(tmp_path):
    catalogue = Catalogue(tmp_path)
    catalogue.refresh()
    assert catalogue.summaries == []
    make_run(tmp_path / "a", steps=100)
    catalogue.refresh()
    (summary,) = catalogue.summaries
    assert dataclasses.astuple(summary)[:5] == ("a", "ended", "spirals · jax · seed 0", 100, 100)
    assert summary.accuracy is not None
    assert math.isclose(summary.accuracy, catalogue.rows["a"]["test_accuracy"])
    (tmp_path / "a").rename(tmp_path / "b")
    catalogue.refresh()
    assert [summary.name for summary in catalogue.summaries] == ["b"]
    assert list(catalogue.rows) == ["b"]


def test_bands_are_of_what_varies():
    assert "test_accuracy" in BANDED
    assert "parameters" not in BANDED
