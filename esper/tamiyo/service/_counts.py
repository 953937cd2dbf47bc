"""What Tamiyo has done, and what who learns has, counted."""

import dataclasses


@dataclasses.dataclass
class Counts:
    """Since it began; what became of health is in `Outcomes`."""

    reports: int = 0
    replaced: int = 0
    """Models that came back as another network."""
    forgotten: int = 0
    """Models of which nothing was heard any more."""
    advised: int = 0
    """Models that the advisor was asked about, each time that it was."""
    postponed: int = 0
    """Of those, models about which it could not say anything yet."""
    decisions: dict[str, int] = dataclasses.field(default_factory=dict)
    """Allowed ones, by action."""
    vetoes: dict[str, int] = dataclasses.field(default_factory=dict)
    """By rule."""
    repeated: int = 0
    """Decisions about a place for which something was asked for already."""
    stray: int = 0
    """Decisions about places that there are not."""
    strange: int = 0
    """Signals about seeds that the model's report does not have."""
    experiences: int = 0
    lost_experiences: int = 0
    """That waited for the learner for too long."""
    not_done: int = 0
    """Boundaries that nothing is learned from, since what was asked for was not done."""
    unasked: int = 0
    """The same, since the run changed seeds that nobody had asked it to."""
    unmeasured: int = 0
    """Boundaries that nothing is learned from, since a loss is not known."""
    failures: dict[str, int] = dataclasses.field(default_factory=dict)
    """Calls of the advisor and of the learner that raised."""
    last_error: str = ""
    """What the last of them raised."""

    def decided(self, action: str) -> None:
        """A decision was allowed."""
        self.decisions[action] = self.decisions.get(action, 0) + 1

    def vetoed(self, rule: str) -> None:
        """A decision was refused."""
        self.vetoes[rule] = self.vetoes.get(rule, 0) + 1

    def failed(self, who: str, error: Exception) -> None:
        """A call raised."""
        self.failures[who] = self.failures.get(who, 0) + 1
        self.last_error = f"{who}: {type(error).__name__}: {error}"


@dataclasses.dataclass
class LearningCounts:
    """What a learner has done since it began, over all that it went on from."""

    updates: int = 0
    """That changed the policy."""
    skipped: int = 0
    """That would have, had their gradient been finite."""
    held_back: int = 0
    """That would have, had they not led too far from the policy that it began with."""
    put_off: int = 0
    """Times that there was something to learn, and too little time for an update."""
    taken: int = 0
    """Experiences that are learned from."""
    refused: dict[str, int] = dataclasses.field(default_factory=dict)
    """Experiences that teach nothing, by reason."""
    reward: float = 0.0
    """Mean of those taken, as they count."""
    loss: float = 0.0
    """Of the last update."""
    kl: float = 0.0
    """From the policy that it began with, in nats: the mean over what the last update saw."""

    def took(self, reward: float) -> None:
        """An experience is learned from."""
        self.taken += 1
        self.reward += (reward - self.reward) / self.taken

    def refuse(self, reason: str) -> None:
        """An experience teaches nothing."""
        self.refused[reason] = self.refused.get(reason, 0) + 1
