"""The tutorial's commands, as they stand on its page, against a real server of a tiny base."""

from __future__ import annotations

import re
import runpy
import subprocess
import warnings
from pathlib import Path

import pytest
from tests.support.servers import running_server

PAGE = (Path(__file__).parents[2] / "docs" / "tutorial.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)


def shell(block: str, folder: Path) -> str:
    done = subprocess.run(
        ["bash", "-euc", block], cwd=folder, capture_output=True, text=True, timeout=240, check=True
    )
    return done.stdout


def test_an_adapter_is_trained_uploaded_asked_and_removed(
    tiny_model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tiny_model("llama")
    train, ask = blocks("python")
    curls = [block for block in blocks("sh") if "curl" in block]
    monkeypatch.chdir(tmp_path)

    def python(name: str, source: str, *arguments: str) -> str:
        """Run a script of the page as its own program would be, in this process."""
        Path(name).write_text(source)
        monkeypatch.setattr("sys.argv", [name, *arguments])
        with warnings.catch_warnings(action="ignore"):
            runpy.run_path(name, run_name="__main__")
        return capsys.readouterr().out

    with running_server(tmp_path / "home", model) as server:

        def here(block: str) -> str:
            there = block.replace(". .venv/bin/activate\n", "").replace(ADDRESS, server.url)
            return there.replace('"smollm2"', f'"{model.name}"')

        ready, asked, uploaded, looked = (here(block) for block in curls)
        assert '"status":"ready"' in shell(ready, tmp_path)
        assert '"adapters":[]' in shell(asked, tmp_path)
        said = python("train.py", train, str(model), "heron", "6")
        losses = [float(loss) for loss in re.findall(r"loss (\S+)", said)]
        assert losses[-1] < losses[0]
        said = shell(uploaded, tmp_path)
        assert '"name":"heron","version":1' in said
        assert '"model":"heron"' in said
        python("ask.py", here(ask))
        said = shell(looked, tmp_path)
        assert 'polyadapt_adapters{tier="device"} 1.0' in said
        assert '"deleted":true' in said
