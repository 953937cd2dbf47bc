"""The tests of compiled models, in a process whose packages are as users have them.

The hook that checks types at run time wraps every function, and torch.compile cannot see through
it.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_compiled_models():
    command = [
        *(
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--no-header",
            "-p",
            "no:cacheprovider",
            "--show-capture=no",
        ),
        *("-o", "addopts=--import-mode=importlib", str(HERE / "compiled_models.py")),
    ]
    root = HERE.parents[1]
    done = subprocess.run(
        command, cwd=root, env={**os.environ}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 10
