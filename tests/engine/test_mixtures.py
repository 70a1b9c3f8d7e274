"""Adapters with experts of their own beside ordinary ones and the base, in one batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.oracle import adapters, composed, peft_oracle, tiny
from tests.oracle.mixture import logits, model_of, write_mixlora
from tests.support.engines import Driver, LogitsRecorder, greedy_request, new_engine, put_blob
from transformers.pytorch_utils import Conv1D

from polyadapt.ops import native
from polyadapt.types import AppliedAdapter, Failed, Request

NUM_TOKENS = 6
DYNAMIC = {"routing_strategy": "mixlora-dynamic", "top_p": 0.6, "temperature": 0.9}
# name -> how the adapter is made; two of different sizes, and one by summed probability
MIXTURES = {
    "four": {"num_experts": 4, "top_k": 2, "rank": 3, "seed": 1},
    "eight": {"num_experts": 8, "top_k": 3, "rank": 2, "seed": 2, "strength": 0.6},
    "dynamic": {"num_experts": 5, "rank": 2, "seed": 3, **DYNAMIC},
}
needs_native = pytest.mark.skipif(not native.is_available(), reason="no C compiler")


class Served:
    """One tiny model, its adapters' directories and blobs."""

    def __init__(self, architecture: str, model_dir: Path, root: Path) -> None:
        self.architecture, self.model_dir, self.blobs = architecture, model_dir, root / "blobs"
        base = peft_oracle.load_base(model_dir)
        self.directories = {
            name: write_mixlora(base, root / name, **options) for name, options in MIXTURES.items()
        }
        self.directories["plain"] = adapters.make_lora(model_dir, root / "plain", 6, seed=4)
        self.ids = {n: put_blob(self.blobs, d, n) for n, d in self.directories.items()}

    def requests(self) -> list[Request]:
        users = ["base", "four", "plain", "eight", "four-again", "dynamic", "base-again"]
        found = []
        for number, name in enumerate(users):
            prompt = tiny.prompt_ids(4 + 7 * number % 19, seed=number)
            adapter = self.ids.get(name.removesuffix("-again"))
            found.append(greedy_request(name, prompt, adapter, NUM_TOKENS, num_prompt_logprobs=0))
        return found

    def expected(self, request: Request, tokens: list[int]) -> torch.Tensor:
        seen = [*request.prompt_ids, *tokens[:-1]]
        name = request.id.removesuffix("-again")
        if name in MIXTURES:
            return logits(self.model_dir, self.directories[name], seen)
        directory = None if name == "base" else self.directories[name]
        return peft_oracle.logits(self.model_dir, directory, seen)

    def driver(self, **settings) -> Driver:
        driver = Driver(new_engine(self.model_dir, self.blobs, **settings))
        driver.load(*self.ids.values())
        return driver


@pytest.fixture(scope="module")
def serve(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory):
    made: dict[str, Served] = {}

    def of(architecture: str) -> Served:
        if architecture not in made:
            root = tmp_path_factory.mktemp(f"mixtures-{architecture}")
            made[architecture] = Served(architecture, tiny_model(architecture), root)
        return made[architecture]

    return of


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "phi3", "gpt2"])
def test_a_mixed_batch_equals_every_expert_run_by_itself(architecture, serve):
    served = serve(architecture)
    driver = served.driver()
    recorder, requests = LogitsRecorder(driver.engine), served.requests()
    driver.run(*requests)
    driver.engine.pool.close()
    assert max(recorder.adapters_per_step) == 4
    for request in requests:
        expected = served.expected(request, driver.transcripts[request.id].tokens)
        try:
            peft_oracle.assert_matches(recorder.of(request.id), expected)
        except AssertionError as error:
            raise AssertionError(f"{request.id}: {error}") from error


def test_a_plain_mlp_beside_attention_equals_it_too(tiny_model, tmp_path):
    model_dir = tiny_model("phi")
    directory = write_mixlora(peft_oracle.load_base(model_dir), tmp_path / "a")
    driver = Driver(new_engine(model_dir, tmp_path / "blobs"))
    recorder = LogitsRecorder(driver.engine)
    adapter = put_blob(tmp_path / "blobs", directory, "a")
    request = greedy_request("a", tiny.prompt_ids(9, 0), adapter, 4, num_prompt_logprobs=0)
    tokens = driver.run(request)["a"].tokens
    driver.engine.pool.close()
    expected = logits(model_dir, directory, [*request.prompt_ids, *tokens[:-1]])
    peft_oracle.assert_matches(recorder.of("a"), expected)


@needs_native
@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_steps_with_experts_stay_one_native_call_a_layer(architecture, serve):
    served = serve(architecture)
    driver = served.driver()
    driver.run(*served.requests())
    steps = driver.engine.stats().counters["native_layer_steps"]
    driver.engine.pool.close()
    assert steps >= NUM_TOKENS - 1


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_torch_form_serves_the_same(architecture, serve, monkeypatch):
    served = serve(architecture)
    monkeypatch.setattr(native, "is_available", lambda: False)
    driver = served.driver()
    recorder, requests = LogitsRecorder(driver.engine), served.requests()
    driver.run(*requests)
    driver.engine.pool.close()
    for request in requests:
        expected = served.expected(request, driver.transcripts[request.id].tokens)
        peft_oracle.assert_matches(recorder.of(request.id), expected)


def test_long_prompts_equal_it_in_chunks_of_any_size(serve):
    served = serve("llama")
    prompt = tiny.prompt_ids(400, seed=9)
    request = greedy_request("r", prompt, served.ids["four"], 2, num_prompt_logprobs=0)
    expected = None
    for budget in (2048, 700, 37):
        driver = served.driver(max_num_batched_tokens=budget, prefix_cache=False)
        recorder = LogitsRecorder(driver.engine)
        tokens = driver.run(request)["r"].tokens
        driver.engine.pool.close()
        if expected is None:
            expected = logits(served.model_dir, served.directories["four"], [*prompt, tokens[0]])
        peft_oracle.assert_matches(recorder.of("r"), expected)


# --------------------------------------------------------------------------- bits
@needs_native
def test_in_exact_mode_no_bit_depends_on_the_batch(serve):
    served = serve("llama")
    requests = served.requests()

    def run(*asked: Request, **settings) -> dict[str, torch.Tensor]:
        driver = served.driver(exact=True, **settings)
        recorder = LogitsRecorder(driver.engine)
        driver.run(*asked)
        driver.engine.pool.close()
        return {request.id: recorder.of(request.id)[-NUM_TOKENS:] for request in asked}

    alone = {}
    for request in requests:
        alone |= run(request)
    shuffled = requests[3:] + requests[:3]
    mixtures = [(requests, {}), (requests[::-1], {"max_num_batched_tokens": 24}),
                (shuffled, {"max_num_seqs": 3})]  # fmt: skip
    for order, settings in mixtures:
        together = run(*order, **settings)
        for request in requests:
            assert torch.equal(together[request.id], alone[request.id]), request.id


# --------------------------------------------------------------------------- scale, composition
def applying(request: Request, *uses: AppliedAdapter) -> Request:
    return replace(request, adapters=uses)


def uses_of(served: Served, *names: str) -> list[AppliedAdapter]:
    return [AppliedAdapter(served.ids[name]) for name in names]


def test_scale_zero_is_the_base_and_another_scale_an_error(serve):
    served = serve("llama")
    prompt = tiny.prompt_ids(11, seed=5)
    whole = greedy_request("r", prompt, None, NUM_TOKENS, num_prompt_logprobs=0)
    driver = served.driver()
    recorder = LogitsRecorder(driver.engine)
    four = served.ids["four"]
    driver.run(replace(whole, id="base"))
    driver.run(applying(replace(whole, id="zero"), AppliedAdapter(four, 0.0)))
    driver.run(applying(replace(whole, id="half"), AppliedAdapter(four, 0.5)))
    driver.engine.pool.close()
    assert torch.equal(recorder.of("zero"), recorder.of("base"))
    last = driver.transcripts["half"].last
    assert isinstance(last, Failed)
    assert (last.code, last.param) == ("invalid_request", "adapters[0].scale")


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_another_adapter_changes_the_linears_that_all_experts_share(architecture, serve):
    served = serve(architecture)
    prompt = tiny.prompt_ids(15, seed=6)
    request = greedy_request("r", prompt, None, NUM_TOKENS, num_prompt_logprobs=0)
    plain = AppliedAdapter(served.ids["plain"], 0.5)
    driver = served.driver()
    recorder = LogitsRecorder(driver.engine)
    tokens = driver.run(applying(request, plain, *uses_of(served, "four")))["r"].tokens
    driver.engine.pool.close()
    changed = dense_sum(served, 0.5)
    ids = torch.tensor([[*prompt, *tokens[:-1]]])
    with torch.inference_mode():
        expected = model_of(changed, served.directories["four"])(input_ids=ids).logits[0]
    peft_oracle.assert_matches(recorder.of("r"), expected)


@torch.no_grad()
def dense_sum(served: Served, scale: float) -> torch.nn.Module:
    """The base with the plain adapter written into its weights, times `scale`."""
    model, directory = peft_oracle.load_base(served.model_dir), served.directories["plain"]
    config = json.loads((directory / "adapter_config.json").read_text())
    tensors = load_file(directory / "adapter_model.safetensors")
    for key, a in tensors.items():
        path, _, factor = key.removeprefix(composed.PREFIX).partition(".lora_")
        if factor == "A.weight":
            b = tensors[key.replace("lora_A", "lora_B")]
            delta = scale * config["lora_alpha"] / len(a) * (b.double() @ a.double())
            module = model.get_submodule(path)
            delta = delta.t() if isinstance(module, Conv1D) else delta
            module.weight.copy_(module.weight.double() + delta)
    return model


def test_two_adapters_with_experts_for_one_mlp_are_refused(serve):
    served = serve("llama")
    request = greedy_request("r", tiny.prompt_ids(5, seed=7), None, 3)
    driver = served.driver()
    driver.run(applying(request, *uses_of(served, "four", "eight")))
    driver.engine.pool.close()
    last = driver.transcripts["r"].last
    assert isinstance(last, Failed)
    assert "both replace model.layers.0.mlp" in last.message


# --------------------------------------------------------------------------- what it costs
def test_a_token_costs_as_many_as_its_experts(serve):
    served = serve("llama")
    for name, cost in (("four", 2), ("eight", 3), ("dynamic", 5), ("plain", 1)):
        driver = served.driver(max_num_batched_tokens=30, max_num_seqs=4)
        prompt = tiny.prompt_ids(30, seed=8)
        driver.run(greedy_request("r", prompt, served.ids[name], 2))
        driver.engine.pool.close()
        prefill = next(rows for rows in driver.rows_per_step if rows)
        assert prefill == 30 // cost, name


def test_what_cannot_have_a_token_in_every_step_waits(serve):
    served = serve("llama")
    driver = served.driver(max_num_batched_tokens=6, max_num_seqs=4)
    requests = [
        greedy_request(f"r{i}", tiny.prompt_ids(3, seed=i), served.ids["four"], 5) for i in range(5)
    ]
    driver.submit(*requests)
    largest = 0
    while driver.engine.has_work:
        driver.step_or_wait()
        largest = max(largest, len(driver.engine.scheduler.running))
        assert driver.rows_per_step[-1] * 2 <= 6
    driver.engine.pool.close()
    assert largest == 3
    assert all(len(driver.transcripts[r.id].tokens) == 5 for r in requests)


def test_what_rows_choose_is_counted_and_can_be_watched(serve):
    served = serve("llama")
    driver = served.driver()
    request = greedy_request("r", tiny.prompt_ids(9, seed=3), served.ids["four"], 2)
    driver.run(request)
    ((rows, *shares),) = driver.engine.stats().routing.values()
    assert rows == 3 * 10  # of three layers
    assert (len(shares), sum(shares)) == (4, pytest.approx(1))

    seen: dict[int, list[torch.Tensor]] = {}
    driver.engine.runner.tokens.observer = lambda site_id, _, weights: seen.setdefault(
        site_id, []
    ).append(weights)
    driver.run(replace(request, id="watched"))
    driver.engine.pool.close()
    assert set(seen) == {mlp.inputs[0] for mlp in driver.engine.info.base.mlps}
    for weights in map(torch.cat, seen.values()):
        assert weights.shape == (10, 4)
        assert torch.allclose(weights.sum(1), torch.ones(10))
        assert ((weights > 0).sum(1) == 2).all()


def test_the_cache_of_packed_adapters_gives_the_same(serve):
    served = serve("llama")
    request = greedy_request("r", tiny.prompt_ids(9, seed=3), served.ids["eight"], NUM_TOKENS)
    tokens = []
    for _ in range(2):  # written by the first, read by the second
        driver = served.driver(packed_cache_bytes=64 << 20)
        tokens.append(driver.run(request)["r"].tokens)
        driver.engine.pool.close()
    assert tokens[0] == tokens[1]
