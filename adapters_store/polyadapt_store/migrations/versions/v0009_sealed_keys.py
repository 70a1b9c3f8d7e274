"""Keys of the registry itself, sealed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"

_TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    """Make the table; what they open is sealed by the server, which has the key for them."""
    op.create_table(
        "sealed_keys",
        sa.Column("name", _TEXT, primary_key=True),
        sa.Column("sealed", _TEXT, nullable=False),
        sa.Column("created", sa.Integer, nullable=False),
    )
