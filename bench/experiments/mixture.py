"""MixLoRA beside LoRA with as many parameters, over the number of tasks in the mixture.

One base; 2 or 8 new tasks at once (a permutation of the symbols each, half of them reversed).
Both arms adapt all linears with scale 2 and have the same LoRA of rank 4 on the attention:

- `mixlora`: 8 experts of rank 2 and a router in each MLP, top 2, with the balance loss times 0.01;
- `lora`: plain LoRA on the MLP's linears, of the smallest rank with no fewer parameters;
- `lora, rank of two experts`: a LoRA of rank 4 there, which is what a token of MixLoRA computes.

Steps, data and seeds are the same; each arm has its own best learning rate (see learning_rates).
Measured on held-out rows of all tasks: the loss of the answer tokens and the share that is right,
mean of the seeds; and which experts the router picks for which task.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from bench.experiments import report, sequence_base, tiny_lm, training
from bench.experiments.data import Batch, SequenceTasks, generator
from bench.experiments.methods import attach, lora, mixlora
from bench.experiments.report import Claim, Outcome
from bench.experiments.sequence_base import BaseSettings
from bench.experiments.served import Adapters, Comparison, Served, compare, parity
from transformers import LlamaForCausalLM

from bench import plots

NAME = "mixture"
_MIXLORA, _LORA, _SMALL = "mixlora", "lora", "lora, rank of two experts"
_BALANCE = 0.01  # times the balance loss, MoE-PEFT's router_aux_loss_coef
Scores = dict[str, dict[int, list[training.Score]]]  # arm -> number of tasks -> by seed

_BASE = BaseSettings()


@dataclass(frozen=True, slots=True)
class Settings:
    """One run."""

    base: BaseSettings = _BASE
    seeds: tuple[int, ...] = (1, 2)
    task_counts: tuple[int, ...] = (2, 8)
    num_experts: int = 8
    top_k: int = 2
    expert_rank: int = 2
    attention_rank: int = 4
    scale: float = 2.0
    num_steps: int = 300
    rows: int = 32
    test_rows: int = 512
    lrs: Mapping[str, float] = field(
        default_factory=lambda: {_MIXLORA: 1e-2, _LORA: 3e-3, _SMALL: 3e-3}
    )


FULL = Settings()
QUICK = Settings(
    base=BaseSettings(num_new_tasks=2, num_steps=30), seeds=(0,), task_counts=(2,), num_experts=3,
    num_steps=5, test_rows=8,
)  # fmt: skip


def run(settings: Settings, scratch: Path) -> Outcome:
    """Train every arm on every mixture."""
    base, tasks = sequence_base.make(settings.base)
    lora_rank = equal_rank(settings)
    ranks = {_LORA: lora_rank, _SMALL: settings.top_k * settings.expert_rank}
    scores: Scores = {_MIXLORA: {}, **{name: {} for name in ranks}}
    counts: dict[str, int] = {}
    load: dict[str, list[float]] = {}
    served: dict[str, Comparison] = {}
    for count in settings.task_counts:
        kinds = sequence_base.new_tasks(tasks, count)
        held_out = sequence_base.test_batch(tasks, kinds, settings.test_rows)
        for seed in settings.seeds:
            model, mlps, attention = train_mixlora(base, tasks, kinds, settings, seed)
            table = training.log_probabilities(model, held_out)
            scores[_MIXLORA].setdefault(count, []).append(training.score(table, held_out))
            counts[_MIXLORA] = attach.num_parameters(model)
            is_served = seed == settings.seeds[0] and count == max(settings.task_counts)
            written: dict[str, tuple[Path, LlamaForCausalLM]] = {}
            if is_served:
                load = _load(mlps, held_out, tasks)
                directory = mixlora.write(scratch / "mixlora", mlps, attention)
                written[_MIXLORA] = directory, model
            for name, rank in ranks.items():
                model, modules = train_lora(
                    base, tasks, kinds, settings, seed, rank, settings.lrs[name]
                )
                if is_served:
                    written[name] = _write_lora(scratch / name, modules), model
                table = training.log_probabilities(model, held_out)
                scores[name].setdefault(count, []).append(training.score(table, held_out))
                counts[name] = attach.num_parameters(model)
            if is_served:
                served = _serve(base, written, held_out, scratch)
            print(f"{count} tasks, seed {seed} done", file=sys.stderr, flush=True)
    return Outcome(
        title="MixLoRA beside LoRA at equal parameters",
        claims=[*_claims(scores, settings, counts), parity(served)],
        tables=[_table(scores, counts)],
        charts={
            f"{NAME}.svg": plots.line_chart(
                "Held-out loss over the number of tasks in the mixture",
                "tasks (logarithmic)",
                "loss of an answer token, nats",
                {n: [(c, _mean(s, "loss")) for c, s in own.items()] for n, own in scores.items()},
            ),
            f"{NAME}-experts.svg": plots.heat_map(
                f"Last layer's experts, {max(settings.task_counts)} tasks: share of a task's picks",
                "expert",
                "",
                [str(e) for e in range(settings.num_experts)],
                load,
            ),
        },
        settings=settings,
        figures={
            "equal rank": lora_rank,
            "parameters": counts,
            "scores": {
                name: {count: [[s.loss, s.accuracy] for s in own] for count, own in by.items()}
                for name, by in scores.items()
            },
            "load": load,
            "served": {name: asdict(own) for name, own in served.items()},
        },
    )


def equal_rank(settings: Settings) -> int:
    """The smallest rank at which LoRA on the MLP has no fewer parameters than the experts and
    router.
    """
    width, inner = settings.base.width, settings.base.inner
    per_rank = 3 * (width + inner)
    experts = settings.num_experts * (settings.expert_rank * per_rank + width)
    return math.ceil(experts / per_rank)


def train_mixlora(
    base: LlamaForCausalLM, tasks: SequenceTasks, kinds: list[int], settings: Settings, seed: int
) -> tuple[LlamaForCausalLM, dict[str, mixlora.MixMlp], dict[str, lora.LowRank]]:
    """The adapted model, its MLPs and its attention's LoRA."""
    model = tiny_lm.frozen_copy(base)
    mlps, attention = mixlora.add_mixlora(
        model,
        num_experts=settings.num_experts,
        top_k=settings.top_k,
        expert_rank=settings.expert_rank,
        attention_rank=settings.attention_rank,
        scale=settings.scale,
        draws=generator(seed, 3),
    )
    _train(model, tasks, kinds, settings, seed, settings.lrs[_MIXLORA], mlps)
    return model, mlps, attention


def train_lora(
    base: LlamaForCausalLM,
    tasks: SequenceTasks,
    kinds: list[int],
    settings: Settings,
    seed: int,
    rank: int,
    lr: float,
) -> tuple[LlamaForCausalLM, dict[str, lora.LowRank]]:
    """The model with LoRA of this rank on the MLP's linears, and all its LoRA."""
    model = tiny_lm.frozen_copy(base)
    draws, own = generator(seed, 3), settings.attention_rank
    attention = lora.add_lora(model, tiny_lm.ATTENTION, own, settings.scale * own, draws)
    mlp = lora.add_lora(model, tiny_lm.FEED_FORWARD, rank, settings.scale * rank, draws)
    _train(model, tasks, kinds, settings, seed, lr, {})
    return model, attention | mlp


def _write_lora(directory: Path, modules: Mapping[str, lora.LowRank]) -> Path:
    """In PEFT's form, with the attention's own rank in its patterns."""
    own = {path: module for path, module in modules.items() if ".self_attn." in path}
    ranks = {path: module.rank for path, module in own.items()}
    alphas = {path: module.alpha for path, module in own.items()}
    first = {path: module for path, module in modules.items() if path not in own}
    return lora.write(directory, first | own, rank_pattern=ranks, alpha_pattern=alphas)


def _serve(
    base: LlamaForCausalLM,
    written: Mapping[str, tuple[Path, LlamaForCausalLM]],
    batch: Batch,
    scratch: Path,
) -> dict[str, Comparison]:
    """The base and every arm in one mixed batch, on a part of the rows."""
    batch = Batch(*(tensor[:64] for tensor in (batch.ids, batch.is_answer, batch.kinds)))
    arms: dict[str, tuple[Adapters, torch.Tensor]] = {
        "base": ((), training.log_probabilities(base, batch))
    }
    with Served(tiny_lm.save(base, scratch / "base"), scratch) as served:
        for name, (directory, model) in written.items():
            arms[name] = ((served.add(directory),), training.log_probabilities(model, batch))
        return compare(served, batch, arms)


def _train(
    model: LlamaForCausalLM,
    tasks: SequenceTasks,
    kinds: list[int],
    settings: Settings,
    seed: int,
    lr: float,
    mlps: Mapping[str, mixlora.MixMlp],
) -> None:
    def loss_of(step: int) -> torch.Tensor:
        batch = tasks.draw(settings.rows, kinds, generator(seed, 5, step))
        logits = model(input_ids=batch.ids, use_cache=False).logits
        loss = training.answer_loss(logits, batch)
        for mlp in mlps.values():
            loss = loss + _BALANCE * mlp.balance_loss
        return loss

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training.fit(trained, loss_of, num_steps=settings.num_steps, lr=lr)


def _load(
    mlps: Mapping[str, mixlora.MixMlp], batch: Batch, tasks: SequenceTasks
) -> dict[str, list[float]]:
    """Task -> the share of its answers' picks that each expert of the last layer got."""
    picked = list(mlps.values())[-1].picked
    assert picked is not None, "a forward comes first"
    found = {}
    for task in batch.kinds.unique().tolist():
        is_used = batch.of_kind(task)[:, None] & batch.is_answer.roll(-1, 1)
        own = picked[is_used].float().sum(0)
        found[sequence_base.name_of(tasks, task)] = (own / own.sum()).tolist()
    return found


def _mean(scores: list[training.Score], what: str) -> float:
    return float(sum(getattr(score, what) for score in scores) / len(scores))


def _claims(scores: Scores, settings: Settings, counts: Mapping[str, int]) -> list[Claim]:
    most = max(settings.task_counts)
    mix, plain = scores[_MIXLORA][most], scores[_LORA][most]
    gains = [b.loss - a.loss for a, b in zip(mix, plain, strict=True)]
    by_count = {
        count: _mean(scores[_LORA][count], "loss") - _mean(scores[_MIXLORA][count], "loss")
        for count in settings.task_counts
    }
    points = 100 * (_mean(mix, "accuracy") - _mean(plain, "accuracy"))
    claims = [
        Claim(
            f"with {most} tasks MixLoRA's loss is lower than LoRA's at equal parameters, for every "
            "seed",
            f"by {', '.join(f'{gain:.3f}' for gain in gains)} nats; accuracy {points:+.1f} points; "
            f"{counts[_MIXLORA]} and {counts[_LORA]} parameters",
            min(gains) > 0,
        ),
        Claim(
            f"with {most} tasks it is better than a LoRA that computes as much per token",
            f"loss {_mean(mix, 'loss'):.3f} and {_mean(scores[_SMALL][most], 'loss'):.3f}",
            _mean(mix, "loss") < _mean(scores[_SMALL][most], "loss"),
        ),
    ]
    if len(by_count) > 1:
        rising = list(by_count.values()) == sorted(by_count.values()) and by_count[most] > 0
        shown = ", ".join(f"{count} tasks: {gain:+.3f}" for count, gain in by_count.items())
        claims.append(Claim("the more tasks, the larger the gain", shown, rising))
    return claims


def _table(scores: Scores, counts: Mapping[str, int]) -> str:
    rows: list[list[Any]] = []
    for name, by_count in scores.items():
        for count, own in by_count.items():
            rows.append(
                [
                    name,
                    counts[name],
                    count,
                    _mean(own, "loss"),
                    _mean(own, "accuracy"),
                    ", ".join(f"{score.loss:.3f}" for score in own),
                ]
            )
    head = ["", "parameters", "tasks", "loss", "accuracy", "loss by seed"]
    return report.table(head, rows)


if __name__ == "__main__":
    report.main(sys.modules[__name__])
