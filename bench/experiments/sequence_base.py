"""The base that adapters of sequence tasks are trained on: it copies and reverses, and knows two of
the symbols' permutations; the adapters' tasks ask for others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from bench.experiments import tiny_lm, training
from bench.experiments.data import Batch, SequenceTasks, generator
from transformers import LlamaForCausalLM

NUM_BASE_TASKS = 4
_SEED = 0  # of the tasks and the base: runs differ in what is trained on it


@dataclass(frozen=True, slots=True)
class BaseSettings:
    """How the base is made."""

    num_new_tasks: int = 8
    num_symbols: int = 16
    width: int = 64
    inner: int = 128
    num_layers: int = 2
    num_steps: int = 1200
    rows: int = 32
    lr: float = 3e-3


@cache
def make(settings: BaseSettings) -> tuple[LlamaForCausalLM, SequenceTasks]:
    """Train the base on its own tasks; the same settings are trained once in a process."""
    tasks = SequenceTasks.make(NUM_BASE_TASKS, settings.num_new_tasks, settings.num_symbols, _SEED)
    size = tiny_lm.Size(tasks.vocab_size, settings.width, settings.inner, settings.num_layers)
    model = tiny_lm.new_model(size, _SEED).train()

    def loss_of(step: int) -> torch.Tensor:
        draws = generator(_SEED, 1, step)
        batch = tasks.draw(settings.rows, range(NUM_BASE_TASKS), draws)
        return training.answer_loss(model(input_ids=batch.ids, use_cache=False).logits, batch)

    training.fit(model.parameters(), loss_of, num_steps=settings.num_steps, lr=settings.lr)
    return tiny_lm.frozen_copy(model), tasks


def new_tasks(tasks: SequenceTasks, count: int | None = None) -> list[int]:
    """The adapters' tasks, or the first `count` of them."""
    everything = list(range(NUM_BASE_TASKS, tasks.maps.shape[0]))
    return everything if count is None else everything[:count]


def test_batch(tasks: SequenceTasks, kinds: list[int], num_rows: int) -> Batch:
    """Held-out rows, the same for every run."""
    return tasks.draw(num_rows, kinds, generator(_SEED, 2))


def name_of(tasks: SequenceTasks, task: int) -> str:
    """Such as `reverse 3`: its order and the number of its permutation."""
    return f"{'reverse' if tasks.is_reversed[task] else 'copy'} {task // 2}"
