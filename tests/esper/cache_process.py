"""Processes that share a disk tier and are killed: `python cache_process.py FOLDER ARTIFACT`.

In each round four processes of four threads each put and get kernels at random, in a folder that
has room for half of them, until each is killed at a random moment. A line of JSON says what a round
left.
"""

import json
import os
import random
import signal
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path

from esper.artifacts import Artifact, read_artifact
from esper.cache import DiskTier
from tests.esper.cache_kernels import variant

ROUNDS = 8
PROCESSES = 4
THREADS = 4
KERNELS = 24
MAX_BYTES = 120_000


def work(tier: DiskTier, kernels: list[Artifact], seed: int, progress: int, own: bytes) -> None:
    """Put and get for ever; what is got must be what was put."""
    chance = random.Random(seed)
    try:
        while True:
            kernel = chance.choice(kernels)
            if chance.random() < 0.5:
                assert tier.put(kernel).kept
            else:
                found = tier.get(kernel.kernel_id)
                assert found is None or found.data == kernel.data
            os.write(progress, own)
    except BaseException:
        failed(progress)


def failed(progress: int) -> None:
    """End this process, and have nobody wait for its threads to begin."""
    traceback.print_exc()
    os.write(progress, bytes(range(PROCESSES * THREADS)))
    os._exit(1)


def start(folder: Path, kernels: list[Artifact], turn: int, process: int, progress: int) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            tier = DiskTier(folder, MAX_BYTES)
            for thread in range(THREADS):
                own = THREADS * process + thread
                arguments = (tier, kernels, 100 * turn + own, progress, bytes([own]))
                threading.Thread(target=work, args=arguments).start()
            while True:
                signal.pause()
        except BaseException:
            failed(progress)
    return pid


def main() -> None:
    folder, file = map(Path, sys.argv[1:])
    source = read_artifact(file.read_bytes())
    kernels = [variant(source, number, padding=500 * number) for number in range(KERNELS)]
    chance = random.Random(0)
    for turn in range(ROUNDS):
        reading, writing = os.pipe()
        pids = [start(folder, kernels, turn, n, writing) for n in range(PROCESSES)]
        # None is killed before all sixteen threads are at work.
        done, begun = 0, set[int]()
        while len(begun) < PROCESSES * THREADS:
            some = os.read(reading, 1 << 16)
            begun.update(some)
            done += len(some)
        killed = 0
        for pid in pids:
            time.sleep(0.05 + chance.random() * 0.25)
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            killed += os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        os.close(writing)
        while some := os.read(reading, 1 << 16):
            done += len(some)
        os.close(reading)
        text = (folder / "usage").read_text().strip()
        lying = sum(path.stat().st_size for path in folder.glob("*.zst"))
        tier = DiskTier(folder, MAX_BYTES)
        left = {
            "killed": killed,
            "threads": len(begun),
            "done": done,
            "written_down": int(text) if text.isdigit() else None,
            "lying": lying,
            "counted": tier.bytes,
            "partials": len(list(folder.glob("*.partial"))),
            "whole": sum(tier.get(path.stem) is not None for path in folder.glob("*.zst")),
            "files": len(tier),
        }
        sys.stdout.write(json.dumps(left) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    # jax says that it has threads; nothing of it runs in what is forked.
    warnings.simplefilter("ignore")
    main()
