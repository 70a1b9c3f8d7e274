"""One optimiser loop and one way to score for every experiment. Knows no adapter, no server."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from bench.experiments.data import Batch
from torch import nn


@dataclass(frozen=True, slots=True)
class Score:
    """Of answer tokens: mean negative log-probability in nats, and the share predicted first."""

    loss: float
    accuracy: float


def fit(
    parameters: Iterable[nn.Parameter],
    loss_of: Callable[[int], torch.Tensor],
    *,
    num_steps: int,
    lr: float,
    after_step: Callable[[], None] | None = None,
) -> list[float]:
    """Minimise loss_of(step); return the mean loss of every twentieth of the steps.

    AdamW without decay, gradient norm at most 1, 5 % warm-up, then a cosine to a tenth of lr.
    """
    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    losses = []
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * _factor(step, num_steps)
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if after_step is not None:
            after_step()
    size = max(num_steps // 20, 1)
    parts = [losses[i : i + size] for i in range(0, num_steps, size)]
    return [round(sum(part) / len(part), 4) for part in parts]


def answer_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy of the answer tokens; logits [rows, length, vocabulary]."""
    is_answer = batch.is_answer[:, 1:]
    return F.cross_entropy(logits[:, :-1][is_answer], batch.ids[:, 1:][is_answer])


@torch.no_grad()
def log_probabilities(model: Callable[..., object], batch: Batch) -> torch.Tensor:
    """float32 [rows, length - 1, vocabulary]: of token i + 1 at i; `model` is transformers'."""
    logits = model(input_ids=batch.ids, use_cache=False).logits
    return torch.log_softmax(logits[:, :-1].float(), -1)


def score(table: torch.Tensor, batch: Batch, rows: torch.Tensor | None = None) -> Score:
    """Score log-probabilities [rows, length - 1, vocabulary] on these rows (bool), None: on all."""
    is_answer = batch.is_answer[:, 1:]
    if rows is not None:
        is_answer = is_answer & rows[:, None]
    wanted = batch.ids[:, 1:][is_answer]
    given = table[is_answer]
    loss = -given.gather(1, wanted[:, None]).mean()
    accuracy = (given.argmax(-1) == wanted).float().mean()
    return Score(float(loss), float(accuracy))


def _factor(step: int, num_steps: int) -> float:
    warm_up = max(num_steps // 20, 1)
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(num_steps - warm_up, 1)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))
