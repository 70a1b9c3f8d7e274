"""The safetensors reader: honest files are read exactly, lying ones are refused with every lie
named.
"""

from __future__ import annotations

import struct
from pathlib import Path
from random import Random

import pytest
from tests.support.safetensors_files import LYING_FILES, entry, file_bytes

from polyadapt.errors import AdapterRejected
from polyadapt_store.checkpoint import Checkpoint, TensorInfo, read_header
from polyadapt_store.limits import StoreLimits
from polyadapt_store.manifest import FileForm, weight_files
from polyadapt_store.strict_json import without_trailing_commas

HONEST = file_bytes(
    {
        "__metadata__": {"format": "pt"},
        "b": entry([2], 12, 16, "BF16"),
        "a": entry([3, 1], 0, 12),
        "scalar": entry([], 16, 18, "F16"),
        "empty": entry([0, 4], 18, 18),
    },
    struct.pack("<3f", 1.0, -2.0, 3.5) + b"\x80\x3f\x00\x40" + b"\x00\x3c",
)


@pytest.fixture
def honest(tmp_path: Path) -> Path:
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(HONEST)
    return path


def codes_of(path: Path) -> list[str]:
    with pytest.raises(AdapterRejected) as caught:
        read_header(path, StoreLimits())
    assert all(problem.message for problem in caught.value.problems)
    return [problem.code for problem in caught.value.problems]


@pytest.fixture(autouse=True)
def registry() -> None:
    """No registry is needed here."""


def test_header_of_an_honest_file_is_returned(honest: Path) -> None:
    header = read_header(honest, StoreLimits())
    assert header["a"] == TensorInfo("F32", (3, 1), 0, 12)
    assert set(header) == {"a", "b", "scalar", "empty"}


def test_padding_behind_the_header_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "padded"
    path.write_bytes(
        file_bytes(b'{"a":{"dtype":"F16","shape":[1],"data_offsets":[0,2]}}   ', b"\0\0")
    )
    assert read_header(path, StoreLimits())["a"].shape == (1,)


def test_bytes_are_taken_as_they_lie_in_the_file(honest: Path) -> None:
    with Checkpoint(honest) as checkpoint:
        raw = checkpoint.take("a")
        assert (raw.dtype, raw.shape) == ("F32", (3, 1))
        assert struct.unpack("<3f", raw.data) == (1.0, -2.0, 3.5)
        assert bytes(checkpoint.take("b").data) == b"\x80\x3f\x00\x40"
        assert bytes(checkpoint.take("empty").data) == b""


def test_a_taken_tensor_outlives_the_checkpoint(honest: Path) -> None:
    with Checkpoint(honest) as checkpoint:
        raw = checkpoint.take("scalar")
    honest.unlink()
    assert bytes(raw.data) == b"\x00\x3c"


def test_taken_bytes_cannot_be_written(honest: Path) -> None:
    with Checkpoint(honest) as checkpoint:
        assert checkpoint.take("a").data.readonly


def test_drained_lists_what_nobody_took(honest: Path) -> None:
    with Checkpoint(honest) as checkpoint:
        checkpoint.take("a")
        assert checkpoint.drained() == ["b", "empty", "scalar"]
        for key in checkpoint.drained():
            checkpoint.take(key)
        assert checkpoint.drained() == []


def test_a_tensor_is_taken_once(honest: Path) -> None:
    with Checkpoint(honest) as checkpoint:
        checkpoint.take("a")
        with pytest.raises(KeyError, match="already taken"):
            checkpoint.take("a")
        with pytest.raises(KeyError, match="not in the checkpoint"):
            checkpoint.take("c")


def test_a_closed_checkpoint_gives_nothing(honest: Path) -> None:
    with Checkpoint(honest) as checkpoint:
        pass
    with pytest.raises(ValueError, match="closed"):
        checkpoint.take("a")


# --------------------------------------------------------------------------- several files
@pytest.fixture
def several(tmp_path: Path) -> dict[str, Path]:
    paths = {}
    for number, prefix in enumerate(["", "0/adapter_model.safetensors/", "x.safetensors/"]):
        path = tmp_path / f"{number}"
        path.write_bytes(file_bytes({"a": entry([1], 0, 4)}, struct.pack("<f", float(number))))
        paths[prefix] = path
    return paths


def test_tensors_of_several_files_have_their_files_names_before_theirs(
    several: dict[str, Path],
) -> None:
    with Checkpoint(several) as checkpoint:
        assert set(checkpoint.header) == {f"{prefix}a" for prefix in several}
        for number, prefix in enumerate(several):
            assert struct.unpack("<f", checkpoint.take(f"{prefix}a").data) == (number,)
            assert len(checkpoint.drained()) == 2 - number


def test_a_part_counts_what_is_taken_from_it(several: dict[str, Path]) -> None:
    with Checkpoint(several) as checkpoint:
        part = checkpoint.below("0/adapter_model.safetensors/")
        assert list(part.header) == part.drained() == ["a"]
        assert struct.unpack("<f", part.take("a").data) == (1.0,)
        assert part.drained() == []
        assert checkpoint.drained() == ["a", "x.safetensors/a"]
        with pytest.raises(KeyError, match="already taken"):
            part.take("a")
        with pytest.raises(KeyError, match="not in the checkpoint"):
            part.take("b")


def test_problems_of_several_files_come_together_and_name_them(several: dict[str, Path]) -> None:
    several[""].write_bytes(b"nonsense")
    several["x.safetensors/"].write_bytes(b"")
    with pytest.raises(AdapterRejected) as caught:
        Checkpoint(several)
    assert [problem.where for problem in caught.value.problems] == ["0", "x.safetensors"]


def test_the_limit_of_tensors_is_that_of_all_files(several: dict[str, Path]) -> None:
    Checkpoint(several, StoreLimits(num_tensors=3))
    with pytest.raises(AdapterRejected) as caught:
        Checkpoint(several, StoreLimits(num_tensors=2))
    assert [problem.code for problem in caught.value.problems] == ["too_many_tensors"]


def test_files_of_an_adapter_are_those_of_its_forms(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    for name in ("adapter_model.safetensors", "0/adapter_model.safetensors", "0/x.safetensors",
                 "adapter_config.json"):  # fmt: skip
        (tmp_path / name).write_bytes(b"")
    forms = (FileForm(("adapter_model.safetensors",), ("*/adapter_model.safetensors",)),)
    assert weight_files(tmp_path, forms) == {
        "": tmp_path / "adapter_model.safetensors",
        "0/adapter_model.safetensors/": tmp_path / "0" / "adapter_model.safetensors",
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b'{"a": [1, 2, ], }', b'{"a": [1, 2 ] }'),
        (b'{"a": ",}", "b": "\\",]", }', b'{"a": ",}", "b": "\\",]" }'),
        (b'{"a": "\\\\",}', b'{"a": "\\\\"}'),
        (b'[1,\n\t]', b'[1\n\t]'),
        (b'{"a": 1,, }', b'{"a": 1, }'),
        (b'{"open": ",}', b'{"open": ",}'),
        (b"", b""),
    ],
)  # fmt: skip
def test_commas_before_closing_brackets_are_taken_out(text: bytes, expected: bytes) -> None:
    assert without_trailing_commas(text) == expected


@pytest.mark.parametrize("name", LYING_FILES)
def test_a_lying_file_is_refused(name: str, tmp_path: Path) -> None:
    content, code = LYING_FILES[name]
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(content)
    assert code in codes_of(path)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut"
    for kept in range(len(HONEST)):
        path.write_bytes(HONEST[:kept])
        codes_of(path)


def test_every_lie_is_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "lies"
    path.write_bytes(
        file_bytes(
            {"..": entry([1], 0, 4), "b": entry([1], 4, 8, "I8"), "c": entry([-1], 8, 9)}, b"\0" * 9
        )
    )
    assert codes_of(path) == ["invalid_tensor_name", "unsupported_dtype", "invalid_shape"]


def test_problem_says_given_and_expected(tmp_path: Path) -> None:
    path = tmp_path / "lies"
    path.write_bytes(file_bytes({"a": entry([2, 3], 0, 20)}, b"\0" * 20))
    with pytest.raises(AdapterRejected) as caught:
        read_header(path, StoreLimits())
    (problem,) = caught.value.problems
    assert problem.where == "'a'"
    assert "24 bytes" in problem.message
    assert "give 20" in problem.message


def test_random_damage_is_refused_or_harmless(tmp_path: Path) -> None:
    random = Random(7)
    path = tmp_path / "damaged"
    num_refused = 0
    for _ in range(400):
        content = bytearray(HONEST)
        for _ in range(random.choice((1, 1, 2, 8))):
            content[random.randrange(len(content))] = random.randrange(256)
        path.write_bytes(content)
        try:
            header = read_header(path, StoreLimits())
        except AdapterRejected:
            num_refused += 1
        else:
            assert sum(info.end - info.begin for info in header.values()) == 18
    assert 0 < num_refused < 400
