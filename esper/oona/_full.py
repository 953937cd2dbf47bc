"""What is said where there is no room."""

from esper.contracts import Topic
from esper.errors import BusFullError


def full_stream(topic: Topic, length: int, count: int, capacity: int) -> BusFullError:
    """The error of a stream that is not to drop what it has."""
    return BusFullError(
        f"{topic.value} holds {length} messages that some group has not acknowledged, and takes"
        f" {capacity} at most: there is no room for {count} more. Wait until some were read, remove"
        " a group that reads no more, or open the bus with a larger capacity or full='drop'."
    )
