"""What all tests rest on."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_tests_that_a_test_runs_leave_what_all_share():
    shared = Path(os.environ["ESPER_CACHE_DIR"])
    assert shared.is_dir()
    quick = "tests/functional/test_health.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", quick],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert shared.is_dir()
