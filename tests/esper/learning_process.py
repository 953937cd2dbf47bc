"""What test_learning_resume runs in processes of its own: learning, and being killed."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import jax

from esper.tamiyo.learning import LearningSettings, Learnt, train
from tests.esper.learning_games import PULLS, Chain, table

ITERATIONS = 12
SETTINGS = LearningSettings(
    envs=8, steps=8, epochs=2, minibatches=2, rate=0.05, decay="linear", iterations=ITERATIONS,
    target_kl=0.01, kl_penalty=1.0,
)  # fmt: skip


def learn(folder: Path | None, **given: Any) -> Learnt:
    """The one run, from its beginning or from where it was cut off."""
    given = {"settings": SETTINGS, "key": jax.random.key(3), "policy": table(4)} | given
    return train(
        Chain(3), given.pop("policy"), given.pop("settings"), given.pop("key"),
        distribution=PULLS, folder=folder, checkpoint_every=2, **given,
    )  # fmt: skip


if __name__ == "__main__":
    place, last = Path(sys.argv[1]), int(sys.argv[2])

    def told(row: dict[str, Any]) -> None:
        # A checkpoint may be half written in the background at this moment.
        if row["iteration"] == last:
            os.kill(os.getpid(), signal.SIGKILL)

    learn(place, told=told)
