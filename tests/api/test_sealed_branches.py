"""The branches of a mark that is served lie in no file in the clear, whatever is done with it; and
without sealing the same look would find them.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.oracle.adapters import make_lora
from tests.support.canaries import files_with
from tests.support.marked_service import MarkedService, is_said_by, marked_service

from polyadapt_store.blobs import BlobStore

pytestmark = pytest.mark.anyio

ENGINE = {"kv_cache_bytes": 8 << 20, "max_adapter_bytes": 1 << 20, "packed_cache_bytes": 8 << 20}
BODY = {"model": "base", "prompt": "one two", "max_tokens": 2}


def patterns(directory: Path) -> list[bytes]:
    """Parts of rows of the branches, as the file of an adapter has them."""
    tensors = load_file(directory / "adapter_model.safetensors")
    (both,) = (tensor for name, tensor in tensors.items() if name.endswith("mark_B"))
    rows = [both[side, bit, 8:16, 0] for side in (0, 1) for bit in (0, 17, 39)]
    assert all(row.abs().min() > 0 for row in rows), "zeros would be anywhere"
    return [row.contiguous().view(torch.uint8).numpy().tobytes() for row in rows]


class Place:
    """The service, and what lies on its disk."""

    def __init__(self, service: MarkedService, root: Path) -> None:
        self.service, self.root = service, root
        self.digest = service.store.resolve("default", "mark").digest
        self.patterns = patterns(service.mark_dir)

    @property
    def clear(self) -> list[str]:
        return files_with([self.root / "home"], self.patterns)

    @property
    def packed(self) -> list[Path]:
        return list(BlobStore(self.root / "home" / "store").derived(self.digest).glob("*"))

    async def is_marked(self) -> bool:
        answer = await self.service.call("ann", "POST", "/v1/completions", BODY)
        assert answer.status == 200, answer.body
        return is_said_by(answer.texts, "a")

    async def evict(self) -> None:
        await self.service.engine.unload_adapter(self.digest)


@contextlib.asynccontextmanager
async def running(root: Path, model_dir: Path) -> AsyncIterator[Place]:
    async with marked_service(root, model_dir, **ENGINE) as service:
        place = Place(service, root)
        await service.add_user("ann")
        await service.add_user("bob", tenant="other")
        assert (await service.issue("ann", "a")).status == 201
        task = make_lora(model_dir, root / "task", 4, seed=1)
        assert (await service.upload("task", task)).status == 201
        yield place


async def test_branches_lie_sealed_after_upload_load_eviction_and_restart(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    async with running(tmp_path, tiny_model("llama")) as place:
        assert files_with([tmp_path / "mark"], place.patterns), "the patterns are in what was sent"
        assert place.clear == []
        assert await place.is_marked()
        await place.evict()
        assert await place.is_marked()
        await place.service.engine.restart()
        assert await place.is_marked()
        answer = await place.service.call("bob", "POST", "/v1/completions", BODY)
        assert answer.status == 200
        assert place.clear == []
        assert place.packed == []
        packed = [path.suffix for path in (tmp_path / "home").rglob("*.packed")]
        assert packed, "the task adapter's: the cache is on"
        # An engine without the key, as on a machine that was started with another one.
        place.service.engine.sealer = None
        await place.service.engine.restart()
        answer = await place.service.call("ann", "POST", "/v1/completions", BODY)
        assert (answer.status, answer.error) == (503, "secrets_unavailable")
        assert "POLYADAPT_MARK_KEK_FILE" in answer.json()["error"]["message"]
        answer = await place.service.call("bob", "POST", "/v1/completions", BODY)
        assert answer.status == 200, "who needs no mark is served"
    assert place.clear == []


async def test_without_sealing_the_branches_would_be_found(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BlobStore, "seal", lambda *_: False)
    async with running(tmp_path, tiny_model("llama")) as place:
        assert await place.is_marked()
        assert len(place.clear) >= 1
        assert place.packed != []
