"""The registry as it was before there were revisions.

What a file of an earlier release lacks of it is added: those wrote these tables and no others.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision: str | None = None

Text = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")

metadata = sa.MetaData()

sa.Table(
    "adapters",
    metadata,
    sa.Column("tenant", Text, primary_key=True),
    sa.Column("name", Text, primary_key=True),
    sa.Column("current_version", sa.Integer),
    sa.Column("last_version", sa.Integer, nullable=False),
)

sa.Table(
    "adapter_versions",
    metadata,
    sa.Column("id", Text, primary_key=True),
    sa.Column("tenant", Text, nullable=False),
    sa.Column("name", Text, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("digest", Text, nullable=False, index=True),
    sa.Column("base_digest", Text, nullable=False),
    sa.Column("status", Text, nullable=False),
    sa.Column("created", sa.Integer, nullable=False),
    sa.Column("description", Text, nullable=False),
    sa.Column("manifest", Text, nullable=False),
    sa.UniqueConstraint("tenant", "name", "version"),
    sa.ForeignKeyConstraint(["tenant", "name"], ["adapters.tenant", "adapters.name"]),
    sa.CheckConstraint("status IN ('ready', 'revoked', 'deleted')"),
)

sa.Table(
    "adapter_tags",
    metadata,
    sa.Column("version_id", Text, sa.ForeignKey("adapter_versions.id"), primary_key=True),
    sa.Column("tag", Text, primary_key=True),
)

sa.Table(
    "workflows",
    metadata,
    sa.Column("tenant", Text, primary_key=True),
    sa.Column("name", Text, primary_key=True),
    sa.Column("id", Text, nullable=False, unique=True),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("created", sa.Integer, nullable=False),
    sa.Column("updated", sa.Integer, nullable=False),
    sa.Column("description", Text, nullable=False),
    sa.Column("definition", Text),
)

sa.Table(
    "adapter_profiles",
    metadata,
    sa.Column("tenant", Text, primary_key=True),
    sa.Column("name", Text, primary_key=True),
    sa.Column("space", Text, nullable=False),
    sa.Column("base_digest", Text, nullable=False),
    sa.Column("examples", Text, nullable=False),
    sa.Column("num_centroids", sa.Integer, nullable=False),
    sa.Column("centroids", sa.LargeBinary, nullable=False),
    sa.Column("own_scores", Text, nullable=False),
    sa.Column("created", sa.Integer, nullable=False),
    sa.ForeignKeyConstraint(["tenant", "name"], ["adapters.tenant", "adapters.name"]),
)

sa.Table(
    "profile_spaces",
    metadata,
    sa.Column("space", Text, primary_key=True),
    sa.Column("content", sa.LargeBinary, nullable=False),
)

sa.Table(
    "policies",
    metadata,
    sa.Column("tenant", Text, primary_key=True),
    sa.Column("created", sa.Integer, nullable=False),
)

sa.Table(
    "policy_adapters",
    metadata,
    sa.Column("tenant", Text, sa.ForeignKey("policies.tenant"), primary_key=True),
    sa.Column("position", sa.Integer, primary_key=True),
    sa.Column("version_id", Text, sa.ForeignKey("adapter_versions.id"), nullable=False, index=True),
    sa.Column("scale", sa.Float, nullable=False),
    sa.Column("rank", sa.Integer),
    sa.Column("options", Text, nullable=False),
)

sa.Table(
    "signatures",
    metadata,
    sa.Column("digest", Text, primary_key=True),
    sa.Column("user", Text, primary_key=True),
    sa.Column("generation", sa.Integer, primary_key=True),
    sa.Column("bits", Text, nullable=False),
    sa.Column("issued_at", sa.Integer, nullable=False),
    sa.Column("revoked_at", sa.Integer),
)

sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", Text, primary_key=True),
    sa.Column("hash", sa.LargeBinary, nullable=False, unique=True),
    sa.Column("tenant", Text, nullable=False),
    sa.Column("label", Text, nullable=False),
    sa.Column("scopes", Text, nullable=False),
    sa.Column("created", sa.Integer, nullable=False),
)


def upgrade() -> None:
    """Make what is not there yet."""
    metadata.create_all(op.get_bind())
