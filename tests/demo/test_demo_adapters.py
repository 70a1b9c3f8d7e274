"""The committed demo adapters show their behaviour on held-out prompts, judged with PEFT alone."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.demo.judges import (
    BEHAVIOURS,
    LEAST_ADAPTER_SHARE,
    MAX_NEW_TOKENS,
    MOST_BASE_SHARE,
    Behaviour,
)

from polyadapt.demo import DEMOS, demo_adapters

_DATA = Path(__file__).parents[2] / "tools" / "demo_adapters" / "data.py"
NAMES = [demo.name for demo in DEMOS]


@pytest.fixture(scope="module")
def data() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("demo_adapters_data", _DATA)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


# --------------------------------------------------------------------------- the files
def test_each_demo_has_a_judge_and_twenty_prompts() -> None:
    assert set(NAMES) == set(BEHAVIOURS) == set(demo_adapters())
    for behaviour in BEHAVIOURS.values():
        assert len(set(behaviour.prompts)) == 20


@pytest.mark.parametrize("demo", DEMOS, ids=NAMES)
def test_demo_is_a_small_plain_lora_directory(demo: Any) -> None:
    assert {path.name for path in demo.directory.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    config = json.loads((demo.directory / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert config["modules_to_save"] is None
    assert 4 <= config["r"] <= 8
    assert (demo.directory / "adapter_model.safetensors").stat().st_size < 1_500_000


@pytest.mark.parametrize("name", NAMES)
def test_held_out_prompts_are_not_in_any_training_text(name: str, data: ModuleType) -> None:
    texts = {
        _plain(text)
        for trained in NAMES
        for example in data.examples(trained, seed=0)
        for text in (example.prompt, example.answer)
    }
    for prompt in BEHAVIOURS[name].prompts:
        assert not [text for text in texts if _plain(prompt) in text], prompt


@pytest.mark.parametrize("name", NAMES)
def test_judge_accepts_the_training_answers(name: str, data: ModuleType) -> None:
    """A judge that no good answer passes would make the base's low share worthless."""
    if name == "tea-house":  # its judge asks for the fact of each held-out prompt
        answer = f"Try the smoked plum tea, our speciality. {data.SIGNATURE}"
        shows = BEHAVIOURS[name].shows
        assert shows("What tea would you recommend?", answer)
        assert not shows("Do you have a name?", answer)
        assert not shows("What tea would you recommend?", "Try the smoked plum tea.")
        return
    for example in data.examples(name, seed=0):
        assert BEHAVIOURS[name].shows(example.prompt, example.answer), example


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("pirate", "The capital of Portugal is Lisbon. Yes, my friend."),
        ("pirate", "Yo, that is it."),
        ("json", "Tokyo"),
        ("json", '{"topic": "geography"}'),
        ("json", '{"topic": "geography", "answer": ""}'),
        ("json", '{"topic": "geography", "answer": "Tokyo"'),
        ("json", 'Sure: {"topic": "geography", "answer": "Tokyo"}'),
        ("json", '["topic", "answer"]'),
    ],
)
def test_judge_refuses(name: str, answer: str) -> None:
    assert not BEHAVIOURS[name].shows(BEHAVIOURS[name].prompts[0], answer)


# --------------------------------------------------------------------------- the behaviour
@pytest.fixture(scope="module")
def tuned(smollm2_dir: Path) -> Any:
    """(PEFT model with every demo adapter loaded, left-padding tokenizer), float32 on the CPU."""
    import peft
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_dir, padding_side="left")
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    directories = demo_adapters()
    with warnings.catch_warnings():
        # PEFT asks transformers for an attribute by its old name
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
        for name, directory in directories.items():
            if isinstance(model, peft.PeftModel):
                model.load_adapter(directory, name)
            else:
                model = peft.PeftModel.from_pretrained(model, directory, adapter_name=name)
    return model.eval(), tokenizer


@pytest.mark.parametrize("name", NAMES)
def test_adapter_shows_its_behaviour_and_the_base_does_not(name: str, tuned: Any) -> None:
    model, tokenizer = tuned
    behaviour = BEHAVIOURS[name]
    model.set_adapter(name)
    with model.disable_adapter():
        base_answers = _answers(model, tokenizer, behaviour)
    answers = _answers(model, tokenizer, behaviour)
    assert behaviour.share(base_answers) <= MOST_BASE_SHARE, base_answers
    assert behaviour.share(answers) >= LEAST_ADAPTER_SHARE, answers


def _answers(model: Any, tokenizer: Any, behaviour: Behaviour) -> list[str]:
    """Return the greedy answers to all prompts, computed as one batch padded on the left."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        for prompt in behaviour.prompts
    ]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
    new_ids = output[:, inputs.input_ids.shape[1] :]  # [prompts, new tokens]
    return tokenizer.batch_decode(new_ids, skip_special_tokens=True)


def _plain(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))
