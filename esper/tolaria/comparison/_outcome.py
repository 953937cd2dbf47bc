"""What one run of one arm came to."""

import dataclasses

from esper.tolaria.comparison._design import Budget


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What runs must have in common to be compared, and what a reader must know of them."""

    task: str
    task_digest: str | None
    """None where the run did not record it."""
    backend: str
    host_sites: tuple[str, ...] | None
    """The host's layers by row; None where the run did not record them."""
    host_parameters: int | None
    host_step_flops: float | None = None
    """Of a training step of the host alone; None where the run did not record it."""
    planned_steps: int
    recipe: tuple[tuple[str, str], ...]
    """How parameters are trained (batch size, optimiser, …), as text, by name."""
    branched: bool
    """Whether it goes on from a step of another run."""
    versions: tuple[tuple[str, str], ...]
    """Of libraries, by name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """Measurements over a run, one place for each decision boundary; None where not finite."""

    steps: tuple[int, ...]
    flops: tuple[float | None, ...]
    """Cumulative, of training alone; None where the run did not count them."""
    test_accuracy: tuple[float | None, ...]
    """In [0, 1]."""
    test_loss: tuple[float | None, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run of one arm, at its last measurement."""

    arm: str
    seed: int
    """Of randomness."""
    budget: Budget
    folder: str
    """Of the run."""
    setting: Setting
    ended: bool
    """Whether its ledger says that it ended, at the step of its last measurement."""
    diverged_at: int | None
    """The first step whose loss is not finite and was not taken back by a recorded rollback."""
    rollbacks: int
    steps: int
    test_accuracy: float | None
    """In [0, 1]; None, like every value here, where it was not measured or is not finite."""
    test_loss: float | None
    reward: float | None
    """See `earned`."""
    validation_loss: float | None
    parameters: int | None
    training_flops: float | None
    kept: int
    """Kernels that run at the end, or were folded into the host."""
    removed: int
    """Kernels that were asked for and do not."""
    compilations: int | None
    seconds: float | None
    """Wall time; reported, never judged."""
    curve: Curve

    @property
    def grafted(self) -> int:
        """Kernels that came in or were to, whatever became of them."""
        return self.kept + self.removed

    @property
    def name(self) -> str:
        """The arm and its seed, for messages."""
        return f"{self.arm}, seed {self.seed}"
