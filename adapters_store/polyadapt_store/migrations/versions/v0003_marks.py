"""Sealed secrets of marks, and the sealed keys of their signatures."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

Text = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    """Make the table; rows in the clear are sealed by the server, which has the key."""
    op.create_table(
        "marks",
        sa.Column("digest", Text, primary_key=True),
        sa.Column("row_key", Text),
        sa.Column("config", Text),
        sa.Column("secrets", Text),
        sa.Column("created", sa.Integer, nullable=False),
    )
