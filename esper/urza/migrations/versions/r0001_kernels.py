"""Kernels and what was measured of them: libraries as they were before they had a version."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_COUNT = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def _text(length: int) -> sa.types.TypeEngine[str]:
    return sa.Text(collation="C").with_variant(sa.String(length), "sqlite")


def upgrade() -> None:
    """Make the first tables."""
    op.create_table(
        "kernels",
        sa.Column("kernel_id", sa.String(64), primary_key=True),
        sa.Column("recipe", sa.String(64), nullable=False, index=True),
        sa.Column("blueprint", _text(64), nullable=False),
        sa.Column("signature", _text(200), nullable=False, index=True),
        sa.Column("birth", sa.String(8), nullable=False),
        sa.Column("confidence", sa.Float, nullable=False),
        sa.Column("init_seed", _COUNT, nullable=False),
        sa.Column("parameter_count", _COUNT, nullable=False),
        sa.Column("flops", _COUNT, nullable=False),
        sa.Column("size_bytes", _COUNT, nullable=False),
    )
    op.create_table(
        "measurements",
        sa.Column("kernel_id", sa.String(64), primary_key=True),
        sa.Column("backend", _text(16), primary_key=True),
        sa.Column("device", _text(100), primary_key=True),
        sa.Column("batch", _COUNT, primary_key=True, autoincrement=False),
        sa.Column("content", sa.JSON, nullable=False),
    )


def downgrade() -> None:
    """Remove them, and all that they hold."""
    op.drop_table("measurements")
    op.drop_table("kernels")
