"""The live page, and the same page with its data inside.

The page is one file without anything from elsewhere. Its policy names the digests of its own style
and script, so that nothing else in it would ever run; all text from runs is set as text.
"""

import base64
import hashlib
import json
import re
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from esper._files import write_atomically
from esper.errors import InputError
from esper.nissa._catalogue import Catalogue
from esper.nissa._messages import Cursor, message, seed_history
from esper.nissa._run_files import find_runs
from esper.nissa._watched import WatchedRun

_DATA = "<!-- data -->"
_POLICY = "<!-- policy -->"

SEED_POINTS = 256
"""Most points of a seed's history in a page that holds its data."""


@cache
def _source() -> str:
    return (files("esper.nissa") / "watch.html").read_text(encoding="utf-8")


def _policy(connect: str) -> str:
    """What the page may do: run its own script, use its own style, and ask its own server."""
    digests = {
        tag: " ".join(f"'sha256-{_digest(text)}'" for text in _inside(tag))
        for tag in ("style", "script")
    }
    return (
        f"default-src 'none'; script-src {digests['script']}; style-src {digests['style']};"
        f" img-src data:; connect-src {connect}; base-uri 'none'; form-action 'none'"
    )


def _inside(tag: str) -> list[str]:
    return re.findall(rf"<{tag}>(.*?)</{tag}>", _source(), flags=re.DOTALL)


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@cache
def live_page() -> tuple[bytes, str]:
    """The page that asks its server, and its Content-Security-Policy."""
    page = _source().replace(_DATA, "").replace(_POLICY, "")
    return page.encode(), _policy("'self'") + "; frame-ancestors 'none'"


def write_page(root: Path, file: Path) -> int:
    """Write one page that holds all that the live page would show now, and opens from a disk.

    Args:
        root: the folder of a run, or one of runs.
        file: what to write; one that is there is replaced, whole or not at all.

    Returns:
        The number of runs in it.

    Raises:
        InputError: where there is no run, or the only one cannot be read, or `file` is in no
            folder.
        OSError: where a file cannot be read, or the disk does not take the page.
    """
    find_runs(root)
    if file.is_dir() or not file.parent.is_dir():
        what = "it is a folder" if file.is_dir() else f"there is no folder {file.parent}"
        raise InputError(f"the page {file} cannot be written: {what}; give another --once")
    catalogue = Catalogue(root)
    catalogue.refresh()
    runs: dict[str, Any] = {}
    for name, path in catalogue.paths.items():
        try:
            runs[name] = _whole(WatchedRun(path, name))
        except InputError:
            if len(catalogue.paths) == 1:
                raise
    listed = [summary.__dict__ for summary in catalogue.summaries]
    data = json.dumps({"list": listed, "runs": runs}, separators=(",", ":"), allow_nan=False)
    # So that no text can end the element that holds it.
    data = data.replace("<", "\\u003c")
    rules = _policy("'none'")
    policy = f'<meta http-equiv="Content-Security-Policy" content="{rules}">'
    block = f'<script type="application/json" id="data">{data}</script>'
    page = _source().replace(_POLICY, policy).replace(_DATA, block)
    write_atomically(file, page.encode("utf-8", "backslashreplace"))
    return len(runs)


def _whole(run: WatchedRun) -> dict[str, Any]:
    """All that a page may ask of a run: its first message, and the histories of its seeds."""
    run.poll_to_end()
    told = message(run, Cursor(), run.state)
    points = run.history.points
    stride = max(1, -(-len(points) // SEED_POINTS))
    chosen = points[::-1][::stride][::-1]
    seeds: dict[str, Any] = {}
    layers, width = points[-1].seeds.shape if points else (0, 0)
    for layer in range(layers):
        for seed in range(width):
            history = seed_history(chosen, layer, seed)
            if any(history["stages"]):
                seeds[f"{layer}.{seed}"] = {k: v for k, v in history.items() if k != "step"}
    return {"told": told, "seeds": seeds, "steps": [point.step for point in chosen]}
