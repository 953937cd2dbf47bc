"""Writers that are killed at every step of a put: `python cache_crashes.py FOLDER ARTIFACT`.

Each puts a kernel for which others must go, in a process of its own that ends itself by
SIGKILL when it comes to a step. A line of JSON says what it left.
"""

import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

from esper.artifacts import read_artifact
from esper.cache import DiskTier, _disk
from esper.errors import ArtifactError
from tests.esper.cache_kernels import variant

STEPS = ("fsync", "_touch", "forget", "unlink", "replace", "write", "written")
"""It dies before it, but `written`: after all."""


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(step: str) -> None:
    """Have this process die at a step."""
    if step == "fsync":
        os.fsync = die
    elif step == "_touch":
        _disk._touch = die
    elif step in ("forget", "write"):
        setattr(_disk._Ledger, step, die)
    elif step in ("unlink", "replace"):
        setattr(Path, step, die)


def lying(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.zst"))


def damaged(tier: DiskTier) -> int:
    count = 0
    for path in tier.folder.glob("*.zst"):
        try:
            count += tier.get(path.stem) is None
        except ArtifactError:
            count += 1
    return count


def main() -> None:
    place, file = map(Path, sys.argv[1:])
    source = read_artifact(file.read_bytes())
    kernels = [variant(source, number) for number in range(4)]
    for step in STEPS:
        folder = place / step
        tier = DiskTier(folder, 1 << 30)
        for kernel in kernels[:3]:
            tier.put(kernel)
        limit = tier.bytes + 10
        pid = os.fork()
        if pid == 0:
            writer = DiskTier(folder, limit)
            arm(step)
            writer.put(kernels[3])
            die()
        _, status = os.waitpid(pid, 0)
        text = (folder / "usage").read_text().strip()
        left: dict[str, Any] = {
            "step": step,
            "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
            "written_down": int(text) if text.isdigit() else None,
            "lying": lying(folder),
            "visible": (folder / f"{kernels[3].kernel_id}.zst").exists(),
        }
        after = DiskTier(folder, limit)
        left |= {
            "counted": after.bytes,
            "lying_after": lying(folder),
            "limit": limit,
            "partials": len(list(folder.glob("*.partial"))),
            "damaged": damaged(after),
            "put_again": after.put(kernels[3]).kept and after.get(kernels[3].kernel_id) is not None,
        }
        sys.stdout.write(json.dumps(left) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    # jax says that it has threads; nothing of it runs in what is forked.
    warnings.simplefilter("ignore")
    main()
