"""Which of SMoRA's ranks are used, and by which task.

One base and 8 new tasks at once. SMoRA has 32 components at every linear, of which a router of the
linear's own picks 4 per token, with alpha 8; it is trained with the balancing bias (a step of 1e-3
against the load; the paper's 1e-5 is for many more steps) and without. Beside it LoRA of rank 4
(as many components per token) and 32 (as many stored), with scale 2. Each arm has its own best
learning rate (see learning_rates).

Measured at the positions that predict answers, on held-out rows:
- the entropy of how often each component is picked, over all tasks, divided by log 32: 1 is even
  use, and 4 of 32 alone would be 0.4;
- the mutual information of component and task in bits, mean of the modules, beside the same with
  the rows' tasks shuffled, which is what chance gives;
- the share of answer tokens that are right and their loss.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from bench.experiments import report, sequence_base, tiny_lm, training
from bench.experiments.data import Batch, SequenceTasks, generator
from bench.experiments.methods import lora, smora
from bench.experiments.report import Claim, Outcome
from bench.experiments.sequence_base import BaseSettings
from bench.experiments.served import Adapters, Comparison, Served, compare, parity
from transformers import LlamaForCausalLM

from bench import plots

NAME = "rank_usage"
_BALANCED, _UNBALANCED = "smora", "smora, no bias"

_BASE = BaseSettings()


@dataclass(frozen=True, slots=True)
class Settings:
    """One run."""

    base: BaseSettings = _BASE
    seeds: tuple[int, ...] = (1, 2)
    rank: int = 32
    num_active: int = 4
    alpha: float = 8.0
    bias_step: float = 1e-3
    num_steps: int = 300
    rows: int = 32
    test_rows: int = 512
    lr: float = 1e-2
    small_lora_lr: float = 3e-3
    lora_lr: float = 1e-3


FULL = Settings()
QUICK = Settings(
    base=BaseSettings(num_new_tasks=2, num_steps=30), seeds=(0,), rank=8, num_active=2, alpha=4.0,
    num_steps=5, test_rows=8,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Usage:
    """Of one trained SMoRA: means over the modules, and one module's table."""

    entropy: float  # of 0 to 1
    smallest_entropy: float  # of any module
    information: float  # bits
    by_chance: float  # bits
    by_task: dict[str, list[float]]  # of the last up_proj: task -> share of the picks by component


def run(settings: Settings, scratch: Path) -> Outcome:
    """Train everything, count picks."""
    base, tasks = sequence_base.make(settings.base)
    kinds = sequence_base.new_tasks(tasks)
    held_out = sequence_base.test_batch(tasks, kinds, settings.test_rows)
    scores: dict[str, list[training.Score]] = {}
    served: dict[str, Comparison] = {}
    picks_difference = 0.0
    usages: dict[str, list[Usage]] = {_BALANCED: [], _UNBALANCED: []}
    for seed in settings.seeds:
        for name, step in ((_BALANCED, settings.bias_step), (_UNBALANCED, 0.0)):
            model, modules = train_smora(base, tasks, kinds, settings, seed, step)
            table = training.log_probabilities(model, held_out)
            scores.setdefault(name, []).append(training.score(table, held_out))
            usages[name].append(_usage(modules, held_out, tasks))
            if name == _BALANCED and seed == settings.seeds[0]:
                part = Batch(*(t[:64] for t in (held_out.ids, held_out.is_answer, held_out.kinds)))
                served, picks_difference = _serve(base, model, modules, part, scratch)
        for rank, lr in (
            (settings.num_active, settings.small_lora_lr),
            (settings.rank, settings.lora_lr),
        ):
            model = train_lora(base, tasks, kinds, settings, seed, rank, lr)
            table = training.log_probabilities(model, held_out)
            scores.setdefault(f"lora of rank {rank}", []).append(training.score(table, held_out))
        print(f"seed {seed} done", file=sys.stderr, flush=True)
    return Outcome(
        title="Which of SMoRA's ranks are used",
        claims=[
            *_claims(usages, scores, settings),
            Claim(
                "the engine, asked as `inspect --routing` asks it, picks as the training code does:"
                " every component's share of a module's picks equal to 1e-3",
                f"{picks_difference:.1e}",
                picks_difference <= 1e-3,
            ),
            parity(served),
        ],
        tables=[_usage_table(usages), _score_table(scores)],
        charts={
            f"{NAME}.svg": plots.heat_map(
                f"Last up_proj: picks of each of {settings.rank} components, times {settings.rank} "
                "(1 = even)",
                "component, by how often the first task picks it",
                "",
                [str(i) for i in range(settings.rank)],
                _sorted_rows(usages[_BALANCED][0].by_task),
            )
        },
        settings=settings,
        figures={
            "scores": {n: [[s.loss, s.accuracy] for s in own] for n, own in scores.items()},
            "usage": {
                name: [
                    {
                        "entropy": u.entropy,
                        "smallest entropy": u.smallest_entropy,
                        "information, bits": u.information,
                        "by chance, bits": u.by_chance,
                    }
                    for u in own
                ]
                for name, own in usages.items()
            },
            "served": {name: asdict(own) for name, own in served.items()},
            "served picks, largest difference": picks_difference,
            "picks of the last up_proj": usages[_BALANCED][0].by_task,
        },
    )


def entropy(shares: torch.Tensor) -> torch.Tensor:
    """In nats, along the last dimension; shares sum to one there."""
    return torch.special.entr(shares).sum(-1)


def train_smora(
    base: LlamaForCausalLM,
    tasks: SequenceTasks,
    kinds: list[int],
    settings: Settings,
    seed: int,
    bias_step: float,
) -> tuple[LlamaForCausalLM, dict[str, smora.SmoraLinear]]:
    """The adapted model and its modules."""
    model = tiny_lm.frozen_copy(base)
    modules = smora.add_smora(
        model, tiny_lm.LINEARS, settings.rank, settings.num_active, settings.alpha,
        generator(seed, 3),
    )  # fmt: skip

    def balance() -> None:
        for module in modules.values():
            module.balance(bias_step)

    _fit(model, tasks, kinds, settings, seed, settings.lr, balance)
    return model, modules


def train_lora(
    base: LlamaForCausalLM,
    tasks: SequenceTasks,
    kinds: list[int],
    settings: Settings,
    seed: int,
    rank: int,
    lr: float,
) -> LlamaForCausalLM:
    """The model with LoRA of this rank on all linears."""
    model = tiny_lm.frozen_copy(base)
    lora.add_lora(model, tiny_lm.LINEARS, rank, 2.0 * rank, generator(seed, 3))
    _fit(model, tasks, kinds, settings, seed, lr, None)
    return model


def _fit(
    model: LlamaForCausalLM,
    tasks: SequenceTasks,
    kinds: list[int],
    settings: Settings,
    seed: int,
    lr: float,
    after_step: Any,
) -> None:
    def loss_of(step: int) -> torch.Tensor:
        batch = tasks.draw(settings.rows, kinds, generator(seed, 5, step))
        return training.answer_loss(model(input_ids=batch.ids, use_cache=False).logits, batch)

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training.fit(trained, loss_of, num_steps=settings.num_steps, lr=lr, after_step=after_step)


def _serve(
    base: LlamaForCausalLM,
    model: LlamaForCausalLM,
    modules: Mapping[str, smora.SmoraLinear],
    batch: Batch,
    scratch: Path,
) -> tuple[dict[str, Comparison], float]:
    """SMoRA and the base in one mixed batch; and how much the engine's share of picks of any
    component of any module differs from the training code's.
    """
    with Served(tiny_lm.save(base, scratch / "base"), scratch) as served:
        adapter = served.add(smora.write(scratch / "smora", modules))
        arms: dict[str, tuple[Adapters, torch.Tensor]] = {
            "base": ((), training.log_probabilities(base, batch)),
            _BALANCED: ((adapter,), training.log_probabilities(model, batch)),
        }
        found = compare(served, batch, arms)
        chosen = served.routing(batch, (adapter,))
    training.log_probabilities(model, batch)
    assert chosen.keys() == modules.keys(), "every module of SMoRA has a router"
    difference = 0.0
    for path, module in modules.items():
        assert module.picked is not None, "a forward came first"
        picks = (chosen[path] > 0).float().mean(0) / module.num_active
        wanted = module.picked.flatten(0, -2).float().mean(0) / module.num_active
        difference = max(difference, float((picks - wanted).abs().max()))
    return found, difference


def _usage(modules: Mapping[str, smora.SmoraLinear], batch: Batch, tasks: SequenceTasks) -> Usage:
    """Of the picks of the last forward, which was this batch's."""
    shuffled = batch.kinds[torch.randperm(len(batch.kinds), generator=generator(9))]
    shares = {path: _shares(module, batch, batch.kinds) for path, module in modules.items()}
    entropies = [
        float(entropy(own.mean(0))) / math.log(modules[path].rank) for path, own in shares.items()
    ]
    last = [path for path in modules if path.endswith("up_proj")][-1]
    names = [sequence_base.name_of(tasks, kind) for kind in batch.kinds.unique().tolist()]
    return Usage(
        entropy=_mean(entropies),
        smallest_entropy=min(entropies),
        information=_mean([_information(own) for own in shares.values()]),
        by_chance=_mean(
            [_information(_shares(module, batch, shuffled)) for module in modules.values()]
        ),
        by_task=dict(zip(names, shares[last].tolist(), strict=True)),
    )


def _shares(module: smora.SmoraLinear, batch: Batch, kinds: torch.Tensor) -> torch.Tensor:
    """[tasks, components]: of the picks that predict a task's answers, each component's share;
    `kinds` [rows] says which task a row counts for.
    """
    assert module.picked is not None, "a forward comes first"
    is_used = batch.is_answer.roll(-1, 1)
    counts = (module.picked & is_used[..., None]).float().sum(1)
    table = torch.stack([counts[kinds == kind].sum(0) for kind in kinds.unique().tolist()])
    return table / table.sum(-1, keepdim=True)


def _information(table: torch.Tensor) -> float:
    """Mutual information in bits of task (each as likely) and component; [tasks, components]."""
    return float(entropy(table.mean(0)) - entropy(table).mean()) / math.log(2)


def _sorted_rows(by_task: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """Columns in the order of the first row's shares, each times the number of columns."""
    first = next(iter(by_task.values()))
    order = sorted(range(len(first)), key=lambda i: -first[i])
    return {name: [row[i] * len(row) for i in order] for name, row in by_task.items()}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _claims(
    usages: Mapping[str, list[Usage]],
    scores: Mapping[str, list[training.Score]],
    settings: Settings,
) -> list[Claim]:
    own, without = usages[_BALANCED], usages[_UNBALANCED]
    even, uneven = (_mean([u.entropy for u in us]) for us in (own, without))
    information = [u.information for u in own]
    chance = [u.by_chance for u in own]
    loss = {name: _mean([s.loss for s in mine]) for name, mine in scores.items()}
    accuracy = {name: _mean([s.accuracy for s in mine]) for name, mine in scores.items()}
    small, large = (f"lora of rank {rank}" for rank in (settings.num_active, settings.rank))

    def better(name: str) -> Claim:
        how = "picks per token" if name == small else "stores"
        return Claim(
            f"SMoRA's loss is lower than that of a LoRA with as many components as it {how}",
            f"{loss[_BALANCED]:.3f} and {loss[name]:.3f} nats; accuracy "
            f"{100 * (accuracy[_BALANCED] - accuracy[name]):+.1f} points",
            loss[_BALANCED] < loss[name],
        )

    return [
        Claim(
            "use does not collapse: the entropy is at least 0.8 in the mean of the modules",
            f"{even:.3f}, smallest module {min(u.smallest_entropy for u in own):.3f}",
            even >= 0.8,
        ),
        Claim("the bias evens it out", f"{even:.3f} with, {uneven:.3f} without", even > uneven),
        Claim(
            "components are chosen by task: at least three times the information of chance",
            f"{_mean(information):.3f} and {_mean(chance):.3f} bits",
            all(a >= 3 * b for a, b in zip(information, chance, strict=True)),
        ),
        better(small),
        better(large),
    ]


def _usage_table(usages: Mapping[str, list[Usage]]) -> str:
    rows = [
        [
            name,
            _mean([u.entropy for u in own]),
            min(u.smallest_entropy for u in own),
            _mean([u.information for u in own]),
            _mean([u.by_chance for u in own]),
        ]
        for name, own in usages.items()
    ]
    head = ["", "entropy", "smallest of a module", "information on the task, bits", "by chance"]
    return report.table(head, rows)


def _score_table(scores: Mapping[str, list[training.Score]]) -> str:
    rows = [
        [
            name,
            _mean([s.loss for s in own]),
            _mean([s.accuracy for s in own]),
            ", ".join(f"{s.loss:.3f}" for s in own),
        ]
        for name, own in scores.items()
    ]
    return report.table(["", "loss", "accuracy", "loss by seed"], rows)


if __name__ == "__main__":
    report.main(sys.modules[__name__])
