"""The learning rates of `mixture` and `rank_usage`: each arm's best of four.

One seed that those experiments do not use, all 8 tasks, and their own numbers of steps. A rate that
is good for one method is bad for another, and comparing at one would decide by it; what is best
here is what the two use.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from bench.experiments import mixture, rank_usage, report, sequence_base, training
from bench.experiments.report import Outcome
from transformers import LlamaForCausalLM

from bench import plots

NAME = "learning_rates"


@dataclass(frozen=True, slots=True)
class Settings:
    """One run."""

    mixture: mixture.Settings = mixture.FULL
    usage: rank_usage.Settings = rank_usage.FULL
    seed: int = 0
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    test_rows: int = 256


FULL = Settings()
QUICK = Settings(mixture=mixture.QUICK, usage=rank_usage.QUICK, rates=(1e-3, 4e-3), test_rows=8)


def run(settings: Settings, scratch: Path) -> Outcome:
    """Train every arm at every rate."""
    base, tasks = sequence_base.make(settings.mixture.base)
    kinds = sequence_base.new_tasks(tasks)
    held_out = sequence_base.test_batch(tasks, kinds, settings.test_rows)
    mix, usage, seed = settings.mixture, settings.usage, settings.seed

    def mixlora(lr: float) -> LlamaForCausalLM:
        own = replace(mix, lrs={**mix.lrs, "mixlora": lr})
        return mixture.train_mixlora(base, tasks, kinds, own, seed)[0]

    def smora(lr: float) -> LlamaForCausalLM:
        own = replace(usage, lr=lr)
        return rank_usage.train_smora(base, tasks, kinds, own, seed, usage.bias_step)[0]

    def mlp_lora(rank: int) -> Callable[[float], LlamaForCausalLM]:
        return lambda lr: mixture.train_lora(base, tasks, kinds, mix, seed, rank, lr)[0]

    def lora(rank: int) -> Callable[[float], LlamaForCausalLM]:
        return lambda lr: rank_usage.train_lora(base, tasks, kinds, usage, seed, rank, lr)

    arms: dict[str, Callable[[float], LlamaForCausalLM]] = {
        "mixture: mixlora": mixlora,
        "mixture: lora": mlp_lora(mixture.equal_rank(mix)),
        "mixture: lora, rank of two experts": mlp_lora(mix.top_k * mix.expert_rank),
        "rank_usage: smora": smora,
        "rank_usage: lora, as many per token": lora(usage.num_active),
        "rank_usage: lora, as many stored": lora(usage.rank),
    }
    losses: dict[str, dict[float, float]] = {}
    for name, train in arms.items():
        for lr in settings.rates:
            table = training.log_probabilities(train(lr), held_out)
            losses.setdefault(name, {})[lr] = training.score(table, held_out).loss
        print(f"{name} done", file=sys.stderr, flush=True)
    best = {name: min(own, key=lambda lr: own[lr]) for name, own in losses.items()}
    rows = [[name, *own.values(), f"{best[name]:g}"] for name, own in losses.items()]
    return Outcome(
        title="Learning rates",
        claims=[],
        tables=[report.table(["loss", *(f"{lr:g}" for lr in settings.rates), "best"], rows)],
        charts={
            f"{NAME}.svg": plots.line_chart(
                "Held-out loss over the learning rate",
                "learning rate (logarithmic)",
                "loss of an answer token, nats",
                {name: list(own.items()) for name, own in losses.items()},
            )
        },
        settings=settings,
        figures={"loss": losses, "best": best},
    )


if __name__ == "__main__":
    report.main(sys.modules[__name__])
