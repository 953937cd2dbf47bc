"""States, tags and outcomes of kernels, references of runs, and the queue of blueprints."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_COUNT = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def _text(length: int) -> sa.types.TypeEngine[str]:
    return sa.Text(collation="C").with_variant(sa.String(length), "sqlite")


def _new() -> list[sa.Column[object]]:
    return [
        sa.Column("state", sa.String(16), nullable=False, server_default="testing"),
        sa.Column("reason", sa.Text, nullable=False, server_default=""),
        sa.Column("ancestor", sa.String(64)),
        sa.Column("platforms", sa.Text),
        sa.Column("created", sa.Float, nullable=False, server_default="0"),
        sa.Column("used", sa.Float, nullable=False, server_default="0"),
        sa.Column("gain", sa.Float),
    ]


_INDICES = {
    "ix_kernels_ancestor": ["ancestor"],
    "ix_kernels_by_name": ["blueprint", "init_seed", "kernel_id"],
    "ix_kernels_by_created": ["created", "kernel_id"],
    "ix_kernels_by_flops": ["flops", "kernel_id"],
    "ix_kernels_by_parameters": ["parameter_count", "kernel_id"],
    "ix_kernels_by_gain": ["gain", "kernel_id"],
}
_TABLES = ("kernel_tags", "kernel_outcomes", "kernel_references", "blueprint_tags", "blueprints")


def upgrade() -> None:
    """Give kernels states; nobody has said yet of those that are there that they are good."""
    for column in _new():
        op.add_column("kernels", column)
    for name, columns in _INDICES.items():
        op.create_index(name, "kernels", columns)
    op.create_table(
        "kernel_tags",
        sa.Column("kernel_id", sa.String(64), primary_key=True),
        sa.Column("tag", _text(64), primary_key=True),
    )
    op.create_index("ix_kernel_tags_by_tag", "kernel_tags", ["tag", "kernel_id"])
    op.create_table(
        "kernel_outcomes",
        sa.Column("kernel_id", sa.String(64), primary_key=True),
        sa.Column("run_id", _text(200), primary_key=True),
        sa.Column("layer", _COUNT, primary_key=True, autoincrement=False),
        sa.Column("seed", _COUNT, primary_key=True, autoincrement=False),
        sa.Column("step", _COUNT, primary_key=True, autoincrement=False),
        sa.Column("gain", sa.Float, nullable=False),
        sa.Column("kept", sa.Boolean, nullable=False),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("content", sa.JSON, nullable=False),
    )
    op.create_table(
        "kernel_references",
        sa.Column("run_id", _text(200), primary_key=True),
        sa.Column("kernel_id", sa.String(64), primary_key=True, index=True),
    )
    op.create_table(
        "blueprints",
        sa.Column("blueprint_id", sa.String(64), primary_key=True),
        sa.Column("name", _text(200), nullable=False),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("signature", _text(200), nullable=False),
        sa.Column("sizes", sa.JSON, nullable=False),
        sa.Column("init_seed", _COUNT, nullable=False),
        sa.Column("priority", sa.Integer, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("kernel_id", sa.String(64), index=True),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("changed", sa.Float, nullable=False),
        sa.Column("worker", _text(200)),
        sa.Column("token", sa.String(32)),
        sa.Column("lease_begun", sa.Float),
        sa.Column("lease_until", sa.Float),
    )
    op.create_index(
        "ix_blueprints_waiting",
        "blueprints",
        ["state", sa.text("priority DESC"), "created", "blueprint_id"],
    )
    op.create_index("ix_blueprints_by_created", "blueprints", ["created", "blueprint_id"])
    op.create_table(
        "blueprint_tags",
        sa.Column("blueprint_id", sa.String(64), primary_key=True),
        sa.Column("tag", _text(64), primary_key=True),
    )
    op.create_index("ix_blueprint_tags_by_tag", "blueprint_tags", ["tag", "blueprint_id"])


def downgrade() -> None:
    """Forget all that is new."""
    for table in _TABLES:
        op.drop_table(table)
    for name in _INDICES:
        op.drop_index(name, "kernels")
    with op.batch_alter_table("kernels") as kernels:
        for column in _new():
            kernels.drop_column(column.name)
