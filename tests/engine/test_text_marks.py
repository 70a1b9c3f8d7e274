"""Marked rows: each is drawn as the papers say, on the host and on a device, and nobody else is."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.engine.fake_device import FakeDevice
from tests.oracle import text_mark

from polyadapt.engine.device_sampler import DeviceSampler
from polyadapt.engine.request import RequestGroup, Sequence
from polyadapt.engine.sampler import sample, sample_rows
from polyadapt.engine.text_marks import TextMarker
from polyadapt.types import MarkSettings, Request, SamplingParams, TextMark

END = (0, 3)
KEY, OTHER = (0x1234567890ABCDEF, -0x7777), (5, 6)
KGW = MarkSettings("kgw", 2, ratio=0.25, bias=2.0)
SYNTHID = MarkSettings("synthid", 3, depth=7)
GUMBEL = MarkSettings("gumbel", 2)
SETTINGS = [KGW, SYNTHID, GUMBEL, replace(KGW, context_width=1, ratio=0.5, bias=0.7)]


def sequence(
    settings: MarkSettings | None,
    output: list[int],
    index: int = 0,
    key: tuple[int, int] = KEY,
    **params: Any,
) -> Sequence:
    """A sequence with prompt [1, 2, 2], the given output so far, and a mark."""
    mark = None if settings is None else TextMark(settings, key)
    sampling = SamplingParams(max_tokens=100, **params)
    request = Request("r", (1, 2, 2), sampling, n=index + 1, text_mark=mark)
    made = RequestGroup.of(request, 0.0).sequences[index]
    made.token_ids += output
    return made


def by_definition(row: torch.Tensor, of: Sequence) -> tuple[np.ndarray, np.ndarray, float]:
    """(ids in their order, cumulative mass, the target), over the whole vocabulary in float64."""
    request = of.group.request
    params, mark = request.sampling, request.text_mark
    scores = adjusted(row, of)
    context = None
    if mark is not None:
        scheme = mark.settings.scheme
        width = mark.settings.context_width
        context = text_mark.context_of(scheme, of.token_ids, of.num_prompt, width)
    if mark is not None and context is not None and scheme == "kgw":
        scores = text_mark.marked_scores(
            scores, mark.key, context, mark.settings.ratio, mark.settings.bias, params.temperature
        )
    if params.temperature == 0.0:
        best = int(scores.argmax())
        return np.array([best]), np.ones(1), 0.0
    weights = np.exp((scores - scores.max()) / np.float32(params.temperature))
    probs = weights.astype(np.float64)
    is_cut = 0 < params.top_k < len(probs) or params.top_p < 1.0 or params.min_p > 0.0
    order = np.argsort(-probs, kind="stable") if is_cut else np.arange(len(probs))
    probs = probs[order]
    if params.top_k:
        probs[params.top_k :] = 0.0
    probs /= probs.sum()
    if params.top_p < 1.0:
        probs[np.cumsum(probs) - probs >= params.top_p] = 0.0
    if params.min_p > 0.0:
        probs[probs < params.min_p * probs[0]] = 0.0
    if mark is not None and context is not None and scheme != "kgw":
        by_id = np.zeros(len(probs))
        by_id[order] = probs
        depth = mark.settings.depth
        probs = text_mark.marked_probs(by_id, mark.key, context, scheme, depth)[order]
    key = np.array([params.seed, of.index], np.uint64)
    counter = np.array([of.num_output, 0, 0, 0], np.uint64)
    uniform = np.random.Generator(np.random.Philox(key=key, counter=counter)).random()
    cumulative = np.cumsum(probs)
    return order, cumulative, uniform * cumulative[-1]


def adjusted(row: torch.Tensor, of: Sequence) -> np.ndarray:
    """Penalties, bias and the minimum length, one token at a time."""
    params, scores = of.group.request.sampling, row.float().numpy().copy()
    for token_id in set(of.token_ids):
        factor = np.float32(params.repetition_penalty)
        scores[token_id] = scores[token_id] / factor if scores[token_id] > 0 else (
            scores[token_id] * factor
        )  # fmt: skip
    for token_id, count in Counter(of.token_ids[of.num_prompt :]).items():
        scores[token_id] -= np.float32(params.presence_penalty + params.frequency_penalty * count)
    for token_id, bias in params.logit_bias:
        scores[token_id] += np.float32(bias)
    if of.num_output < params.min_tokens:
        scores[list(END)] = -np.inf
    return scores


def assert_drawn(row: torch.Tensor, of: Sequence, found: int) -> bool:
    """Whether it is the very token that the definition gives; else the number lies at the border of
    the two.
    """
    ids, cumulative, target = by_definition(row, of)
    expected = int(ids[np.searchsorted(cumulative, target, side="right")])
    if found == expected:
        return True
    places = [int(np.flatnonzero(ids == token_id)[0]) for token_id in (found, expected)]
    border = cumulative[min(places) : max(places)]
    assert np.abs(border - target).min() < 2e-5, (found, expected)
    return False


KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.3},
    {},
    {"temperature": 0.2},
    {"top_p": 0.9},
    {"top_p": 0.2, "min_p": 0.01},
    {"top_k": 40},
    {"top_k": 1},
    {"top_k": 700, "top_p": 0.95, "temperature": 0.7},
    {"min_p": 0.05, "temperature": 2.0},
    {"repetition_penalty": 1.7, "temperature": 0.0},
    {"repetition_penalty": 0.6, "top_p": 0.8},
    {"presence_penalty": 0.8, "frequency_penalty": 0.3},
    {"logit_bias": ((2, 3.5), (4, -100.0)), "temperature": 0.0},
    {"logit_bias": ((1, 1.25),), "min_tokens": 9, "top_p": 0.7, "repetition_penalty": 1.1},
    {"min_tokens": 5, "temperature": 0.0},
]


def batch(num: int, num_vocab: int, seed: int) -> tuple[torch.Tensor, list[Sequence]]:
    """Rows of all schemes and two keys and of none, with all kinds of sampling."""
    rng = random.Random(seed)
    logits = torch.randn(num, num_vocab, generator=torch.Generator().manual_seed(seed)) * 3
    sequences = [
        sequence(
            rng.choice([*SETTINGS, None]),
            [rng.randrange(min(num_vocab, 4)) for _ in range(rng.randrange(9))],
            seed=rng.randrange(2**63),
            index=rng.randrange(3),
            key=rng.choice([KEY, OTHER]),
            **rng.choice(KINDS),
        )
        for _ in range(num)
    ]
    return logits, sequences


def test_the_oracles_hash_is_siphash():
    key = (0x0706050403020100, 0x0F0E0D0C0B0A0908)  # appendix A of the paper; 15 bytes there,
    words = [0x0706050403020100]  # and from its authors' vectors for 8
    assert text_mark.siphash_of(key, words) == 0x93F5F5799A932462
    assert text_mark.word_of(0, 0) == 0xE220A8397B1DCDAF  # splitmix64's first number from 0


@pytest.mark.parametrize("num_vocab", [5, 300, 1500])
def test_every_row_is_drawn_as_the_papers_say(num_vocab):
    num_exact = 0
    logits, sequences = batch(90, num_vocab, num_vocab)
    together = sample_rows(logits, sequences)
    for row, of, drawn in zip(logits, sequences, together, strict=True):
        alone = sample(row, of, END)
        assert alone is not None
        assert drawn is None or drawn == alone
        num_exact += assert_drawn(row, of, alone.token_id)
    assert num_exact >= 89


@pytest.mark.parametrize("num_vocab", [5, 300, 1500])
def test_a_device_draws_what_the_host_does(num_vocab):
    logits, sequences = batch(90, num_vocab, num_vocab + 1)
    found = DeviceSampler(FakeDevice()).sample(logits, sequences, [END] * 90).read()
    num_exact = 0
    for row, of, drawn in zip(logits, sequences, found, strict=True):
        expected = sample(row, of, END)
        assert drawn is not None
        assert expected is not None
        num_exact += drawn == expected
        if drawn != expected:
            assert_drawn(row, of, drawn.token_id)
    assert num_exact >= 89


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_mark_changes_what_is_drawn_and_its_keys_differ(settings):
    logits = torch.randn(200, generator=torch.Generator().manual_seed(2))
    drawn = {}
    for name, own, key in (("none", None, KEY), ("one", settings, KEY), ("other", settings, OTHER)):
        rows = [sequence(own, [4, 5, 6], seed=seed, key=key) for seed in range(60)]
        drawn[name] = [sample(logits, of, END).token_id for of in rows]
    assert drawn["none"] != drawn["one"] != drawn["other"] != drawn["none"]


def test_unmarked_rows_are_the_same_bit_for_bit_beside_marked_ones():
    logits, sequences = batch(60, 300, 9)
    plain = [of for of in sequences if of.group.request.text_mark is None]
    at = [i for i, of in enumerate(sequences) if of.group.request.text_mark is None]
    assert len(plain) > 5
    mixed = sample_rows(logits, sequences)
    assert [mixed[i] for i in at] == sample_rows(logits[at], plain)


def test_logprobs_are_the_models_own_with_a_mark():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(4))
    expected = torch.log_softmax(logits, -1)
    for settings in SETTINGS:
        drawn = sample(logits, sequence(settings, [4, 5, 6], num_logprobs=3), END)
        assert drawn is not None
        assert drawn.logprob is not None
        assert drawn.logprob.logprob == pytest.approx(float(expected[drawn.token_id]))
        assert [v for _, v in drawn.logprob.top] == pytest.approx(expected.topk(3)[0].tolist())


def test_only_green_lists_read_the_prompt_and_others_mark_a_context_once():
    green = TextMarker(TextMark(KGW, KEY), 3, 100)
    assert green.context([1, 2, 2]) == (2, 2)
    assert green.context([1, 2, 2, 9, 8, 9, 8]) == green.context([1, 2, 2, 9, 8]) == (9, 8)
    race = TextMarker(TextMark(GUMBEL, KEY), 3, 100)
    assert race.context([1, 2, 2, 9]) is None
    assert race.context([1, 2, 2, 9, 8]) == (9, 8)
    assert race.context([1, 2, 2, 9, 8, 9]) == (8, 9)
    assert race.context([1, 2, 2, 9, 8, 9, 8]) is None
    assert race.context([1, 2, 2, 9, 8, 9, 8]) is None, "asked again it says the same"
    late = TextMarker(TextMark(GUMBEL, KEY), 3, 100)  # that a preempted sequence's might be
    assert late.context([1, 2, 2, 9, 8, 9, 8]) is None
    assert late.context([1, 2, 2, 9, 8, 9, 8, 7]) == (8, 7)


def test_nothing_prints_a_key():
    request = sequence(KGW, []).group.request
    for shown in (repr(request), str(request), f"{request}", repr(request.text_mark)):
        for word in KEY:
            assert str(word) not in shown
            assert f"{word & (2**64 - 1):x}" not in shown.lower()
    assert "kgw" in repr(request)
