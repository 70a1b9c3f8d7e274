"""The engine on an asynchronous device: captured decode steps give what plain ones give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.oracle import adapters
from tests.support.engines import SMALL, Driver, greedy_request, new_engine, put_blob
from tests.support.fake_device import CaptureError, FakeDevice
from transformers.models.llama.modeling_llama import LlamaModel

from polyadapt.config import EngineConfig
from polyadapt.engine.build import build_engine
from polyadapt.engine.device_forward import list_buckets
from polyadapt.ops import native
from polyadapt.types import AdapterId

PROMPTS = [[5, 6, 7, 8, 9], [11, 12], list(range(20, 60)), [3], [70, 71, 72], [81, 82, 80]]


@pytest.fixture(scope="module")
def blob_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("blobs")


@pytest.fixture(scope="module")
def adapter(
    tiny_model: Callable[[str], Path], blob_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> AdapterId:
    directory = tmp_path_factory.mktemp("adapter") / "a"
    return put_blob(blob_root, adapters.make_lora(tiny_model("llama"), directory, 4, seed=1), "a")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    """Its tensors are no host tensors: the native kernels are not for them."""
    monkeypatch.setattr(native, "serves", lambda _: False)
    monkeypatch.setattr(native, "is_available", lambda: False)
    return FakeDevice()


@pytest.fixture
def start(blob_root: Path) -> Iterator[Callable[..., Driver]]:
    made: list[Driver] = []

    def make(model_dir: Path, device: FakeDevice | None, **settings: object) -> Driver:
        if device is None:
            made.append(Driver(new_engine(model_dir, blob_root, **settings)))
        else:
            config = EngineConfig(
                model=str(model_dir), device="cpu", dtype="float32", **(SMALL | settings)
            )
            engine = build_engine(
                config, model_dir, blob_root, lambda: None, name="base", device=device
            )
            made.append(Driver(engine))
        return made[-1]

    yield make
    for driver in made:
        driver.engine.pool.close()


def _served(driver: Driver, adapter: AdapterId | None = None) -> dict[str, list[int]]:
    """Tokens of prompts that come and end one after the other; every other one has the adapter."""
    for number, prompt in enumerate(PROMPTS):
        named = adapter if number % 2 else None
        request = greedy_request(f"r{number}", prompt, named, max_tokens=4 + 3 * number)
        driver.submit(request)
        driver.step_or_wait()
    driver.run()
    return {name: transcript.tokens for name, transcript in driver.transcripts.items()}


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "gpt2"])
@pytest.mark.parametrize("page_size", [4, 16])
def test_captured_steps_give_the_tokens_of_plain_ones(
    tiny_model, start, device, architecture, page_size
):
    model_dir = tiny_model(architecture)
    found = start(model_dir, device, page_size=page_size)
    tokens = _served(found)
    assert found.engine.counters["graph_steps"] > 10
    assert found.engine.counters["graph_failures"] == 0
    expected = _served(start(model_dir, None, page_size=page_size))
    assert tokens == expected
    assert len({tuple(row) for row in tokens.values()}) == len(PROMPTS), "they say different things"


def test_adapters_beside_base_rows_leave_the_graphs_and_come_back(
    tiny_model, start, device, adapter
):
    found = start(tiny_model("llama"), device)
    assert _served(found, adapter) == _served(start(tiny_model("llama"), None), adapter)
    assert found.engine.counters["graph_steps"] > 0
    assert found.engine.counters["eager_steps"] > 0


def test_nothing_new_is_captured_while_serving_the_base(tiny_model, start, device):
    found = start(tiny_model("llama"), device)
    captured = found.engine.counters["graph_captures"]
    assert captured == len(list_buckets(SMALL["max_num_seqs"])) == len(device.graphs)
    _served(found)
    assert found.engine.counters["graph_captures"] == captured


def test_a_preempted_sequence_goes_on_with_the_same_tokens(tiny_model, start, device):
    small = {"kv_cache_bytes": 14 * 16 * 256, "page_size": 4}
    found = start(tiny_model("llama"), device, **small)
    tokens = _served(found)
    assert found.engine.counters["preemptions"] > 0, "the memory is too large for this test"
    assert tokens == _served(start(tiny_model("llama"), None))


def test_a_model_that_reads_on_the_host_is_served_without_graphs(
    tiny_model, start, device, monkeypatch
):
    expected = _served(start(tiny_model("llama"), None))
    forward = LlamaModel.forward

    def reading(self: LlamaModel, input_ids: torch.Tensor, **rest: Any) -> Any:
        assert int(input_ids.max()) < self.config.vocab_size
        return forward(self, input_ids, **rest)

    monkeypatch.setattr(LlamaModel, "forward", reading)
    found = start(tiny_model("llama"), device)
    assert found.engine.counters["graph_captures"] == 0
    assert found.engine.counters["graph_failures"] == len(list_buckets(SMALL["max_num_seqs"]))
    assert _served(found) == expected
    assert found.engine.counters["graph_steps"] == 0


def test_buckets_hold_every_number_of_rows_and_are_mostly_filled():
    for most in (1, 2, 5, 16, 17, 64, 100, 256):
        buckets = list_buckets(most)
        assert buckets[0] == 1
        assert buckets[-1] == most
        assert all((high - low - 1) / high < 1 / 3 for low, high in pairwise(buckets))


def test_the_fake_device_refuses_what_a_graph_cannot_hold():
    x = torch.ones(3)
    with pytest.raises(CaptureError, match="item"):
        FakeDevice().capture(lambda: x * x.sum().item())
    with pytest.raises(CaptureError, match="lift"):
        FakeDevice().capture(lambda: x * torch.tensor(2.0))


def test_the_fake_devices_graph_ignores_what_python_would_do_by_now():
    x, factor = torch.ones(3), [2.0]
    graph, y = FakeDevice().capture(lambda: (x * factor[0]).view(1, 3).add_(1))
    factor[0] = 100.0
    x.fill_(5.0)
    graph.replay()
    assert y.tolist() == [[11.0, 11.0, 11.0]]
