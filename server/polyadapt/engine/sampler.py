"""Choose the next token of each sequence. A row's choice depends on its own logits, tokens and
seed only.

Randomness is counter-based: token i of sequence j is a pure function of (seed, j, i), so that
neither the batch nor a preemption changes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from polyadapt.engine.request import Sequence
from polyadapt.engine.text_marks import RowMark, row_marks
from polyadapt.types import SamplingParams, TokenLogprob

# Below this a draw is the argmax in float32 whatever the logits.
GREEDY_BELOW = 1e-5
# Rows that are widened to float32 at a time: they shall still be in the cache when they are read.
_ROWS_AT_ONCE = 8
# Tokens less likely than this part of the likeliest are looked at when the others do not suffice.
_FIRST_FLOOR = 1e-3
# Entries of a distribution that are summed first, to find the one block that is looked through.
_BLOCK = 256


@dataclass(frozen=True, slots=True)
class Sampled:
    """One sequence's next token; logprob only when it was asked for."""

    token_id: int
    logprob: TokenLogprob | None


@torch.inference_mode()
def sample(
    logits: torch.Tensor, sequence: Sequence, end_token_ids: tuple[int, ...]
) -> Sampled | None:
    """Return the next token, or None when the logits are not finite (NaN, +inf, or nothing finite).

    logits [vocabulary] of any float dtype, left unchanged. end_token_ids are forbidden until
    min_tokens is reached. Order: penalties, logit_bias, min_tokens, a text mark that raises scores,
    temperature, top_k, top_p, min_p, a text mark that reshapes what is left.
    """
    params = sequence.group.request.sampling
    scores = logits.float()
    row = scores.cpu().numpy()
    best = _best(row)
    if best is None:
        return None
    if _is_adjusted(params, sequence):
        row = _adjust(scores.clone(), params, sequence, end_token_ids).cpu().numpy()
        best = _best(row)
        if best is None:
            return None
    (mark,) = row_marks([sequence], len(row))
    token_id = _choose(row, best, params, sequence, mark)
    logprob = None
    if params.num_logprobs is not None:
        logprob = score(logits, token_id, params.num_logprobs)
    return Sampled(token_id, logprob)


@torch.inference_mode()
def sample_rows(logits: torch.Tensor, sequences: Seq[Sequence]) -> list[Sampled | None]:
    """Return for each sequence what `sample` returns of its row, or None where `sample` must tell.

    logits [sequences, vocabulary]. None stands for logits that are not finite and for sequences
    with penalties, bias, a minimum length or logprobs.
    """
    found: list[Sampled | None] = []
    marks = row_marks(sequences, logits.shape[1])
    for rows in torch.split(logits, _ROWS_AT_ONCE):
        table = rows.float().cpu().numpy()
        bests = table.argmax(axis=1).tolist()
        for row, best in zip(table, bests, strict=True):
            sequence = sequences[len(found)]
            params = sequence.group.request.sampling
            is_plain = params.num_logprobs is None and not _is_adjusted(params, sequence)
            if is_plain and np.isfinite(row[best]):
                mark = marks[len(found)]
                found.append(Sampled(_choose(row, best, params, sequence, mark), None))
            else:
                found.append(None)
    return found


@torch.inference_mode()
def score(logits: torch.Tensor, token_id: int, num_top: int) -> TokenLogprob:
    """Natural log-probability of the token under the model's own distribution, and the
    likeliest; no penalty, cut or mark is in it.
    """
    logprobs = torch.log_softmax(logits.float(), -1)
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        values, ids = logprobs.topk(num_top)
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token_id, float(logprobs[token_id]), top)


def _best(row: np.ndarray) -> int | None:
    """The first of the largest entries; None unless it is finite. NaN counts as the largest."""
    best = int(row.argmax())
    return best if np.isfinite(row[best]) else None


def _choose(
    row: np.ndarray, best: int, params: SamplingParams, sequence: Sequence, mark: RowMark | None
) -> int:
    if mark is not None and mark.raising is not None:
        row = mark.raise_scores(row, best, params)
        best = int(row.argmax())
    if params.temperature < GREEDY_BELOW:
        return best
    return _draw(row, best, params, _uniform(params.seed, sequence), mark)


def _is_adjusted(params: SamplingParams, sequence: Sequence) -> bool:
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
        or bool(params.logit_bias)
        or sequence.num_output < params.min_tokens
    )


def _adjust(
    scores: torch.Tensor,
    params: SamplingParams,
    sequence: Sequence,
    end_token_ids: tuple[int, ...],
) -> torch.Tensor:
    """Apply penalties, bias and the minimum length in place.

    repetition_penalty (arXiv 1909.05858, over prompt and output): a positive score is divided, a
    negative one multiplied. presence and frequency (OpenAI, over the output): score - presence -
    frequency*count.
    """
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(sequence.token_ids)), device=scores.device)
        values = scores[seen]
        penalty = params.repetition_penalty
        scores[seen] = torch.where(values > 0, values / penalty, values * penalty)
    counts = Counter(sequence.token_ids[sequence.num_prompt :])
    if counts and (params.presence_penalty or params.frequency_penalty):
        ids = torch.tensor(list(counts), device=scores.device)
        times = torch.tensor(list(counts.values()), dtype=torch.float32, device=scores.device)
        scores[ids] -= params.presence_penalty + params.frequency_penalty * times
    if params.logit_bias:
        ids = torch.tensor([i for i, _ in params.logit_bias], device=scores.device)
        scores[ids] += torch.tensor([b for _, b in params.logit_bias], device=scores.device)
    if sequence.num_output < params.min_tokens and end_token_ids:
        scores[list(end_token_ids)] = float("-inf")
    return scores


def _draw(
    row: np.ndarray, best: int, params: SamplingParams, uniform: float, mark: RowMark | None
) -> int:
    """Draw by inverting the distribution function, over the kept tokens in a fixed order.

    row float32 [vocabulary], of which `best` is a largest entry and finite.
    """
    num_vocab = len(row)
    ids: np.ndarray | None = None  # None: all of them
    if 0 < params.top_k < num_vocab:
        ids = _largest(row, params.top_k)
        row, best = row[ids], 0
    # Shifted first: divided by a small temperature, a large score would overflow. What is far
    # below the largest may, to minus infinity, whose weight is 0.
    with np.errstate(over="ignore"):
        weights = np.exp((row - row[best]) / np.float32(params.temperature))
    if params.top_p >= 1.0 and params.min_p <= 0.0:
        if mark is not None:
            weights = mark.reshape(weights, ids)
        found = _invert(weights, uniform)
        return found if ids is None else int(ids[found])
    total = float(weights.sum(dtype=np.float64))
    if ids is None:
        ids = _likeliest(weights, total, params)
        weights = weights[ids]
    probs = weights.astype(np.float64) / total
    if params.top_p < 1.0:
        # Keep the smallest set whose mass reaches top_p: whoever starts below it.
        below = np.cumsum(probs) - probs
        probs = np.where(below < params.top_p, probs, 0.0)
    if params.min_p > 0.0:
        probs = np.where(probs >= params.min_p * probs[0], probs, 0.0)
    if mark is not None:
        probs = mark.reshape(probs, ids)
    return int(ids[_invert(probs, uniform)])


def _likeliest(weights: np.ndarray, total: float, params: SamplingParams) -> np.ndarray:
    """Indices in falling order of their weights: as many as top_p and min_p can reach, or more.

    The largest weight is 1. Of equal ones the first comes first.
    """
    # Most distributions keep a few hundred tokens above the first floor. Below the second one all
    # have together half of what top_p leaves out.
    rest = (1.0 - params.top_p) * total / (2 * len(weights)) if params.top_p < 1.0 else 0.0
    ids = np.flatnonzero(weights >= np.float32(max(_FIRST_FLOOR, params.min_p)))
    is_reached = params.top_p < 1.0 and weights[ids].sum(dtype=np.float64) > params.top_p * total
    if not is_reached and params.min_p < _FIRST_FLOOR and rest < _FIRST_FLOOR:
        ids = np.flatnonzero(weights >= np.float32(max(rest, params.min_p)))
    return ids[np.argsort(-weights[ids], kind="stable")]


def _largest(row: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest entries in falling order; of equal ones the first."""
    least = np.partition(row, len(row) - count)[len(row) - count]
    ids = np.flatnonzero(row >= least)
    return ids[np.argsort(-row[ids], kind="stable")][:count]


def _invert(weights: np.ndarray, uniform: float) -> int:
    """Index of the first entry at which the cumulative sum exceeds uniform * total; never an entry
    of mass 0.

    The sums are float64: of blocks first, then of the one block in which the entry lies.
    """
    starts = np.arange(0, len(weights), _BLOCK)
    sums = np.add.reduceat(weights, starts, dtype=np.float64)
    ends = np.cumsum(sums)
    target = uniform * ends[-1]
    block = min(int(np.searchsorted(ends, target, side="right")), len(ends) - 1)
    while sums[block] == 0.0:  # the product rounded up to the total
        block -= 1
    inside = weights[starts[block] : starts[block] + _BLOCK]
    cumulative = np.cumsum(inside, dtype=np.float64)
    before = ends[block - 1] if block else 0.0
    found = int(np.searchsorted(cumulative, target - before, side="right"))
    if found >= len(inside):  # the same block's two sums may differ in the last bit
        found = int(np.flatnonzero(inside)[-1])
    return int(starts[block]) + found


def _uniform(seed: int, sequence: Sequence) -> float:
    """A number in [0, 1) from Philox4x64-10 keyed by (seed, sequence index) at counter
    num_output.
    """
    key = np.array([seed & (2**64 - 1), sequence.index], dtype=np.uint64)
    counter = np.array([sequence.num_output, 0, 0, 0], dtype=np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key, counter=counter)).random())
