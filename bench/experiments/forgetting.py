"""Forgetting classes one pair after the other with GS-LoRA, and taking it back.

A base of four layers names the class (of ten) of a noisy word. GS-LoRA (rank 8, scale 1 / 8, the
feed-forward modules) forgets classes 3 and 7, then, on top of that, 1 and 5. In the loss the
cross-entropy of what is to be forgotten counts 0.2 times until it has reached 6 nats (log 10 is
2.3), and each block's norm counts `sparsity`; blocks whose update is below 1 % of the largest are
zeroed behind the training.

Measured on held-out words: accuracy of the forgotten classes (chance is 10 %) and of all others,
before, behind each task, and with tasks taken back by their gate bits; the number of blocks left
over the sparsity. The first seed's stack is served as one adapter by an engine in exact mode: all
states in one batch, and the base before it, by itself.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bench.experiments import report, tiny_lm, training
from bench.experiments.data import Batch, NoisyClasses, generator
from bench.experiments.methods import gs_lora, lora
from bench.experiments.report import Claim, Outcome
from bench.experiments.served import Adapters, Comparison, Served, comparison, parity
from transformers import LlamaForCausalLM

from bench import plots

NAME = "forgetting"
TASKS = {"first": (3, 7), "second": (1, 5)}  # name -> classes
# What applies -> the tasks whose bits are set.
STATES: dict[str, tuple[str, ...]] = {
    "base": (),
    "first": ("first",),
    "first and second": ("first", "second"),
    "first taken back": ("second",),
    "both taken back": (),
}
_CHANCE = 0.1
Modules = dict[str, lora.LowRank]


@dataclass(frozen=True, slots=True)
class Settings:
    """One run."""

    seeds: tuple[int, ...] = (1, 2, 3)
    num_classes: int = 10
    num_symbols: int = 16
    length: int = 12
    noise: float = 0.45
    num_layers: int = 4
    base_steps: int = 800
    base_lr: float = 3e-3
    rank: int = 8
    bound: float = 6.0  # nats
    weight: float = 0.2
    sparsity: float = 1e-3
    sparsities: tuple[float, ...] = (0.0, 1e-4, 1e-3, 3e-3)  # of the first task, first seed
    pruned_below: float = 0.01
    num_steps: int = 300
    lr: float = 3e-3
    rows: int = 32  # to retain and to forget, each
    test_rows: int = 4000


FULL = Settings()
QUICK = Settings(
    seeds=(0,), num_layers=2, base_steps=20, sparsities=(0.0,), num_steps=3, test_rows=40
)


def run(settings: Settings, scratch: Path) -> Outcome:
    """Train the base, forget twice for every seed, take it back."""
    data = NoisyClasses.make(
        settings.num_classes, settings.num_symbols, settings.length, settings.noise, seed=0
    )
    base = _train_base(data, settings)
    held_out = data.draw(settings.test_rows, range(settings.num_classes), generator(0, 2))
    runs: list[dict[str, dict[str, float]]] = []
    kept: list[dict[str, int]] = []
    is_restored = True
    served: dict[str, Comparison] = {}
    before = _last(base, held_out)
    for seed in settings.seeds:
        model, tasks, counts = _forget(base, data, settings, seed)
        tables = {name: _state(model, tasks, bits, held_out) for name, bits in STATES.items()}
        runs.append({name: _accuracies(table, held_out) for name, table in tables.items()})
        kept.append(counts)
        is_restored &= torch.equal(tables["both taken back"], before)
        if seed == settings.seeds[0]:
            part = Batch(*(t[:60] for t in (held_out.ids, held_out.is_answer, held_out.kinds)))
            served, is_served_exactly = _serve(base, model, tasks, part, scratch)
            is_restored &= is_served_exactly
        print(f"seed {seed} done", file=sys.stderr, flush=True)
    sweep = [_sweep(base, data, settings, value, held_out) for value in settings.sparsities]
    mean = {
        state: {group: _mean([run[state][group] for run in runs]) for group in runs[0][state]}
        for state in STATES
    }
    return Outcome(
        title="Forgetting two classes, two more, and taking it back",
        claims=[*_claims(runs, mean, kept, sweep, is_restored, settings), parity(served)],
        tables=[_table(mean), _sweep_table(sweep)],
        charts={f"{NAME}.svg": _chart(mean)},
        settings=settings,
        figures={
            "mean": mean,
            "runs": runs,
            "blocks left": kept,
            "sparsity": sweep,
            "served": {name: asdict(own) for name, own in served.items()},
        },
        notes=[
            "Forgetting by gates can be taken back, and is therefore no erasure: whoever holds the "
            "base holds what was forgotten."
        ],
    )


def _train_base(data: NoisyClasses, settings: Settings) -> LlamaForCausalLM:
    size = tiny_lm.Size(data.vocab_size, num_layers=settings.num_layers)
    model = tiny_lm.new_model(size, 0).train()

    def loss_of(step: int) -> torch.Tensor:
        batch = data.draw(settings.rows, range(settings.num_classes), generator(0, 1, step))
        return training.answer_loss(model(input_ids=batch.ids, use_cache=False).logits, batch)

    training.fit(model.parameters(), loss_of, num_steps=settings.base_steps, lr=settings.base_lr)
    return tiny_lm.frozen_copy(model)


def _forget(
    base: LlamaForCausalLM, data: NoisyClasses, settings: Settings, seed: int
) -> tuple[LlamaForCausalLM, dict[str, Modules], dict[str, int]]:
    """Both tasks, one on top of the other; the last is the number of blocks that each keeps."""
    model = tiny_lm.frozen_copy(base)
    tasks: dict[str, Modules] = {}
    counts = {}
    gone: list[int] = []
    for number, (name, classes) in enumerate(TASKS.items()):
        gone += classes
        tasks[name] = _train_task(
            model, data, classes, gone, settings, settings.sparsity, (seed, number)
        )
        counts[name] = len(gs_lora.prune(tasks[name], settings.pruned_below))
    return model, tasks, counts


def _train_task(
    model: LlamaForCausalLM,
    data: NoisyClasses,
    classes: Sequence[int],
    gone: Sequence[int],
    settings: Settings,
    sparsity: float,
    seeds: tuple[int, int],
) -> Modules:
    """Add a task that forgets `classes` while all but the `gone` ones are retained."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    modules = gs_lora.add_task(model, settings.rank, generator(*seeds, 3))
    others = [c for c in range(settings.num_classes) if c not in gone]

    def loss_of(step: int) -> torch.Tensor:
        draws = generator(*seeds, 5, step)
        losses = []
        for part in (others, classes):
            batch = data.draw(settings.rows, part, draws)
            logits = model(input_ids=batch.ids, use_cache=False).logits
            losses.append(training.answer_loss(logits, batch))
        return gs_lora.forget_loss(
            *losses, modules, bound=settings.bound, weight=settings.weight, sparsity=sparsity
        )

    parameters = [p for module in modules.values() for p in (module.A, module.B)]
    training.fit(parameters, loss_of, num_steps=settings.num_steps, lr=settings.lr)
    return modules


def _last(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Log-probabilities of the class token [rows, vocabulary]."""
    return training.log_probabilities(model, batch)[:, -1]


def _state(
    model: LlamaForCausalLM, tasks: Mapping[str, Modules], bits: Sequence[str], batch: Batch
) -> torch.Tensor:
    for name, modules in tasks.items():
        gs_lora.switch(modules, is_on=name in bits)
    return _last(model, batch)


def _serve(
    base: LlamaForCausalLM,
    model: LlamaForCausalLM,
    tasks: Mapping[str, Modules],
    batch: Batch,
    scratch: Path,
) -> tuple[dict[str, Comparison], bool]:
    """Every state in one mixed batch; whether taking both tasks back gives the bits of the base."""
    with Served(tiny_lm.save(base, scratch / "base"), scratch, exact=True) as served:
        (before,) = served.tables(batch, {"base": ()}).values()
        stack = served.add(gs_lora.write(scratch / "forgetting", tasks))
        arms: dict[str, Adapters] = {
            name: () if name == "base" else (replace(stack, options=(("tasks", bits),)),)
            for name, bits in STATES.items()
        }
        tables = served.tables(batch, arms)
    found = {}
    for name, bits in STATES.items():
        _state(model, tasks, bits, batch)
        offline = training.log_probabilities(model, batch)
        found[name] = comparison(tables[name], offline, batch)
    is_restored = all(torch.equal(tables[name], before) for name in ("base", "both taken back"))
    return found, is_restored


def _accuracies(table: torch.Tensor, batch: Batch) -> dict[str, float]:
    """Of each task's classes and of all others."""
    is_right = (table.argmax(-1) == batch.ids[:, -1]).float()
    is_left = torch.ones(len(is_right), dtype=torch.bool)
    found = {}
    for name, classes in TASKS.items():
        rows = torch.isin(batch.kinds, torch.tensor(classes))
        found[name] = float(is_right[rows].mean())
        is_left &= ~rows
    return {**found, "others": float(is_right[is_left].mean())}


def _sweep(
    base: LlamaForCausalLM,
    data: NoisyClasses,
    settings: Settings,
    sparsity: float,
    held_out: Batch,
) -> dict[str, float]:
    """The first task of the first seed with this sparsity."""
    model = tiny_lm.frozen_copy(base)
    classes = TASKS["first"]
    seeds = (settings.seeds[0], 0)
    modules = _train_task(model, data, classes, classes, settings, sparsity, seeds)
    norms = sorted(gs_lora.update_norms(modules).values(), reverse=True)
    kept = gs_lora.prune(modules, settings.pruned_below)
    found = _accuracies(_last(model, held_out), held_out)
    retained = {name: value for name, value in found.items() if name != "first"}
    return {
        "sparsity": sparsity,
        "blocks": len(kept),
        "smallest block's share of the largest": norms[-1] / norms[0],
        "forgotten": found["first"],
        "others": retained["others"],
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _claims(
    runs: Sequence[Mapping[str, Mapping[str, float]]],
    mean: Mapping[str, Mapping[str, float]],
    kept: Sequence[Mapping[str, int]],
    sweep: Sequence[Mapping[str, float]],
    is_restored: bool,
    settings: Settings,
) -> list[Claim]:
    both, base = "first and second", mean["base"]
    forgotten = max(run[both][name] for run in runs for name in TASKS)
    drops = [run["base"]["others"] - run[both]["others"] for run in runs]
    first_drops = [run["base"]["others"] - run["first"]["others"] for run in runs]
    back = mean["first taken back"]
    active = [line["blocks"] for line in sweep]
    return [
        Claim(
            "forgotten classes are at most 2 points above chance, for every seed",
            f"at most {100 * forgotten:.1f} % (before: {100 * base['first']:.1f} and "
            f"{100 * base['second']:.1f} %)",
            forgotten <= _CHANCE + 0.02,
        ),
        Claim(
            "the other classes lose less than 1 point by the first task, for every seed",
            ", ".join(f"{100 * drop:+.2f}" for drop in first_drops),
            max(first_drops) < 0.01,
        ),
        Claim(
            "and by both tasks",
            ", ".join(f"{100 * drop:+.2f}" for drop in drops),
            max(drops) < 0.01,
        ),
        Claim(
            "taking both tasks back gives the base's log-probabilities bit for bit, in the training"
            " code and served beside rows that forget",
            "equal" if is_restored else "different",
            is_restored,
        ),
        Claim(
            "the first task can be taken back alone, though the second was trained on top of it: "
            "its classes come back to within 5 points and the second's stay forgotten",
            f"{100 * back['first']:.1f} % of {100 * base['first']:.1f}, and "
            f"{100 * back['second']:.1f} %",
            back["first"] >= base["first"] - 0.05 and back["second"] <= _CHANCE + 0.02,
        ),
        Claim(
            "the sparsity leaves fewer blocks: the largest one fewer than none",
            ", ".join(f"{line['sparsity']:g}: {line['blocks']}" for line in sweep)
            + f" of {settings.num_layers}; in the runs {[dict(k) for k in kept]}",
            active[-1] < active[0],
        ),
    ]


def _table(mean: Mapping[str, Mapping[str, float]]) -> str:
    rows: list[list[Any]] = [[state, *own.values()] for state, own in mean.items()]
    first, second = (", ".join(map(str, classes)) for classes in TASKS.values())
    return report.table(["accuracy", f"classes {first}", f"classes {second}", "the others"], rows)


def _sweep_table(sweep: Sequence[Mapping[str, float]]) -> str:
    return report.table(list(sweep[0]), [[f"{v:g}" for v in line.values()] for line in sweep])


def _chart(mean: Mapping[str, Mapping[str, float]]) -> str:
    names = {"first": "classes 3, 7", "second": "classes 1, 5", "others": "the others"}
    return plots.bar_chart(
        "Accuracy by what applies (chance: 0.1)",
        "",
        "accuracy",
        {label: {s: own[name] for s, own in mean.items()} for name, label in names.items()},
    )


if __name__ == "__main__":
    report.main(sys.modules[__name__])
