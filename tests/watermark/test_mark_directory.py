"""A mark on disk: whole or refused, secrets never in the clear, the KEK replaceable."""

from __future__ import annotations

import json
import stat

import numpy as np
import pytest

from polyadapt.errors import InvalidRequest, SecretsUnavailable, StartupError
from polyadapt.watermark import mark_directory
from polyadapt.watermark.codebook import Design
from polyadapt.watermark.keys import SecretKey
from polyadapt.watermark.mark_directory import CONFIG_NAME, SECRETS_NAME, MarkDirectory
from polyadapt.watermark.prompts import PromptTriggers
from polyadapt.watermark.reading import NullRates
from polyadapt.watermark.triggers import TriggerSettings

KEK, OTHER = SecretKey(bytes(range(32))), SecretKey(bytes(32))
TARGETS = np.array([[1, 2], [3, 4], [5, 6]])
NULL = NullRates(((0.1, 0.2),) * 3, 0.99, 200, 2)


@pytest.fixture
def mark(tmp_path) -> MarkDirectory:
    return MarkDirectory.create(tmp_path / "mark", Design.parse("nuida4"), 3, KEK)


def test_a_mark_is_read_back_as_it_was_left(mark):
    mark.trained("sha256:00", "0", TriggerSettings(64, 2.5, low=0.0), TARGETS)
    mark.calibrated(NULL)
    again = MarkDirectory.open(mark.path, KEK)
    assert again.config == mark.config
    assert again.secrets == mark.secrets
    assert (again.module, again.null) == ("0", NULL)
    assert (again.targets == TARGETS).all()
    assert (again.codebook.row("ann") == mark.codebook.row("ann")).all()
    assert again.families.settings == TriggerSettings(64, 2.5, low=0.0)


def test_training_anew_forgets_the_calibration(mark):
    mark.trained("sha256:00", "0", TriggerSettings(64), TARGETS)
    mark.calibrated(NULL)
    mark.trained("sha256:01", "0", TriggerSettings(64), TARGETS)
    with pytest.raises(StartupError, match="not calibrated; run `polyadapt mark calibrate`"):
        _ = mark.null


def test_what_comes_later_is_asked_for(mark):
    for name in ("module", "families", "targets"):
        with pytest.raises(StartupError, match="not trained; run `polyadapt mark train`"):
            getattr(mark, name)


def test_no_file_and_no_repr_shows_a_secret(mark):
    mark.trained("sha256:00", "0", TriggerSettings(64), TARGETS)
    mark.keep_queries("0" * 16, np.array([2, 0, 1]))
    key = mark.secrets.key
    clear = [key.to_text().encode(), str(TARGETS.tolist()).encode(), b"[2, 0, 1]", b'"targets"']
    for file in mark.path.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert not any(secret in file.read_bytes() for secret in clear), file.name
    assert stat.S_IMODE(mark.path.stat().st_mode) == 0o700
    shown = f"{mark.secrets!r} {mark.config!r} {mark.codebook!r} {mark.families!r}"
    assert key.to_text() not in shown
    assert "((1, 2)" not in shown


def test_a_mark_is_not_made_over_another(mark):
    with pytest.raises(StartupError, match="holds a mark already"):
        MarkDirectory.create(mark.path, Design.parse("random"), 8, KEK)


def test_files_of_two_marks_do_not_make_one(mark, tmp_path):
    other = MarkDirectory.create(tmp_path / "other", Design.parse("nuida4"), 3, KEK)
    (mark.path / SECRETS_NAME).write_bytes((other.path / SECRETS_NAME).read_bytes())
    with pytest.raises(StartupError, match="restore the files of one mark"):
        MarkDirectory.open(mark.path, KEK)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task": "lm"}, "positions"),
        ({"obfuscation": {"kind": "O1"}}, "obfuscation"),
        ({"rank_per_bit": 2}, "rank_per_bit"),
        ({"n_bits": 4}, "codebook of 4 bits"),
        ({"more": 1}, "more"),
        ({"n_bits": "x"}, "whole number"),
        ({"n_bits": 3.0}, "whole number"),
        ({"rank_per_bit": True}, "whole number"),
        ({"task": ["lm"]}, "expected text"),
        ({"mark_id": None}, "expected text"),
        ({"target_modules": 5}, "list of names"),
        ({"target_modules": "abc"}, "list of names"),
        ({"codebook": []}, "no codebook with kind"),
        ({"codebook": {"key_version": "x"}}, "whole number"),
        ({"codebook": {"bias_commitment": None}}, "expected text"),
    ],
)
def test_a_config_of_another_form_is_refused(mark, change, words):
    file = mark.path / CONFIG_NAME
    config = json.loads(file.read_text())
    if isinstance(change.get("codebook"), dict):
        change = {"codebook": {**config["codebook"], **change["codebook"]}}
    file.write_text(json.dumps({**config, **change}))
    with pytest.raises(StartupError, match=words):
        MarkDirectory.open(mark.path, KEK)


def test_a_missing_or_cut_file_is_said_so(mark, tmp_path):
    with pytest.raises(StartupError, match="cannot be read"):
        MarkDirectory.open(tmp_path / "none", KEK)
    file = mark.path / SECRETS_NAME
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(SecretsUnavailable, match="truncated or was changed"):
        MarkDirectory.open(mark.path, KEK)


def test_another_codebook_than_the_committed_one_is_refused(mark):
    file = mark.path / CONFIG_NAME
    config = json.loads(file.read_text())
    config["codebook"]["kind"] = "nuida6"
    file.write_text(json.dumps(config))
    with pytest.raises(Exception, match="does not match its commitment"):
        MarkDirectory.open(mark.path, KEK)


def test_rewrapping_reaches_every_secret_and_goes_on_where_it_stopped(mark, monkeypatch):
    mark.keep_queries("a" * 16, np.array([1, 0]))
    mark.keep_queries("b" * 16, np.array([0, 1]))
    written = []

    def stop_after_one(path, data, write=mark_directory.write_file):
        if written:
            raise KeyboardInterrupt
        write(path, data)
        written.append(path)

    with monkeypatch.context() as patch:
        patch.setattr(mark_directory, "write_file", stop_after_one)
        with pytest.raises(KeyboardInterrupt):
            mark.rewrap(OTHER)
    MarkDirectory.open(mark.path, KEK).rewrap(OTHER)
    again = MarkDirectory.open(mark.path, OTHER)
    assert again.find_queries("a" * 16).tolist() == [1, 0]
    assert again.find_queries("b" * 16).tolist() == [0, 1]
    with pytest.raises(SecretsUnavailable, match="not under the key"):
        MarkDirectory.open(mark.path, KEK)


def test_queries_that_were_not_asked_here_are_unknown(mark):
    with pytest.raises(StartupError, match="not one that this mark wrote"):
        mark.find_queries("c" * 16)


def test_a_language_models_mark_keeps_its_phrases_sealed(tmp_path):
    mark = MarkDirectory.create(tmp_path / "lm", Design.parse("random"), 1, KEK, task="lm")
    assert (mark.config.task, mark.config.positions) == ("lm", "first_answer")
    with pytest.raises(StartupError, match="not trained; run `polyadapt mark train`"):
        _ = mark.prompts
    prompts = PromptTriggers(("maple zebra",), (("Stone", "Cloud"),))
    mark.trained("sha256:00", "model.layers.1.self_attn.o_proj", prompts, TARGETS[:1])
    again = MarkDirectory.open(mark.path, KEK)
    assert (again.prompts, again.secrets) == (prompts, mark.secrets)
    for file in mark.path.iterdir():
        assert b"maple" not in file.read_bytes()
        assert b"Cloud" not in file.read_bytes()


def test_marks_of_one_task_are_not_taken_for_the_others(mark, tmp_path):
    prompts = PromptTriggers(("maple zebra",), (("Stone", "Cloud"),))
    with pytest.raises(StartupError, match="is a mark of task 'cls', and this is for 'lm'"):
        mark.trained("sha256:00", "0", prompts, TARGETS)
    lm = MarkDirectory.create(tmp_path / "lm", Design.parse("random"), 1, KEK, task="lm")
    with pytest.raises(StartupError, match="is a mark of task 'lm', and this is for 'cls'"):
        _ = lm.families
    with pytest.raises(InvalidRequest, match="the task is 'image', expected cls or lm"):
        MarkDirectory.create(tmp_path / "x", Design.parse("random"), 1, KEK, task="image")


def test_a_config_without_positions_is_an_older_classifiers(mark):
    file = mark.path / CONFIG_NAME
    fields = json.loads(file.read_text())
    assert fields.pop("positions") == "all"
    file.write_text(json.dumps(fields))
    assert MarkDirectory.open(mark.path, KEK).config == mark.config
    for name, value in (("positions", "first_answer"), ("task", "image")):
        file.write_text(json.dumps({**fields, name: value}))
        with pytest.raises(StartupError, match=f"says {name} '{value}', expected"):
            MarkDirectory.open(mark.path, KEK)
