"""The examples run from top to bottom, and what they claim holds: they assert it themselves."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "experiments").glob("growing_*.py"))
ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


def run(script: Path, place: Path) -> subprocess.CompletedProcess[str]:
    flags = f"{ONE_THREAD} {os.environ.get('XLA_FLAGS', '')}"
    given = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        cwd=place,
        env=os.environ | given,
        capture_output=True,
        text=True,
        check=False,
    )


def test_there_is_one_for_each_face_and_one_for_populations():
    faces = {"equinox", "flax", "plain", "population"}
    assert {path.stem.removeprefix("growing_") for path in EXAMPLES} == faces


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs_and_warns_of_nothing(script, tmp_path):
    done = run(script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    seen = re.findall(r"test accuracy[^\n\d]*(\d[\d.]*)", done.stdout)
    assert max(map(float, seen)) > 0.95
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_it_is_in_cells_that_notebooks_read(script):
    """Cells are marked in the percent format, and text is comments alone."""
    docstring, *cells = re.split(r"^# %%", script.read_text(), flags=re.MULTILINE)
    assert docstring.startswith('"""')
    assert len(cells) >= 4
    for cell in cells:
        kind, _, body = cell.partition("\n")
        assert kind in ("", " [markdown]")
        if kind:
            assert all(line.startswith("#") for line in body.splitlines() if line)
