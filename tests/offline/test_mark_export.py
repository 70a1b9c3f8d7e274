"""Copies of marked language models: equal to the branches written out, through the engine."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.oracle.marks import behind, marked, write_mark
from tests.support.marked_suspect import lm_mark
from tests.support.peft_adapters import tiny_llama
from transformers import PreTrainedModel

from polyadapt.config import EngineConfig
from polyadapt.errors import InvalidRequest, StartupError
from polyadapt.models.load import model_digest
from polyadapt.offline.mark_export import ADAPTER_DIR, export_lm
from polyadapt.offline.served import ServedModel
from polyadapt.watermark.mark_directory import BRANCHES_NAME, MarkDirectory

NUM_BITS = 5
IDS = [5, 9, 30, 7, 61, 12, 3, 44]


@pytest.fixture
def base(tmp_path) -> PreTrainedModel:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "model")
    return model


@pytest.fixture
def adapter(base, tmp_path) -> Path:
    """The adapter of all users, as the server has it: random branches of one module."""
    digest = model_digest(tmp_path / "model")
    return write_mark(base, tmp_path / "all", base_hash=digest, modules=behind(base)[:1])


@pytest.fixture
def mark(base, adapter, tmp_path) -> MarkDirectory:
    """The mark with these branches."""
    digest = model_digest(tmp_path / "model")
    found = lm_mark(tmp_path / "mark", NUM_BITS, base_hash=digest, module=behind(base)[0])
    shutil.copy(adapter / "adapter_model.safetensors", found.path / BRANCHES_NAME)
    return found


@torch.inference_mode()
def logits(model) -> torch.Tensor:
    return model(input_ids=torch.tensor([IDS])).logits[0]


def test_a_copy_is_served_as_its_user_was(base, adapter, mark, tmp_path):
    """By the engine, in float32: under the user's signature, and as an adapter of its own."""
    out = tmp_path / "out"
    assert export_lm(mark, tmp_path / "model", "ann", out, form=None) == "bundle"
    assert [file.name for file in out.iterdir()] == [ADAPTER_DIR]
    word = "".join(map(str, mark.codebook.row("ann").tolist()))
    wanted = logits(marked(base, adapter, word)).log_softmax(-1)

    async def scores(directory: Path, options) -> list:
        config = EngineConfig(
            model="tiny", device="cpu", dtype="float32", kv_cache_bytes=8 << 20,
            max_adapter_bytes=8 << 20,
        )  # fmt: skip
        served = ServedModel(config, tmp_path / "model", tmp_path / f"blobs-{directory.name}")
        await served.start()
        try:
            return await served.score(served.put(directory), None, IDS, 8, options)
        finally:
            await served.stop()

    ours = asyncio.run(scores(adapter, (("signature", word),)))
    exported = asyncio.run(scores(out / ADAPTER_DIR, (("signature", "11111"),)))
    for at, (one, other) in enumerate(zip(ours, exported, strict=True)):
        assert other.logprob == pytest.approx(one.logprob, abs=1e-4)
        if at + 1 < len(IDS):
            assert other.logprob == pytest.approx(float(wanted[at, IDS[at + 1]]), abs=1e-4)


def test_a_copy_holds_nothing_of_the_branches_that_are_not_its_users(mark, tmp_path):
    export_lm(mark, tmp_path / "model", "ann", tmp_path / "one", form="bundle")
    tensors = load_file(mark.path / BRANCHES_NAME)
    for name, tensor in tensors.items():
        if name.endswith("mark_B"):
            others = 1 - mark.codebook.row("ann").astype(np.int64)
            tensor[torch.from_numpy(others), range(NUM_BITS)] = 7.0
    save_file(tensors, mark.path / BRANCHES_NAME)
    export_lm(mark, tmp_path / "model", "ann", tmp_path / "other", form="bundle")
    files = sorted(file.name for file in (tmp_path / "one" / ADAPTER_DIR).iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    for file in files:
        one, other = (tmp_path / out / ADAPTER_DIR / file for out in ("one", "other"))
        assert one.read_bytes() == other.read_bytes()


def test_what_cannot_leave_is_refused(mark, tmp_path):
    for form in ("merged", "expanded"):
        with pytest.raises(InvalidRequest, match="hinges are not linear"):
            export_lm(mark, tmp_path / "model", "ann", tmp_path / "out", form=form)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(StartupError, match="not an empty directory"):
        export_lm(mark, tmp_path / "model", "ann", tmp_path / "out", form=None)
    mark.trained("sha256:other", mark.module, mark.prompts, mark.targets)
    with pytest.raises(StartupError, match="mean nothing on another base"):
        export_lm(mark, tmp_path / "model", "ann", tmp_path / "b", form=None)
    assert not (tmp_path / "b").exists()
