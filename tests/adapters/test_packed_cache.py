"""Packed forms on disk: what is found is what the family made, and nothing else is ever used."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tests.support.basespec import ModelWeights, base_spec
from tests.support.engines import put_blob
from tests.support.peft_adapters import peft_model, save, tiny_gpt2

from polyadapt.adapters import packed_cache, reader
from polyadapt.adapters.adapter import Option, Probe, Traits
from polyadapt.adapters.pace import Pace
from polyadapt.adapters.packing import PackedAdapter
from polyadapt.adapters.reader import AdapterReader
from polyadapt.errors import AdapterUnavailable
from polyadapt_store.blobs import BlobStore


class Rig:
    """Readers over one store of adapters of a tiny model; counts what the family had to read."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root / "store"
        self.sources = root / "sources"
        self.base = tiny_gpt2()
        self.spec = base_spec(self.base)
        self.num_read = 0
        pack = reader.pack

        def counted(*args: Any, **options: Any) -> PackedAdapter:
            self.num_read += 1
            return pack(*args, **options)

        monkeypatch.setattr(reader, "pack", counted)

    def add(self, seed: int = 1, **options: Any) -> str:
        defaults = {"r": 4, "target_modules": ["c_attn", "c_fc"], "init_lora_weights": False}
        config = LoraConfig(**(defaults | options))
        directory = save(peft_model(self.base, config, seed), self.sources / str(seed))
        return put_blob(self.root, directory, str(seed)).digest

    def reader(
        self,
        capacity: int = 1 << 20,
        dtype: torch.dtype = torch.float32,
        **changes: Any,
    ) -> AdapterReader:
        spec = dataclasses.replace(self.spec, **changes)
        return AdapterReader(self.root, spec, ModelWeights(self.base), dtype, Pace(), capacity)

    def files(self) -> list[Path]:
        return sorted(path for path in (self.root / "derived").rglob("*") if path.is_file())


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(tmp_path, monkeypatch)


def assert_same(found: PackedAdapter, expected: PackedAdapter) -> None:
    assert found.weights.dtype == expected.weights.dtype
    assert torch.equal(found.weights, expected.weights)
    assert torch.equal(found.cells, expected.cells)
    for name in ("traits", "rank", "nbytes"):
        assert getattr(found, name) == getattr(expected, name)


def test_what_a_request_may_choose_is_kept(rig: Rig) -> None:
    cache, digest = rig.reader()._cache, rig.add()
    assert cache is not None
    options = (
        Option("parts", "words", "which", ("a", "b"), ("a", "b"), components=((0, 1), (1, 4))),
        Option("weight", "number", "how much", 1.0, least=-1, most=2.5),
        Option("limit", "count", "how many", 1, least=1, most=3),
        Option("is_late", "flag", "when", True),
        Option("after", "count", "from when on", most=9),
    )
    packed = dataclasses.replace(rig.reader()(digest), traits=Traits(options=options))
    cache.put(digest, packed)
    found = cache.get(digest)
    assert found is not None
    assert_same(found, packed)
    kinds = [type(option.default) for option in found.traits.options]
    assert kinds == [tuple, float, int, bool, type(None)]


def test_a_probe_behind_the_cells_is_kept(rig: Rig) -> None:
    cache, digest = rig.reader()._cache, rig.add()
    assert cache is not None
    plain = rig.reader()(digest)
    probe = Probe((2, 3, 4), 2, top_k=1, temperature=0.5, resting=0.25)
    weights = torch.cat([plain.weights, torch.arange(25.0)])
    packed = dataclasses.replace(plain, weights=weights, traits=Traits(probe=probe))
    cache.put(digest, packed)
    found = cache.get(digest)
    assert found is not None
    assert_same(found, packed)
    cache.put(digest, dataclasses.replace(packed, weights=weights[:-1]))
    assert cache.get(digest) is None, "its weights are not those that its traits announce"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mapped_from", [1, 1 << 30])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": "all"},  # not scalable, and sites of rank 0
        {"lora_bias": True},
        {"target_modules": ["wte", "c_attn"], "rank_pattern": {"c_attn": 2}},
        {"target_modules": "transformer.h.1.mlp.c_fc"},  # leaves keys and values alone
    ],
    ids=["plain", "bias", "lora_bias", "embedding", "neutral"],
)
def test_the_second_read_is_the_first_ones_result(
    rig: Rig,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    mapped_from: int,
    dtype: torch.dtype,
):
    monkeypatch.setattr(packed_cache, "_MAPPED_FROM", mapped_from)
    digest = rig.add(**options)
    expected = rig.reader(0, dtype)(digest)
    assert rig.files() == []
    assert_same(rig.reader(dtype=dtype)(digest), expected)
    assert rig.num_read == 2
    assert_same(rig.reader(dtype=dtype)(digest), expected)
    assert rig.num_read == 2


def test_files_are_as_private_as_the_blobs(rig: Rig):
    rig.reader()(rig.add())
    (file,) = rig.files()
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    assert (rig.root / "derived").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("change", "constant"),
    [
        ({"dtype": torch.bfloat16}, {}),
        ({"digest": "sha256:" + "1" * 64}, {}),
        ({}, {"__version__": "9.9.9"}),
        ({}, {"_code_digest": lambda package: "other"}),
    ],
    ids=["arena", "base", "version", "code"],
)
def test_what_was_packed_for_something_else_is_not_found(
    rig: Rig,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    constant: dict[str, Any],
):
    digest = rig.add()
    rig.reader()(digest)
    for name, value in constant.items():
        monkeypatch.setattr(packed_cache, name, value)
    rig.reader(**change)(digest)
    assert rig.num_read == 2
    assert len(rig.files()) == 2


@pytest.mark.parametrize(
    "changed", ["adapters/packing.py", "adapters/families/lora.py", "ops/cells.py"]
)
def test_a_change_of_the_sources_that_pack_is_a_change_of_the_key(tmp_path: Path, changed: str):
    package = Path(packed_cache.__file__).parents[1]
    copy = tmp_path / "polyadapt"
    for folder in ("adapters", "ops"):
        shutil.copytree(package / folder, copy / folder)
    digest = packed_cache._code_digest(package)
    assert packed_cache._code_digest(copy) == digest, "it lies elsewhere and is the same"
    packed_cache._code_digest.cache_clear()
    with open(copy / changed, "a") as file:
        file.write("#")
    assert packed_cache._code_digest(copy) != digest


def test_a_renamed_file_is_not_taken_for_another_adapter(rig: Rig, caplog):
    first, second = rig.add(1), rig.add(2)
    read = rig.reader()
    expected = read(first)
    read(second)
    (one,) = BlobStore(rig.root).derived(first).iterdir()
    (other,) = BlobStore(rig.root).derived(second).iterdir()
    one.write_bytes(other.read_bytes())
    assert_same(read(first), expected)
    assert "packed form of something else" in caplog.text


def _cut(data: bytearray) -> bytes:
    return bytes(data[:-1])


def _empty(data: bytearray) -> bytes:
    return b""


def _lengthen(data: bytearray) -> bytes:
    return bytes(data) + b"\0"


def _flip(at: int) -> Callable[[bytearray], bytes]:
    def flip(data: bytearray) -> bytes:
        data[at] ^= 1
        return bytes(data)

    return flip


@pytest.mark.parametrize(
    "damage",
    [_cut, _empty, _lengthen, _flip(0), _flip(50), _flip(70), _flip(-1)],
    ids=["cut", "empty", "longer", "magic", "head", "sites", "weights"],
)
@pytest.mark.parametrize("mapped_from", [1, 1 << 30])
def test_a_damaged_file_is_made_again_with_a_warning(
    rig: Rig,
    monkeypatch: pytest.MonkeyPatch,
    caplog,
    damage: Callable[[bytearray], bytes],
    mapped_from: int,
):
    monkeypatch.setattr(packed_cache, "_MAPPED_FROM", mapped_from)
    digest = rig.add()
    expected = rig.reader(0)(digest)
    rig.reader()(digest)
    (file,) = rig.files()
    whole = file.read_bytes()
    file.write_bytes(damage(bytearray(whole)))
    with caplog.at_level(logging.WARNING):
        assert_same(rig.reader()(digest), expected)
    assert f"the packed form of {digest} is made again" in caplog.text
    assert rig.num_read == 3
    assert rig.files() == [file]
    assert file.read_bytes() == whole


def test_the_files_used_longest_ago_leave_when_there_are_too_many_bytes(rig: Rig):
    digests = [rig.add(seed) for seed in (1, 2, 3, 4)]
    read = rig.reader()
    read(digests[0])
    nbytes = rig.files()[0].stat().st_size
    read = rig.reader(3 * nbytes + nbytes // 2)
    for age, digest in enumerate(digests[:3]):
        read(digest)
        (file,) = BlobStore(rig.root).derived(digest).iterdir()
        os.utime(file, (100 + age, 100 + age))
    read(digests[0])  # used again: the second is the oldest now
    read(digests[3])
    kept = {path.parent.name for path in rig.files()}
    assert kept == {digests[n].removeprefix("sha256:") for n in (0, 2, 3)}
    assert sum(path.stat().st_size for path in rig.files()) <= 3 * nbytes + nbytes // 2


def test_a_lower_limit_takes_effect_at_the_start(rig: Rig):
    read = rig.reader()
    for seed in (1, 2, 3):
        read(rig.add(seed))
    assert len(rig.files()) == 3
    rig.reader(2 * rig.files()[0].stat().st_size)
    assert len(rig.files()) == 1  # an eighth of the limit is left free


def test_an_adapter_beyond_the_limit_is_read_and_not_kept(rig: Rig):
    digest = rig.add()
    rig.reader(100)(digest)
    assert rig.files() == []


def test_a_file_that_cannot_be_written_is_only_a_warning(rig: Rig, monkeypatch, caplog):
    digest = rig.add()

    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert_same(rig.reader()(digest), rig.reader(0)(digest))
    assert "cannot be kept" in caplog.text
    assert rig.files() == []


def test_an_unfinished_file_is_removed_at_the_start(rig: Rig):
    digest = rig.add()
    rig.reader()(digest)
    (file,) = rig.files()
    file.with_name("0123.tmp").write_bytes(b"half")
    rig.reader()
    assert rig.files() == [file]


def test_a_packed_form_leaves_with_its_blob_and_is_no_substitute_for_it(rig: Rig):
    digest = rig.add()
    read = rig.reader()
    packed = read(digest)
    before = packed.weights.clone()
    BlobStore(rig.root).delete(digest)
    assert rig.files() == []
    assert torch.equal(packed.weights, before), "whoever holds it keeps it"
    with pytest.raises(AdapterUnavailable):
        read(digest)


def test_a_packed_form_that_is_written_after_its_blob_was_deleted_is_removed(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
):
    digest = rig.add()
    expected = rig.reader(0)(digest)
    pack = reader.pack

    def pack_and_delete(*args: Any, **options: Any) -> PackedAdapter:
        packed = pack(*args, **options)
        BlobStore(rig.root).delete(digest)
        return packed

    monkeypatch.setattr(reader, "pack", pack_and_delete)
    assert_same(rig.reader()(digest), expected)
    assert list((rig.root / "derived").iterdir()) == []


def refuse(*args: object, **options: object) -> None:
    raise PermissionError(1, "Operation not permitted")


def test_a_file_that_cannot_be_marked_as_used_is_used_all_the_same(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog
):
    digest = rig.add()
    expected = rig.reader()(digest)
    monkeypatch.setattr(os, "utime", refuse)
    assert_same(rig.reader()(digest), expected)
    assert rig.num_read == 1
    assert "cannot be marked as used" in caplog.text


def test_a_damaged_file_that_cannot_be_removed_fails_no_load(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog
):
    digest = rig.add()
    expected = rig.reader()(digest)
    rig.files()[0].write_bytes(b"damaged")
    monkeypatch.setattr(Path, "unlink", refuse)
    assert_same(rig.reader()(digest), expected)
    assert "cannot be removed" in caplog.text


@pytest.mark.parametrize("method", ["unlink", "lstat"])
def test_old_files_that_cannot_be_trimmed_fail_no_load(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog, method: str
):
    first, second = rig.add(1), rig.add(2)
    rig.reader()(first)
    capacity = rig.files()[0].stat().st_size * 3 // 2
    read = rig.reader(capacity)
    expected = rig.reader(0)(second)
    inner = getattr(Path, method)

    def refuse_packed(path: Path, **options: Any) -> Any:
        if path.suffix == ".packed" and rig.num_read == 3:  # behind the load, when it is kept
            refuse()
        return inner(path, **options)

    monkeypatch.setattr(Path, method, refuse_packed)
    assert_same(read(second), expected)
    assert "cannot be" in caplog.text
