"""A store with a validator that accepts everything, and uploads of two small files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import sqlalchemy as sa

from polyadapt_store.manifest import PEFT_FORM, AdapterRecord, FileForm, ValidationReport
from polyadapt_store.object_store import ObjectBlobs
from polyadapt_store.store import AdapterStore

# The server's URL where names are kept in PostgreSQL; child processes inherit it.
DATABASE_VARIABLE = "POLYADAPT_TEST_DATABASE"
# The bucket's URL where bytes are kept in an object store, whose server obstore's variables name.
BUCKET_VARIABLE = "POLYADAPT_TEST_BUCKET"

REPORT = ValidationReport(
    family="lora",
    rank=4,
    target_modules=("q_proj",),
    num_elements=512,
    num_tensors=4,
    is_scalable=True,
    base_model="tiny",
    base_digest="sha256:" + "0" * 64,
)


def accept(directory: Path) -> ValidationReport:
    return REPORT


def open_store(
    root: Path,
    validate: Callable[[Path], ValidationReport] = accept,
    failpoint: Callable[[str], None] = lambda name: None,
    forms: Sequence[FileForm] = (PEFT_FORM,),
) -> AdapterStore:
    return AdapterStore(
        root,
        validate,
        registry=registry_of(root),
        remote=remote_of(root, failpoint),
        forms=forms,
        failpoint=failpoint,
    )


def remote_of(root: Path, failpoint: Callable[[str], None]) -> ObjectBlobs | None:
    """The object store of the store at `root`: a prefix of its own in the bucket, or none."""
    url = os.environ.get(BUCKET_VARIABLE)
    return None if url is None else ObjectBlobs(f"{url}/{_name(root)}", failpoint)


def _name(root: Path) -> str:
    return "store_" + hashlib.sha256(str(root).encode()).hexdigest()[:20]


def registry_of(root: Path) -> Path | str:
    """The registry of the store at `root`: a schema of its own on the server, or a file."""
    server = os.environ.get(DATABASE_VARIABLE)
    if server is None:
        return root / "registry.sqlite"
    schema = _name(root)
    engine = sa.create_engine(
        sa.make_url(server).set(drivername="postgresql+psycopg"), poolclass=sa.NullPool
    )
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA IF NOT EXISTS {schema}")
    return f"{server}?options=-csearch_path%3D{schema}"


def upload(
    store: AdapterStore,
    name: str = "poet",
    tenant: str = "a",
    content: bytes = b"1",
    **more: object,
) -> tuple[AdapterRecord, bool]:
    with store.stage() as staged:
        with staged.add_file("adapter_config.json") as writer:
            writer.write(b"{}")
        with staged.add_file("adapter_model.safetensors") as writer:
            writer.write(content)
        return store.publish(staged, name, tenant, **more)  # type: ignore[arg-type]


def files_below(root: Path) -> set[str]:
    """Every file of the store but the database's own."""
    return {
        path.relative_to(root).as_posix()
        for path in root.rglob("*")
        if path.is_file()
        and not path.name.startswith(("registry.sqlite", "lock"))
        and path.parent.name != "locks"
    }
