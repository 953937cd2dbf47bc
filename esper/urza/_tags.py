"""Tags of kernels and of blueprints: short names, as many as `MOST_TAGS` on each."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Annotated

import sqlalchemy as sa
from pydantic import TypeAdapter, ValidationError

from esper.contracts import MOST_TAGS, Tag
from esper.errors import InputError
from esper.urza._connections import upsert
from esper.urza._schema import BLUEPRINT_TAGS, KERNEL_TAGS

_TAGS = TypeAdapter(Annotated[list[Tag], "tags"])
_MOST_IDS = 500
"""In one query."""


def checked_tags(tags: Iterable[str]) -> list[str]:
    """Tags in order, each once.

    Raises:
        InputError: for a text that is none.
    """
    if isinstance(tags, str):
        raise InputError(f"tags are several texts, got the text {tags[:80]!r}: give a list of it")
    try:
        return sorted(set(_TAGS.validate_python(list(tags), strict=True)))
    except ValidationError as error:
        found = str(error.errors()[0]["input"])
        raise InputError(
            f"{found[:80]!r} is no tag: expected 1 to 64 characters without line breaks"
        ) from error


@dataclasses.dataclass(frozen=True)
class TagTable:
    """The tags of one kind of thing."""

    table: sa.Table
    owner: sa.Column[str]

    def add(self, connection: sa.Connection, owner_id: str, tags: Iterable[str]) -> None:
        """Give something tags.

        Raises:
            InputError: for too many.
        """
        rows = [{self.owner.name: owner_id, "tag": tag} for tag in checked_tags(tags)]
        if not rows:
            return
        connection.execute(upsert(connection, self.table).on_conflict_do_nothing(), rows)
        count = sa.select(sa.func.count()).where(self.owner == owner_id)
        if (found := connection.scalar(count) or 0) > MOST_TAGS:
            raise InputError(
                f"{owner_id[:12]} would have {found} tags, and may have {MOST_TAGS}: remove some"
            )

    def remove(self, connection: sa.Connection, owner_id: str, tags: Iterable[str]) -> None:
        """Take tags from something."""
        gone = checked_tags(tags)
        connection.execute(
            sa.delete(self.table).where(self.owner == owner_id, self.table.c.tag.in_(gone))
        )

    def of(self, connection: sa.Connection, ids: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """The tags of each of these that has some, in order."""
        found: dict[str, list[str]] = defaultdict(list)
        for start in range(0, len(ids), _MOST_IDS):
            some = ids[start : start + _MOST_IDS]
            query = sa.select(self.owner, self.table.c.tag).where(self.owner.in_(some))
            for owner_id, tag in connection.execute(query.order_by(self.table.c.tag)):
                found[owner_id].append(tag)
        return {owner_id: tuple(tags) for owner_id, tags in found.items()}

    def has_all(self, owner: sa.ColumnElement[str], tags: Iterable[str]) -> list[sa.Exists]:
        """Conditions that something has each of these tags."""
        return [
            sa.exists().where(self.owner == owner, self.table.c.tag == tag)
            for tag in checked_tags(tags)
        ]


KERNELS_TAGS = TagTable(KERNEL_TAGS, KERNEL_TAGS.c.kernel_id)
BLUEPRINTS_TAGS = TagTable(BLUEPRINT_TAGS, BLUEPRINT_TAGS.c.blueprint_id)
