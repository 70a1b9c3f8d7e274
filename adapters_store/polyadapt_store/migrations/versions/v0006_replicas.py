"""Heartbeats of the servers that share a registry."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

Text = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    """Begin to keep them."""
    op.create_table(
        "replicas",
        sa.Column("id", Text, primary_key=True),
        sa.Column("started", sa.BigInteger, nullable=False),
        sa.Column("seen", sa.BigInteger, nullable=False),
        sa.Column("num_writes", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "replica_adapters",
        sa.Column("replica", Text, sa.ForeignKey("replicas.id"), primary_key=True),
        sa.Column("digest", Text, primary_key=True, index=True),
        sa.Column("tier", Text, nullable=False),
    )
