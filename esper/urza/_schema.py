"""The tables of a library, as the newest migration leaves them.

The migrations are what an older library goes through; a test holds both to be the same.
"""

import sqlalchemy as sa

REVISIONS = ("0001", "0002")
"""Of the schema, oldest first; the last is what this version of Esper reads and writes."""
VERSION_TABLE = "esper_library_version"

METADATA = sa.MetaData()

COUNT = sa.BigInteger().with_variant(sa.Integer, "sqlite")
ID = sa.String(64)
STATE = sa.String(16)


def text(length: int) -> sa.types.TypeEngine[str]:
    """A text, compared byte by byte on every database; SQLite does not look at the length."""
    return sa.Text(collation="C").with_variant(sa.String(length), "sqlite")


def first_columns() -> list[sa.Column[object]]:
    """Those of a kernel that libraries had before they were migrated."""
    return [
        sa.Column("kernel_id", ID, primary_key=True),
        sa.Column("recipe", ID, nullable=False, index=True),
        sa.Column("blueprint", text(64), nullable=False),
        sa.Column("signature", text(200), nullable=False, index=True),
        sa.Column("birth", sa.String(8), nullable=False),
        sa.Column("confidence", sa.Float, nullable=False),
        sa.Column("init_seed", COUNT, nullable=False),
        sa.Column("parameter_count", COUNT, nullable=False),
        sa.Column("flops", COUNT, nullable=False),
        sa.Column("size_bytes", COUNT, nullable=False),
    ]


KERNELS = sa.Table(
    "kernels",
    METADATA,
    *first_columns(),
    sa.Column("state", STATE, nullable=False, server_default="testing"),
    sa.Column("reason", sa.Text, nullable=False, server_default=""),
    sa.Column("ancestor", ID, index=True),
    sa.Column("platforms", sa.Text),
    sa.Column("created", sa.Float, nullable=False, server_default="0"),
    sa.Column("used", sa.Float, nullable=False, server_default="0"),
    sa.Column("gain", sa.Float),
)
"""`platforms` as `,cpu,cuda,`; `used` is when a run last began to refer to it or told of it; `gain`
is the mean over its outcomes, so that searches need not count."""
sa.Index("ix_kernels_by_name", *(KERNELS.c[n] for n in ("blueprint", "init_seed", "kernel_id")))
sa.Index("ix_kernels_by_created", KERNELS.c.created, KERNELS.c.kernel_id)
sa.Index("ix_kernels_by_flops", KERNELS.c.flops, KERNELS.c.kernel_id)
sa.Index("ix_kernels_by_parameters", KERNELS.c.parameter_count, KERNELS.c.kernel_id)
sa.Index("ix_kernels_by_gain", KERNELS.c.gain, KERNELS.c.kernel_id)

MEASUREMENTS = sa.Table(
    "measurements",
    METADATA,
    sa.Column("kernel_id", ID, primary_key=True),
    sa.Column("backend", text(16), primary_key=True),
    sa.Column("device", text(100), primary_key=True),
    sa.Column("batch", COUNT, primary_key=True, autoincrement=False),
    sa.Column("content", sa.JSON, nullable=False),
)
"""What was measured of kernels, which is not part of them: it differs by machine."""

KERNEL_TAGS = sa.Table(
    "kernel_tags",
    METADATA,
    sa.Column("kernel_id", ID, primary_key=True),
    sa.Column("tag", text(64), primary_key=True),
)
sa.Index("ix_kernel_tags_by_tag", KERNEL_TAGS.c.tag, KERNEL_TAGS.c.kernel_id)

OUTCOMES = sa.Table(
    "kernel_outcomes",
    METADATA,
    sa.Column("kernel_id", ID, primary_key=True),
    sa.Column("run_id", text(200), primary_key=True),
    sa.Column("layer", COUNT, primary_key=True, autoincrement=False),
    sa.Column("seed", COUNT, primary_key=True, autoincrement=False),
    sa.Column("step", COUNT, primary_key=True, autoincrement=False),
    sa.Column("gain", sa.Float, nullable=False),
    sa.Column("kept", sa.Boolean, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("content", sa.JSON, nullable=False),
)

REFERENCES = sa.Table(
    "kernel_references",
    METADATA,
    sa.Column("run_id", text(200), primary_key=True),
    sa.Column("kernel_id", ID, primary_key=True, index=True),
)

BLUEPRINTS = sa.Table(
    "blueprints",
    METADATA,
    sa.Column("blueprint_id", ID, primary_key=True),
    sa.Column("name", text(200), nullable=False),
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("signature", text(200), nullable=False),
    sa.Column("sizes", sa.JSON, nullable=False),
    sa.Column("init_seed", COUNT, nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("state", STATE, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("kernel_id", ID, index=True),
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("changed", sa.Float, nullable=False),
    sa.Column("worker", text(200)),
    sa.Column("token", sa.String(32)),
    sa.Column("lease_begun", sa.Float),
    sa.Column("lease_until", sa.Float),
)
"""The token is that of the last claim, also after it ended: so that its end may be told twice."""
sa.Index(
    "ix_blueprints_waiting",
    BLUEPRINTS.c.state,
    BLUEPRINTS.c.priority.desc(),
    BLUEPRINTS.c.created,
    BLUEPRINTS.c.blueprint_id,
)
sa.Index("ix_blueprints_by_created", BLUEPRINTS.c.created, BLUEPRINTS.c.blueprint_id)

BLUEPRINT_TAGS = sa.Table(
    "blueprint_tags",
    METADATA,
    sa.Column("blueprint_id", ID, primary_key=True),
    sa.Column("tag", text(64), primary_key=True),
)
sa.Index("ix_blueprint_tags_by_tag", BLUEPRINT_TAGS.c.tag, BLUEPRINT_TAGS.c.blueprint_id)

FIRST = {"kernels": [c.name for c in first_columns()], "measurements": list(MEASUREMENTS.c.keys())}
"""The tables of the first revision, and their columns."""
