"""Adapters that are fetched from a source, and answers that are given again."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"

Text = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    """Begin to keep them."""
    op.create_table(
        "imports",
        sa.Column("id", Text, primary_key=True),
        sa.Column("tenant", Text, nullable=False),
        sa.Column("name", Text, nullable=False),
        sa.Column("uri", Text, nullable=False),
        sa.Column("version", sa.Integer),
        sa.Column("error", Text),
        sa.Column("created", sa.BigInteger, nullable=False, index=True),
    )
    op.create_table(
        "idempotency",
        sa.Column("tenant", Text, primary_key=True),
        sa.Column("key", Text, primary_key=True),
        sa.Column("fingerprint", Text, nullable=False),
        sa.Column("status", sa.Integer),
        sa.Column("body", Text),
        sa.Column("created", sa.BigInteger, nullable=False, index=True),
    )
