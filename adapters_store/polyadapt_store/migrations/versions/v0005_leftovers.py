"""Bytes in a shared object store that no version names."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

Text = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    """Begin to keep them."""
    op.create_table(
        "blob_leftovers",
        sa.Column("digest", Text, primary_key=True),
        sa.Column("since", sa.BigInteger, nullable=False),
    )
