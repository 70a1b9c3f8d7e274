"""One upload on its way in: file names are judged, wanted bytes are written and hashed, the rest is
dropped.

Knows nothing of what the files hold, except that pickles are never stored.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from polyadapt.errors import InvalidRequest, PayloadTooLarge, Problem
from polyadapt_store.blobs import BlobStore, Failpoint
from polyadapt_store.limits import StoreLimits
from polyadapt_store.manifest import (
    CONFIG_SUFFIX,
    PEFT_FORM,
    WEIGHTS_NAME,
    FileEntry,
    FileForm,
    is_read,
    is_shallow,
    missing_files,
)
from polyadapt_store.strict_json import shown

logger = logging.getLogger(__name__)

_PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})
# What a trainer leaves beside the adapter. Dropped unread like a README, so that a whole output
# folder can be sent.
_TRAINER_PICKLES = frozenset({"training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt"})
# Weights under a name that no family reads would change the output if we knew how; dropping them
# would hide that.
_WEIGHTS = frozenset({".safetensors", ".gguf", ".npz", ".npy", ".h5", ".msgpack", ".onnx"})


class FileWriter:
    """Takes one file's bytes in order. A context manager; leaving it by an error abandons
    the file.
    """

    def __init__(
        self, upload: StagedUpload, name: str, target: Path | None, max_bytes: int
    ) -> None:
        self._upload = upload
        self._name = name
        self._max_bytes = max_bytes
        self._digest = hashlib.sha256()
        self._size = 0
        self._file: BinaryIO | None = None
        if target is not None:
            target.parent.mkdir(mode=0o700, exist_ok=True)
            self._file = target.open("xb")

    def write(self, data: bytes) -> None:
        """Add bytes; raises PayloadTooLarge as soon as the file or the upload is over its limit."""
        self._size += len(data)
        if self._size > self._max_bytes:
            raise PayloadTooLarge(
                f"{shown(self._name)} is larger than {self._max_bytes} bytes", param="files"
            )
        self._upload.count(len(data))
        if self._file is not None:
            self._digest.update(data)
            self._file.write(data)

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is None:
            return
        with self._file:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        if kind is None:
            self._upload.complete(FileEntry(self._name, self._size, self._digest.hexdigest()))


class StagedUpload:
    """The files of one upload, in a directory that nobody else sees. Leaving the context removes
    what was not published.

    Not thread-safe: one upload belongs to one thread at a time.
    """

    def __init__(
        self,
        blobs: BlobStore,
        limits: StoreLimits,
        failpoint: Failpoint,
        forms: Sequence[FileForm] = (PEFT_FORM,),
    ) -> None:
        """forms: files that belong to one of them are stored."""
        self._blobs = blobs
        self._limits = limits
        self._failpoint = failpoint
        self._forms = forms
        self._names: set[str] = set()
        self._files: list[FileEntry] = []
        self._problems: list[Problem] = []
        self._unused: list[str] = []
        self._num_bytes = 0
        self._directory: Path | None = blobs.new_staging()
        self._failpoint("stage.created")

    @property
    def directory(self) -> Path:
        """Where the stored files lie; raises ValueError after the upload was published or
        dropped.
        """
        if self._directory is None:
            raise ValueError("the upload was published or dropped already")
        return self._directory

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """The files that were written completely."""
        return tuple(self._files)

    @property
    def unused(self) -> tuple[str, ...]:
        """Names that were sent and are not stored."""
        return tuple(self._unused)

    @property
    def problems(self) -> list[Problem]:
        """What is wrong with the set of files: pickles, unknown weights, missing files."""
        names = {file.name for file in self._files}
        missing = [
            Problem("missing_file", f"{name} is missing from the upload", name)
            for name in missing_files(names, self._forms)
        ]
        return self._problems + missing

    def add_file(self, name: str) -> FileWriter:
        """Return a writer for the file `name`, as the client called it.

        Raises InvalidRequest for a name that is no plain relative path of at most one folder, or
        was sent before, and PayloadTooLarge for too many files.
        """
        self._check_name(name)
        if len(self._names) >= self._limits.num_files:
            raise PayloadTooLarge(
                f"the upload has more than {self._limits.num_files} files", param="files"
            )
        if name.casefold() in self._names:
            raise InvalidRequest(f"the file {shown(name)} was sent twice", param="files")
        self._names.add(name.casefold())
        last = name.rpartition("/")[2]
        suffix = os.path.splitext(last)[1].lower()
        max_bytes = self._limits.file_bytes
        if is_read(name, self._forms):
            if suffix == CONFIG_SUFFIX:
                max_bytes = self._limits.config_bytes
            return FileWriter(self, name, self.directory / name, max_bytes)
        if last in _TRAINER_PICKLES or last.startswith("rng_state"):
            self._unused.append(name)
        elif suffix in _PICKLES:
            self._problems.append(
                Problem(
                    "pickle_refused",
                    f"{name} is a pickle, which runs code when it is read; "
                    f"send {WEIGHTS_NAME} (PEFT: save_pretrained(..., safe_serialization=True))",
                    name,
                )
            )
        elif suffix in _WEIGHTS:
            self._problems.append(
                Problem(
                    "unknown_weights_file",
                    f"{name} holds weights under a name that nothing reads, expected "
                    f"{WEIGHTS_NAME}",
                    name,
                )
            )
        else:
            self._unused.append(name)
        return FileWriter(self, name, None, max_bytes)

    def wants(self, name: str) -> bool:
        """Whether a file of this name would be stored."""
        return is_read(name, self._forms)

    def check_size(self, name: str, num_bytes: int) -> None:
        """Raise PayloadTooLarge, before it is read, for a file that could not be added."""
        if num_bytes > min(self._limits.file_bytes, self._limits.total_bytes - self._num_bytes):
            raise PayloadTooLarge(f"{shown(name)} has {num_bytes} bytes, too many", param="files")

    def count(self, num_bytes: int) -> None:
        """Charge bytes to the upload; raises PayloadTooLarge."""
        self._num_bytes += num_bytes
        if self._num_bytes > self._limits.total_bytes:
            raise PayloadTooLarge(
                f"the upload is larger than {self._limits.total_bytes} bytes", param="files"
            )

    def complete(self, entry: FileEntry) -> None:
        """Record a file whose bytes are on the disk."""
        self._files.append(entry)
        self._failpoint("stage.file_written")

    def move_to(self, place: Callable[[Path], object]) -> None:
        """Hand the directory over to `place`; if that raises, the upload stays ours to remove."""
        place(self.directory)
        self._directory = None

    def take_over(self, other: StagedUpload) -> None:
        """Become the other upload, of the same store, which is left with nothing to remove; to be
        called before any file was added. Raises ValueError after `other` was published or dropped.
        """
        assert not self._names, "an upload with files of its own takes over no other's"
        self._directory, other._directory = other.directory, self._directory
        self._names, self._files, self._num_bytes = other._names, other._files, other._num_bytes
        self._problems, self._unused = other._problems, other._unused

    def discard(self) -> None:
        """Remove the files if they were not published; does nothing the second time."""
        directory, self._directory = self._directory, None
        if directory is not None and directory.exists():
            self._blobs.discard(directory)

    def __enter__(self) -> StagedUpload:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.discard()

    def _check_name(self, name: str) -> None:
        parts = name.split("/")
        is_plain = (
            0 < len(name) <= self._limits.name_chars
            and name.isprintable()
            and "\\" not in name
            and all(part not in ("", ".", "..") and len(part.encode()) <= 255 for part in parts)
        )
        if not is_plain or not is_shallow(name):
            raise InvalidRequest(
                f"file name {shown(name)} must be a relative path of at most one folder, "
                "without '..', backslashes and control characters",
                param="files",
            )
