"""A policy that learns while it decides, from what came of what it decided."""

import dataclasses
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import equinox as eqx
import numpy as np

from esper.checkpoints import tree_digest
from esper.tamiyo.learning._experienced import (
    Refusal,
    Shape,
    experienced,
)
from esper.tamiyo.learning._folder import made_own
from esper.tamiyo.learning._online_bucket import Bucket, capacity_of
from esper.tamiyo.learning._online_file import Known, Packed, packed, read_online, write_online
from esper.tamiyo.learning._online_settings import OnlineSettings
from esper.tamiyo.learning._online_update import OnlineUpdate, Outcome
from esper.tamiyo.policy import LoadedPolicy, save_policy
from esper.tamiyo.service import Experience, LearningCounts

LEARNING = "learning.safetensors"
POLICY = "policy.safetensors"


class OnlineLearner:
    """Learns from experiences between decisions; see `esper.tamiyo.service.Learner`.

    An experience becomes a step from graph to graph, as `PolicyAdvisor` sees reports, and is kept
    with others of its bucket; so a graph of a known bucket compiles nothing. Batches of one size
    are drawn by surprise (`ReplayStore`), and each is one update (`OnlineUpdate`) that stays near
    the first policy. Of its effects and familiarity nothing is learned.

    An update is begun only where the last ones of its bucket took no longer than there is time. The
    first waits for its program; where that is compiled aside, others are learned from meanwhile.

    What is done depends on what it was given, and on how many updates there was time for.

    Args:
        policy: where it begins.
        settings: how; by default `OnlineSettings()`.
        exchanged: is given the policy every so many updates.
        folder: where it is kept, written every so many updates and when it is closed, as
            `policy.safetensors`, a policy as any other, and `learning.safetensors`, from which it
            goes on to the bit. None keeps nothing.
        compile_aside: compile and write in a thread.
        clock: seconds.

    Raises:
        InputError: where the folder's file is damaged, or was begun with another policy or with
            other layers; where the folder is none, or another learner keeps its own there.
    """

    def __init__(
        self,
        policy: LoadedPolicy,
        settings: OnlineSettings | None = None,
        *,
        exchanged: Callable[[LoadedPolicy], None] = lambda policy: None,
        folder: Path | None = None,
        compile_aside: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.counts = LearningCounts()
        self._settings = settings = settings or OnlineSettings()
        self._first = policy
        self._exchanged = exchanged
        self._folder = folder
        self._clock = clock
        self._update = OnlineUpdate(policy.policy, settings)
        self._state = self._update.start()
        self._digest = tree_digest(eqx.filter(policy.policy, eqx.is_array))
        self._buckets: dict[Shape, Bucket] = {}
        self._programs: dict[Shape, Future[None]] = {}
        self._waiting: deque[Experience] = deque()
        self._thread = ThreadPoolExecutor(1, "esper-learn") if compile_aside else None
        self._writing: Future[None] | None = None
        self._written = 0
        """Updates that were made when it was last written."""
        self._lock: int | None = None
        if folder is not None:
            self._lock = made_own(folder, "what is learned", "another service that learns")
            if (folder / LEARNING).exists():
                self.load(folder / LEARNING)

    @property
    def policy(self) -> LoadedPolicy:
        """As it is now, with the effects and familiarity that it began with."""
        learned = {"updates": self.counts.updates, "experiences": self.counts.taken}
        return dataclasses.replace(
            self._first,
            policy=self._update.policy(self._state),
            card=self._first.card | {"online": learned},
        )

    def update(self, experiences: Sequence[Experience], seconds: float) -> None:
        """Take in what is new, and learn for no longer than so many seconds.

        What there is no time for waits. Without a thread, the first update of a bucket takes as
        long as its program takes to compile.

        Raises:
            OSError: where it could not be written.
        """
        self._wait(experiences)
        until = self._clock() + seconds
        while self._waiting and self._clock() < until:
            self._take(self._waiting.popleft())
        tried = 0
        while (shape := self._next(until - self._clock(), tried)) is not None:
            self._learn(shape)
            tried += 1
        # What waits is not written, and so nothing is while anything waits.
        due = self.counts.updates - self._written >= self._settings.save_every
        if due and seconds > 0.0 and not self._waiting:
            self._keep()

    def save(self, path: Path) -> None:
        """Write all that the next update depends on, whole or not at all.

        What waits is taken in before.
        """
        while self._waiting:
            self._take(self._waiting.popleft())
        write_online(path, packed(self._all()))

    def load(self, path: Path) -> None:
        """Go on from what was saved; the policy is exchanged for the one learned until then.

        Raises:
            InputError: for a file that is damaged or something else, and one that was begun with
                another policy or other layers. Nothing is changed then.
        """
        found = read_online(path, self._digest, self._state, self._settings)
        self._state, self._buckets, self.counts = found.state, found.buckets, found.counts
        self._written = self.counts.updates
        self._exchanged(self.policy)

    def close(self) -> None:
        """Write what was learned, where there is a folder, and let go of the thread.

        What waits is taken in before.

        Raises:
            OSError: where it could not be written.
        """
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None
        if self._folder is not None:
            self.save(self._folder / LEARNING)
            save_policy(self._folder / POLICY, self.policy)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _wait(self, experiences: Sequence[Experience]) -> None:
        self._waiting.extend(experiences)
        while len(self._waiting) > self._settings.waiting:
            self._waiting.popleft()
            self.counts.refuse(Refusal.LOST)

    def _take(self, experience: Experience) -> None:
        found = experienced(experience)
        if isinstance(found, Refusal):
            self.counts.refuse(found)
            return
        bucket = self._buckets.get(found.shape)
        if bucket is None:
            if len(self._buckets) >= self._settings.buckets:
                self.counts.refuse(Refusal.CROWDED)
                return
            if not capacity_of(found.transition, self._settings):
                self.counts.refuse(Refusal.TOO_LARGE)
                return
            bucket = Bucket(found.transition, self._settings, len(self._buckets))
            self._buckets[found.shape] = bucket
        most = self._settings.most_reward
        reward = np.float32(np.clip(experience.reward, -most, most))
        bucket.add(found.transition._replace(reward=reward))
        self.counts.took(float(reward))

    def _next(self, seconds: float, tried: int) -> Shape | None:
        """The bucket with most to learn from, of those that there is the time for."""
        due = [shape for shape, own in self._buckets.items() if own.due > 0]
        if seconds <= 0.0 or not due:
            return None
        ready = [shape for shape in due if self._is_ready(shape)]
        short = [shape for shape in ready if self._buckets[shape].seconds <= seconds]
        if ready and not short and not tried:
            self.counts.put_off += 1
            for shape in ready:
                self._buckets[shape].put_off()
        # Of equals the first.
        return max(short, key=lambda shape: self._buckets[shape].due, default=None)

    def _is_ready(self, shape: Shape) -> bool:
        """Whether nothing has to be compiled for a bucket, or somebody has the time to wait."""
        if self._thread is None:
            return True
        if shape not in self._programs:
            bucket = self._buckets[shape]
            self._programs[shape] = self._thread.submit(self._compile, bucket, *bucket.some())
        # One that failed says why where it is used.
        return self._programs[shape].done()

    def _compile(self, bucket: Bucket, kept: Any, weights: np.ndarray) -> None:
        state = self._update.start()
        self._update(state, kept, weights)
        began = self._clock()
        self._update(state, kept, weights)
        bucket.took(self._clock() - began)

    def _learn(self, shape: Shape) -> None:
        bucket, counts, settings = self._buckets[shape], self.counts, self._settings
        began = self._clock()
        drawn = bucket.store.draw(settings.batch, correction=settings.correction)
        self._state, found = self._update(self._state, drawn.transitions, drawn.weights)
        surprise = np.asarray(found.surprise, np.float64)
        bucket.store.update(drawn.serials, np.where(np.isfinite(surprise), surprise, 0.0))
        bucket.updates += 1
        outcome = found.outcome
        if outcome is Outcome.SKIPPED:
            counts.skipped += 1
        else:
            counts.loss, counts.kl = found.loss, found.kl
        counts.held_back += outcome is Outcome.HELD_BACK
        counts.updates += outcome is Outcome.MADE
        # The first one here may have compiled.
        if bucket.tried:
            bucket.took(self._clock() - began)
        bucket.tried = True
        if outcome is Outcome.MADE and counts.updates % settings.exchange_every == 0:
            self._exchanged(self.policy)

    def _keep(self) -> None:
        """Write what was learned until now; aside where there is a thread."""
        if self._folder is None or (self._writing is not None and not self._writing.done()):
            return
        before, self._writing = self._writing, None
        self._written = self.counts.updates
        # Copies, which the next updates do not change.
        everything, policy = packed(self._all()), self.policy
        if self._thread is None:
            _write(self._folder, everything, policy)
        else:
            self._writing = self._thread.submit(_write, self._folder, everything, policy)
        if before is not None:
            before.result()

    def _all(self) -> Known:
        return Known(
            self._digest, self._settings.layers, self._state, self._buckets, self.counts
        )  # fmt: skip


def _write(folder: Path, everything: Packed, policy: LoadedPolicy) -> None:
    write_online(folder / LEARNING, everything)
    save_policy(folder / POLICY, policy)
