"""Models that tell a bus of themselves, in a process of their own.

`python -m experiments.bench._tamiyo_models PLACE SECONDS RATE MODELS` publishes health, each batch
that of all seeds of a model, and a report of each model a second, through a `BatchingPublisher` on
the bus at PLACE. Where PLACE is `pipe`, messages are written to standard output instead, for a
process whose bus is in its memory. Last, the counts of what was sent are written to standard
error, as JSON.
"""

import dataclasses
import json
import struct
import sys
import time
from collections.abc import Sequence
from typing import IO, Any

import numpy as np

from esper.contracts import HealthSignalBatch, ModelReport, OonaMessage, Topic
from esper.oona import BatchingPublisher, open_broker

SITES, SEEDS = 25, 4
ROWS = SITES * SEEDS
"""Signals of a batch: one of each seed of a model."""
_FAULTY, _READY = 0.01, 0.005
_ACTIVE = 2


@dataclasses.dataclass
class Sent:
    """What was published."""

    signals: int = 0
    faulty: int = 0
    """With errors; they must pass, as those that are ready must."""
    ready: int = 0
    reports: int = 0
    seconds: float = 0.0


class Pipe:
    """Writes messages where a broker would keep them."""

    def __init__(self, out: IO[bytes]) -> None:
        self._out = out

    def publish(self, messages: Sequence[OonaMessage]) -> None:
        """As bytes, the length of each before it."""
        for message in messages:
            body = message.to_bytes()
            self._out.write(struct.pack("<I", len(body)) + body)
        self._out.flush()


def read_pipe(source: IO[bytes]) -> OonaMessage | None:
    """The next message; None at the end."""
    head = source.read(4)
    if len(head) < 4:
        return None
    return OonaMessage.from_bytes(source.read(struct.unpack("<I", head)[0]))


def make_report(step: int) -> ModelReport:
    """A chain of sites, all of whose seeds are active."""

    def by_site(value: Any) -> tuple[Any, ...]:
        return (value,) * SITES

    def by_seed(value: Any) -> tuple[Any, ...]:
        return by_site((value,) * SEEDS)

    return ModelReport(
        step=step, steps=1 << 30, sites=tuple(f"site-{row}" for row in range(SITES)),
        kinds=by_site("linear"), depths=tuple(range(SITES)), senders=tuple(range(SITES - 1)),
        receivers=tuple(range(1, SITES)), site_parameters=by_site(4_160), site_inputs=by_site(64),
        site_outputs=by_site(64), grows=by_site(True), train_loss=(0.5, 0.6, 0.7, 0.8),
        validation_loss=(0.6, 0.7, 0.8, 0.9), validation_accuracy=0.8, first_loss=2.3,
        loss_spread=0.05, rollbacks=(), host_parameters=104_000, host_flops=208_000.0,
        parameters=150_000, flops=300_000.0, gradient_norm=by_site(0.1), weight_norm=by_site(8.0),
        follows=by_site((0.1, 0.4)), stage=by_seed(_ACTIVE), alpha=by_seed(1.0),
        health=by_seed(0.9),
        health_before=by_seed(0.9), worth=by_seed(0.01), worth_half=by_seed(0.005),
        age=by_seed(5), held=by_seed(0), descriptions=((0.5,) * 14,) * 8,
        fits=by_site((0,) * 8), kernel_ids=("a" * 64,), kernel_parameters=(500,),
        kernel_flops=(1_000,),
    )  # fmt: skip


def make_batch(random: np.random.Generator, step: int, sent: Sent) -> HealthSignalBatch:
    """The health of a model's seeds at a step; what must pass is counted."""
    faulty = random.random(ROWS) < _FAULTY
    ready = random.random(ROWS) < _READY
    sent.signals += ROWS
    sent.faulty += int(faulty.sum())
    sent.ready += int(ready.sum())
    score = np.clip(random.normal(0.9, 0.02, ROWS), 0.0, 1.0)
    return HealthSignalBatch(
        layer_id=tuple(range(SITES)) * SEEDS,
        seed_id=tuple(np.repeat(range(SEEDS), SITES).tolist()),
        chunk_id=(0,) * ROWS,
        epoch=(0,) * ROWS,
        step=(step,) * ROWS,
        stage=(_ACTIVE,) * ROWS,
        activation_variance=tuple(random.random(ROWS).tolist()),
        dead_neuron_ratio=tuple((1.0 - score).tolist()),
        avg_correlation=(0.1,) * ROWS,
        health_score=tuple(score.tolist()),
        error_count=tuple(np.where(faulty, random.integers(1, 5, ROWS), 0).tolist()),
        is_ready_for_transition=tuple(ready.tolist()),
    )


def publish_models(place: str, seconds: float, rate: int, models: int) -> Sent:
    """Publish at an even pace, and return what was sent once the bus has it."""
    sent, random = Sent(), np.random.default_rng(0)
    broker: Any = Pipe(sys.stdout.buffer) if place == "pipe" else open_broker(place)
    gap, turns = ROWS / rate, int(seconds * rate / ROWS)
    reports_every = max(1, models)
    with BatchingPublisher(broker) as publisher:
        began = time.perf_counter()

        def say(topic: Topic, model: int, payload: dict[str, Any]) -> None:
            name = f"run-{model}"
            publisher.publish(
                OonaMessage(topic=topic, key=name, sender_id=name, payload=payload)
            )  # fmt: skip

        for model in range(models):
            say(Topic.MODEL_REPORT, model, make_report(0).model_dump(mode="json"))
        sent.reports = models
        for turn in range(turns):
            wait = began + turn * gap - time.perf_counter()
            if wait > 0.0:
                time.sleep(wait)
            model, step = turn % models, 1 + turn // models
            say(Topic.SEED_HEALTH, model, make_batch(random, step, sent).model_dump(mode="json"))
            if turn % reports_every == model and step % max(1, round(rate / ROWS / models)) == 0:
                say(Topic.MODEL_REPORT, model, make_report(step).model_dump(mode="json"))
                sent.reports += 1
        publisher.flush()
        sent.seconds = time.perf_counter() - began
    if place != "pipe":
        broker.close()
    return sent


def main(argv: Sequence[str]) -> int:
    """Run from the command line."""
    place, seconds, rate, models = argv
    sent = publish_models(place, float(seconds), int(rate), int(models))
    print(json.dumps(dataclasses.asdict(sent)), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
