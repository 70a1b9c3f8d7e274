"""The registry's revisions, oldest first, and how a database is brought to the last of them.

A revision is a file versions/vNNNN_what.py, which is never changed once it was released. Nothing is
taken back: a release reads what the one before it wrote, not the other way round.
"""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

HEAD = "0009"


def migrate(connection: sa.Connection) -> str | None:
    """Bring the database to HEAD within the caller's transaction, which lets no other process
    migrate; return the revision that is there if this release does not know it.
    """
    found = MigrationContext.configure(connection).get_current_revision()
    if found == HEAD:
        return None
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if found is not None and found not in known:
        return found
    config.attributes["connection"] = connection
    command.upgrade(config, HEAD)
    return None
