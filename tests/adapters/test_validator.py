"""The one-shot validator: what passes, what is refused with which problem, and what becomes of a
crash.
"""

from __future__ import annotations

import dataclasses
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.support.safetensors_files import LYING_FILES, entry, file_bytes

from polyadapt.adapters import validator
from polyadapt.adapters.validator import MAX_PROBLEMS, run_validator, validate
from polyadapt.errors import AdapterRejected, Unavailable
from polyadapt.types import BaseSpec, SiteSpec
from polyadapt_store.limits import StoreLimits
from polyadapt_store.manifest import ReportedTraits

BASE = BaseSpec(
    name="tiny",
    digest="sha256:" + "0" * 64,
    architecture="TinyForCausalLM",
    vocab_size=16,
    max_model_len=64,
    is_tied=False,
    embedding_path="embed",
    head_path="head",
    sites=(
        SiteSpec("embed", "embedding", 16, 4, False),
        SiteSpec("layers.0.q", "linear", 4, 4, False),
    ),
)
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
PREFIX = "base_model.model.layers.0.q"
SIZES = {"F32": 4, "F16": 2, "BF16": 2}
ONES = {"F32": struct.pack("<f", 1.0), "F16": b"\x00\x3c", "BF16": b"\x80\x3f"}
NON_FINITE = {
    ("F32", "nan"): b"\x00\x00\xc0\x7f",
    ("F32", "signalling nan"): b"\x01\x00\x80\xff",
    ("F32", "inf"): b"\x00\x00\x80\x7f",
    ("F32", "-inf"): b"\x00\x00\x80\xff",
    ("F16", "nan"): b"\x00\x7e",
    ("F16", "inf"): b"\x00\x7c",
    ("F16", "-inf"): b"\x00\xfc",
    ("BF16", "nan"): b"\xc0\x7f",
    ("BF16", "inf"): b"\x80\x7f",
    ("BF16", "-inf"): b"\x80\xff",
}
LARGEST_FINITE = {"F32": b"\xff\xff\x7f\xff", "F16": b"\xff\xfb", "BF16": b"\x7f\xff"}


def write(directory: Path, weights: bytes, config: object = CONFIG) -> Path:
    text = config if isinstance(config, bytes) else json.dumps(config).encode()
    (directory / "adapter_config.json").write_bytes(text)
    (directory / "adapter_model.safetensors").write_bytes(weights)
    return directory


def weights(dtype: str = "F32", a: bytes | None = None, b: bytes | None = None) -> bytes:
    """A [2, 4] and B [4, 2] for the one linear of BASE."""
    size = 8 * SIZES[dtype]
    a, b = a or ONES[dtype] * 8, b or ONES[dtype] * 8
    return file_bytes(
        {
            f"{PREFIX}.lora_A.weight": entry([2, 4], 0, size, dtype),
            f"{PREFIX}.lora_B.weight": entry([4, 2], size, 2 * size, dtype),
        },
        a + b,
    )


def codes_of(function: Any, *arguments: Any) -> list[str]:
    with pytest.raises(AdapterRejected) as caught:
        function(*arguments)
    return [problem.code for problem in caught.value.problems]


def test_a_good_adapter_is_reported(tmp_path: Path) -> None:
    report = run_validator(write(tmp_path, weights()), BASE)
    assert (report.family, report.rank, report.target_modules) == ("lora", 2, ("q",))
    assert (report.num_elements, report.num_tensors, report.is_scalable) == (16, 2, True)
    assert (report.base_model, report.base_digest) == (BASE.name, BASE.digest)


def test_what_a_request_may_choose_is_reported(tmp_path: Path) -> None:
    def traits_of(name: str, tensors: bytes, config: dict[str, Any]) -> ReportedTraits | None:
        (tmp_path / name).mkdir()
        report = validate(write(tmp_path / name, tensors, config), BASE, StoreLimits())
        assert msgspec.json.decode(msgspec.json.encode(report), type=type(report)) == report
        return report.traits

    assert traits_of("plain", weights(), CONFIG) == ReportedTraits()
    nested = CONFIG | {"nested": True, "rank_min": 1, "rank_max": 2, "scale": "alpha/b"}
    assert traits_of("nested", weights(), nested) == ReportedTraits(ranks=(1, 2))
    invoked = CONFIG | {"alora_invocation_tokens": [3, 1]}
    expected = ReportedTraits(invocation_tokens=(3, 1))
    assert traits_of("invoked", weights(), invoked) == expected
    tasks = {"peft_type": "GS_LORA", "tasks": [{"name": "a", "r": 2}], "target_modules": ["q"]}
    header = {
        f"{PREFIX}.tasks.0.lora_A": entry([2, 4], 0, 32, "F32"),
        f"{PREFIX}.tasks.0.lora_B": entry([4, 2], 32, 64, "F32"),
    }
    found = traits_of("tasks", file_bytes(header, ONES["F32"] * 16), tasks)
    assert found is not None
    (option,) = found.options
    assert (option.kind, option.default) == ("words", ("a",))
    assert "'a'" in option.expected


def test_problems_of_config_header_and_numbers_come_together(tmp_path: Path) -> None:
    nan = NON_FINITE["F32", "nan"] + ONES["F32"] * 7
    write(tmp_path, weights(a=nan), CONFIG | {"use_qalora": True, "r": 3})
    codes = codes_of(run_validator, tmp_path, BASE)
    assert codes == ["unsupported_config", "non_finite"]


def test_a_broken_config_does_not_hide_a_broken_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, b"nonsense", b"{")
    assert codes_of(run_validator, tmp_path, BASE) == ["invalid_json", "truncated_file"]


@pytest.mark.parametrize(("dtype", "kind"), NON_FINITE)
@pytest.mark.parametrize("position", [0, 7])
def test_non_finite_numbers_are_refused(
    dtype: str, kind: str, position: int, tmp_path: Path
) -> None:
    numbers = [ONES[dtype]] * 8
    numbers[position] = NON_FINITE[dtype, kind]
    write(tmp_path, weights(dtype, b=b"".join(numbers)))
    with pytest.raises(AdapterRejected) as caught:
        validate(tmp_path, BASE, StoreLimits())
    (problem,) = caught.value.problems
    assert problem.code == "non_finite"
    assert problem.where == f"'{PREFIX}.lora_B.weight'"


@pytest.mark.parametrize("dtype", SIZES)
def test_the_largest_finite_numbers_are_accepted(dtype: str, tmp_path: Path) -> None:
    write(tmp_path, weights(dtype, a=LARGEST_FINITE[dtype] * 8))
    assert validate(tmp_path, BASE, StoreLimits()).rank == 2


def test_a_number_behind_the_first_chunk_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validator, "_CHUNK", 8)
    write(tmp_path, weights(b=ONES["F32"] * 7 + NON_FINITE["F32", "inf"]))
    assert codes_of(validate, tmp_path, BASE, StoreLimits()) == ["non_finite"]


@pytest.mark.parametrize("name", LYING_FILES)
def test_a_lying_checkpoint_is_refused(name: str, tmp_path: Path) -> None:
    content, code = LYING_FILES[name]
    write(tmp_path, content)
    assert code in codes_of(validate, tmp_path, BASE, StoreLimits())


@pytest.mark.parametrize("name", ["pickle", "header nested without end", "too many tensors"])
def test_the_process_survives_a_lying_checkpoint(name: str, tmp_path: Path) -> None:
    content, code = LYING_FILES[name]
    write(tmp_path, content)
    assert codes_of(run_validator, tmp_path, BASE) == [code]


def test_a_pickle_never_runs(tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(canary),)

    import pickle

    (tmp_path / "adapter").mkdir()
    write(tmp_path / "adapter", pickle.dumps([Bomb()] * 20))
    run_codes = codes_of(run_validator, tmp_path / "adapter", BASE)
    assert run_codes == ["pickle_refused"]
    assert not canary.exists()


@pytest.mark.parametrize(
    "value", ["os.system", "http://127.0.0.1:1/x", "/etc/passwd", "{{ 7 * 7 }}", "__import__('os')"]
)
def test_texts_in_the_config_are_never_acted_upon(value: str, tmp_path: Path) -> None:
    hostile = CONFIG | {
        "auto_mapping": {"base_model_class": value, "parent_library": value},
        "megatron_core": value,
        "base_model_name_or_path": value,
        "revision": value,
    }
    write(tmp_path, weights(), hostile)
    program = """
import sys
from pathlib import Path
import msgspec
from polyadapt.adapters.validator import validate
from polyadapt.types import BaseSpec
from polyadapt_store.limits import StoreLimits
base = msgspec.json.decode(sys.stdin.buffer.read(), type=BaseSpec)
directory = Path(sys.argv[1])
seen = []
def hook(event, arguments):
    if event.partition(".")[0] in ("socket", "subprocess", "os", "exec", "ctypes", "import",
    "shutil"):
        seen.append((event, str(arguments[:1])))
    if event == "open" and not str(arguments[0]).startswith(str(directory)):
        seen.append((event, str(arguments[0])))
sys.addaudithook(hook)
validate(directory, base, StoreLimits())
found = [event for event in seen if event[0] not in ("os.scandir", "os.listdir")]
sys.stdout.write(repr(found))
"""
    import msgspec

    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        input=msgspec.json.encode(BASE),
        capture_output=True,
        check=False,
    )
    assert done.stdout == b"[]", (done.stdout, done.stderr.decode())


def test_a_stray_folder_of_an_adapter_is_refused(tmp_path: Path) -> None:
    write(tmp_path, weights())
    (tmp_path / "0").mkdir()
    write(tmp_path / "0", weights())
    assert codes_of(validate, tmp_path, BASE, StoreLimits()) == ["unread_file", "unread_file"]


def test_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    assert codes_of(run_validator, tmp_path, BASE) == ["missing_file"]


def test_a_flood_of_problems_is_counted(tmp_path: Path) -> None:
    header = {f"junk{i:05d}": entry([0], 0, 0) for i in range(5000)}
    write(tmp_path, file_bytes(header))
    with pytest.raises(AdapterRejected) as caught:
        run_validator(tmp_path, BASE)
    problems = caught.value.problems
    assert len(problems) == MAX_PROBLEMS + 1
    assert problems[-1].code == "more_problems"
    assert "4800" in problems[-1].message


def test_out_of_time_is_a_rejection(tmp_path: Path) -> None:
    write(tmp_path, weights())
    limits = dataclasses.replace(StoreLimits(), validator_wall_s=0.001)
    assert codes_of(run_validator, tmp_path, BASE, limits) == ["validator_failed"]


def test_out_of_memory_is_a_rejection(tmp_path: Path) -> None:
    # The header's 40 MB of text do not fit into 64 MB of address space beside the interpreter.
    content = file_bytes(b"{" + b" " * (40 << 20) + b"}")
    write(tmp_path, content)
    limits = dataclasses.replace(
        StoreLimits(), header_bytes=64 << 20, validator_memory=(64 << 20) - len(content)
    )
    assert codes_of(run_validator, tmp_path, BASE, limits) == ["validator_failed"]
    enough = dataclasses.replace(limits, validator_memory=1 << 30)
    assert codes_of(run_validator, tmp_path, BASE, enough) == ["no_tensors"]


def test_an_endless_computation_is_ended_by_the_processor_limit(tmp_path: Path) -> None:
    # Patterns as large and as many as are accepted: many seconds of compiling.
    pattern = "(?:[a-z]{0,60}[.]?){0,16}" * 4
    table = {f"{pattern}{i}": 2 for i in range(2000)}
    write(tmp_path, weights(), CONFIG | {"rank_pattern": table})
    limits = dataclasses.replace(StoreLimits(), validator_cpu_s=1)
    with pytest.raises(AdapterRejected) as caught:
        run_validator(tmp_path, BASE, limits)
    (problem,) = caught.value.problems
    assert problem.code == "validator_failed"
    assert "SIGXCPU" in problem.message


def test_a_crash_is_a_rejection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, weights())
    crashing = tmp_path / "python"
    crashing.write_text("#!/bin/sh\nkill -SEGV $$\n")
    crashing.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(crashing))
    with pytest.raises(AdapterRejected) as caught:
        run_validator(tmp_path, BASE)
    (problem,) = caught.value.problems
    assert problem.code == "validator_failed"
    assert "SIGSEGV" in problem.message
    assert str(tmp_path) not in problem.message


@pytest.mark.parametrize("answer", ["", "nonsense", "{}", '{"report": {"rank": "x"}}', "[]"])
def test_an_answer_that_is_no_verdict_is_a_rejection(
    answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, weights())
    lying = tmp_path / "python"
    lying.write_text(f"#!/bin/sh\nprintf '%s' '{answer}'\n")
    lying.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(lying))
    assert codes_of(run_validator, tmp_path, BASE) == ["validator_failed"]


def test_no_process_at_all_is_our_own_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, weights())
    monkeypatch.setattr(sys, "executable", str(tmp_path / "absent"))
    with pytest.raises(Unavailable):
        run_validator(tmp_path, BASE)


def test_the_child_sees_nothing_of_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, weights())
    spy = tmp_path / "python"
    spy.write_text(f'#!/bin/sh\nenv > {tmp_path}/environment; echo "$@" > {tmp_path}/arguments\n')
    spy.chmod(0o755)
    monkeypatch.setenv("POLYADAPT_API_KEY", "sk-canary")
    monkeypatch.setattr(sys, "executable", str(spy))
    codes_of(run_validator, tmp_path, BASE)
    assert "canary" not in (tmp_path / "environment").read_text()
    assert (tmp_path / "arguments").read_text().split() == [
        "-I",
        "-m",
        "polyadapt.adapters.validator",
    ]


def test_the_child_never_imports_torch() -> None:
    program = "import sys, polyadapt.adapters.validator; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-c", program], check=False)
    assert done.returncode == 0
