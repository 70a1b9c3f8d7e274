"""DyLoRA's curve over its ranks, beside an ordinary LoRA that is cut off.

One base, one new task (reversed symbols under a new permutation), LoRA of rank 8, alpha 16, on all
linears, and the same number of steps, learning rate and data for everyone:

- `dylora`: for each step a rank b is drawn uniformly, the first b components act with alpha / b;
  `frozen` trains only the b-th then, as the authors' released script does;
- `lora, cut` keeps the first b components of the LoRA of rank 8, with scale alpha / b, and `lora,
  cut, alpha/r` with alpha / 8;
- `lora of rank b` is trained at each rank by itself: as many trainings as ranks.

Measured on held-out rows: the share of answer tokens that are right and their loss, mean of the
seeds. The curves of the first seed are then served: one adapter, every rank in one batch.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from bench.experiments import report, sequence_base, tiny_lm, training
from bench.experiments.data import Batch, SequenceTasks, generator
from bench.experiments.methods import lora
from bench.experiments.report import Claim, Outcome
from bench.experiments.sequence_base import BaseSettings
from bench.experiments.served import Adapters, Comparison, Served, compare
from transformers import LlamaForCausalLM

from bench import plots
from polyadapt.types import AppliedAdapter

NAME = "rank_curve"
Curve = dict[int, training.Score]  # rank b -> score

_BASE = BaseSettings()


@dataclass(frozen=True, slots=True)
class Settings:
    """One run."""

    base: BaseSettings = _BASE
    seeds: tuple[int, ...] = (1, 2)
    rank: int = 8
    alpha: float = 16.0
    separate: tuple[int, ...] = (1, 2, 4)  # and the full rank, which is the LoRA that is cut
    num_steps: int = 400
    rows: int = 32
    test_rows: int = 256
    lr: float = 2e-3


FULL = Settings()
QUICK = Settings(
    base=BaseSettings(num_new_tasks=2, num_steps=30), seeds=(0,), rank=4, separate=(1,),
    num_steps=10, test_rows=8,
)  # fmt: skip


def run(settings: Settings, scratch: Path) -> Outcome:
    """Train, score every rank, serve the first seed's."""
    base, tasks = sequence_base.make(settings.base)
    task = sequence_base.new_tasks(tasks)[1]  # a reversed one
    held_out = sequence_base.test_batch(tasks, [task], settings.test_rows)
    runs: list[dict[str, Curve]] = []
    for seed in settings.seeds:
        trained = {
            "dylora": _train(base, tasks, task, settings, seed, settings.rank, "all"),
            "dylora, frozen": _train(base, tasks, task, settings, seed, settings.rank, "last"),
            "lora": _train(base, tasks, task, settings, seed, settings.rank, None),
        }
        curves = {name: _curve(*trained[name], held_out) for name in ("dylora", "dylora, frozen")}
        curves["lora, cut"] = _curve(*trained["lora"], held_out)
        curves["lora, cut, alpha/r"] = _curve(*trained["lora"], held_out, is_rescaled=False)
        curves["lora of rank b"] = {settings.rank: curves["lora, cut"][settings.rank]}
        for rank in settings.separate:
            own = _train(base, tasks, task, settings, seed, rank, None)
            curves["lora of rank b"][rank] = _curve(*own, held_out)[rank]
        runs.append(curves)
        if seed == settings.seeds[0]:
            served = _serve(base, trained, held_out, scratch)
        print(f"seed {seed} done", file=sys.stderr, flush=True)
    mean = _mean(runs)
    before = training.score(training.log_probabilities(base, held_out), held_out)
    return Outcome(
        title="DyLoRA's ranks beside a LoRA that is cut off",
        claims=_claims(mean, settings, served),
        tables=[_table(mean, settings, before)],
        charts={f"{NAME}.svg": _chart(mean)},
        settings=settings,
        figures={
            "base": before.accuracy,
            "mean": _plain(mean),
            "runs": [_plain(curves) for curves in runs],
            "served": {name: asdict(own) for name, own in served.items()},
        },
        notes=[
            "Served in one batch with every rank of both adapters, the LoRA with rank b, and with "
            "rank b and scale b / r for alpha / r."
        ],
    )


def _train(
    base: LlamaForCausalLM,
    tasks: SequenceTasks,
    task: int,
    settings: Settings,
    seed: int,
    rank: int,
    nested: str | None,
) -> tuple[LlamaForCausalLM, dict[str, lora.LowRank]]:
    """Train a LoRA; nested: "all" of the first b components, the "last" of them, or not at all."""
    model = tiny_lm.frozen_copy(base)
    modules = lora.add_lora(model, tiny_lm.LINEARS, rank, settings.alpha, generator(seed, 3, rank))

    def loss_of(step: int) -> torch.Tensor:
        if nested is not None:
            b = int(torch.randint(1, rank + 1, (), generator=generator(seed, 4, step)))
            lora.use_rank(modules, b, settings.alpha / b)
        batch = tasks.draw(settings.rows, [task], generator(seed, 5, step))
        return training.answer_loss(model(input_ids=batch.ids, use_cache=False).logits, batch)

    for module in modules.values():
        module.is_only_last_trained = nested == "last"
    parameters = [p for module in modules.values() for p in (module.A, module.B)]
    training.fit(parameters, loss_of, num_steps=settings.num_steps, lr=settings.lr)
    return model, modules


def _curve(
    model: LlamaForCausalLM,
    modules: Mapping[str, lora.LowRank],
    batch: Batch,
    *,
    is_rescaled: bool = True,
) -> Curve:
    """The score of the first b components, for every b, with alpha / b or else alpha / r."""
    first = next(iter(modules.values()))
    found = {}
    for b in range(1, first.rank + 1):
        lora.use_rank(modules, b, first.alpha / (b if is_rescaled else first.rank))
        found[b] = training.score(training.log_probabilities(model, batch), batch)
    return found


def _serve(
    base: LlamaForCausalLM,
    trained: Mapping[str, tuple[LlamaForCausalLM, Mapping[str, lora.LowRank]]],
    batch: Batch,
    scratch: Path,
) -> dict[str, Comparison]:
    """Every rank of both adapters in one mixed batch."""
    first = next(iter(trained["lora"][1].values()))
    rank, alpha = first.rank, first.alpha
    arms: dict[str, tuple[Adapters, torch.Tensor]] = {}

    def add(name: str, b: int, scale: float, applied: AppliedAdapter) -> None:
        model, modules = trained[name.partition(",")[0]]
        lora.use_rank(modules, b, scale)
        arms[f"{name}, b = {b}"] = ((applied,), training.log_probabilities(model, batch))

    with Served(tiny_lm.save(base, scratch / "base"), scratch) as served:
        for name in ("dylora", "lora"):
            applied = served.add(lora.write_nested(scratch / name, trained[name][1]))
            for b in range(1, rank + 1):
                add(name, b, alpha / b, replace(applied, rank=b))
                if name == "lora":
                    scaled = replace(applied, rank=b, scale=b / rank)
                    add("lora, alpha/r", b, alpha / rank, scaled)
        return compare(served, batch, arms)


def _mean(runs: list[dict[str, Curve]]) -> dict[str, Curve]:
    def of(scores: list[training.Score]) -> training.Score:
        num = len(scores)
        return training.Score(
            sum(s.loss for s in scores) / num, sum(s.accuracy for s in scores) / num
        )

    return {
        name: {b: of([curves[name][b] for curves in runs]) for b in runs[0][name]}
        for name in runs[0]
    }


def _claims(
    mean: Mapping[str, Curve], settings: Settings, served: Mapping[str, Comparison]
) -> list[Claim]:
    half = range(1, settings.rank // 2 + 1)
    dylora, cut, fixed = (mean[name] for name in ("dylora", "lora, cut", "lora, cut, alpha/r"))
    margin = min(min(cut[b].loss, fixed[b].loss) - dylora[b].loss for b in half)
    full = cut[settings.rank].accuracy - dylora[settings.rank].accuracy
    own = mean["lora of rank b"]
    behind = max(own[b].accuracy - dylora[b].accuracy for b in own)
    return [
        Claim(
            f"below half the rank (b = 1 to {half[-1]}) DyLoRA's loss is lower than that of LoRA "
            "cut off, with either scale",
            f"by at least {margin:.3f} nats",
            margin > 0,
        ),
        Claim(
            "at the full rank DyLoRA is within 1 point of LoRA ('without significant loss')",
            f"{100 * full:.1f} points behind",
            full <= 0.01,
        ),
        Claim(
            "at no rank is it more than 5 points behind a LoRA trained at that rank",
            f"at most {100 * behind:.1f} points behind",
            behind <= 0.05,
        ),
        Claim(
            "alpha / b is the right scale to cut with: LoRA cut with alpha / r has a lower loss at "
            "no rank below half",
            f"{sum(fixed[b].loss < cut[b].loss for b in half)} of {len(half)} ranks are lower",
            all(fixed[b].loss >= cut[b].loss for b in half),
        ),
        Claim(
            "served log-probabilities equal the training code's to 1e-3, every rank in one batch",
            f"{max(own.difference for own in served.values()):.1e}",
            max(own.difference for own in served.values()) <= 1e-3,
        ),
    ]


def _table(mean: Mapping[str, Curve], settings: Settings, before: training.Score) -> str:
    ranks = range(1, settings.rank + 1)
    rows = [
        [f"{name}: {what}"] + [getattr(curve[b], what) if b in curve else "-" for b in ranks]
        for what in ("accuracy", "loss")
        for name, curve in mean.items()
    ]
    rows.append(["base: accuracy", *[before.accuracy] * len(ranks)])
    return report.table(["b", *map(str, ranks)], rows)


def _chart(mean: Mapping[str, Curve]) -> str:
    return plots.line_chart(
        "Answer tokens that are right, by the rank that a request chooses",
        "rank b (logarithmic)",
        "accuracy",
        {name: [(b, score.accuracy) for b, score in c.items()] for name, c in mean.items()},
    )


def _plain(curves: Mapping[str, Curve]) -> dict[str, dict[str, dict[int, float]]]:
    return {
        name: {
            "accuracy": {b: score.accuracy for b, score in curve.items()},
            "loss": {b: score.loss for b, score in curve.items()},
        }
        for name, curve in curves.items()
    }


if __name__ == "__main__":
    report.main(sys.modules[__name__])
