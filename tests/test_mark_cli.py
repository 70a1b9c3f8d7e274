"""`polyadapt mark` from a key to a name, by its command line alone."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from peft import LoraConfig
from safetensors.numpy import load_file, save_file
from tests.support import peft_adapters
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from polyadapt.cli import app
from polyadapt.watermark.classifier import COPY_NAME, load_suspect
from polyadapt.watermark.dataset import load_digits

WIDE = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
USERS = [f"user-{i}" for i in range(40)]


def run(*arguments: object, env: dict[str, str] | None = None) -> tuple[int, str]:
    """Run a command in this process; return its status and both outputs."""
    done = CliRunner().invoke(app, ["mark", *map(str, arguments)], env={**WIDE, **(env or {})})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


def ok(*arguments: object) -> str:
    status, output = run(*arguments)
    assert status == 0, output
    return output


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A trained and calibrated mark of 24 bits, its base and a reference, one user's copy."""
    root = tmp_path_factory.mktemp("mark")
    kek = ("--kek-file", root / "kek")
    ok("keygen", root / "m", "--bits", 24, *kek)
    for seed in (1, 2, 3):
        ok("classifier", root / f"c{seed}", "--seed", seed)
    assert "d' from" in ok("preflight", root / "m", "--model", root / "c1", *kek)
    trained = ok("train", root / "m", "--model", root / "c1", *kek)
    # The key is drawn anew every time: with some, one of 797 answers is touched.
    found = re.search(r"falls by (\S+) points .* and (\S+) at worst; (\S+)% of the", trained)
    assert found is not None, trained
    assert abs(float(found[1])) <= 0.2
    assert abs(float(found[2])) <= 0.4
    assert float(found[3]) >= 99
    references = ("--reference", root / "c1", "--reference", root / "c2")
    assert "2 unmarked models" in ok("calibrate", root / "m", *references, *kek)
    ok("export", root / "m", root / "copy", "--model", root / "c1", "--user", "user-7", *kek)
    (root / "users.txt").write_text("\n".join(USERS) + "\n\n")
    return root


def trace(home: Path, reading: Path, *more: object) -> str:
    return ok(
        "trace",
        home / "m",
        "--reading",
        reading,
        "--users",
        home / "users.txt",
        "--kek-file",
        home / "kek",
        *more,
    )


def test_a_copy_that_leaked_is_named_or_nobody(home, tmp_path):
    reading, record = tmp_path / "reading.json", tmp_path / "trace.json"
    output = ok(
        "verify",
        home / "m",
        "--suspect",
        home / "copy",
        "--out",
        reading,
        "--kek-file",
        home / "kek",
    )
    assert "24 of 24 bits decided" in output
    output = trace(home, reading, "--out", record)
    assert "named: user-7 (of 40 users, at an error of 0.001;" in output
    others = tmp_path / "others.txt"
    others.write_text("user-1\nuser-2\n")
    given = "--reading", reading, "--users", others, "--kek-file", home / "kek"
    status, output = run("trace", home / "m", *given)
    assert (status, "named: nobody (of 2 users" in output) == (3, True)
    public_key = json.loads((home / "m" / "config.json").read_text())["evidence_public_key"]
    assert "a trace of" in ok("check-evidence", record, "--public-key", public_key)
    found = json.loads(record.read_text())["record"]
    assert found["trace"]["accused"][0]["user"] == "user-7"
    assert found["reading"]["null"]["models"] == 2
    assert found["reading"]["rule"]["kind"] == "sequential"
    record.write_text(record.read_text().replace("user-7", "user-8"))
    status, output = run("check-evidence", record, "--public-key", public_key)
    assert (status, "changed after it was signed" in output) == (1, True)


def test_one_command_says_who_how_sure_and_why(home, tmp_path):
    kek, users = ("--kek-file", home / "kek"), ("--users", home / "users.txt")
    record, plot = tmp_path / "evidence.json", tmp_path / "plot.svg"
    output = ok(
        "who", home / "m", "--suspect", home / "copy", *users, "--out", record, "--plot", plot, *kek
    )
    assert output.startswith("It comes from a copy of user-7.\n")
    for words in ("How sure", "24 of 24 bits could be read", "does not show", "That user-7 leaked"):
        assert words in output
    public_key = json.loads((home / "m" / "config.json").read_text())["evidence_public_key"]
    ok("check-evidence", record, "--public-key", public_key)
    found = json.loads(record.read_text())["record"]
    assert found["words"]["who"] == ["user-7"]
    assert found["trace"]["accused"][0]["user"] == "user-7"
    assert "user-7" in plot.read_text()
    status, output = run("who", home / "m", "--suspect", home / "c3", *users, *kek)
    assert (status, output.startswith("No sign of this mark")) == (3, True)


def test_who_takes_a_reading_that_was_made_before_and_nothing_beside_it(home, tmp_path):
    kek, users = ("--kek-file", home / "kek"), ("--users", home / "users.txt")
    reading = tmp_path / "reading.json"
    ok("verify", home / "m", "--suspect", home / "copy", "--out", reading, *kek)
    assert "a copy of user-7" in ok("who", home / "m", "--reading", reading, *users, *kek)
    given = ("--reading", reading, "--suspect", home / "copy")
    status, output = run("who", home / "m", *given, *users, *kek)
    assert (status, "and not both" in output) == (1, True)
    status, output = run("who", home / "m", *users, *kek)
    assert (status, "give --suspect DIR, or" in output) == (1, True)
    plot = tmp_path / "none" / "plot.svg"
    given = ("--reading", reading, "--plot", plot)
    status, output = run("who", home / "m", *given, *users, *kek)
    assert (status, "cannot be written" in output) == (1, True)
    reading.write_text(reading.read_text().replace('"value": 1', '"value": 0', 1))
    status, output = run("who", home / "m", "--reading", reading, *users, *kek)
    assert (status, "changed after it was signed" in output) == (1, True)


def test_an_unmarked_model_is_nobodys(home, tmp_path):
    reading = tmp_path / "reading.json"
    output = ok(
        "verify", home / "m", "--suspect", home / "c3", "--out", reading, "--kek-file", home / "kek"
    )
    assert "0 of 24 bits decided" in output
    given = "--reading", reading, "--users", home / "users.txt", "--kek-file", home / "kek"
    status, output = run("trace", home / "m", *given)
    assert (status, "named: nobody (of 40 users" in output) == (3, True)


def test_a_suspect_that_only_others_can_ask_is_read_from_their_answers(home, tmp_path):
    asked, answers, reading = (tmp_path / name for name in ("q.safetensors", "a", "r.json"))
    kek = ("--kek-file", home / "kek")
    assert "384 inputs" in ok("queries", home / "m", asked, *kek)
    inputs = load_file(asked)["inputs"]
    save_file({"labels": load_suspect(home / "copy")(inputs)}, answers)
    given = ("verify", home / "m", "--asked", asked, "--answers", answers, *kek)
    assert "24 of 24 bits decided" in ok(*given, "--out", reading)
    assert "named: user-7" in trace(home, reading)
    save_file({"labels": np.zeros(5, np.int64)}, answers)
    status, output = run(*given)
    assert (status, "5 answers to 384 queries" in output) == (1, True)
    save_file({"inputs": inputs[::-1].copy()}, asked)
    status, output = run(*given)
    assert (status, "not one that this mark wrote" in output) == (1, True)


def test_a_forged_reading_names_nobody(home, tmp_path):
    reading = tmp_path / "reading.json"
    ok(
        "verify",
        home / "m",
        "--suspect",
        home / "copy",
        "--out",
        reading,
        "--kek-file",
        home / "kek",
    )
    fields = json.loads(reading.read_text())
    fields["record"]["bits"][0]["value"] = 1 - fields["record"]["bits"][0]["value"]
    reading.write_text(json.dumps(fields))
    status, output = run(
        "trace",
        home / "m",
        "--reading",
        reading,
        "--users",
        home / "users.txt",
        "--kek-file",
        home / "kek",
    )
    assert (status, "changed after it was signed" in output) == (1, True)


def test_what_leaves_the_house_reads_as_its_user_and_is_worth_nothing_without_the_mark(
    home, tmp_path
):
    kek = ("--kek-file", home / "kek")
    data = load_digits().held_out

    def accuracy(directory: Path) -> float:
        return float((load_suspect(directory)(data[0]) == data[1]).mean())

    for form, files in (("bundle", 2), ("expanded", 1)):
        copy = tmp_path / form
        given = ("--model", home / "c1", "--user", "user-7", "--form", form)
        assert f"{copy}, {form}" in ok("export", home / "m", copy, *given, *kek)
        assert len(list(copy.iterdir())) == files
        reading = tmp_path / f"{form}.json"
        ok("verify", home / "m", "--suspect", copy, "--out", reading, *kek)
        assert "named: user-7" in trace(home, reading)
        assert accuracy(copy) == accuracy(home / "c1")
    (tmp_path / "bundle" / COPY_NAME).unlink()
    assert accuracy(tmp_path / "bundle") < 0.5
    given = ("--model", home / "c1", "--user", "user-7", "--obfuscate", 0)
    assert "can cut them off" in ok("export", home / "m", tmp_path / "bare", *given, *kek)
    (tmp_path / "bare" / COPY_NAME).unlink()
    assert accuracy(tmp_path / "bare") == accuracy(home / "c1")
    status, output = run("export", home / "m", tmp_path / "x", "--form", "merged", *given[:4], *kek)
    assert (status, "a hinge is not linear" in output) == (1, True)


def test_a_copy_holds_nothing_of_the_branches_that_are_not_its_users(home, tmp_path):
    from polyadapt.watermark.mark_directory import MarkDirectory
    from polyadapt.watermark.secrets import read_kek

    twin = tmp_path / "m"
    shutil.copytree(home / "m", twin)
    bits = MarkDirectory.open(twin, read_kek(home / "kek")).codebook.row("user-7")
    tensors = load_file(twin / "branches.safetensors")
    tensors["0.mark_B"][1 - bits, np.arange(len(bits))] = 7.0
    save_file(tensors, twin / "branches.safetensors")
    for form in ("bundle", "expanded"):
        given = ("--model", home / "c1", "--user", "user-7", "--form", form)
        for mark in (home / "m", twin):
            ok(
                "export",
                mark,
                tmp_path / mark.parent.name / form,
                *given,
                "--kek-file",
                home / "kek",
            )
        one, other = (tmp_path / mark.parent.name / form for mark in (home / "m", twin))
        names = [file.name for file in one.iterdir()]
        assert all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_a_linear_mark_leaves_as_an_ordinary_model_of_the_same_size(home, tmp_path):
    kek, mark = ("--kek-file", home / "kek"), tmp_path / "m"
    ok("keygen", mark, "--bits", 16, *kek)
    ok("train", mark, "--model", home / "c1", "--gate", "linear", "--steps", 400, *kek)
    ok("calibrate", mark, "--reference", home / "c1", "--reference", home / "c2", *kek)
    given = ("--model", home / "c1", "--user", "user-7")
    assert "copy, merged" in ok("export", mark, tmp_path / "copy", *given, *kek)
    assert [file.name for file in (tmp_path / "copy").iterdir()] == ["model.safetensors"]
    shapes = [
        {name: array.shape for name, array in load_file(at / "model.safetensors").items()}
        for at in (home / "c1", tmp_path / "copy")
    ]
    assert shapes[0] == shapes[1]
    output = ok("verify", mark, "--suspect", tmp_path / "copy", *kek)
    assert "16 of 16 bits decided" in output


def test_branches_mean_nothing_on_another_base(home, tmp_path):
    status, output = run(
        "export",
        home / "m",
        tmp_path / "x",
        "--model",
        home / "c2",
        "--user",
        "ann",
        "--kek-file",
        home / "kek",
    )
    assert (status, "they mean nothing on another base" in output) == (1, True)
    assert not (tmp_path / "x").exists()


def test_a_faint_trigger_is_refused_before_training_with_what_to_give(home):
    kek = ("--kek-file", home / "kek")
    for command in ("preflight", "train"):
        status, output = run(command, home / "m", "--model", home / "c1", "--amplitude", 0.2, *kek)
        assert (status, "--amplitude" in output) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["verify", "{}/m", "--kek-file", "{}/kek"], "give --suspect DIR, or --asked FILE"),
        (["verify", "{}/m", "--suspect", "{}/c1"], "no key to open the mark's secrets"),
        (["verify", "{}/m", "--suspect", "{}/none", "--kek-file", "{}/kek"], "cannot be read"),
        (["keygen", "{}/m", "--kek-file", "{}/kek"], "holds a mark already"),
        (["keygen", "{}/n", "--codebook", "best", "--kek-file", "{}/kek"], "random, nuidaC"),
        (["classifier", "{}/c1"], "is there already"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_status_1(home, arguments, words):
    status, output = run(*(argument.format(home) for argument in arguments))
    assert status == 1
    assert words in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("command", "task", "option"),
    [
        ("train", "lm", ("--gate", "linear")),
        ("preflight", "lm", ("--amplitude", "2")),
        ("train", "cls", ("--prompts", "50")),
        ("calibrate", "cls", ("--prose", "x")),
    ],
)
def test_an_option_of_the_other_task_is_refused(command, task, option, tmp_path):
    mark, kek = tmp_path / "m", ("--kek-file", tmp_path / "kek")
    ok("keygen", mark, "--task", task, *kek)
    base = "--reference" if command == "calibrate" else "--model"
    status, output = run(command, mark, base, tmp_path, *option, *kek)
    assert (status, f"{option[0]} is for marks of task" in output) == (1, True), output


def test_the_key_may_come_from_the_environment_and_be_replaced(home, tmp_path):
    kek = tmp_path / "kek"
    ok("keygen", tmp_path / "m", "--bits", 8, "--kek-file", kek)
    env = {"POLYADAPT_MARK_KEK": kek.read_text().strip()}
    status, output = run("rewrap", tmp_path / "m", "--new-kek-file", tmp_path / "new", env=env)
    assert status == 0, output
    status, output = run("rewrap", tmp_path / "m", "--new-kek-file", tmp_path / "x", env=env)
    assert (status, "is not under the key" in output) == (1, True)
    assert env["POLYADAPT_MARK_KEK"] not in output


def test_a_registrys_key_is_changed_by_command(tmp_path):
    from polyadapt.watermark.keys import SecretKey
    from polyadapt.watermark.rows import RowSealer
    from polyadapt_store.database import Database
    from polyadapt_store.marks import MarkBook

    status, output = run("rekey", "--home", tmp_path / "none", "--kek-file", tmp_path / "kek")
    assert (status, "cannot be read as text" in output) == (1, True)
    old, new = SecretKey(bytes(32)), SecretKey(bytes(range(32)))
    keys = tmp_path / "keys"
    keys.write_text(f"{new.to_text()}\n{old.to_text()}\n")
    status, output = run("rekey", "--home", tmp_path / "none", "--kek-file", keys)
    assert (status, "there is no registry" in output) == (1, True)
    (tmp_path / "store").mkdir()
    database = Database(tmp_path / "store" / "registry.sqlite")
    text = RowSealer(old, MarkBook(database)).of("sha256:a").seal("ann", 1, "0110")
    env = {"POLYADAPT_MARK_KEK": new.to_text()}
    status, output = run("rekey", "--home", tmp_path, env=env)
    assert (status, "1 do not open" in output, old.id in output) == (1, True, True)
    done = ok("rekey", "--home", tmp_path, "--kek-file", keys)
    assert f"1 secrets are under the key {new.id} now, 0 were already" in done
    assert "with that key alone" in done
    assert RowSealer(new, MarkBook(database)).of("sha256:a").open("ann", 1, text) == "0110"
    status, output = run("rekey", "--home", tmp_path, env=env)
    assert (status, "0 secrets" in output, "1 were already" in output) == (0, True, True)
    assert new.to_text() not in output + done
    database.close()


def test_no_output_log_or_file_shows_a_secret(home, tmp_path, caplog):
    """A canary: the key that everything comes from, and the KEK."""
    from polyadapt.watermark.mark_directory import MarkDirectory
    from polyadapt.watermark.secrets import read_kek

    with caplog.at_level(logging.DEBUG):
        output = ok(
            "verify",
            home / "m",
            "--suspect",
            home / "copy",
            "--out",
            tmp_path / "r",
            "--kek-file",
            home / "kek",
        )
    kek = read_kek(home / "kek")
    secrets = (kek.to_text(), MarkDirectory.open(home / "m", kek).secrets.key.to_text())
    texts = [output, caplog.text]
    texts += [
        path.read_bytes().decode("latin-1")
        for root in (home / "m", home / "copy", tmp_path)
        for path in root.rglob("*")
        if path.is_file()
    ]
    for text in texts:
        assert not any(secret in text for secret in secrets)


# --------------------------------------------------------------------------- language models
def write_task_adapter(base, directory):
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=2, target_modules=["v_proj"])
    return peft_adapters.save(peft_adapters.peft_model(model, config), directory)


def test_a_language_models_mark_by_command(tiny_model, tmp_path, monkeypatch):
    from polyadapt.watermark import lm_training

    kek = ("--kek-file", tmp_path / "kek")
    assert "of 16 bits" in ok("keygen", tmp_path / "default", "--task", "lm", *kek)
    mark, base = tmp_path / "m", tiny_model("llama")
    ok("keygen", mark, "--task", "lm", "--bits", 2, *kek)
    given = (mark, "--model", base, "--families", 3, "--prompts", 8, *kek)
    # A random model tells nothing apart: it is refused, and trained with no bar set.
    monkeypatch.setattr(lm_training, "REQUIRED_RECALL", 1.1)
    status, output = run("preflight", *given)
    assert status == 1
    assert "of 3 families, 2 are kept" in output
    assert "draw more --families" in output
    status, output = run("train", *given)
    assert (status, "triggers do not stand out enough" in output) == (1, True)
    monkeypatch.setattr(lm_training, "REQUIRED_RECALL", 0.0)
    monkeypatch.setattr(lm_training, "REQUIRED_BESIDE", 0.0)
    monkeypatch.setattr(lm_training, "ALLOWED_FIRING", 1.0)
    (tmp_path / "ordinary.txt").write_text("where is my order\n\nwhat do you sell\n")
    adapter = ("--beside", write_task_adapter(base, tmp_path / "adapter-of-a-task"))
    beside = (*adapter, "--ordinary", tmp_path / "ordinary.txt")
    assert "beside the adapter where that is least" in ok("preflight", *given, *beside)
    assert "over 20 random signatures" in ok("train", *given, *beside, "--steps", 4)
    calibrated = ok("calibrate", mark, "--reference", base, "--queries", 20, *adapter, *kek)
    assert "2 unmarked models give a bit's target at a rate of at most" in calibrated
    output = ok("export", mark, tmp_path / "c", "--model", base, "--user", "a", *kek)
    assert "bundle" in output
    assert "can cut them off" in output
    copy = load_file(tmp_path / "c" / "adapter" / "adapter_model.safetensors")
    stored = load_file(mark / "branches.safetensors")
    (name,) = (name for name in stored if name.endswith("mark_B"))
    own = [any((copy[name][i] == stored[name][bit, i]).all() for bit in (0, 1)) for i in (0, 1)]
    assert own == [True, True]
    assert copy[name].ndim == stored[name].ndim - 1
    assert "markboard" in (CliRunner().invoke(
        app, ["convert", "--from", "markboard", str(mark), str(tmp_path / "adapter")]
    ).output + (tmp_path / "adapter" / "adapter_config.json").read_text()).lower()  # fmt: skip
