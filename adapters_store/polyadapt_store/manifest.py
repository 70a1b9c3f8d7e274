"""What a stored adapter is: its files and their digest, the validator's report, the registry's
record.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from polyadapt.types import AdapterId, OptionValue

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_SUFFIX, WEIGHTS_SUFFIX = ".json", ".safetensors"

# What may name an adapter or a workflow: in a longer expression, and as the pattern of a schema.
NAME = "[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
NAME_PATTERN = f"^{NAME}$"

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
class OfferedOption:
    """One thing that a request may choose of an adapter by name; `expected` says its values."""

    name: str
    kind: str
    summary: str
    expected: str
    default: OptionValue | None = None  # what stands where a request says nothing
    num_bits: int = 0  # of kind `bits`, which no request chooses


@dataclass(frozen=True, slots=True)
class ReportedTraits:
    """What whoever asks for an adapter has to know of it beside its scale."""

    ranks: tuple[int, int] | None = None  # the least and the most that a request may choose
    invocation_tokens: tuple[int, ...] = ()  # it acts from their last occurrence on; (): always
    options: tuple[OfferedOption, ...] = ()


@dataclass(frozen=True, slots=True)
class FileForm:
    """The files of one form of adapter, by their paths in its directory.

    required: each must be there; optional: what may be, "*" standing for any folder or name.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    def reads(self, name: str) -> bool:
        """Whether a file of this path is one of the form's."""
        parts = name.split("/")
        return name in self.required or any(
            len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))
            for wanted in (pattern.split("/") for pattern in self.optional)
        )


PEFT_FORM = FileForm((CONFIG_NAME, WEIGHTS_NAME))


def is_read(name: str, forms: Sequence[FileForm]) -> bool:
    """Whether a file of this path belongs to any of the forms."""
    return any(form.reads(name) for form in forms)


def missing_files(names: Collection[str], forms: Sequence[FileForm]) -> tuple[str, ...]:
    """What the form lacks that the names come closest to; empty when they complete one."""
    lacks = (tuple(name for name in form.required if name not in names) for form in forms)
    return min(lacks, key=len)


def is_shallow(name: str) -> bool:
    """Whether a file of this path, with '/', lies at most one folder deep, as all of them do."""
    return name.count("/") <= 1


def list_shallow(directory: Path) -> list[str]:
    """Return, in order, the paths of the files of a directory that may belong to an adapter; links
    are followed.
    """
    found = (path for path in directory.rglob("*") if path.is_file())
    return sorted(filter(is_shallow, (path.relative_to(directory).as_posix() for path in found)))


def list_names(directory: Path) -> frozenset[str]:
    """Return the paths of all files below an adapter's directory, with '/'."""
    found = (path for path in directory.rglob("*") if not path.is_dir())
    return frozenset(path.relative_to(directory).as_posix() for path in found)


def weight_files(directory: Path, forms: Sequence[FileForm]) -> dict[str, Path]:
    """Return the safetensors files that belong to the forms, each under what its tensors' names
    begin with when they are read together: nothing for WEIGHTS_NAME itself, else its path and '/'.
    """
    names = (name for name in list_names(directory) if name.endswith(WEIGHTS_SUFFIX))
    return {
        weights_prefix(name): directory / name for name in sorted(names) if is_read(name, forms)
    }


def weights_prefix(name: str) -> str:
    """What the names of a file's tensors begin with; see weight_files."""
    return "" if name == WEIGHTS_NAME else f"{name}/"


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
    traits: ReportedTraits | None = None  # None: validated before they were recorded

    @property
    def is_mark(self) -> bool:
        """Whether the adapter tells who asks: its weights are secret, and lie sealed."""
        offered = () if self.traits is None else self.traits.options
        return any(option.kind == "bits" for option in offered)


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
        return AdapterId(self.name, self.version, self.digest, self.tenant)

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
