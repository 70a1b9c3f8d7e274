"""`polyadapt mark text-...`: keys, and whose a text is, without a server."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests.support import byte_tokenizer
from typer.testing import CliRunner

from polyadapt.cli import app
from polyadapt.watermark.secrets import read_kek
from polyadapt.watermark.text import GreenList, context_seeds, user_key

RUNNER = CliRunner()


@pytest.fixture
def key_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POLYADAPT_HOME", str(tmp_path / "home"))
    found = RUNNER.invoke(app, ["mark", "text-keygen", str(tmp_path / "key")])
    assert found.exit_code == 0, found.output
    assert "public key" in found.output
    return tmp_path / "key"


def write_text(key_file: Path, user: str, path: Path) -> Path:
    """400 letters, each the greenest of some, and so this user's."""
    key = user_key(read_kek(key_file), user)
    rng, scheme, tokens = np.random.default_rng(1), GreenList(), [104, 105]
    while len(tokens) < 400:
        seed = context_seeds(key[None], np.array([tokens[-2:]]))
        options = rng.integers(97, 123, 3)
        tokens.append(int(options[scheme.evidence(seed, options).argmax()]))
    path.write_bytes(bytes(tokens))
    return path


def test_a_text_is_traced_and_the_record_checks(key_file: Path, tmp_path: Path):
    model = byte_tokenizer.write(tmp_path / "model")
    (model / "config.json").write_text("{}")
    text = write_text(key_file, "key-7", tmp_path / "text")
    users = tmp_path / "users"
    users.write_text("\n".join(f"key-{i}" for i in range(50)))
    common = [str(text), "--model", str(model), "--key-file", str(key_file)]
    record = tmp_path / "record.json"
    found = RUNNER.invoke(
        app, ["mark", "text-trace", *common, "--users", str(users), "--out", str(record)]
    )
    assert found.exit_code == 0, found.output
    assert "named: key-7 (of 50 users, 400 tokens" in found.output
    signed = json.loads(record.read_text())
    signature = signed["signature"]
    assert (signed["record"]["version"], signed["record"]["kind"]) == (1, "text reading")
    checked = RUNNER.invoke(
        app, ["mark", "check-evidence", str(record), "--public-key", signature["public_key"]]
    )
    assert checked.exit_code == 0, checked.output
    for user, code in (("key-7", 0), ("key-8", 3)):
        found = RUNNER.invoke(
            app,
            ["mark", "text-detect", *common, "--user", user, "--scheme", "kgw:2:0.25",
             "--scheme", "synthid", "--scheme", "gumbel"],
        )  # fmt: skip
        assert found.exit_code == code, found.output


def test_the_one_command_says_whose_text_it_is_in_words(key_file: Path, tmp_path: Path):
    model = byte_tokenizer.write(tmp_path / "model")
    (model / "config.json").write_text("{}")
    text = write_text(key_file, "key-7", tmp_path / "text")
    users, record, plot = (tmp_path / name for name in ("users", "record.json", "plot.svg"))
    users.write_text("\n".join(f"key-{i}" for i in range(50)))
    common = [
        "mark",
        "who",
        "--users",
        str(users),
        "--model",
        str(model),
        "--key-file",
        str(key_file),
    ]
    to = ["--out", str(record), "--plot", str(plot)]
    found = RUNNER.invoke(app, [*common, "--text", str(text), *to])
    assert found.exit_code == 0, found.output
    assert found.output.startswith("It was written for key-7.\n")
    assert len(json.loads(record.read_text())["record"]["ranked"]) == 10
    assert "key-7" in plot.read_text()
    found = RUNNER.invoke(app, [*common, "--text", "-"], input="nothing that was marked " * 9)
    assert (found.exit_code, found.output.startswith("Nobody can be named.")) == (3, True)
    for more in (
        [],
        ["--text", str(text), "--reading", str(record)],
        [str(tmp_path), "--text", "-"],
    ):
        found = RUNNER.invoke(app, [*common, *more])
        assert (found.exit_code, "or --text FILE alone" in found.output) == (1, True), found.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--scheme", "kgw:x"], "kgw[:WIDTH"),
        (["--scheme", "no"], "none of"),
        ([], "no key"),
        (["--out", "/no/such/place"], "cannot be written"),
    ],
)
def test_what_cannot_be_is_one_clear_line(arguments, says, tmp_path, monkeypatch):
    monkeypatch.setenv("POLYADAPT_HOME", str(tmp_path))
    model = byte_tokenizer.write(tmp_path / "model")
    (model / "config.json").write_text("{}")
    (tmp_path / "text").write_text("hello")
    given = [str(tmp_path / "text"), "--user", "a", "--model", str(model), *arguments]
    if arguments:
        RUNNER.invoke(app, ["mark", "text-keygen", str(tmp_path / "key")])
        given += ["--key-file", str(tmp_path / "key")]
    found = RUNNER.invoke(app, ["mark", "text-detect", *given])
    assert found.exit_code not in (0, 1) or "Traceback" not in found.output
    assert says in found.output + (found.stderr or "")
