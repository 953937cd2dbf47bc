"""What a comparison writes: tables, figures and a page."""

import base64
import csv
import dataclasses
import io
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import matplotlib as mpl
import pytest
from PIL import Image

from esper.errors import EsperError, InputError
from esper.tolaria.comparison import (
    Outcome,
    Verdict,
    describe,
    judge,
    read_table,
    write_comparison,
)
from esper.tolaria.comparison._latex import latex, table_tex
from esper.tolaria.comparison._page import page
from esper.tolaria.comparison._table import table_json
from tests.esper.comparison_outcomes import CONTROLS, design, outcome, typical

TABLES = {"table.csv", "table.json", "table.tex", "differences.csv", "report.html"}
FIGURES = ("differences", "accuracy-steps", "accuracy-flops", "accuracy-parameters")
HOSTILE = "</title><script>alert(1)</script>\"'<b> & $x^2$ {{ 7*7 }} \\end{tabular} 50%_#~| 種子"


def figures(budget: str, names: tuple[str, ...] = FIGURES) -> set[str]:
    return {f"equal-{budget}-{name}.{end}" for name in names for end in ("svg", "png")}


@dataclasses.dataclass(frozen=True)
class Written:
    folder: Path
    verdicts: tuple[Verdict, ...]
    runs: tuple[Outcome, ...]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """A verdict under equal steps, and none under equal FLOPs, where a run is missing."""
    folder = tmp_path_factory.mktemp("comparison") / "spirals"
    runs = (*typical(), *typical(budget="flops")[:-1])
    verdicts = (judge(design(), runs), judge(design(budget="flops"), runs))
    assert [verdict.refused for verdict in verdicts] == [False, True]
    before = dict(mpl.rcParams)
    write_comparison(folder, verdicts, runs)
    assert dict(mpl.rcParams) == before
    return Written(folder, verdicts, runs)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_files(written: Written):
    # Without a verdict there are no differences to draw.
    assert set(contents(written.folder)) == (
        TABLES | figures("steps") | figures("flops", FIGURES[1:])
    )


def test_equal_comparisons_give_equal_bytes_whatever_the_order(tmp_path: Path, written: Written):
    write_comparison(tmp_path / "spirals", written.verdicts, reversed(written.runs))
    assert contents(tmp_path / "spirals") == contents(written.folder)


def test_what_is_there_is_replaced_and_what_is_over_is_removed(tmp_path: Path, written: Written):
    folder = tmp_path / "spirals"
    shutil.copytree(written.folder, folder)
    (folder / "notes.txt").write_text("mine")
    (folder / "table.csv").write_text("the old one")
    runs = [dataclasses.replace(run, curve=dataclasses.replace(
        run.curve, flops=(None,) * len(run.curve.flops))) for run in typical()]  # fmt: skip
    write_comparison(folder, [judge(design(), runs)], runs)
    names = tuple(name for name in FIGURES if name != "accuracy-flops")
    assert set(contents(folder)) == TABLES | figures("steps", names) | {"notes.txt"}
    assert "the old one" not in (folder / "table.csv").read_text()


def test_a_full_disk_leaves_what_was_there(small_disk: Callable[[int], Path]):
    folder = small_disk(64)
    (folder / "table.csv").write_text("the old one")
    with pytest.raises(OSError, match="No space left"):
        write_comparison(folder, [judge(design(), [])], [])
    assert contents(folder) == {"table.csv": b"the old one"}


@pytest.mark.parametrize("count", [0, 2])
def test_one_verdict_for_each_budget(tmp_path: Path, written: Written, count: int):
    got = ["none", "", "steps, steps"][count]
    with pytest.raises(InputError, match=f"one verdict for each budget, got {got}; judge each"):
        write_comparison(tmp_path / "out", [written.verdicts[0]] * count, written.runs)
    assert not (tmp_path / "out").exists()


# Tables


def test_the_json_table_is_lossless(written: Written):
    verdicts, runs = read_table(written.folder / "table.json")
    assert verdicts == written.verdicts
    assert runs == tuple(sorted(written.runs, key=lambda o: (o.budget, o.arm, o.seed)))


def test_what_is_not_finite_is_kept(tmp_path: Path):
    runs = [outcome("fixed", 0, 0.1, test_loss=math.inf), outcome("heuristic", 0, math.nan)]
    verdict = judge(design(), runs)
    (tmp_path / "table.json").write_bytes(table_json([verdict], runs))
    (read,), (fixed, heuristic) = read_table(tmp_path / "table.json")
    assert read == verdict
    assert fixed == runs[0]
    assert heuristic.test_accuracy is not None
    assert math.isnan(heuristic.test_accuracy)
    # No reader chokes on it.
    json.loads((tmp_path / "table.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c | {"schema_version": 7}, "has schema version 7, this Esper reads 1: use the"),
        (lambda c: {}, "cannot be read as the table of a comparison: expected `schema_version`"),
        (lambda c: c | {"outcomes": [{"arm": "fixed"}]}, "cannot be read as the table"),
        (lambda c: c | {"more": 1}, "cannot be read as the table of a comparison"),
        (lambda c: [], "cannot be read as the table of a comparison"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path: Path, written: Written, change, message):
    content = json.loads((written.folder / "table.json").read_bytes())
    (tmp_path / "table.json").write_text(json.dumps(change(content)))
    with pytest.raises(EsperError, match=message):
        read_table(tmp_path / "table.json")


def test_a_table_that_is_not_there(tmp_path: Path):
    with pytest.raises(EsperError, match=r"(?s)cannot be read.*write it again from the runs"):
        read_table(tmp_path / "table.json")


def test_the_csv_tables(written: Written):
    rows = list(csv.DictReader(io.StringIO((written.folder / "table.csv").read_text())))
    assert [(row["budget"], row["arm"]) for row in rows] == [
        (budget, arm) for budget in ("steps", "flops") for arm in ("heuristic", *CONTROLS)
    ]
    verdict = written.verdicts[0]
    for row, pair in zip(rows[1:5], verdict.pairs, strict=True):
        assert row["verdict"] == pair.word
        assert float(row["mean_difference"]) == pair.mean
        assert (float(row["low"]), float(row["high"])) == (pair.low, pair.high)
        assert float(row["p_holm"]) == pair.p_holm
    assert rows[0]["role"] == "treatment"
    assert rows[0]["verdict"] == rows[0]["p"] == ""
    assert {row["verdict"] for row in rows[5:]} == {"no verdict"}
    assert {row["mean_difference"] for row in rows[5:]} == {""}
    assert float(rows[0]["mean"]) == verdict.arms[0].mean

    rows = list(csv.DictReader(io.StringIO((written.folder / "differences.csv").read_text())))
    assert len(rows) == 40
    for pair in verdict.pairs:
        found = [float(row["difference"]) for row in rows if row["control"] == pair.control]
        assert found == list(pair.differences)
    assert [row["seed"] for row in rows[:10]] == [str(seed) for seed in range(10)]
    assert {row["budget"] for row in rows} == {"steps"}


def tabulars(source: str) -> list[list[list[str]]]:
    """The cells of each tabular, by row."""
    bodies = re.findall(
        r"\\begin\{tabular\}\{@\{\}lrrrrrl@\{\}\}(.*?)\\end\{tabular\}", source, re.S
    )
    return [
        [re.split(r"(?<!\\) & ", line.removesuffix(r" \\")) for line in body.splitlines()
         if line.endswith(r" \\")]
        for body in bodies
    ]  # fmt: skip


def test_the_latex_table(written: Written):
    steps, flops = tabulars((written.folder / "table.tex").read_text())
    assert [row[0] for row in steps[2:]] == ["heuristic", *CONTROLS]
    assert {len(row) for row in steps[1:]} == {7}
    assert [row[-1] for row in steps[2:]] == [
        "treatment", "better", "worse", "equivalent", "undecided"
    ]  # fmt: skip
    pair = written.verdicts[0].pairs[1]
    assert steps[4][4].startswith(f"$-${-100 * pair.mean:.2f} ($-$")
    assert {row[-1] for row in flops[2:]} == {"no verdict"}


def test_names_are_escaped_for_latex():
    assert latex('50 %_#&$ {x} \\ ~^ <|>" –\n a') == (
        r"50 \%\_\#\&\$ \{x\} \textbackslash{} \textasciitilde{}\textasciicircum{}"
        r" \textless{}\textbar{}\textgreater{}\textquotedblright{} -- a"
    )


def hostile(tmp_path: Path) -> tuple[Verdict, Path]:
    runs = [
        dataclasses.replace(run, arm=HOSTILE) if run.arm == "fixed" else run for run in typical()
    ]
    runs = [
        dataclasses.replace(run, arm="_hidden $a$") if run.arm == "random" else run for run in runs
    ]
    plan = design(controls=("static-small", "static-final", HOSTILE, "_hidden $a$"))
    verdict = judge(plan, runs)
    write_comparison(tmp_path, [verdict], runs)
    return verdict, tmp_path


def test_hostile_names(tmp_path: Path):
    verdict, folder = hostile(tmp_path)
    # A table of LaTeX keeps its shape.
    (rows,) = tabulars((folder / "table.tex").read_text())
    assert {len(row) for row in rows[1:]} == {7}
    body = (folder / "table.tex").read_text()
    assert body.count(r"\end{tabular}") == body.count(r"\begin{tabular}") == 1
    # A page shows them and obeys none.
    page = Page((folder / "report.html").read_text())
    assert "<script" not in page.source
    assert HOSTILE in page.text
    # A figure draws them all, long ones cut, and those with an underscore too.
    drawn = {text.strip() for text in texts(folder / "equal-steps-accuracy-steps.svg")}
    assert drawn >= {f"{HOSTILE[:23]}…", "_hidden $a$"}
    assert "alert" in describe(verdict)
    assert read_table(folder / "table.json")[0] == (verdict,)


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="there is no LaTeX here")
def test_latex_takes_the_table(tmp_path: Path):
    name = HOSTILE.encode("ascii", "ignore").decode().strip()
    runs = [dataclasses.replace(run, arm=name) if run.arm == "fixed" else run for run in typical()]
    verdict = judge(design(controls=("static-small", "static-final", name, "random")), runs)
    (tmp_path / "table.tex").write_bytes(table_tex([verdict, verdict]))
    (tmp_path / "paper.tex").write_text(
        r"\documentclass{article}\usepackage{booktabs}"
        r"\begin{document}\input{table}\end{document}"
    )
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


# Figures


def texts(path: Path) -> list[str]:
    return [e.text or "" for e in ET.parse(path).iter("{http://www.w3.org/2000/svg}text")]


def test_figures_name_arms_and_axes_and_no_date(written: Written):
    for path in written.folder.glob("*.svg"):
        drawn = texts(path)
        for arm in CONTROLS:
            assert arm in drawn
        assert not any(e.tag.endswith("date") for e in ET.parse(path).iter())
    assert "training FLOPs, cumulative" in texts(written.folder / "equal-steps-accuracy-flops.svg")
    assert any(
        text.startswith("heuristic minus control, test accuracy in percentage points")
        for text in texts(written.folder / "equal-steps-differences.svg")
    )


def test_pictures_are_pictures(written: Written):
    for path in written.folder.glob("*.png"):
        with Image.open(path) as picture:
            picture.load()
            assert picture.width > 1_000
            assert set(picture.info) <= {"dpi"}
            assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 5


def test_figures_of_runs_measured_at_other_places(tmp_path: Path):
    # Under equal FLOPs arms have other steps, and grown runs of two seeds other FLOPs.
    runs = typical(budget="flops")
    stretched = [
        dataclasses.replace(run, curve=dataclasses.replace(
            run.curve,
            steps=tuple(2 * step + run.seed for step in run.curve.steps),
            test_accuracy=(*run.curve.test_accuracy[:-2], None, run.curve.test_accuracy[-1])))
        for run in runs
    ]  # fmt: skip
    write_comparison(tmp_path, [judge(design(budget="flops"), stretched)], stretched)
    assert set(texts(tmp_path / "equal-flops-accuracy-steps.svg")) >= {"heuristic", *CONTROLS}


def test_figures_without_a_run(tmp_path: Path):
    verdict = judge(design(), [])
    write_comparison(tmp_path, [verdict], [])
    assert set(contents(tmp_path)) == TABLES | figures("steps", (FIGURES[1], FIGURES[3]))
    assert "There are no runs." in Page((tmp_path / "report.html").read_text()).text


# The page


VOID = {"meta", "br", "img"}


class Page(HTMLParser):
    """What stands in a page; every element is closed in its place."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._words: list[str] = []
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self._words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self._words).split())

    @property
    def images(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == "img"]


@pytest.fixture
def report(written: Written) -> Page:
    return Page((written.folder / "report.html").read_text())


def test_the_page_needs_nothing_from_elsewhere(report: Page):
    for _, attributes in report.elements:
        for name in ("href", "src"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#"))
    assert not re.search(r"@import|url\(|<script|<link", report.source)
    assert "prefers-color-scheme: dark" in report.source


def test_the_page_begins_with_what_was_found(report: Page, written: Written):
    top = report.text.split("beside its controls")[0]
    assert "heuristic is better than static-small; worse than static-final;" in top
    assert "No verdict: these runs do not allow one." in top
    assert "the seeds are not paired: 'random' lacks 9 of" in top
    for pair in written.verdicts[0].pairs:
        assert f"interval {100 * pair.low:+.2f} to {100 * pair.high:+.2f}" in top
    for assumption in written.verdicts[0].assumptions:
        assert assumption in top
    assert "in the mean of 10 pairs" in top
    assert "static-small 12.5 s" in top
    assert "There is no verdict." in report.text


def test_the_page_holds_its_figures_in_both_themes(report: Page):
    assert len(report.images) == 7
    for image in report.images:
        kind, _, data = (image["src"] or "").partition(",")
        assert kind == "data:image/svg+xml;base64"
        root = ET.fromstring(base64.b64decode(data))
        source = base64.b64decode(data).decode()
        assert "prefers-color-scheme: dark" in source
        assert "currentColor" in source
        assert root.tag.endswith("svg")
        assert len(image["alt"] or "") > 40
    assert "Better than static-small" in (report.images[0]["alt"] or "")


def test_caveats_are_at_the_top():
    verdict = judge(design(controls=("static-small",)), typical())
    source = page([verdict], {}, "spirals").decode()
    top = Page(source).text.split("beside its controls")[0]
    assert "Beware: The design has no static-final, fixed, random:" in top
