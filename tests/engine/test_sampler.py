"""Sampling of one row: distributions, order of the steps, determinism, refusals."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from polyadapt.engine.request import RequestGroup, Sequence
from polyadapt.engine.sampler import sample, sample_rows
from polyadapt.types import Request, SamplingParams

END = (0,)


def sequence(output: list[int] | None = None, index: int = 0, **params: Any) -> Sequence:
    """A sequence with prompt [1, 2] and the given output so far."""
    request = Request("r", (1, 2), SamplingParams(max_tokens=100, **params), n=index + 1)
    made = RequestGroup.of(request, 0.0).sequences[index]
    made.token_ids += output or []
    return made


def draw_many(logits: torch.Tensor, count: int, **params: Any) -> np.ndarray:
    """Frequencies of `count` draws with seeds 0..count-1."""
    found = Counter()
    for seed in range(count):
        drawn = sample(logits, sequence(seed=seed, **params), END)
        assert drawn is not None
        found[drawn.token_id] += 1
    return np.array([found[i] for i in range(len(logits))]) / count


def assert_close(frequencies: np.ndarray, expected: np.ndarray, count: int) -> None:
    """Every frequency within five standard errors, and exactly zero where nothing is allowed."""
    error = 5 * np.sqrt(np.maximum(expected * (1 - expected), 1e-9) / count)
    assert (np.abs(frequencies - expected) <= error + 1e-12).all(), (frequencies, expected)
    assert (frequencies[expected == 0] == 0).all()


LOGITS = torch.tensor([1.0, 0.5, 2.0, -1.0, 0.0, 1.5])


@pytest.mark.parametrize(
    ("params", "mask"),
    [
        ({}, [1, 1, 1, 1, 1, 1]),
        ({"temperature": 0.5}, [1, 1, 1, 1, 1, 1]),
        ({"top_k": 2}, [0, 0, 1, 0, 0, 1]),
        ({"top_p": 0.6}, [0, 0, 1, 0, 0, 1]),
        ({"top_p": 0.8}, [1, 0, 1, 0, 0, 1]),
        ({"min_p": 0.5}, [0, 0, 1, 0, 0, 1]),
        # top_p is a part of what top_k leaves: 0.62 and 0.38.
        ({"top_k": 2, "top_p": 0.5}, [0, 0, 1, 0, 0, 0]),
    ],
)
def test_draws_follow_the_distribution(params, mask):
    count = 4000
    scaled = LOGITS / params.get("temperature", 1.0)
    expected = torch.softmax(scaled, 0).numpy() * np.array(mask)
    frequencies = draw_many(LOGITS, count, **params)
    assert_close(frequencies, expected / expected.sum(), count)


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
def test_a_large_vocabularys_nucleus_is_the_same_with_and_without_the_shortcut(top_p):
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(1)) * 2
    probs, ids = torch.softmax(logits.double(), 0).sort(descending=True)
    nucleus = set(ids[(probs.cumsum(0) - probs) < top_p].tolist())
    drawn = {sample(logits, sequence(seed=s, top_p=top_p), END).token_id for s in range(300)}
    assert drawn <= nucleus
    assert len(drawn) > 10


def test_temperature_zero_is_argmax_and_ties_take_the_first():
    drawn = sample(torch.tensor([0.0, 3.0, 3.0]), sequence(temperature=0.0), END)
    assert drawn is not None
    assert drawn.token_id == 1


def test_a_draw_depends_on_seed_index_and_position_only():
    logits = torch.zeros(1000)

    def one(**kwargs: Any) -> int:
        drawn = sample(logits, sequence(**kwargs), END)
        assert drawn is not None
        return drawn.token_id

    assert one(seed=5) == one(seed=5)
    different = {one(seed=5), one(seed=6), one(seed=5, index=1), one(seed=5, output=[7])}
    assert len(different) == 4
    assert one(seed=5, output=[7]) == one(seed=5, output=[9]), "the tokens themselves do not count"
    assert one(seed=2**63 - 1) != one(seed=2**63 - 2)


def test_penalties_and_bias_change_the_scores_as_defined():
    logits = torch.tensor([0.0, 2.0, -2.0, 1.0, 1.0])

    def greedy(**params: Any) -> int:
        drawn = sample(logits, sequence(temperature=0.0, **params), END)
        assert drawn is not None
        return drawn.token_id

    assert greedy() == 1
    assert greedy(repetition_penalty=2.5) == 3, "2/2.5 < 1: a token of the prompt counts as seen"
    assert greedy(presence_penalty=1.5) == 1, "the prompt does not count for presence"
    assert greedy(output=[1], presence_penalty=1.5) == 3
    assert greedy(output=[1], frequency_penalty=0.6) == 1
    assert greedy(output=[1, 1], frequency_penalty=0.6) == 3
    assert greedy(logit_bias=((4, 1.5),)) == 4
    assert greedy(logit_bias=((1, -100.0),)) == 3


def test_end_tokens_are_forbidden_until_min_tokens():
    logits = torch.tensor([5.0, 1.0, 0.0])
    early = sample(logits, sequence([1], temperature=0.0, min_tokens=2), END)
    late = sample(logits, sequence([1, 1], temperature=0.0, min_tokens=2), END)
    assert early is not None
    assert late is not None
    assert (early.token_id, late.token_id) == (1, 0)


def test_logprobs_are_the_models_own_whatever_the_sampling():
    drawn = sample(LOGITS, sequence(temperature=0.0, num_logprobs=3, logit_bias=((3, 100.0),)), END)
    assert drawn is not None
    expected = torch.log_softmax(LOGITS, 0)
    assert drawn.token_id == 3
    assert drawn.logprob is not None
    assert drawn.logprob.logprob == pytest.approx(float(expected[3]))
    assert [i for i, _ in drawn.logprob.top] == [2, 5, 0]
    assert [v for _, v in drawn.logprob.top] == pytest.approx(expected[[2, 5, 0]].tolist())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_logits_give_no_token(bad):
    assert sample(torch.tensor([0.0, bad, 1.0]), sequence(), END) is None
    assert sample(torch.full((3,), float("-inf")), sequence(), END) is None


def test_the_logits_are_left_unchanged():
    logits = LOGITS.clone()
    sample(logits, sequence([3], repetition_penalty=2.0, logit_bias=((1, 5.0),), min_tokens=5), END)
    assert torch.equal(logits, LOGITS)


@pytest.mark.parametrize("cut", [{}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 3}])
@pytest.mark.parametrize("temperature", [1e-40, 1e-6, 1e-4])
def test_a_tiny_temperature_is_greedy_and_never_an_error(temperature, cut):
    logits = torch.tensor([1.0, 30.0, 29.0, -50.0])
    drawn = sample(logits, sequence(seed=3, temperature=temperature, **cut), END)
    assert drawn is not None
    assert drawn.token_id == 1


def test_a_penalty_that_overflows_gives_no_token():
    drawn = sample(torch.tensor([1.0, 2.0, 3.0]), sequence(repetition_penalty=1e-40), END)
    assert drawn is None


def slow_draw(logits: torch.Tensor, drawn: Sequence) -> int:
    """The definition, over the whole vocabulary sorted, in float64."""
    params = drawn.group.request.sampling
    scores = logits.float().numpy()
    if params.temperature == 0.0:
        return int(scores.argmax())
    scaled = (scores - scores.max()) / np.float32(params.temperature)
    probs = np.exp(scaled).astype(np.float64)
    cut = 0 < params.top_k < len(probs) or params.top_p < 1.0 or params.min_p > 0.0
    ids = np.argsort(-probs, kind="stable") if cut else np.arange(len(probs))
    probs = probs[ids]
    if params.top_k:
        probs[params.top_k :] = 0.0
    probs = probs / probs.sum()
    if params.top_p < 1.0:
        probs[np.cumsum(probs) - probs >= params.top_p] = 0.0
    if params.min_p > 0.0:
        probs[probs < params.min_p * probs[0]] = 0.0
    key = np.array([params.seed, drawn.index], np.uint64)
    counter = np.array([drawn.num_output, 0, 0, 0], np.uint64)
    uniform = np.random.Generator(np.random.Philox(key=key, counter=counter)).random()
    cumulative = np.cumsum(probs)
    return int(ids[np.searchsorted(cumulative, uniform * cumulative[-1], side="right")])


KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.3},
    {"top_p": 0.9},
    {"top_p": 0.2, "min_p": 0.01},
    {"top_k": 40},
    {"top_k": 700, "top_p": 0.95, "temperature": 0.7},
    {"min_p": 0.05, "temperature": 2.0},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_vocab", [5, 256, 1000, 4097])
def test_rows_drawn_together_are_what_each_is_alone_and_by_definition(dtype, num_vocab):
    num = 8 * len(KINDS) + 3  # more than are widened at a time, and a rest
    generator = torch.Generator().manual_seed(num_vocab)
    logits = (torch.randn(num, num_vocab, generator=generator) * 3).to(dtype)
    logits[:, 1] = float("-inf")
    sequences = [sequence([7] * (i % 3), seed=i, **KINDS[i % len(KINDS)]) for i in range(num)]
    together = sample_rows(logits, sequences)
    alone = [sample(row, s, END) for row, s in zip(logits, sequences, strict=True)]
    assert together == alone
    slow = [slow_draw(row, s) for row, s in zip(logits, sequences, strict=True)]
    assert [drawn.token_id for drawn in alone] == slow


def test_a_row_that_is_not_plain_is_left_to_be_drawn_alone():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    logits[1, 3], logits[2, 3] = float("nan"), float("inf")
    logits[5] = float("-inf")
    sequences = [
        sequence(temperature=0.0),
        sequence(temperature=0.0),
        sequence(),
        sequence(num_logprobs=0),
        sequence([1], frequency_penalty=1.0),
        sequence(),
    ]
    drawn = sample_rows(logits, sequences)
    assert [row is None for row in drawn] == [False, True, True, True, True, True]


def test_ties_at_the_last_place_of_top_k_take_the_first():
    logits = torch.tensor([1.0, 5.0, 3.0, 3.0, 3.0, 0.0])
    found = {sample(logits, sequence(seed=s, top_k=2), END).token_id for s in range(200)}
    assert found == {1, 2}
