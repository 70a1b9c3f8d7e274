"""Compile the native kernels once per machine and load them. Knows no tensors.

The library lies in <home>/native/<key>/, where the key covers everything that decides its bytes:
sources, flags, compiler and processor. Without a compiler, or with POLYADAPT_NATIVE=0, there is no
library and a reason.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from polyadapt.config import default_home

_LOG = logging.getLogger(__name__)

_SOURCES = Path(__file__).parent
# Nothing here relaxes IEEE semantics: NaN and infinity behave as written. Contraction is off
# because the sources spell out every fused operation, so vectors and scalar tails round alike.
_FLAGS = (
    "-std=gnu11",
    "-O3",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fvisibility=default",
)
_OPENMP = "-fopenmp"
_OPENMP_SYMBOLS = (
    "GOMP_parallel",
    "__kmpc_fork_call",
)  # gcc's and clang's entry to a parallel region
_COMPILERS = ("cc", "gcc", "clang")
_VERSION_TIMEOUT_S = 20
_BUILD_TIMEOUT_S = 180


@dataclass(frozen=True, slots=True)
class Loaded:
    """The loaded library, or None and why there is none; `reason` also names how it was built."""

    library: ctypes.CDLL | None
    reason: str


class BuildError(Exception):
    """One attempt to build or load the kernels failed; the message says how."""


@functools.cache
def load() -> ctypes.CDLL | None:
    """Return the native library, compiled now if this machine has not compiled it before, or None.

    The outcome and its reason are logged once per process. Import torch first: the library takes
    its threads from the OpenMP runtime that torch brought into the process.
    """
    return outcome().library


@functools.cache
def outcome() -> Loaded:
    """As `load`, with the reason."""
    found = load_from(default_home(os.environ) / "native", os.environ)
    if found.library is None:
        _LOG.warning("native kernels are off: %s", found.reason)
    else:
        _LOG.info("native kernels are on: %s", found.reason)
    return found


def load_from(cache: Path, environ: Mapping[str, str], sources: Path = _SOURCES) -> Loaded:
    """Return the library of `sources` from `cache`, compiling it there if need be.

    `environ` gives POLYADAPT_NATIVE ("0" turns the kernels off), CC and PATH. Whatever is missing
    or fails ends up in `reason`; nothing is raised for it.
    """
    if environ.get("POLYADAPT_NATIVE") == "0":
        return Loaded(None, "POLYADAPT_NATIVE=0")
    compiler = find_compiler(environ)
    if compiler is None:
        return Loaded(None, f"no C compiler ({', '.join(_COMPILERS)} or $CC) on PATH; install gcc")
    failures = []
    for flags in _variants():
        try:
            library = _load_variant(cache, compiler, flags, sources)
        except (BuildError, OSError, subprocess.SubprocessError) as error:
            failures.append(f"{' '.join(flags[len(_FLAGS) :]) or 'plain'}: {error}")
            _LOG.debug("native kernels: %s", failures[-1])
            continue
        return Loaded(library, f"{compiler[0]} {' '.join(flags[len(_FLAGS) :])}".strip())
    return Loaded(None, "; ".join(failures))


def find_compiler(environ: Mapping[str, str]) -> tuple[str, ...] | None:
    """Return the command of the first of $CC, cc, gcc and clang that PATH holds, or None."""
    wanted = [tuple(environ.get("CC", "").split())] + [(name,) for name in _COMPILERS]
    for command in wanted:
        if command and (path := shutil.which(command[0], path=environ.get("PATH", ""))):
            return (path, *command[1:])
    return None


def _variants() -> list[tuple[str, ...]]:
    """Return the flags to try, fastest first."""
    target = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    variants = [(*_FLAGS, target), _FLAGS]
    if _has_openmp():
        variants.insert(0, (*_FLAGS, target, _OPENMP))
    return variants


def _has_openmp() -> bool:
    """Whether torch has made an OpenMP runtime visible to libraries that are loaded later."""
    process = ctypes.CDLL(None)
    for symbol in _OPENMP_SYMBOLS:
        try:
            process[symbol]
        except AttributeError:
            continue
        return True
    return False


def _load_variant(
    cache: Path, compiler: tuple[str, ...], flags: tuple[str, ...], sources: Path
) -> ctypes.CDLL:
    """Return the library of these flags, from the cache or compiled into it."""
    folder = cache / _key(compiler, flags, sources)
    path = folder / "kernels.so"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_owner(folder)
    if path.exists():
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            _LOG.warning("%s does not load (%s); compiling it again", path, error)
    _build(path, compiler, flags, sources)
    return ctypes.CDLL(str(path))


def _build(path: Path, compiler: tuple[str, ...], flags: tuple[str, ...], sources: Path) -> None:
    """Compile every source and link the library at `path`, which appears whole or not at all.

    Two processes may build at once: each works in a folder of its own and the last rename wins.
    """
    with tempfile.TemporaryDirectory(prefix="build-", dir=path.parent) as name:
        folder = Path(name)
        objects = []
        for source in _files(sources):
            if source.suffix == ".c":
                objects.append(str(folder / f"{source.stem}.o"))
                _run([*compiler, *flags, "-c", str(source), "-o", objects[-1]])
        # Linked without -fopenmp: naming a runtime here would load a second one, with threads of
        # its own, beside torch's. The open symbols bind to the runtime that torch loaded.
        undefined = ["-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else []
        library = folder / path.name
        _run([*compiler, "-shared", *undefined, "-o", str(library), *objects, "-lm"])
        os.replace(library, path)


def _run(command: list[str]) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=_BUILD_TIMEOUT_S
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        said = lines[0] if lines else "no message"
        raise BuildError(f"{command[0]} ended with status {done.returncode}: {said}")


def _key(compiler: tuple[str, ...], flags: tuple[str, ...], sources: Path) -> str:
    version = subprocess.run(
        [*compiler, "--version"],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=_VERSION_TIMEOUT_S,
    )
    parts = [*compiler, *flags, version.stdout, platform.machine(), _processor()]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:{part}".encode())
    for source in _files(sources):
        content = source.read_bytes()
        digest.update(f"{source.name}:{len(content)}:".encode() + content)
    return digest.hexdigest()


def _files(sources: Path) -> list[Path]:
    return sorted(path for path in sources.iterdir() if path.suffix in (".c", ".h"))


def _processor() -> str:
    """Return what "native" stands for here: the first processor's model and features."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    found: dict[str, str] = {}
    for line in cpuinfo.read_text(errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in wanted:
            found.setdefault(name.strip(), value.strip())
    return repr(sorted(found.items()))


def _check_owner(folder: Path) -> None:
    """Refuse a folder that another user could have put a library into."""
    status = folder.stat()
    if status.st_uid not in (os.getuid(), 0) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BuildError(f"{folder} is open to another user; remove it or chmod 700")
