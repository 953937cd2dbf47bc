"""`esper library` as a user meets it: on a folder, and on a service."""

import json
import os
import re
from pathlib import Path

import pytest

from esper.contracts import KernelOutcome, KernelState
from esper.tolaria import open_run
from esper.tolaria._run_folder import library_folder
from esper.urza import Library
from tests.esper.cache_kernels import variant
from tests.esper.service_thread import SECRET, ServedLibrary
from tests.esper.test_cli import CONFIG, esper_here


@pytest.fixture(params=["folder", "service"])
def store(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    own = Library(tmp_path / "lib")
    if request.param == "folder":
        monkeypatch.setenv("ESPER_LIBRARY__WHERE", "lib")
        yield own
        return
    with ServedLibrary(lambda: Library(tmp_path / "lib"), tmp_path / "lib/library.sqlite") as it:
        monkeypatch.setenv("ESPER_LIBRARY__WHERE", it.url)
        monkeypatch.setenv("ESPER_LIBRARY__TOKEN", SECRET)
        yield own


@pytest.fixture
def kernels(store, artifact):
    """The ids of three kernels, in order."""
    return sorted(store.put(variant(artifact, i), tags=("mine",)[: i == 0]) for i in range(3))


def here(*arguments, check=0) -> str:
    return esper_here("library", *arguments, check=check).output


def ids(text: str) -> list[str]:
    return sorted(re.findall(r"^ ?([0-9a-f]{64})\b", text, re.MULTILINE))


def test_kernels_are_found_by_what_is_known_of_them(kernels):
    text = here("search")
    assert ids(text) == kernels
    assert text.endswith("3 kernels\n")
    assert "residual_mlp" in text
    assert "validated" in text
    (tagged,) = [
        json.loads(line) for line in here("search", "--tag", "mine", "--json").splitlines()
    ]
    assert tagged["tags"] == ["mine"]
    for found in (
        here("search", "--signature", "2->8 float32", "--blueprint", "residual_mlp"),
        here("search", "--platform", "cuda", "--max-parameters", 10**6, "--order", "created"),
        here("search", "--state", "VALIDATED", "--state", "testing", "--max-bytes", 10**9),
    ):
        assert ids(found) == kernels
    for nothing in (
        here("search", "--max-flops", 1),
        here("search", "--min-gain", 0.0),
        here("search", "--state", "deprecated"),
        here("search", "--ancestor", kernels[0][:12]),
    ):
        assert nothing.endswith("0 kernels\n")
    assert here("search", "--limit", 2).endswith("2 kernels, and more: see --limit\n")
    assert here("search", "--tag", "mine").endswith("1 kernel\n")


def test_what_is_known_of_a_kernel_is_shown(store, kernels):
    store.refer("a run", kernels[:1])
    store.record_outcomes(
        [
            KernelOutcome(run_id="a run", kernel_id=kernels[0], layer=0, seed=seed, task="spirals",
                          step=10, gain=gain, kept=True)
            for seed, gain in enumerate((0.25, 0.75))
        ]
    )  # fmt: skip
    place = {"kernel_id": kernels[0], "device": "a CPU", "batch": 8}
    store.record_measurement(place | {"backend": "jax", "forward_us": 12.34})
    store.record_measurement(place | {"backend": "torch"})
    text = here("show", kernels[0][:12])
    assert "batch 8, 12.3 µs forward" in text
    for words in (
        kernels[0],
        "2->8 float32",
        "needed by run",
        "a run",
        "0.5 (",
        "in 2 places of 1 run; kept in 2",
    ):
        assert words in text
    told = json.loads(here("show", kernels[0], "--json"))
    assert told["usage"]["mean_gain"] == 0.5
    assert told["runs"] == ["a run"]
    assert told["kernel_id"] == kernels[0]
    assert "nothing is known" in here("show", kernels[1])


def test_a_state_is_given_with_its_reason_and_one_that_may_not_follow_is_refused(store, kernels):
    done = here("move", "deprecated", kernels[0], kernels[1][:16], "--reason", "slower [bold]now")
    assert ids(done) == kernels[:2]
    record = store.record(kernels[0])
    assert (record.state, record.reason) == (KernelState.DEPRECATED, "slower [bold]now")
    assert "slower [bold]now" in here("show", kernels[0])
    assert ids(here("search")) == kernels[2:]
    refused = here("move", "deployed", kernels[0], check=1)
    assert "deprecated" in refused
    assert "validated" in refused
    assert store.record(kernels[0]).state is KernelState.DEPRECATED


def test_tags_are_given_and_taken(store, kernels):
    done = here("tag", *kernels, "--add", "a", "--add", "b", "--remove", "mine")
    assert ids(done) == kernels
    assert all(store.record(kernel_id).tags == ("a", "b") for kernel_id in kernels)
    assert "has no tags" in here("tag", kernels[0], "--remove", "a", "--remove", "b")


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        (("--add", "a", "--add", "b", "--remove", "b"), "'b' cannot be added and removed at once"),
        (("--add", "a", "--remove", "mine", "--remove", "mime"),
         "'mime' cannot be removed, and nothing was changed: expected tags that any of the"),
    ],
)  # fmt: skip
def test_tags_that_contradict_each_other_or_the_library_change_nothing(
    store, kernels, tags, message
):
    assert message in here("tag", *kernels, *tags, check=2)
    assert [store.record(kernel_id).tags for kernel_id in kernels] == [("mine",), (), ()]


def test_a_service_is_named_in_what_is_wrong_there(store, kernels):
    place = os.environ["ESPER_LIBRARY__WHERE"]
    for arguments in (
        ("show", "0" * 12),
        ("move", "invalid", "0" * 64),
        ("tag", "0", "--add", "x"),
    ):
        text = here(*arguments, check=2)
        assert "holds no kernel" in text
        assert (f"; the library is at {place}\n" in text) is place.startswith("http")


def test_what_nobody_needs_is_removed_once_it_is_meant(store, kernels):
    here("move", "deprecated", *kernels[:2])
    store.refer("a run", kernels[:1])
    text = here("collect")
    assert "0 kernels with 0.0 MiB would be removed; --yes removes them" in text
    assert "2 stay, because they are too new" in text
    text = here("collect", "--grace", 0)
    assert ids(text) == kernels[1:2]
    assert "1 stays, because runs or blueprints need them" in text
    assert len(store.find(states=KernelState)) == 3
    text = here("collect", "--grace", 0, "--yes")
    assert "1 kernel with" in text
    assert "removed; 2 with" in text
    assert "are left" in text
    assert sorted(r.kernel_id for r in store.find(states=KernelState)) == [kernels[0], kernels[2]]
    here("release", "a run")
    report = json.loads(here("collect", "--grace", 0, "--yes", "--json"))
    assert report["removed"] == kernels[:1]
    text = here("collect", "--grace", 0, "--state", "validated", "--keep", 0, "--max-size", 0,
                "--older-than", 0)  # fmt: skip
    assert ids(text) == kernels[2:]


def test_a_run_is_released_by_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(CONFIG + "steps: 20\nvariants: 1\n")
    esper_here("grow", "--task", "spirals", "--config", "tiny.yaml", "--out", "run", check=0)
    run = open_run(Path("run"))
    place, run_id = library_folder(run.path, run.config), run.genesis
    store = Library(place)
    needed = [r.kernel_id for r in store.find(states=KernelState) if store.references(r.kernel_id)]
    assert needed
    assert store.references(needed[0]) == [run_id]
    assert run_id[:16] in here("release", "run", "--library", place)
    assert store.references(needed[0]) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("search", "--order", "beauty"), r"kernels cannot be found by that: .*order"),
        (("search", "--signature", "2>8"), "2>8"),
        (("search", "--state", "done"), "no state 'done': expected one of testing, validated"),
        (("search", "--library", "nowhere"), "there is no library in .*nowhere"),
        (("show", "f" * 64), "holds no kernel"),
        (("move", "better", "abc"), "no state 'better': expected one of"),
        (("move", "invalid", "0" * 12), "holds no kernel"),
        (("tag", "0" * 12), "say which tags to --add or to --remove"),
        (("collect", "--state", "gone"), "no state 'gone'"),
        (("release", "no/run"), "is no folder of a run, and no run's id"),
        (("release", "."), "holds no run"),
    ],
)
def test_what_cannot_be_done_is_said(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Library(tmp_path / "runs/library").close()
    text = here(*arguments, check=2)
    assert re.search(message, text.replace("\n", " ")), text
    assert "Traceback" not in text


def test_one_wrong_kernel_of_several_changes_none(store, kernels):
    for arguments in (("move", "invalid"), ("tag", "--add", "x")):
        assert "holds no kernel" in here(*arguments, kernels[0], "0" * 12, check=2)
    record = store.record(kernels[0])
    assert (record.state, "x" in record.tags) == (KernelState.VALIDATED, False)
