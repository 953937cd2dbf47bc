"""The schema of a library through time; run by `esper.urza._upgrade`, or by the alembic command."""
