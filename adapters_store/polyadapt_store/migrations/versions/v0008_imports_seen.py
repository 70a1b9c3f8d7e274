"""When the server that fetches an adapter said so last."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """What was under way is taken for lost: the server that fetched it has ended."""
    op.add_column("imports", sa.Column("seen", sa.BigInteger, nullable=False, server_default="0"))
