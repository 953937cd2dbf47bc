"""How full the streams of a bus are, and how far its groups."""

import dataclasses

from esper.contracts import Topic


@dataclasses.dataclass(frozen=True)
class TopicStatistics:
    """The stream of one topic."""

    topic: Topic
    length: int
    """Messages that it holds, read or not."""
    dropped: int
    """Messages that it let go of though some group had not acknowledged them."""
    dead: int
    """Dead letters of all groups."""


@dataclasses.dataclass(frozen=True)
class GroupStatistics:
    """One group's reading of one topic."""

    group: str
    topic: Topic
    lag: int
    """Messages that were not delivered yet."""
    pending: int
    """Messages that were delivered, and not settled."""
    consumers: int
    """Those whose lease has not run out."""


@dataclasses.dataclass(frozen=True)
class BusStatistics:
    """All topics that were ever written to or read from, and all groups."""

    topics: tuple[TopicStatistics, ...]
    groups: tuple[GroupStatistics, ...]

    @property
    def length(self) -> int:
        """Messages of all topics."""
        return sum(own.length for own in self.topics)

    @property
    def dropped(self) -> int:
        """Messages of all topics that were let go of unread."""
        return sum(own.dropped for own in self.topics)

    @property
    def dead(self) -> int:
        """Dead letters of all topics."""
        return sum(own.dead for own in self.topics)

    def topic(self, topic: Topic) -> TopicStatistics:
        """The stream of a topic; an empty one where it was never used."""
        for own in self.topics:
            if own.topic == topic:
                return own
        return TopicStatistics(topic, 0, 0, 0)

    def group(self, group: str, topic: Topic) -> GroupStatistics | None:
        """How far a group is with a topic; None where it does not read it."""
        for own in self.groups:
            if (own.group, own.topic) == (group, topic):
                return own
        return None
