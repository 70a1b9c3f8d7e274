"""The replayed end of a model: the same logits as the whole model's, marked or not."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from tests.oracle import marks
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from polyadapt.errors import StartupError
from polyadapt.watermark.branches import Branches, signs_of
from polyadapt.watermark.last_layer import LastLayer

PROMPTS = [[1, 5, 9, 2, 40 + i, *range(50, 50 + 3 * (i % 3))] for i in range(20)]


def load(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def full(model, ids):
    with torch.inference_mode():
        return model(torch.tensor([ids]), use_cache=False).logits[0]


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_rows_give_the_models_own_logits_whatever_they_were_collected_with(
    tiny_model, architecture
):
    model = load(tiny_model(architecture)).requires_grad_(False)
    last = LastLayer(model)
    rows = last.collect(PROMPTS)
    expected = torch.stack([full(model, prompt)[-1] for prompt in PROMPTS])
    found = last.logits(rows)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    alone = last.collect(PROMPTS[3:4])
    torch.testing.assert_close(alone.x, rows[3:4].x, atol=1e-5, rtol=1e-4)


def test_the_end_alone_replays_the_same_logits_without_the_layers_before(tiny_model):
    model = load(tiny_model("llama")).requires_grad_(False)
    last = LastLayer(model)
    rows = last.collect(PROMPTS[:4])
    expected, end = last.logits(rows), last.end()
    before = weakref.ref(model.model.layers[0])
    del model, last
    gc.collect()
    assert before() is None
    assert torch.equal(end.logits(rows), expected)


def test_every_position_of_a_text_is_a_row(tiny_model):
    model = load(tiny_model("llama")).requires_grad_(False)
    last = LastLayer(model)
    rows = last.collect_text(PROMPTS[:2])
    assert len(rows) == len(PROMPTS[0]) + len(PROMPTS[1])
    found = last.logits(rows[: len(PROMPTS[0])])
    torch.testing.assert_close(found, full(model, PROMPTS[0]), atol=2e-5, rtol=1e-4)


def test_branches_act_as_they_do_beside_the_module_itself(tiny_model, tmp_path):
    model = load(tiny_model("llama")).requires_grad_(False)
    last = LastLayer(model)
    directory = marks.write_mark(model, tmp_path, modules=[last.module], strength=0.7)
    stored = marks.load_file(directory / "adapter_model.safetensors")
    branches = Branches.of_pair({k.rpartition(".")[2]: v for k, v in stored.items()})
    rows = last.collect(PROMPTS)
    changed = 0
    for bits in ("10110", "01001"):
        signs = signs_of(torch.tensor([[int(bit) for bit in bits]]).numpy())
        found = last.logits(rows, branches, signs.expand(len(rows), -1))
        for row, prompt in enumerate(PROMPTS):
            dense = marks.marked(model, directory, bits, row=len(prompt) - 1)
            expected = full(dense, prompt)[-1]
            torch.testing.assert_close(found[row], expected, atol=5e-5, rtol=1e-3)
            changed += int((expected - full(model, prompt)[-1]).abs().max() > 1e-2)
    assert changed > 10


def test_a_model_without_such_an_end_is_refused():
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50)
    with pytest.raises(StartupError, match="GPT2LMHeadModel has no one stack of layers"):
        LastLayer(GPT2LMHeadModel(config))


def test_a_model_whose_logits_are_made_otherwise_is_refused(tiny_model):
    # Gemma 2 caps its logits.
    with pytest.raises(StartupError, match="the last layer of Gemma2ForCausalLM is not what was"):
        LastLayer(load(tiny_model("gemma2")))
