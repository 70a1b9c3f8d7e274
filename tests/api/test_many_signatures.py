"""64 signatures in one batch over HTTP, against 64 models that the branches are merged into."""

from __future__ import annotations

import asyncio
import copy
import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.oracle.marks import write_mark
from tests.support.marked_service import MarkedService, marked_service
from torch import nn
from transformers import AutoModelForCausalLM

from polyadapt.engine.request import Request
from polyadapt.models.load import model_digest

NUM = 64  # users, and bits
NUM_TOKENS = 3
PROMPTS = ("one two three", "the quick brown fox", "a small model", "hello", "def add(left")
TOLERANCE = 1e-5  # of the largest logit
NUM_SHOWN = 20


@dataclass
class Crowd:
    """The service, its event loop, and the signature of every user."""

    runner: asyncio.Runner
    service: MarkedService
    bits: dict[str, str]
    mark_dir: Path
    base: nn.Module


@pytest.fixture(scope="module")
def crowd(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Crowd]:
    root, model_dir = tmp_path_factory.mktemp("crowd"), tiny_model("llama")
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64).eval()
    mark_dir = write_mark(
        base, root / "linear", base_hash=model_digest(model_dir), num_bits=NUM, gate="linear",
        encoding="antipodal", strength=0.1,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(0, 2, (NUM, NUM), generator=generator).tolist()
    bits = {f"user{i}": "".join(map(str, row)) for i, row in enumerate(rows)}

    async def fill(service: MarkedService) -> None:
        assert (await service.upload("linear", mark_dir)).status == 201
        off = {"tenant": "default", "required": False}
        put = await service.call("operator", "PUT", "/v1/watermarks/mark/policy", off)
        assert put.status == 200, put.body
        on = {"tenant": "default", "required": True}
        put = await service.call("operator", "PUT", "/v1/watermarks/linear/policy", on)
        assert put.status == 200, put.body
        for name, signature in bits.items():
            await service.add_user(name)
            path = f"/v1/watermarks/linear/users/{service.ids[name]}"
            made = await service.call("operator", "PUT", path, {"signature": signature})
            assert made.status == 201, made.body

    with asyncio.Runner() as runner:
        running = marked_service(
            root, model_dir, max_num_seqs=NUM, max_num_batched_tokens=2048,
            kv_cache_bytes=8 << 20, max_adapter_bytes=4 << 20,
        )  # fmt: skip
        service = runner.run(running.__aenter__())
        try:
            runner.run(fill(service))
            yield Crowd(runner, service, bits, mark_dir, base)
        finally:
            runner.run(running.__aexit__(None, None, None))


def merged(base: nn.Module, directory: Path, bits: str) -> nn.Module:
    """The base with one user's branches added to its weights, in float64."""
    model = copy.deepcopy(base)
    tensors = load_file(directory / "adapter_model.safetensors")
    for path in {key.rpartition(".")[0] for key in tensors}:
        a, b, fold = (tensors[f"{path}.mark_{name}"].double() for name in ("A", "B", "fold"))
        for i, bit in enumerate(bits):
            signed = b[i] if bit == "1" else -b[i]
            model.get_submodule(path).weight.data += (signed + fold[i]) @ a[i]
    return model


def ask_everybody(crowd: Crowd) -> dict[str, Any]:
    """Every user's completion with the logprobs of its tokens; the requests come at once."""

    async def ask(name: str, prompt: str) -> Any:
        body = {
            "model": "base", "messages": [{"role": "user", "content": prompt}],
            "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True,
            "logprobs": True, "top_logprobs": NUM_SHOWN,
        }  # fmt: skip
        answer = await crowd.service.call(name, "POST", "/v1/chat/completions", body)
        assert answer.status == 200, answer.body
        return answer.json()["choices"][0]["logprobs"]["content"]

    async def ask_all() -> dict[str, Any]:
        asked = [ask(name, PROMPTS[i % len(PROMPTS)]) for i, name in enumerate(crowd.bits)]
        return dict(zip(crowd.bits, await asyncio.gather(*asked), strict=True))

    return crowd.runner.run(ask_all())


def test_sixty_four_signatures_in_one_batch_are_sixty_four_merged_models(crowd: Crowd) -> None:
    engine = crowd.service.engine._engine._loop.engine  # type: ignore[union-attr]
    rows_per_step: list[int] = []
    run, submit = engine.runner.run, crowd.service.engine.submit
    num_asked, all_asked = itertools.count(1), threading.Event()

    def count(request: Request) -> Any:
        if next(num_asked) == NUM:
            all_asked.set()
        return submit(request)

    def spy(batch: Any) -> Any:
        assert all_asked.wait(60)  # however slowly this machine takes them
        rows_per_step.append(len({rows.sequence.group.request.id for rows in batch}))
        return run(batch)

    engine.runner.run = spy  # type: ignore[method-assign]
    crowd.service.engine.submit = count  # type: ignore[method-assign]
    try:
        found = ask_everybody(crowd)
    finally:
        engine.runner.run = run  # type: ignore[method-assign]
        crowd.service.engine.submit = submit  # type: ignore[method-assign]
    assert max(rows_per_step) >= NUM - 8, "they were hardly ever together"
    tokenizer = crowd.service.app.state.services.text.tokenizer
    worst, others = 0.0, []
    for i, (name, bits) in enumerate(crowd.bits.items()):
        turns = [{"role": "user", "content": PROMPTS[i % len(PROMPTS)]}]
        prompt = tokenizer.encode_chat(turns, add_generation_prompt=True)
        logits = greedy(merged(crowd.base, crowd.mark_dir, bits), prompt)
        expected, largest = logits.log_softmax(-1), float(logits.abs().max())
        for told, row in zip(found[name], expected, strict=True):
            shown = [top["logprob"] for top in told["top_logprobs"]]
            ours = torch.tensor([told["logprob"], *shown], dtype=torch.float64)
            theirs = torch.cat([row.topk(1).values, row.topk(NUM_SHOWN).values])
            worst = max(worst, float((ours - theirs).abs().max()) / largest)
        if i < len(PROMPTS):
            other = greedy(merged(crowd.base, crowd.mark_dir, bits[::-1]), prompt)
            others.append(float((other - logits)[0].abs().max()) / largest)
    assert worst <= TOLERANCE
    assert min(others) > 100 * TOLERANCE, "the reference does not tell users apart"


@torch.no_grad()
def greedy(model: nn.Module, prompt: list[int]) -> torch.Tensor:
    """The logits [NUM_TOKENS, vocabulary] that its next tokens are chosen from."""
    ids, rows = list(prompt), []
    for _ in range(NUM_TOKENS):
        rows.append(model(input_ids=torch.tensor([ids])).logits[0, -1])
        ids.append(int(rows[-1].argmax()))
    return torch.stack(rows)
