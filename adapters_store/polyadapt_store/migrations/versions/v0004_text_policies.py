"""How texts are marked, per tenant."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

_TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        "text_policies",
        sa.Column("tenant", _TEXT, primary_key=True),
        sa.Column("generation", sa.Integer, primary_key=True),
        sa.Column("is_required", sa.Integer, nullable=False),
        sa.Column("settings", _TEXT, nullable=False),
        sa.Column("created", sa.Integer, nullable=False),
    )
