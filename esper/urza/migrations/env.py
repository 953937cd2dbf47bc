"""Alembic runs this, on the connection that `esper.urza._upgrade` gives it.

From the command line a database is named by `-x url=...`: for who writes migrations.
"""

import sqlalchemy as sa
from alembic import context

from esper.urza._schema import METADATA, VERSION_TABLE


def _run(connection: sa.Connection) -> None:
    context.configure(connection=connection, target_metadata=METADATA, version_table=VERSION_TABLE)
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    _run(given)
else:
    with sa.create_engine(context.get_x_argument(as_dictionary=True)["url"]).connect() as opened:
        _run(opened)
