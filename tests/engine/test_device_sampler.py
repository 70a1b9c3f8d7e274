"""Sampling on a device: each row is what the CPU's form chooses of it, and nobody waits.

The CPU's form is the oracle (test_sampler.py holds it to its definition). Both draw with the same
uniform number; exp and sums may differ in the last bits of float32, so that a number that lies so
near to the border of two tokens may fall on either side. A wrong token is told from that by the
border: see assert_near_a_border.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from tests.engine.fake_device import UNREAD, BlindDevice, FakeDevice

from polyadapt.engine.device_sampler import DeviceSampler, is_penalised
from polyadapt.engine.request import RequestGroup, Sequence
from polyadapt.engine.sampler import Sampled, sample
from polyadapt.ops.device import Host
from polyadapt.types import Request, SamplingParams

END = (0, 3)
# Relative to the mass: some hundred roundings of float32, though only few come together.
NEAR = 2e-5


def sequence(output: list[int] | None = None, index: int = 0, **params: Any) -> Sequence:
    """A sequence with prompt [1, 2, 2] and the given output so far."""
    request = Request("r", (1, 2, 2), SamplingParams(max_tokens=100, **params), n=index + 1)
    made = RequestGroup.of(request, 0.0).sequences[index]
    made.token_ids += output or []
    return made


def draw(logits: torch.Tensor, sequences: list[Sequence]) -> list[Sampled | None]:
    """What the device chooses; logits may have more rows than there are sequences."""
    return DeviceSampler(FakeDevice()).sample(logits, sequences, [END] * len(sequences)).read()


def kept_mass(row: torch.Tensor, of: Sequence) -> tuple[np.ndarray, np.ndarray, float]:
    """(ids in their order, cumulative mass, the target) by definition, in float64."""
    params = of.group.request.sampling
    probs = torch.softmax(adjusted(row, of).double() / params.temperature, 0).numpy()
    is_cut = 0 < params.top_k < len(probs) or params.top_p < 1.0 or params.min_p > 0.0
    ids = np.argsort(-probs, kind="stable") if is_cut else np.arange(len(probs))
    probs = probs[ids]
    if params.top_k:
        probs[params.top_k :] = 0.0
    probs /= probs.sum()
    if params.top_p < 1.0:
        probs[np.cumsum(probs) - probs >= params.top_p] = 0.0
    if params.min_p > 0.0:
        probs[probs < params.min_p * probs[0]] = 0.0
    key = np.array([params.seed, of.index], np.uint64)
    counter = np.array([of.num_output, 0, 0, 0], np.uint64)
    uniform = np.random.Generator(np.random.Philox(key=key, counter=counter)).random()
    cumulative = np.cumsum(probs)
    return ids, cumulative, uniform * cumulative[-1]


def adjusted(row: torch.Tensor, of: Sequence) -> torch.Tensor:
    """The scores by the definitions of the penalties, one token at a time."""
    params, scores = of.group.request.sampling, row.float().clone()
    for token_id in set(of.token_ids):
        value = scores[token_id]
        factor = params.repetition_penalty
        scores[token_id] = value / factor if value > 0 else value * factor
    for token_id, count in Counter(of.token_ids[of.num_prompt :]).items():
        scores[token_id] -= params.presence_penalty + params.frequency_penalty * count
    for token_id, bias in params.logit_bias:
        scores[token_id] += bias
    if of.num_output < params.min_tokens:
        scores[list(END)] = float("-inf")
    return scores


def assert_near_a_border(row: torch.Tensor, of: Sequence, found: int, expected: int) -> None:
    """The two tokens are neighbours, and the uniform number lies at the border between them."""
    ids, cumulative, target = kept_mass(row, of)
    places = [int(np.flatnonzero(ids == token_id)[0]) for token_id in (found, expected)]
    border = cumulative[min(places)]
    assert abs(border - target) < NEAR, (found, expected, border, target)


KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.3},
    {},
    {"top_p": 0.9},
    {"top_p": 0.2, "min_p": 0.01},
    {"top_k": 40},
    {"top_k": 1},
    {"top_k": 700, "top_p": 0.95, "temperature": 0.7},
    {"top_k": 3, "min_p": 0.2, "top_p": 0.999},
    {"min_p": 0.05, "temperature": 2.0},
    {"repetition_penalty": 1.7, "temperature": 0.0},
    {"repetition_penalty": 0.6, "top_p": 0.8},
    {"presence_penalty": 0.8, "frequency_penalty": 0.3},
    {"frequency_penalty": -0.7, "temperature": 0.3, "top_k": 20},
    {"logit_bias": ((2, 3.5), (4, -100.0)), "temperature": 0.0},
    {"logit_bias": ((1, 1.25),), "min_tokens": 9, "top_p": 0.7, "repetition_penalty": 1.1},
    {"min_tokens": 2, "temperature": 0.0},
    {"temperature": 1e-6, "top_p": 0.5},
    {"temperature": 1e-4},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_vocab", [5, 256, 1000, 4097])
def test_every_row_is_what_the_cpus_form_chooses(dtype, num_vocab):
    rng = random.Random(num_vocab)
    generator = torch.Generator().manual_seed(num_vocab)
    num_other, num = 0, 0
    for round_number in range(12):
        logits = (torch.randn(150, num_vocab, generator=generator) * 3).to(dtype)
        if round_number % 3 == 0:
            logits[:, 1] = float("-inf")
        if round_number % 4 == 0:
            logits = (logits * 2).round() / 2  # many ties
        sequences = [
            sequence(
                [rng.randrange(num_vocab) for _ in range(rng.randrange(6))],
                seed=rng.randrange(-(2**63), 2**63),
                index=rng.randrange(3),
                **rng.choice(KINDS),
            )
            for _ in range(rng.randrange(1, 140))
        ]
        found = draw(logits, sequences)
        for row, of, drawn in zip(logits, sequences, found, strict=False):
            expected = sample(row, of, END)
            assert drawn is not None
            assert expected is not None
            num += 1
            if drawn.token_id != expected.token_id:
                num_other += 1
                assert_near_a_border(row, of, drawn.token_id, expected.token_id)
    assert num > 300
    assert num_other <= num * 1e-3, "a border is that near now and then, not often"


def test_the_oracle_of_borders_knows_the_tokens_that_are_drawn():
    """Else it could not tell a wrong token: everywhere but at a border it agrees with the draw."""
    logits = torch.randn(len(KINDS), 300, generator=torch.Generator().manual_seed(1)) * 2
    for row, kind in zip(logits, KINDS, strict=True):
        of = sequence([5, 6, 6], seed=11, **kind)
        if of.group.request.sampling.temperature >= 1e-5:
            ids, cumulative, target = kept_mass(row, of)
            drawn = sample(row, of, END)
            assert drawn is not None
            assert ids[np.searchsorted(cumulative, target, side="right")] == drawn.token_id


@pytest.mark.parametrize(
    ("params", "mask"),
    [
        ({}, [1, 1, 1, 1, 1, 1]),
        ({"temperature": 0.5}, [1, 1, 1, 1, 1, 1]),
        ({"top_k": 2}, [0, 0, 1, 0, 0, 1]),
        ({"top_p": 0.8}, [1, 0, 1, 0, 0, 1]),
        ({"min_p": 0.5}, [0, 0, 1, 0, 0, 1]),
        ({"top_k": 2, "top_p": 0.5}, [0, 0, 1, 0, 0, 0]),
    ],
)
def test_draws_follow_the_distribution(params, mask):
    count = 6000
    logits = torch.tensor([1.0, 0.5, 2.0, -1.0, 0.0, 1.5])
    sequences = [sequence(seed=seed, **params) for seed in range(count)]
    drawn = Counter(s.token_id for s in draw(logits.expand(count, -1), sequences))
    scaled = logits / params.get("temperature", 1.0)
    expected = torch.softmax(scaled, 0).numpy() * np.array(mask)
    expected /= expected.sum()
    frequencies = np.array([drawn[i] for i in range(len(logits))]) / count
    error = 5 * np.sqrt(np.maximum(expected * (1 - expected), 1e-9) / count)
    assert (np.abs(frequencies - expected) <= error).all(), (frequencies, expected)
    assert (frequencies[expected == 0] == 0).all()


def test_equal_scores_are_taken_in_their_order():
    logits = torch.tensor([[0.0, 3.0, 3.0, -0.0, 0.0, 3.0]])
    (best,) = draw(logits, [sequence(temperature=0.0)])
    assert best.token_id == 1
    many = logits.expand(400, -1)
    of_two = draw(many, [sequence(seed=seed, top_k=2) for seed in range(400)])
    assert {s.token_id for s in of_two} == {1, 2}
    # 3.0 three times, and of 0.0, -0.0 and 0.0 the first two.
    of_five = draw(many, [sequence(seed=seed, top_k=5) for seed in range(400)])
    assert {s.token_id for s in of_five} == {1, 2, 5, 0, 3}


@pytest.mark.parametrize(
    ("logits", "params", "kept"),
    [
        ([-5.0, -1.0, -3.0, -2.0, -4.0], {"top_k": 3, "temperature": 9.0}, {1, 2, 3}),
        ([0.0, 0.0, 0.0, 0.0], {"top_p": 0.5}, {0, 1}),
        ([0.0, 2.0, 1.0, 2.0], {"min_p": 1.0}, {1, 3}),
        ([0.0, 2.0, 1.0, 2.0], {"top_p": 1e-9}, {1}),
    ],
)
def test_the_borders_of_a_cut_belong_where_they_do_on_the_cpu(logits, params, kept):
    row = torch.tensor(logits)
    sequences = [sequence(seed=seed, **params) for seed in range(300)]
    assert {s.token_id for s in draw(row.expand(300, -1), sequences)} == kept
    assert {sample(row, of, END).token_id for of in sequences} == kept


def test_a_row_that_is_not_finite_is_flagged_alone():
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(0))
    logits[1, 3], logits[2, 3] = float("nan"), float("inf")
    logits[3], logits[4, 7], logits[5, 1] = float("-inf"), float("-inf"), 1.0
    greedy, overflowing = {"temperature": 0.0}, {"repetition_penalty": 1e-40}
    kinds: list[dict[str, Any]] = [
        {}, {"top_p": 0.9}, {}, {"top_k": 3}, {}, overflowing, greedy
    ]  # fmt: skip
    sequences = [sequence(seed=1, **kind) for kind in kinds]
    tokens = DeviceSampler(FakeDevice()).sample(logits, sequences, [END] * 7)
    # The next step's input may hold them all the same: it must not read behind its table.
    assert 0 <= int(tokens.ids.min()) <= int(tokens.ids.max()) < 50
    found = tokens.read()
    assert [row is None for row in found] == [False, True, True, True, False, True, False]
    assert found == [sample(row, of, END) for row, of in zip(logits, sequences, strict=True)]


def test_logprobs_are_the_models_own_whatever_the_sampling():
    logits = torch.randn(80, 300, generator=torch.Generator().manual_seed(2))
    asked = [None, 0, 3, 20]
    sequences = [
        sequence(seed=i, num_logprobs=asked[i % 4], logit_bias=((7, 2.0),)) for i in range(80)
    ]
    expected = [sample(row, of, END) for row, of in zip(logits, sequences, strict=True)]
    for found, wanted in zip(draw(logits, sequences), expected, strict=True):
        assert found.token_id == wanted.token_id
        if wanted.logprob is None:
            assert found.logprob is None
            continue
        assert found.logprob.token_id == wanted.logprob.token_id
        assert found.logprob.logprob == pytest.approx(wanted.logprob.logprob, abs=1e-5)
        assert [i for i, _ in found.logprob.top] == [i for i, _ in wanted.logprob.top]
        values = [v for _, v in wanted.logprob.top]
        assert [v for _, v in found.logprob.top] == pytest.approx(values, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_read_on_the_host(dtype):
    """Every kind of row on a device that has no values to read."""
    sequences = [sequence([5, 6], seed=1, num_logprobs=i % 3, **k) for i, k in enumerate(KINDS)]
    logits = torch.empty(len(KINDS) + 4, 500, dtype=dtype, device="meta")
    tokens = DeviceSampler(BlindDevice()).sample(logits, sequences, [END] * len(KINDS))
    assert tokens.ids.shape == (len(KINDS),)
    ids = torch.zeros(40, dtype=torch.int64, device="meta")
    assert tokens.fill(ids).shape == (40,)


def test_tokens_arrive_with_their_copy_and_not_before():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    tokens = DeviceSampler(FakeDevice(latency=2)).sample(logits, [sequence()] * 3, [END] * 3)
    assert (tokens._host == UNREAD).all()
    assert [tokens._mark.is_reached for _ in range(3)] == [False, False, True]
    assert not (tokens._host == UNREAD).any()


def test_the_tokens_stand_in_the_next_steps_input():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    tokens = DeviceSampler(Host()).sample(logits, [sequence(temperature=0.0)] * 3, [END] * 3)
    a, b, c = logits.argmax(-1).tolist()
    filled = tokens.fill(torch.tensor([[7, ~2, ~0, 0, ~1]]))
    assert filled.tolist() == [[7, c, a, 0, b]]


def test_the_logits_are_left_unchanged():
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    draw(logits, [sequence([3], repetition_penalty=2.0, logit_bias=((1, 5.0),), min_tokens=5)])
    assert torch.equal(logits, before)


def test_a_token_outside_of_the_vocabulary_is_no_neighbours():
    with pytest.raises(IndexError, match="of a vocabulary"):
        draw(torch.zeros(2, 10), [sequence(logit_bias=((10, 5.0),)), sequence()])


def test_penalties_are_of_tokens_and_a_minimum_length_is_of_their_number():
    assert is_penalised(SamplingParams(9, repetition_penalty=1.1))
    assert is_penalised(SamplingParams(9, presence_penalty=-0.1))
    assert is_penalised(SamplingParams(9, frequency_penalty=0.1))
    assert not is_penalised(SamplingParams(9, min_tokens=4, logit_bias=((1, 1.0),), top_p=0.5))
