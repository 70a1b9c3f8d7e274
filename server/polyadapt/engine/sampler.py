"""Choose the next token of each sequence. A row's choice depends on its own logits, tokens and
seed only.

Randomness is counter-based: token i of sequence j is a pure function of (seed, j, i), so that
neither the batch nor a preemption changes it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from polyadapt.engine.request import Sequence
from polyadapt.types import SamplingParams, TokenLogprob

# The likeliest tokens among which top-p is looked for before the whole vocabulary is sorted.
_NUCLEUS_GUESS = 512
# Below this a draw is the argmax in float32 whatever the logits.
_GREEDY_BELOW = 1e-5


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
    min_tokens is reached. Order: penalties, logit_bias, min_tokens, temperature, top_k, top_p,
    min_p.
    """
    params = sequence.group.request.sampling
    scores = logits.float()
    if not bool(torch.isfinite(scores.max())):  # max propagates NaN
        return None
    if _is_adjusted(params, sequence):
        scores = _adjust(scores.clone(), params, sequence, end_token_ids)
        if not bool(torch.isfinite(scores.max())):
            return None
    if params.temperature < _GREEDY_BELOW:
        token_id = int(scores.argmax())
    else:
        # Shifted first: divided by a small temperature, a large score would overflow.
        scaled = (scores - scores.max()) / params.temperature
        token_id = _draw(scaled, params, _uniform(params.seed, sequence))
    logprob = None
    if params.num_logprobs is not None:
        logprob = score(logits, token_id, params.num_logprobs)
    return Sampled(token_id, logprob)


@torch.inference_mode()
def score(logits: torch.Tensor, token_id: int, num_top: int) -> TokenLogprob:
    """Natural log-probability of the token under the model's own distribution, and the
    likeliest.
    """
    logprobs = torch.log_softmax(logits.float(), -1)
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        values, ids = logprobs.topk(num_top)
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token_id, float(logprobs[token_id]), top)


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


def _draw(scores: torch.Tensor, params: SamplingParams, uniform: float) -> int:
    """Draw by inverting the distribution function, over the kept tokens in a fixed order."""
    num_vocab = scores.shape[0]
    is_cut = 0 < params.top_k < num_vocab
    if not is_cut and params.top_p >= 1.0 and params.min_p <= 0.0:
        return _invert(torch.softmax(scores, -1).double(), uniform)
    if is_cut:
        kept, ids = scores.topk(params.top_k)
        probs = torch.softmax(kept, -1).double()
    else:
        probs, ids = _likeliest(torch.softmax(scores, -1).double(), params)
    if params.top_p < 1.0:
        # Keep the smallest set whose mass reaches top_p: whoever starts below it.
        below = torch.cumsum(probs, 0) - probs
        probs = torch.where(below < params.top_p, probs, 0.0)
    if params.min_p > 0.0:
        probs = torch.where(probs >= params.min_p * probs[0], probs, 0.0)
    return int(ids[_invert(probs, uniform)])


def _likeliest(probs: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities in falling order with their ids: as many as top_p or min_p can reach."""
    num_vocab = probs.shape[0]
    if num_vocab > _NUCLEUS_GUESS:
        values, ids = probs.topk(_NUCLEUS_GUESS)
        is_enough = params.top_p < 1.0 and float(values.sum()) >= params.top_p
        if is_enough or (params.min_p > 0.0 and float(values[-1] / values[0]) < params.min_p):
            return values, ids
    return probs.sort(descending=True)


def _invert(probs: torch.Tensor, uniform: float) -> int:
    """Index of the first entry at which the cumulative sum exceeds uniform * total; never an entry
    of mass 0.
    """
    cumulative = torch.cumsum(probs, 0)
    found = int(torch.searchsorted(cumulative, uniform * float(cumulative[-1]), right=True))
    if found >= probs.shape[0]:  # the product rounded up to the total
        found = int(probs.nonzero()[-1])
    return found


def _uniform(seed: int, sequence: Sequence) -> float:
    """A number in [0, 1) from Philox4x64-10 keyed by (seed, sequence index) at counter
    num_output.
    """
    key = np.array([seed & (2**64 - 1), sequence.index], dtype=np.uint64)
    counter = np.array([sequence.num_output, 0, 0, 0], dtype=np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key, counter=counter)).random())
