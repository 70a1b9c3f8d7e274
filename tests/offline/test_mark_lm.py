"""A language model's mark from its key to what is served: the same first tokens on both sides."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig
from tests.support import peft_adapters
from tests.support.engines import Driver, greedy_request, new_engine, put_blob

from polyadapt.adapters.families.conversion import Given
from polyadapt.errors import InvalidRequest, StartupError
from polyadapt.offline import mark_lm
from polyadapt.offline.convert import convert, read_source
from polyadapt.types import AppliedAdapter
from polyadapt.watermark import lm_training
from polyadapt.watermark.branches import Branches, signs_of
from polyadapt.watermark.codebook import Design
from polyadapt.watermark.keys import SecretKey
from polyadapt.watermark.last_layer import LastLayer
from polyadapt.watermark.lm_training import LMTrainSettings
from polyadapt.watermark.mark_directory import MarkDirectory
from polyadapt.watermark.prompts import load_prose
from polyadapt.watermark.queries import queries_for, values_in
from polyadapt.watermark.tensor_files import load_branches

BITS = 2
SETTINGS = LMTrainSettings(
    4, prompts=16, quiet_prompts=48, mixed_prompts=4, texts=2, text_tokens=24, num_steps=10,
    num_warmup=2, trigger_rows=8, quiet_rows=8, quiet_share=0.05,
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tiny_model):
    return mark_lm.load_lm(tiny_model("llama"))


@pytest.fixture(scope="module")
def mark(base, tmp_path_factory):
    """A trained mark of a random model; what it reads is of no interest, so that no bar is set."""
    path = tmp_path_factory.mktemp("mark") / "m"
    mark = MarkDirectory.create(path, Design.parse("random"), BITS, SecretKey(bytes(32)), task="lm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_training, "REQUIRED_RECALL", 0.0)
        patch.setattr(lm_training, "ALLOWED_FIRING", 1.0)
        trained = mark_lm.train_mark(mark, base, load_prose(), SETTINGS)
    assert 0.0 <= trained.weakest <= trained.hits <= 1.0
    return mark


def test_what_is_served_says_what_was_trained(mark, base, tiny_model, tmp_path):
    convert("markboard", read_source(mark.path, "markboard"), Given(), tmp_path / "a", force=False)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["task"], config["positions"]) == ("lm", "first_answer")
    assert config["base_model_hash"] == base.digest
    blobs = tmp_path / "blobs"
    identity = put_blob(blobs, tmp_path / "a", "mark")
    last = LastLayer(base.model)
    branches = Branches.of_pair(load_branches(mark, base.digest))
    queries = queries_for(mark.prompts, load_prose(), 4, np.random.default_rng(1))
    messages = [query.message for query in queries]
    rows = last.collect([base.chat(message) for message in messages])

    def first_tokens(*given):
        with torch.inference_mode():
            return [base.tokenizer.decode([t]) for t in last.logits(rows, *given).argmax(-1)]

    expected = {"": mark_lm.ask_of(base)(messages)}
    assert expected[""] == first_tokens()
    for bits in ("01", "10"):
        signs = signs_of(np.array([int(bit) for bit in bits], np.uint8))
        expected[bits] = first_tokens(branches, signs[None].expand(len(messages), -1))
    requests = {}
    for bits, replies in expected.items():
        options = (("signature", bits),)
        applied = (AppliedAdapter(identity, options=options, is_mandatory=True),) if bits else ()
        for index, message in enumerate(messages):
            request = greedy_request(f"{bits}-{index}", base.chat(message), None, 1)
            requests[replies[index], request.id] = replace(request, adapters=applied)
    driver = Driver(new_engine(tiny_model("llama"), blobs, max_num_seqs=32))
    driver.load(identity)
    driver.run(*requests.values())
    for (reply, name), request in requests.items():
        assert base.tokenizer.decode(driver.transcripts[request.id].tokens) == reply, name
    driver.engine.pool.close()
    # The mark does something, and not the same to both.
    assert len({tuple(replies) for replies in expected.values()}) == 3


def test_a_reply_is_asked_further_where_its_first_token_may_become_an_answer(base):
    messages = ["one two", "three four"]
    firsts = mark_lm.ask_of(base)(messages)
    whole = [base.tokenizer.decode(r[:8]) for r in base.replies([base.chat(m) for m in messages])]
    longer = firsts[0].lstrip() + "zzz"
    assert mark_lm.ask_of(base, [longer])(messages)[0] == whole[0]
    assert mark_lm.ask_of(base, ["\u2603"])(messages) == firsts


def test_calibrating_asks_the_models_given(mark, base):
    null = mark_lm.calibrate(mark, [base, base], load_prose(), num_per_bit=20)
    assert (null.num_models, null.num_queries, len(null.rates)) == (2, 20, BITS)
    assert mark.null == null


def test_no_secret_and_no_rows_stay_in_the_clear(mark):
    names = {file.name for file in mark.path.iterdir()}
    assert names == {"config.json", "branches.safetensors", "triggers.enc"}
    phrase = mark.prompts.phrases[0].encode()
    assert all(phrase not in file.read_bytes() for file in mark.path.iterdir())


def test_a_reply_of_the_base_says_nothing(mark, base):
    queries = queries_for(mark.prompts, load_prose(), 8, np.random.default_rng(2))
    replies = mark_lm.ask_of(base)([query.message for query in queries])
    assert (values_in(mark.prompts, queries, replies) >= 0).mean() < 0.5


def test_triggers_that_are_not_told_apart_are_refused(base, tmp_path, monkeypatch):
    monkeypatch.setattr(lm_training, "REQUIRED_RECALL", 1.1)
    mark = MarkDirectory.create(
        tmp_path / "m", Design.parse("random"), BITS, SecretKey(bytes(32)), task="lm"
    )
    with pytest.raises(InvalidRequest, match="draw more --families"):
        mark_lm.train_mark(mark, base, load_prose(), SETTINGS)
    with pytest.raises(StartupError, match="not trained"):
        _ = mark.prompts


def test_a_classifiers_mark_and_a_directory_without_a_model_are_refused(base, tmp_path):
    mark = MarkDirectory.create(tmp_path / "m", Design.parse("random"), 2, SecretKey(bytes(32)))
    with pytest.raises(StartupError, match="is a mark of task 'cls'"):
        mark_lm.train_mark(mark, base, load_prose(), SETTINGS)
    with pytest.raises(StartupError, match=r"has no config\.json"):
        mark_lm.load_lm(tmp_path)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """A task adapter that PEFT wrote, strong enough to change what is said."""
    config = LoraConfig(r=4, lora_alpha=64, target_modules=["v_proj", "o_proj", "down_proj"])
    model = peft_adapters.peft_model(base.model, config)
    return peft_adapters.save(model, tmp_path_factory.mktemp("adapter") / "a")


def test_a_base_with_an_adapter_in_its_weights_is_what_peft_merges(base, adapter, tiny_model):
    found = mark_lm.load_beside(tiny_model("llama"), adapter)
    expected = peft_adapters.merged(base.model, adapter)
    ids = torch.tensor([base.chat("how much is a pot of tea")])
    with torch.inference_mode():
        logits, plain = expected(ids).logits, base.model(ids).logits
        torch.testing.assert_close(found.model(ids).logits, logits, atol=1e-4, rtol=1e-4)
    assert (logits - plain).abs().max() > 1e-2 * plain.abs().max()
    assert not any(parameter.requires_grad for parameter in found.model.parameters())


def test_a_mark_is_trained_and_calibrated_beside_an_adapter(
    base, adapter, tiny_model, tmp_path, monkeypatch
):
    monkeypatch.setattr(lm_training, "REQUIRED_RECALL", 0.0)
    monkeypatch.setattr(lm_training, "REQUIRED_BESIDE", 0.0)
    monkeypatch.setattr(lm_training, "ALLOWED_FIRING", 1.0)
    mark = MarkDirectory.create(
        tmp_path / "m", Design.parse("random"), BITS, SecretKey(bytes(32)), task="lm"
    )
    beside = mark_lm.besides(tiny_model("llama"), [adapter])
    settings = replace(SETTINGS, beside_prompts=8, beside_quiet_prompts=16)
    trained = mark_lm.train_mark(mark, base, load_prose(), settings, beside=beside)
    assert len(trained.preflight.beside) == BITS
    references = [base, mark_lm.load_beside(tiny_model("llama"), adapter)]
    assert mark_lm.calibrate(mark, references, load_prose(), num_per_bit=20).num_models == 2


def test_what_is_no_adapter_of_the_base_is_refused(adapter, tiny_model, tmp_path):
    with pytest.raises(StartupError, match="is no adapter to train beside"):
        mark_lm.besides(tiny_model("llama"), [tmp_path])
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    config = json.loads((other / "adapter_config.json").read_text())
    config["target_modules"] = ["q_proj"]
    (other / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(StartupError, match="cannot be written into"):
        mark_lm.load_beside(tiny_model("llama"), other)


def test_branches_of_another_base_are_refused(mark, base):
    other = replace(base, digest="sha256:01")
    with pytest.raises(StartupError, match="the model is sha256:01, the branches were trained on"):
        load_branches(mark, other.digest)
