"""A library that an older Esper made, brought to today's tables; alembic is imported here alone."""

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config

_MIGRATIONS = Path(__file__).parent / "migrations"


def upgrade(connection: sa.Connection, revision: str, *, unversioned: bool) -> None:
    """Run the migrations up to a revision, in the transaction that the connection is in.

    Args:
        unversioned: its tables are those of the first revision, and it does not say so.
    """
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    if unversioned:
        command.stamp(config, "0001")
    command.upgrade(config, revision)
