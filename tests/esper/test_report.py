"""The report: one page that holds all it needs, and tells what the runs recorded."""

import dataclasses
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest

from esper.nissa import RunRecord, read_run, write_report
from esper.nissa._report import TIMELINES

KERNEL = "ab" * 32
VOID = {"meta", "br", "link", "img", "input", "hr"}


# Runs, as the trainer writes them


def entry(step: int, kind: str, *, seed: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "step": step, "layer": 0, "seed": seed, "kind": kind,
        "kernel": "", "value": 0.0, "span": 0, "reason": "",
    } | more  # fmt: skip


def graft(step: int, seed: int = 0) -> list[dict[str, Any]]:
    """Asked for at `step`, at work 20 steps later, at full alpha 100 after that."""
    return [
        entry(step, "load", seed=seed, kernel=KERNEL, reason="training loss 0.67 has not fallen"),
        entry(step + 20, "activate", seed=seed, kernel=KERNEL),
        entry(step + 20, "ramp", seed=seed, value=1.0, span=100),
    ]


GROWN = [
    *graft(100),
    entry(200, "health", value=0.875),
    entry(300, "fossilize", kernel=KERNEL, reason="validation loss rises by 1.152 without it"),
    *graft(300, seed=1),
    entry(450, "unload", seed=1, kernel=KERNEL, reason="not worth it"),
]
THERE_FROM_THE_START = [
    entry(0, "load", kernel=KERNEL, reason="there from the start"),
    entry(0, "activate", kernel=KERNEL, value=1.0),
]


def rows(accuracy: float = 0.9, steps: int = 500, parameters: int = 42) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "train_loss": 0.7 * 10.0 ** (-3 * step / steps) if step else None,
            "test_accuracy": 0.5 + (accuracy - 0.5) * step / steps,
            "validation_loss": 0.5,
            "validation_accuracy": 0.5,
            "test_loss": 0.5,
            "stages": [[0]],
            "alphas": [[0.0]],
            "compilations": 1,
            "parameters": parameters,
            "seconds": {"train": step / 100, "evaluate": 0.25, "ponder": 0.125},
        }
        for step in range(0, steps + 1, 50)
    ]


def write_run(
    path: Path,
    *,
    seed: int = 0,
    metrics: list[dict[str, Any]] | None = None,
    events: list[dict[str, Any]] | None = None,
    regions: bool = False,
    versions: dict[str, str] | None = None,
) -> RunRecord:
    path.mkdir(parents=True)
    config = {"task": "spirals", "backend": "jax", "seed": seed, "steps": 500}
    versions = {"jax": "0.10.2", "python": "3.11.7"} if versions is None else versions
    (path / "run.json").write_text(json.dumps({"config": config, "versions": versions}))
    mark = entry(500, "mark")
    lines = [json.dumps({"entry": e, "hash": "0" * 64}) + "\n" for e in [*(events or []), mark]]
    (path / "events.jsonl").write_text("".join(lines))
    if metrics is not None:
        (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    if regions:
        axis = np.linspace(0.0, 1.0, 120, dtype=np.float32)
        grid = np.broadcast_to(axis, (120, 120))
        np.savez_compressed(path / "regions.npz", before=grid, after=grid.T)
    return read_run(path)


@pytest.fixture
def arms(tmp_path: Path) -> dict[str, dict[str, list[RunRecord]]]:
    """Two sections, with three seeds of each arm and with one."""
    runs = tmp_path / "runs"
    small = [write_run(runs / f"small-{i}", seed=i, metrics=rows(0.5 + 0.01 * i)) for i in range(3)]
    grown = [
        write_run(
            runs / f"grown-{i}",
            seed=i,
            metrics=rows(0.9 + 0.05 * i, parameters=1458),
            events=GROWN,
            regions=True,
        )
        for i in range(3)
    ]
    final = write_run(runs / "final", metrics=rows(), events=THERE_FROM_THE_START)
    return {
        "spirals, jax": {"static-small": small, "grown": grown},
        "digits, jax": {"static-final": [final]},
    }


class Page(HTMLParser):
    """What stands in a page: elements and their attributes, and the text that is shown."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        """With single spaces."""
        return " ".join(" ".join(self.words).split())

    def figures(self, about: str) -> list[str]:
        """What the figures say that they show, of those that mention `about`."""
        labels = [str(a["aria-label"]) for tag, a in self.elements if a.get("role") == "img"]
        return [label for label in labels if about in label]


def report(path: Path, arms: dict[str, dict[str, list[RunRecord]]], title: str = "Esper") -> Page:
    write_report(path, arms, title=title)
    return Page(path.read_text())


def one_arm(run: RunRecord) -> dict[str, dict[str, list[RunRecord]]]:
    return {"spirals": {"grown": [run]}}


# The page


def test_needs_nothing_from_elsewhere(tmp_path, arms):
    page = report(tmp_path / "report.html", arms)
    assert not re.findall(r"\w+://", page.source)
    assert not re.findall(r"@import|@font-face", page.source)
    assert all(found == "#" for found in re.findall(r"url\(['\"]?(.)", page.source))
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object", "img"}
    references = [
        str(value) for _, a in page.elements for name, value in a.items() if name in ("href", "src")
    ]
    assert references
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in references)


def test_every_reference_has_one_target(tmp_path, arms):
    page = report(tmp_path / "report.html", arms)
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    links = [str(a["href"]) for _, a in page.elements if str(a.get("href", "")).startswith("#")]
    clips = [str(a["clip-path"])[4:-1] for _, a in page.elements if "clip-path" in a]
    assert links
    assert clips
    assert {link[1:] for link in links + clips} <= set(ids)


def test_equal_runs_give_equal_bytes(tmp_path, arms):
    report(tmp_path / "a.html", arms)
    report(tmp_path / "b.html", arms)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_leaves_no_settings_behind(tmp_path, arms):
    before = dict(mpl.rcParams)
    report(tmp_path / "report.html", arms)
    assert dict(mpl.rcParams) == before


def test_replaces_a_report_and_leaves_nothing_beside_it(tmp_path, arms):
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "report.html"
    path.write_text("the old one")
    report(path, arms)
    assert [found.name for found in path.parent.iterdir()] == ["report.html"]
    assert "the old one" not in path.read_text()


def test_a_folder_that_is_not_there_is_an_error_of_the_system(tmp_path, arms):
    with pytest.raises(OSError, match="No such file"):
        write_report(tmp_path / "missing" / "report.html", arms, title="Esper")


HOSTILE = "</title><script>alert('1')</script>\"><b> & $x^2$ {{ 7*7 }} 種子"


def test_what_runs_say_is_shown_and_never_obeyed(tmp_path):
    events = [entry(100, "load", kernel=KERNEL, reason=HOSTILE), entry(120, "cancel")]
    run = write_run(tmp_path / HOSTILE.replace("/", "_"), metrics=rows(), events=events)
    page = report(tmp_path / "report.html", {HOSTILE: {HOSTILE: [run]}}, title=HOSTILE)
    assert "<script" not in page.source
    assert "</title><" not in page.source.replace("</title>\n<", "")
    # Title (twice), section, arm in several places, reason.
    assert page.text.count(HOSTILE) >= 6
    assert page.figures(HOSTILE)


def test_every_section_and_arm_is_named(tmp_path, arms):
    page = report(tmp_path / "report.html", arms, title="Beside its control arms")
    assert "Beside its control arms" in page.text
    for section, groups in arms.items():
        for arm in groups:
            assert arm in page.text
            for shown in ("test accuracy over", "training loss over", "seconds"):
                assert any(arm in label for label in page.figures(section) if shown in label)


@pytest.mark.parametrize("empty", [{}, {"spirals": {}}, {"spirals": {"grown": []}}])
def test_no_runs_are_called_that(tmp_path, empty):
    page = report(tmp_path / "report.html", empty)
    assert re.search("no runs", page.text)


# Numbers


def test_summary_of_three_seeds(tmp_path, arms):
    text = report(tmp_path / "report.html", arms).text
    # Accuracies 0.9, 0.95 and 1: t(2) = 4.3027, standard deviation 0.05.
    assert "grown 3 95.0% (90.0%–100.0%) 95.0% ± 12.4 1,458 1 1" in text
    assert "static-small 3 51.0% (50.0%–52.0%) 51.0% ± 2.5 42 0 0" in text


def test_summary_of_one_seed(tmp_path, arms):
    text = report(tmp_path / "report.html", arms).text
    assert "static-final 1 90.0% one seed 42 1 0" in text
    assert "One arm alone shows what happened, not that growth helps" in text


def test_where_time_went(tmp_path, arms):
    text = report(tmp_path / "report.html", arms).text
    # Known activities first; one that nobody planned is shown too.
    assert "arm seconds a run total train evaluate ponder" in text
    assert "grown 5.38 5.00 0.25 0.12" in text


def test_a_run_without_metrics_is_named(tmp_path, arms):
    idle = write_run(tmp_path / "idle", seed=7)
    arms["spirals, jax"]["grown"].append(idle)
    arms["digits, jax"]["static-final"] = [idle]
    page = report(tmp_path / "report.html", arms)
    assert "grown, random seed 7: no metrics yet" in page.text
    assert "static-final 1 no metrics – – 0 0" in page.text
    assert page.text.count("None of the runs has recorded it yet.") == 2
    assert "static-final : no times recorded yet." in page.text


def test_a_run_cut_short_is_named_and_ends_the_curve(tmp_path):
    runs = [
        write_run(tmp_path / "whole", metrics=rows(0.9)),
        write_run(tmp_path / "short", seed=1, metrics=rows(0.9)[:5]),
    ]
    page = report(tmp_path / "report.html", {"spirals": {"grown": runs}})
    assert "random seed 1: its last measurement is of step 200 of 500." in page.text
    # Both are at 0.5 + 0.4 · 200/500 there.
    assert page.figures("test accuracy over")[0].endswith("At the end: grown 66.0%.")


@pytest.mark.parametrize("loss", [None, float("nan"), float("inf"), 0.0])
def test_a_loss_that_cannot_be_drawn_leaves_a_gap(tmp_path, loss):
    metrics = rows()
    metrics[4]["train_loss"] = loss
    page = report(tmp_path / "report.html", one_arm(write_run(tmp_path / "run", metrics=metrics)))
    assert "no positive, finite training loss at step 200" in page.text


def test_a_run_that_only_began(tmp_path):
    page = report(
        tmp_path / "report.html", one_arm(write_run(tmp_path / "run", metrics=rows()[:1]))
    )
    assert "its last measurement is of step 0 of 500" in page.text
    assert len(page.figures("test accuracy over")) == 1
    assert page.figures("training loss over") == []


def test_losses_many_decades_apart_are_drawn(tmp_path):
    runs = [write_run(tmp_path / str(i), seed=i, metrics=rows()) for i in range(2)]
    for row in runs[0].metrics:
        row["train_loss"] = 1e-44
    for row in runs[1].metrics:
        row["train_loss"] = 1e38
    page = report(tmp_path / "report.html", {"spirals": {"grown": runs}})
    assert page.figures("training loss over")[0].endswith("grown 0.001.")


def test_long_runs_are_thinned_out(tmp_path):
    metrics = rows(steps=50 * 5_000)
    report(tmp_path / "report.html", one_arm(write_run(tmp_path / "run", metrics=metrics)))
    assert (tmp_path / "report.html").stat().st_size < 100_000


# Growth


def test_stages_over_time(tmp_path, arms):
    page = report(tmp_path / "report.html", arms)
    told = page.figures("stages and alpha")
    assert len(told) == 3
    assert told[0].endswith(
        "Layer 0, seed 0: DORMANT from 0, LOADING from 100, ACTIVE from 120, FOSSILIZED from 300;"
        " Layer 0, seed 1: DORMANT from 0, LOADING from 300, ACTIVE from 320, DORMANT from 450."
    )
    assert "grown: 2 more runs" in page.text
    assert "static-small : no seed ever left DORMANT." in page.text
    assert "static-final : its kernels are there from step 0" in page.text


def test_decisions_and_their_reasons(tmp_path, arms):
    text = report(tmp_path / "report.html", arms).text
    first = KERNEL[:12]
    assert f"100 0 0 graft asked for {first} training loss 0.67 has not fallen" in text
    assert f"300 0 0 fossilised {first} validation loss rises by 1.152 without it" in text
    assert f"450 0 1 unloaded {first} not worth it" in text
    assert KERNEL[:13] not in text


def test_failures_are_told(tmp_path):
    failures = [entry(200, "errors", value=3.0, reason="output not finite"), entry(250, "reset")]
    run = write_run(tmp_path / "run", metrics=rows(), events=[*graft(100), *failures])
    page = report(tmp_path / "report.html", one_arm(run))
    assert page.figures("ERROR_RECOVERY from 200, DORMANT from 250")
    assert "200 0 0 3 failures in a row – output not finite" in page.text
    assert "grown 1 90.0% one seed 42 0 1" in page.text


def test_a_kernel_still_loading_is_neither_kept_nor_removed(tmp_path):
    run = write_run(tmp_path / "run", metrics=rows(), events=graft(490)[:1])
    assert "grown 1 90.0% one seed 42 0 0" in report(tmp_path / "report.html", one_arm(run)).text


@pytest.mark.parametrize(
    "events", [[entry(100, "unload")], [entry(100, "sprout")], [entry(100, "load", kernel="zz")]]
)
def test_events_that_contradict_each_other_are_not_drawn(tmp_path, events):
    run = write_run(tmp_path / "run", metrics=rows(), events=events)
    page = report(tmp_path / "report.html", one_arm(run))
    assert "its events cannot be told as a history" in page.text
    assert page.figures("stages and alpha") == []


def test_only_so_many_runs_are_drawn(tmp_path):
    run = write_run(tmp_path / "run", metrics=rows(), events=graft(100))
    page = report(tmp_path / "report.html", {"spirals": {"grown": [run] * (TIMELINES + 3)}})
    assert len(page.figures("stages and alpha")) == TIMELINES
    assert "3 more are not shown." in page.text


# Regions


def test_regions_of_the_median_run(tmp_path, arms):
    page = report(tmp_path / "report.html", arms)
    shown = page.figures("probability of class 1")
    assert [label.rpartition(": ")[0] for label in shown] == [
        "spirals, jax: grown, random seed 1"
    ] * 2
    assert "grown, random seed 1, test accuracy 95.0%" in page.text
    assert "No arm grew, so there is no before and after." in page.text


def test_regions_are_optional(tmp_path):
    run = write_run(tmp_path / "run", metrics=rows(), events=GROWN)
    page = report(tmp_path / "report.html", one_arm(run))
    assert page.figures("probability of class 1") == []
    assert "grown : no run of it has recorded any" in page.text
    half = dataclasses.replace(run, regions={"before": np.full((120, 120), np.nan, np.float32)})
    page = report(tmp_path / "report.html", one_arm(half))
    assert len(page.figures("before growth")) == 1
    assert page.figures("after growth") == []


# Provenance


def paths(arms: dict[str, dict[str, list[RunRecord]]]) -> Iterator[Path]:
    for groups in arms.values():
        for runs in groups.values():
            yield from (run.path for run in runs)


def test_commands_to_replay_and_versions(tmp_path, arms):
    other = write_run(tmp_path / "a run", metrics=rows(), versions={"jax": "0.11.0"})
    gone = dataclasses.replace(other, path=tmp_path / "gone")
    arms["digits, jax"]["static-final"] += [other, gone]
    text = report(tmp_path / "report.html", arms).text
    for path in paths(arms):
        assert re.search(f"esper replay '?{re.escape(str(path))}", text)
    assert f"esper replay '{other.path}'" in text
    assert "Versions, 7 runs: jax 0.10.2, python 3.11.7." in text
    assert "Versions, 1 run: jax 0.11.0." in text
    assert "Versions, 1 run: unknown" in text
