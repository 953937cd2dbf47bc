"""The live page as a person meets it: a real browser, a real server, real run folders."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from esper.errors import InputError
from esper.nissa import write_page
from tests.esper.watch_runs import Plan, RunMaker, long_rows, make_run
from tests.esper.watch_server import Server, chromium, serving

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>"


def unsettled(path: Path) -> Path:
    """A run that was taken back once, and lost a line."""
    maker = RunMaker(path, Plan(layers=6, seeds=4, steps=1_000, reason=HOSTILE, busy=0.1))
    for _ in range(30):
        maker.boundary()
    maker.go_back(10)
    maker.finish()
    with (path / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": "{HOSTILE}"}}\n')
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    unsettled(folder / "b <i>old")
    long_rows(make_run(folder / "long", layers=2, steps=40), 40_000)
    make_run(folder / "wide", layers=200, seeds=8, steps=40, busy=0.1)
    (folder / "z").mkdir()
    (folder / "z" / "run.json").write_text('{"schema_version": 3}')
    return folder


@pytest.fixture(scope="module")
def server(root) -> Iterator[Server]:
    with serving(root) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


class Page:
    """What is on the page."""

    def __init__(self, browser: Any, url: str, **media: str) -> None:
        self.browser = browser
        features = [
            {"name": f"prefers-{k.replace('_', '-')}", "value": v} for k, v in media.items()
        ]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        browser.get("about:blank")
        browser.get_log("browser")
        browser.get(url)

    def ask(self, script: str) -> Any:
        return self.browser.execute_script(f"return {script.strip()}")

    def text(self, selector: str) -> str:
        return self.ask(f"document.querySelector({json.dumps(selector)}).textContent")

    def until(self, script: str, seconds: float = 30.0) -> None:
        limit = time.monotonic() + seconds
        while not self.ask(script):
            assert time.monotonic() < limit, f"{script}: {self.ask('document.body.innerText')}"
            time.sleep(0.05)

    def press(self, *keys: str) -> None:
        from selenium.webdriver import ActionChains

        ActionChains(self.browser).send_keys(*keys).perform()

    @property
    def focus(self) -> str:
        return self.ask(
            "document.activeElement.getAttribute('aria-label')"
            " || document.activeElement.textContent"
        )

    def quiet(self) -> None:
        """Nothing was said on the console, and nothing of a run has run."""
        assert self.browser.get_log("browser") == []
        assert self.ask("window.hacked === undefined")
        assert self.ask("document.querySelectorAll('img, main script, iframe').length") == 0


Open = Callable[..., Page]


@pytest.fixture
def page(browser, server) -> Open:
    def opened(run: str, **media: str) -> Page:
        from urllib.parse import urlencode

        found = Page(browser, f"{server.url}#{urlencode({'run': run})}", **media)
        found.until("!document.getElementById('content').hidden")
        found.until("document.getElementById('tiles').children.length > 0")
        return found

    return opened


OLD = "b <i>old"


def test_shows_what_the_run_did(page):
    shown = page(OLD)
    assert shown.text("#title") == OLD
    assert shown.text("#state") == "ended"
    assert shown.text("#steps") == "step 1,000 of 1,000"
    tiles = shown.ask(
        "Object.fromEntries([...document.querySelectorAll('#tiles div')].map("
        "(d) => [d.children[0].textContent, d.children[1].textContent]))"
    )
    assert tiles["rollbacks"] == "1"
    assert tiles["test accuracy"].endswith("%")
    assert tiles["training FLOPs"] == "2.00 G"
    assert shown.ask("document.querySelectorAll('#grid .row').length") == 6
    assert shown.ask("document.querySelectorAll('#grid .cell').length") == 24
    assert shown.ask("document.querySelectorAll('#runs a').length") == 4
    assert shown.ask("document.querySelectorAll('figure canvas').length") == 7
    entries = shown.text("#entries")
    assert "rolled back to step 400" in entries
    assert "the training loss is not finite; half the learning rate" in entries
    assert "taken back" in entries
    assert "vetoed: graft" in entries
    assert "cooldown: layer" in entries
    expects = "graft expected to bring 0.5"
    assert expects in entries
    assert "unlike any network of its training" in entries
    shown.ask(
        "[...document.querySelectorAll('#filters button')]"
        ".find((b) => b.textContent === 'What it expects').click()"
    )
    shown.until(f"!document.getElementById('entries').textContent.includes('{expects}')")
    assert "cooldown: layer" in shown.text("#entries")
    assert "metrics.jsonl, line 62: it cannot be read" in shown.text("#problems")
    assert shown.ask("document.querySelectorAll('#worths tbody tr').length") > 3
    assert "train" in shown.text("#times")
    shown.quiet()


def test_what_runs_say_is_shown_and_never_obeyed(page):
    shown = page(OLD)
    assert HOSTILE in shown.text("#entries")
    shown.ask("document.querySelector('#filters button').click()")
    shown.quiet()


def test_the_numbers_are_those_of_the_files(page, root):
    shown = page(OLD)
    last = json.loads((root / OLD / "metrics.jsonl").read_text().splitlines()[-2])
    stages = [stage for seeds in last["stages"] for stage in seeds]
    told = "[...document.querySelectorAll('#grid .cell')].map((c) => c.getAttribute('aria-label'))"
    names = ["dormant", "loading", "active", "error recovery", "fossilised"]
    labels = shown.ask(told)
    for at, (label, stage) in enumerate(zip(labels, stages, strict=True)):
        alpha = [a for line in last["alphas"] for a in line][at]
        assert label.startswith(f"blocks.{at // 4}.linear, seed {at % 4}: {names[stage]}")
        assert (f", alpha {alpha:.2f}" in label) == (stage >= 2)
    counts = shown.text("#legend")
    assert f"fossilised {stages.count(4)}" in counts
    assert f"active {stages.count(2)}" in counts


@pytest.mark.parametrize(
    ("script", "text"),
    [
        ("tickText(5e8)", "500 M"), ("tickText(1e9)", "1 G"), ("tickText(1.5e9)", "1.5 G"),
        ("tickText(50000)", "50 k"), ("tickText(10000)", "10 k"), ("tickText(1500)", "1,500"),
        ("tickText(0)", "0"), ("tickText(0.05)", "0.05"), ("tickText(-0.5)", "-0.5"),
        ("tickText(2e-5)", "2e-5"), ("real(3012.4, 3)", "3,012"), ("real(357.2, 3)", "357"),
        ("real(0.05601)", "0.05601"), ("real(1.5e-7)", "1.50e-7"), ("real(2e6)", "2.00e6"),
        ("real(null)", "–"), ("real(0)", "0"), ("si(950)", "950"), ("si(1788)", "1,788"),
        ("si(107000)", "107 k"), ("si(4e9)", "4.00 G"), ("percent(0.9648)", "96.5 %"),
        ("duration(7)", "7 s"), ("duration(600)", "10 min"), ("duration(7200)", "2 h"),
    ],
)  # fmt: skip
def test_numbers_are_written_as_people_do(numbers, script, text):
    assert numbers.ask(script) == text


@pytest.fixture(scope="module")
def numbers(browser, server) -> Page:
    return Page(browser, f"{server.url}#run=z")


def test_the_grid_by_keys(page):
    from selenium.webdriver import Keys

    shown = page(OLD)
    shown.ask("document.getElementById('seeds').focus()")
    shown.press(Keys.TAB, Keys.TAB, Keys.TAB)
    assert shown.focus.startswith("blocks.0.linear, seed 0: ")
    shown.press(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    assert shown.focus.startswith("blocks.2.linear, seed 1: ")
    assert shown.text("#chosen") == "blocks.2.linear · layer 2, seed 1"
    shown.press(Keys.END)
    assert shown.focus.startswith("blocks.2.linear, seed 3: ")
    shown.press(Keys.PAGE_DOWN, Keys.ARROW_DOWN)
    assert shown.focus.startswith("blocks.5.linear, seed 3: ")
    # One of all cells is in the order of tabs, and it can be seen which has the focus.
    assert shown.ask("document.querySelectorAll('#grid .cell[tabindex=\"0\"]').length") == 1
    assert shown.ask("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert shown.ask("location.hash").endswith("seed=5.3")
    shown.quiet()


def test_curves_by_keys_and_as_tables(page):
    from selenium.webdriver import Keys

    shown = page(OLD)
    shown.ask("document.querySelector('#curves canvas').focus()")
    spoken = "document.activeElement.getAttribute('aria-valuetext')"
    assert shown.ask(spoken).startswith("step 1,000: train 0.")
    for _ in range(20):
        # A browser that is busy may take the focus away once more; Home twice is Home.
        shown.ask("document.querySelector('#curves canvas').focus()")
        shown.press(Keys.HOME)
        time.sleep(0.2)
        if shown.ask(spoken).startswith("step 0"):
            break
    shown.until(f"{spoken}.startsWith('step 0: train –, validation ')")
    shown.press(Keys.ARROW_RIGHT)
    shown.until(f"{spoken}.startsWith('step 20: train 0.')")
    shown.press(Keys.ESCAPE)
    shown.until(f"{spoken}.startsWith('step 1,000')")
    shown.ask("document.querySelector('#curves summary').click()")
    shown.until("document.querySelectorAll('#curves details[open] tbody tr').length > 40")
    shown.quiet()


def test_every_control_has_a_name(page):
    shown = page(OLD)
    unnamed = shown.ask(
        "[...document.querySelectorAll('button, input, a, canvas, [tabindex]')].filter((e) =>"
        " !(e.getAttribute('aria-label') || e.getAttribute('aria-labelledby')"
        " || e.textContent.trim() || e.ariaHidden)).map((e) => e.outerHTML)"
    )
    assert unnamed == []
    ids = shown.ask("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))
    assert shown.ask("document.querySelectorAll('h1').length") == 1


PAINTED = """
(() => {
  const pen = document.getElementById("cells").getContext("2d");
  const ratio = window.devicePixelRatio;
  const hex = (value) => value.toString(16).padStart(2, "0");
  return cells.map((cell, at) => {
    const [x, y, size] = places[Math.floor(at / run.grid.seeds)];
    const left = (x + (at % run.grid.seeds) * (size + 1)) * ratio;
    const data = pen.getImageData(left, y * ratio, size * ratio, size * ratio).data;
    const found = new Set();
    for (let i = 0; i < data.length; i += 4)
      if (data[i + 3] === 255)
        found.add("#" + [...data.slice(i, i + 3)].map(hex).join(""));
    return [run.grid.stages[at], run.grid.alphas[at], [...found]];
  });
})()
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_cells_are_painted_by_stage(page, scheme):
    shown = page(OLD, color_scheme=scheme)
    shown.until("drawn && drawn[0] >= 0")
    fills = shown.ask("FILLS.map((name) => name && paint[name])")
    edges = shown.ask("EDGES.map((name) => paint[name])")
    ink = shown.ask("paint['--ink']")
    seen = set()
    for stage, alpha, colours in shown.ask(PAINTED):
        seen.add(stage)
        assert edges[stage] in colours
        if fills[stage] and (alpha > 0.1 or stage in (1, 3)):
            assert fills[stage] in colours
        assert not set(fills) - {fills[stage], None} & set(colours)
        assert stage == 0 or ink in colours
    assert {2, 4} <= seen


def test_cells_are_painted_anew_for_another_scheme(browser, page):
    shown = page(OLD, color_scheme="light")
    shown.until("drawn && drawn[0] >= 0")
    light = shown.ask(PAINTED)
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    shown.until("paint['--ink'] === '#e6e8eb' && !dirty.size")
    assert not any(set(a[2]) & set(b[2]) for a, b in zip(light, shown.ask(PAINTED), strict=True))


def test_the_height_of_a_cell_is_alpha_or_health(page):
    shown = page(OLD)
    shown.until("drawn && drawn[0] >= 0")
    at = shown.ask("run.grid.health.findIndex((h) => h < 0.9)")
    assert shown.ask(f"drawn[{at}] % 64") == round(50 * shown.ask(f"run.grid.alphas[{at}]"))
    shown.ask("document.querySelectorAll('#fills button')[1].click()")
    shown.until(f"drawn[{at}] % 64 === Math.round(50 * run.grid.health[{at}])")
    assert shown.ask("document.querySelector('#fills [aria-pressed=true]').textContent") == (
        "height: health"
    )


CONTRAST = """
(() => {
  const probe = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (text) => {
    probe.clearRect(0, 0, 1, 1);
    probe.fillStyle = text;
    probe.fillRect(0, 0, 1, 1);
    return [...probe.getImageData(0, 0, 1, 1).data];
  };
  const light = (c) => c.slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ratio = (a, b) => {
    const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
    return (x + 0.05) / (y + 0.05);
  };
  const behind = (element) => {
    const found = [];
    for (let at = element; at; at = at.parentElement) {
      const style = getComputedStyle(at);
      for (const [colour] of style.backgroundImage.matchAll(/rgba?\\([^)]*\\)/g))
        if (rgba(colour)[3] === 255) found.push(rgba(colour));
      const own = rgba(style.backgroundColor);
      if (own[3] === 255) { found.push(own); break; }
    }
    return found;
  };
  const bad = [];
  let seen = 0;
  for (const element of document.querySelectorAll("body *")) {
    const words = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!words || !element.checkVisibility() || element.closest(".away, .skip, script, style"))
      continue;
    seen += 1;
    const ink = rgba(getComputedStyle(element).color);
    for (const paper of behind(element))
      if (ratio(ink, paper) < 4.5)
        bad.push(element.className + " " + element.textContent.slice(0, 30) + ratio(ink, paper));
  }
  // What is painted: letters on the cells, and the words beside the curves.
  for (const fill of ["--card", ...FILLS.filter(Boolean)])
    if (ratio(rgba(paint["--ink"]), rgba(paint[fill])) < 4.5) bad.push("letters on " + fill);
  for (const words of ["--soft", "--warn", "--ink"])
    if (ratio(rgba(paint[words]), rgba(paint["--card"])) < 4.5) bad.push(words);
  for (const line of ["--train", "--validation", "--test", "--other"])
    if (ratio(rgba(paint[line]), rgba(paint["--card"])) < 3) bad.push(line);
  return [seen, bad];
})()
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_what_is_behind_them(page, scheme):
    shown = page(OLD, color_scheme=scheme)
    paper = shown.ask("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
    seen, bad = shown.ask(CONTRAST)
    assert seen > 100
    assert bad == []
    # The check itself can fail.
    grey = {"light": "#999", "dark": "#555"}[scheme]
    shown.ask(f"document.documentElement.style.setProperty('--soft', '{grey}')")
    assert shown.ask(CONTRAST)[1]


def test_nothing_moves_where_that_was_asked_for(page):
    moving = "getComputedStyle(document.getElementById('bar')).transitionDuration"
    assert page(OLD, reduced_motion="reduce").ask(moving) == "0s"
    assert page(OLD, reduced_motion="no-preference").ask(moving) == "0.25s"


def test_a_narrow_window_needs_no_scrolling_sideways(browser, page):
    size = browser.get_window_size()
    try:
        browser.set_window_size(500, 900)
        shown = page("wide")
        wide = shown.ask("document.documentElement.scrollWidth - window.innerWidth")
        assert wide <= 0
    finally:
        browser.set_window_size(size["width"], size["height"])


def test_a_long_run_is_thinned_and_says_so(page):
    shown = page("long")
    shown.until("document.getElementById('thinned').textContent.startsWith('40,000 meas')")
    assert "64 to a point" in shown.text("#thinned")
    assert shown.ask("run.series.step.length") <= 1024
    assert shown.ask("Math.max(...run.series.train_loss_high)") == 9
    shown.quiet()


def test_a_run_that_cannot_be_read_says_why(browser, server):
    shown = Page(browser, f"{server.url}#run=z")
    shown.until("document.getElementById('waiting').textContent.includes('schema version 3')")
    assert shown.ask("document.getElementById('content').hidden")
    shown.quiet()


def test_another_run_is_chosen_from_the_list(page):
    shown = page("wide")
    assert shown.ask("document.querySelectorAll('#grid .cell').length") == 1600
    assert shown.ask("document.querySelector('#runs a[aria-current]').firstChild.textContent") == (
        "wide"
    )
    shown.ask("document.querySelector('#runs a').click()")
    shown.until("document.querySelectorAll('#grid .cell').length === 24")
    assert shown.text("#title") == OLD
    shown.quiet()


def test_a_run_that_trains_is_followed(page, root):
    maker = RunMaker(root / "live", Plan(steps=10_000, busy=0.3))
    for _ in range(5):
        maker.boundary()
    shown = page(OLD)
    shown.until(
        "[...document.querySelectorAll('#runs .name')].some((n) => n.textContent === 'live')"
    )
    shown = page("live")
    assert shown.text("#state") == "training"
    shown.until("document.getElementById('steps').textContent === 'step 80 of 10,000'")
    shown.until("history && history.step.length === 5")
    for _ in range(3):
        maker.boundary()
        shown.until(f"run.now.step === {maker.step - 20}")
    shown.until("document.getElementById('steps').textContent === 'step 140 of 10,000'")
    # The chosen seed's curve is what the server would tell of it.
    shown.until("history.step.length === 8 && history.step.at(-1) === 140")
    assert shown.ask("history.alphas.at(-1)") == pytest.approx(
        float(maker.state.alpha[0, 0]), abs=1e-3
    )
    maker.go_back(4)
    shown.until("document.getElementById('entries').textContent.includes('rolled back to step 80')")
    maker.boundary()
    shown.until("document.getElementById('steps').textContent === 'step 80 of 10,000'")
    maker.close()
    shown.quiet()


# The same page from a file


def test_one_file_holds_the_page_and_its_data(browser, root, tmp_path):
    file = tmp_path / "page.html"
    assert write_page(root / OLD, file) == 1
    assert HOSTILE not in file.read_text()
    shown = Page(browser, file.as_uri())
    shown.until("document.getElementById('tiles').children.length > 0")
    assert shown.text("#title") == OLD
    assert shown.text("#steps") == "step 1,000 of 1,000"
    assert shown.text("#live") == "as it was when this page was written"
    assert HOSTILE in shown.text("#entries")
    shown.ask("document.querySelectorAll('#grid .cell')[9].click()")
    shown.until("document.getElementById('chosen').textContent.includes('layer 2, seed 1')")
    assert shown.ask("history.step.length") == shown.ask("run.series.step.length")
    assert shown.ask("performance.getEntriesByType('resource').length") == 0
    shown.quiet()


def test_one_file_holds_many_runs(browser, root, tmp_path):
    runs = tmp_path / "runs"
    for seed in range(2):
        make_run(runs / f"seed-{seed}", seed=seed, steps=100 + 20 * seed)
    file = tmp_path / "page.html"
    file.write_text("the old one")
    assert write_page(runs, file) == 2
    assert [found.name for found in tmp_path.iterdir() if found.is_file()] == ["page.html"]
    shown = Page(browser, file.as_uri())
    shown.until("document.getElementById('steps').textContent === 'step 100 of 100'")
    shown.ask("document.querySelectorAll('#runs a')[1].click()")
    shown.until("document.getElementById('steps').textContent === 'step 120 of 120'")
    shown.quiet()


def test_a_run_that_cannot_be_read_is_listed_in_the_file(root, tmp_path):
    runs = tmp_path / "runs"
    make_run(runs / "a", steps=20)
    make_run(runs / "b", steps=20)
    (runs / "b" / "run.json").write_text("{")
    assert write_page(runs, tmp_path / "page.html") == 1
    assert "run.json is damaged" in (tmp_path / "page.html").read_text()
    with pytest.raises(InputError, match="damaged"):
        write_page(runs / "b", tmp_path / "page.html")
