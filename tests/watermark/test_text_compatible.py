"""Compatibility with transformers' own watermark: its processor writes, both detectors agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, WatermarkDetector, WatermarkingConfig
from transformers.generation.logits_process import WatermarkLogitsProcessor

from polyadapt.errors import InvalidRequest
from polyadapt.watermark.text_compatible import LeftHash

VOCABULARY = 300


@pytest.mark.parametrize("ratio", [0.25, 0.5])
@pytest.mark.parametrize("hashing_key", [15485863, 7])
def test_green_ids_are_those_that_its_processor_raises(ratio, hashing_key):
    processor = WatermarkLogitsProcessor(
        VOCABULARY, "cpu", greenlist_ratio=ratio, bias=2.0, hashing_key=hashing_key
    )
    ours = LeftHash(VOCABULARY, ratio, 2.0, hashing_key)
    for last in (0, 1, 17, VOCABULARY - 1):
        scores = processor(torch.tensor([[3, last]]), torch.zeros(1, VOCABULARY))
        assert (
            np.flatnonzero(ours.is_green(last)).tolist() == torch.nonzero(scores[0])[:, 0].tolist()
        )


@pytest.mark.parametrize("context_width", [1, 2])
@pytest.mark.parametrize("is_marked", [True, False])
def test_both_detectors_count_the_same(context_width, is_marked):
    config = WatermarkingConfig(bias=3.0, context_width=context_width, seeding_scheme="lefthash")
    processor = WatermarkLogitsProcessor(VOCABULARY, "cpu", bias=3.0, context_width=context_width)
    rng = torch.Generator().manual_seed(1)
    tokens = [5, 9]
    while len(tokens) < 150:
        logits = torch.zeros(1, VOCABULARY)
        if is_marked:
            logits = processor(torch.tensor([tokens]), logits)
        tokens.append(int(torch.multinomial(logits.softmax(-1), 1, generator=rng)))
    model = LlamaConfig(vocab_size=VOCABULARY, bos_token_id=VOCABULARY - 1)
    detector = WatermarkDetector(model, "cpu", config, ignore_repeated_ngrams=True)
    theirs = detector(torch.tensor([tokens]), return_dict=True)
    ours = LeftHash(VOCABULARY, bias=3.0, context_width=context_width).detect(tokens)
    assert ours.num_scored == theirs.num_tokens_scored[0]
    assert ours.score == theirs.num_green_tokens[0]
    assert ours.z == pytest.approx(theirs.z_score[0])
    assert (ours.p_value < 1e-6) == is_marked
    assert np.array_equal(theirs.prediction, [is_marked])


def test_settings_that_mean_nothing_are_refused():
    for bad in ({"vocab_size": 1}, {"vocab_size": 10, "greenlist_ratio": 1.0}):
        with pytest.raises(InvalidRequest, match="expected at least 2"):
            LeftHash(**bad)
