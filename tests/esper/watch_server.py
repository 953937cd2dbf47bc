"""The command `esper watch` in a process of its own, and a browser to look at it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

COMMAND = """
import sys, typer
from esper.cli._watch import watch
app = typer.Typer()
app.command()(watch)
app(prog_name="esper watch")
"""


class Server:
    """A live page's server that listens."""

    def __init__(self, process: "subprocess.Popen[str]", said: str) -> None:
        self.process = process
        self.said = said
        found = re.search(r"http://\S+:(\d+)/", said)
        assert found is not None, said
        self.url = found[0]
        self.port = int(found[1])

    def get(self, path: str, **headers: str) -> tuple[int, dict[str, str], str]:
        """Status, headers in small letters and body of an answer."""
        request = urllib.request.Request(self.url + path, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                known = {key.lower(): value for key, value in answer.headers.items()}
                return answer.status, known, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, {}, error.read().decode()

    def stream(self, run: str) -> "Stream":
        """What a page of this run is told."""
        query = urllib.parse.urlencode({"run": run})
        return Stream(urllib.request.urlopen(f"{self.url}api/stream?{query}", timeout=30))


class Stream:
    """Server-sent events as they come."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self._answer.close()

    def next(self, wanted: str = "run") -> dict[str, Any]:
        """The next event of a kind."""
        kind = ""
        while True:
            line = self._answer.readline().decode()
            assert line, "the stream has ended"
            if line.startswith("event: "):
                kind = line[7:].strip()
            elif line.startswith("data: ") and kind == wanted:
                return json.loads(line[6:])

    def rest(self) -> str:
        """What is said until the stream ends."""
        return self._answer.read().decode()


@contextmanager
def serving(root: Path) -> Iterator[Server]:
    """`esper watch ROOT` on a free port, interrupted at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(root), "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    try:
        said = process.stdout.readline()
        if not said:
            raise AssertionError(process.communicate()[1])
        yield Server(process, said)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
        process.stdout.close()
        assert process.stderr is not None
        process.stderr.close()


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless Chromium; skips the test where there is none, and fails it where CI is set."""
    missing = ""
    try:
        from selenium.webdriver import Chrome, ChromeOptions, ChromeService
    except ImportError as error:
        missing = f"selenium cannot be imported ({error})"
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not missing and not (browser and driver):
        missing = f"chromium is {browser}, chromedriver is {driver}"
    if missing:
        if os.environ.get("CI") == "true":
            pytest.fail(f"the live page must be looked at in a browser here: {missing}")
        pytest.skip(f"needs a browser: {missing}")
    options = ChromeOptions()
    options.binary_location = browser
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--window-size=1400,1000",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = Chrome(options=options, service=ChromeService(driver))
    try:
        yield found
    finally:
        found.quit()
