"""A process that shares a disk tier with others: `python cache_process.py FOLDER ARTIFACT SEED`.

Puts and gets kernels at random until it is killed, and writes a line for every round. One that
is damaged, or not the one that was asked for, ends it with status 1.
"""

import random
import sys
from pathlib import Path

from esper.artifacts import read_artifact
from esper.cache import DiskTier
from tests.esper.cache_kernels import variant

KERNELS = 24
MAX_BYTES = 120_000


def _say(word: str) -> None:
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()


def main() -> None:
    folder, artifact, seed = sys.argv[1:]
    source = read_artifact(Path(artifact).read_bytes())
    kernels = [variant(source, number, padding=500 * number) for number in range(KERNELS)]
    chance = random.Random(int(seed))
    tier = DiskTier(folder, MAX_BYTES)
    _say("ready")
    while True:
        kernel = chance.choice(kernels)
        if chance.random() < 0.5:
            assert tier.put(kernel).kept
        else:
            found = tier.get(kernel.kernel_id)
            assert found is None or found.data == kernel.data
        _say("round")


if __name__ == "__main__":
    main()
