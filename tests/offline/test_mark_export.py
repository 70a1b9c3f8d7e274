"""Copies of marked language models: equal to the branches written out, without code of ours where
they are merged and through the engine where they are bundles.
"""

from __future__ import annotations

import asyncio
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.oracle.marks import behind, marked, write_mark
from tests.support.peft_adapters import tiny_llama
from transformers import AutoModelForCausalLM, PreTrainedModel

from polyadapt.config import EngineConfig
from polyadapt.errors import InvalidRequest, StartupError
from polyadapt.models.load import model_digest
from polyadapt.offline.mark_export import ADAPTER_DIR, BASE_DIR, export_lm
from polyadapt.offline.served import ServedModel

BITS = np.array([0, 1, 1, 0, 1], np.uint8)
WORD = "01101"
IDS = [5, 9, 30, 7, 61, 12, 3, 44]
TOLERANCE = 1e-5  # of the largest logit


@pytest.fixture
def base(tmp_path) -> PreTrainedModel:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "model")
    return model


def mark_of(base, tmp_path: Path, **form: Any) -> Path:
    return write_mark(base, tmp_path / "mark", base_hash=model_digest(tmp_path / "model"), **form)


def export(tmp_path: Path, mark: Path, out: str, form=None, strength=1.0, bits=BITS) -> Path:
    config = json.loads((mark / "adapter_config.json").read_text())
    export_lm(
        config, mark / "adapter_model.safetensors", tmp_path / "model", bits, tmp_path / out,
        form=form, strength=strength, rng=np.random.default_rng(3),
    )  # fmt: skip
    return tmp_path / out


@torch.inference_mode()
def logits(model) -> torch.Tensor:
    return model(input_ids=torch.tensor([IDS])).logits[0]


def check(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (found - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


LINEAR: dict[str, dict[str, Any]] = {
    "pair": {"gate": "linear", "rank": 2},
    "antipodal": {"gate": "linear", "encoding": "antipodal"},
    "presence": {"gate": "linear", "encoding": "presence"},
}


@pytest.mark.parametrize("name", LINEAR)
def test_a_merged_copy_is_what_transformers_loads_by_itself(name, base, tmp_path):
    mark = mark_of(base, tmp_path, **LINEAR[name])
    found = AutoModelForCausalLM.from_pretrained(export(tmp_path, mark, "out"), dtype="float32")
    check(logits(found), logits(marked(base, mark, WORD)))
    other = logits(marked(base, mark, "11110"))
    assert (logits(found) - other).abs().max() > 1e-3 * other.abs().max()


@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_bundle_is_a_lora_that_peft_loads_and_its_base_lacks_what_it_carries(
    name, base, tmp_path
):
    mark = mark_of(base, tmp_path, **LINEAR[name])
    out = export(tmp_path, mark, "out", "bundle")
    bare = AutoModelForCausalLM.from_pretrained(out / BASE_DIR, dtype="float32")
    lacking = logits(bare)
    wanted = logits(marked(base, mark, WORD))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's own, of transformers
        loaded = peft.PeftModel.from_pretrained(bare, out / ADAPTER_DIR)
    check(logits(loaded), wanted)
    assert (lacking - logits(base)).abs().max() > 0.05 * wanted.abs().max()
    weight = base.get_submodule(behind(base)[0]).weight.detach()
    stored = load_file(out / BASE_DIR / "model.safetensors")[f"{behind(base)[0]}.weight"]
    share = (stored - weight).norm() / weight.norm()
    assert float(share) == pytest.approx(1.0, rel=1e-4)


def test_a_hinge_bundle_is_served_as_its_user_was(base, tmp_path):
    """By the engine, in float32: under the user's signature, and as an adapter of its own."""
    mark = mark_of(base, tmp_path)
    out = export(tmp_path, mark, "out")
    assert [file.name for file in out.iterdir()] == [ADAPTER_DIR]
    wanted = logits(marked(base, mark, WORD)).log_softmax(-1)

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

    ours = asyncio.run(scores(mark, (("signature", WORD),)))
    exported = asyncio.run(scores(out / ADAPTER_DIR, (("signature", "11111"),)))
    for at, (one, other) in enumerate(zip(ours, exported, strict=True)):
        assert other.logprob == pytest.approx(one.logprob, abs=1e-4)
        if at + 1 < len(IDS):
            assert other.logprob == pytest.approx(float(wanted[at, IDS[at + 1]]), abs=1e-4)


@pytest.mark.parametrize(
    ("form", "gate"), [("bundle", "hinge"), ("merged", "linear"), ("bundle", "linear")]
)
def test_a_copy_holds_nothing_of_the_branches_that_are_not_its_users(form, gate, base, tmp_path):
    mark = mark_of(base, tmp_path, gate=gate)
    one = export(tmp_path, mark, "one", form)
    tensors = load_file(mark / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("mark_B"):
            tensor[torch.from_numpy(1 - BITS.astype(np.int64)), range(5)] = 7.0
    save_file(tensors, mark / "adapter_model.safetensors")
    other = export(tmp_path, mark, "other", form)
    files = [file.relative_to(one) for file in one.rglob("*") if file.is_file()]
    assert files
    assert all((one / file).read_bytes() == (other / file).read_bytes() for file in files)


def test_what_cannot_leave_is_refused(base, tmp_path):
    hinge = mark_of(base, tmp_path)
    with pytest.raises(InvalidRequest, match="a hinge is not linear"):
        export(tmp_path, hinge, "out", "merged")
    export(tmp_path, hinge, "out")
    with pytest.raises(StartupError, match="not an empty directory"):
        export(tmp_path, hinge, "out")
    folded = mark_of(base, tmp_path, gate="linear", encoding="antipodal", has_fold=False)
    with pytest.raises(StartupError, match="no mark_fold"):
        export(tmp_path, folded, "a")
    other = write_mark(base, tmp_path / "mark", gate="linear")
    with pytest.raises(StartupError, match="mean nothing on another base"):
        export(tmp_path, other, "b")
    assert not (tmp_path / "b").exists()
