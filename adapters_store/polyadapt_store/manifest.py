"""What a stored adapter is: its files and their digest, the validator's report, the registry's
record.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from polyadapt.types import AdapterId

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

# `validating` and `rejected` are states of an upload; only ready versions are ever recorded.
AdapterStatus = Literal["ready", "revoked", "deleted"]


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One stored file: name relative to the adapter's directory with '/', size in bytes, sha256 in
    hex.
    """

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ValidationReport:
    """What validation learned of an adapter that can be served; a rejected one is an
    AdapterRejected.
    """

    family: str
    rank: int  # the largest of any module
    target_modules: tuple[str, ...]
    num_elements: int  # device elements
    num_tensors: int
    is_scalable: bool  # whether requests may scale it by anything but 0 and 1
    base_model: str
    base_digest: str
    notes: tuple[str, ...] = ()
    unused_files: tuple[str, ...] = ()  # uploaded, without effect on serving, not stored


@dataclass(frozen=True, slots=True)
class AdapterManifest:
    """The files of one adapter and what they were found to be. `digest` depends on the
    files alone.
    """

    files: tuple[FileEntry, ...]
    report: ValidationReport

    @property
    def digest(self) -> str:
        """The adapter's content digest, see digest_of."""
        return digest_of(self.files)

    @property
    def nbytes(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """One version of one name, as the registry knows it and the API shows it."""

    id: str  # opaque, stable for this version
    name: str
    version: int
    digest: str
    tenant: str
    status: AdapterStatus
    created: int  # unix seconds
    description: str
    tags: tuple[str, ...]
    nbytes: int
    report: ValidationReport

    @property
    def adapter_id(self) -> AdapterId:
        """The identity that requests carry."""
        return AdapterId(self.name, self.version, self.digest)

    @property
    def family(self) -> str:
        """The family that serves it."""
        return self.report.family

    @property
    def base_model(self) -> str:
        """The name of the base it was validated against."""
        return self.report.base_model

    @property
    def base_digest(self) -> str:
        """The digest of the base it was validated against."""
        return self.report.base_digest

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return self.report.rank

    @property
    def target_modules(self) -> tuple[str, ...]:
        """The last path components of the modules it changes."""
        return self.report.target_modules


def digest_of(files: Iterable[FileEntry]) -> str:
    """Return "sha256:<hex>" over the files' listing.

    Semantics: sha256 over the concatenation, in byte order of the names, of
    `<len(name)>:<name> <size> <sha256>\\n`. The length prefix keeps any two listings apart.
    """
    listing = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name.encode()):
        name = file.name.encode()
        listing.update(b"%d:%s %d %s\n" % (len(name), name, file.size, file.sha256.encode()))
    return f"sha256:{listing.hexdigest()}"
