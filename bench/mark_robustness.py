"""What of a mark survives what a thief may do with a copy: a matrix of attacks, over seeds.

    python -m bench.mark_robustness [--seeds 5] [--out bench/results/<date>-<machine>]

Copies of the packaged digits' classifier with 32 bits, as they leave the house: hinge marks as an
obfuscated bundle and, for comparison, with their branches bare; linear marks merged. The attacker
has every weight and all the training data. Reading and tracing are by the rule that was fixed
before: 16 queries a bit, 1,000 users, alpha 1e-3 over all.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench.places import results_folder
from torch import Tensor, nn
from torch.nn import functional as F

from polyadapt.watermark.branches import Branches, MarkedModel, signs_of
from polyadapt.watermark.classifier import Answer, answer_of, train_classifier
from polyadapt.watermark.codebook import Codebook, Design
from polyadapt.watermark.dataset import load_digits
from polyadapt.watermark.keys import SecretKey
from polyadapt.watermark.obfuscation import expand, merge, obfuscate, seed_of
from polyadapt.watermark.reading import (
    NullRates,
    choose_targets,
    make_queries,
    measure_null_rates,
    read_answers,
)
from polyadapt.watermark.statistics import Bit, BitRule
from polyadapt.watermark.trace import trace
from polyadapt.watermark.training import Gate, TrainSettings, train
from polyadapt.watermark.triggers import TriggerFamilies, TriggerSettings

NUM_BITS, NUM_USERS, NUM_QUERIES, ALPHA = 32, 1000, 16, 1e-3
MODULE = "0"
USERS = tuple(f"user-{i}" for i in range(NUM_USERS))
FORMS: Mapping[str, Gate] = {
    "hinge, obfuscated": "hinge",
    "hinge, bare": "hinge",
    "linear, merged": "linear",
}


class Copy(nn.Sequential):
    """A stack of Linear and ReLU whose first linear has units beside it: one user's bundle."""

    def __init__(self, model: nn.Sequential, own: Branches | None) -> None:
        super().__init__(*copy.deepcopy(list(model)))
        self.own = copy.deepcopy(own)
        self.requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [rows, labels] of x [rows, size]."""
        y = self[0](x)
        if self.own is not None:
            y = y + self.own(x, torch.ones(1, self.own.num_bits))
        for layer in list(self.children())[1:]:
            y = y if layer is self.own else layer(y)
        return y

    def matrices(self) -> list[nn.Parameter]:
        """Return every matrix: what is pruned and quantised."""
        return [parameter for parameter in self.parameters() if parameter.ndim == 2]


@dataclass(frozen=True, slots=True)
class Mark:
    """One trained mark, and what it is read with."""

    base: nn.Sequential
    branches: Branches
    families: TriggerFamilies
    targets: Any
    null: NullRates
    book: Codebook
    inputs: Any
    labels: Any
    carriers: Any
    truth: Any

    def read(self, ask: Answer, rng: np.random.Generator) -> list[Bit]:
        """Return what 16 queries of each bit say."""
        queries = make_queries(self.families, self.carriers, NUM_QUERIES, rng)
        answers = ask(queries.inputs)
        return [r.value for r in read_answers(queries, answers, self.targets, self.null, BitRule())]

    def copy_of(self, user: str, form: str) -> Copy:
        """Return what the user is given."""
        own = self.branches.own(self.book.row(user))
        if form == "linear, merged":
            return Copy(merge(self.base, MODULE, own), None)
        if form == "hinge, bare":
            return Copy(self.base, own)
        rng = seed_of(user.encode().ljust(16, b"\0"))
        return Copy(*obfuscate(self.base, MODULE, own, 1.0, rng))


def make_mark(
    gate: Gate, seed: int, base: nn.Sequential, others: Sequence[nn.Sequential], *, key: int = 0
) -> Mark:
    """Train one on `base`, which may be a marked copy, and calibrate it with it and the others."""
    data = load_digits()
    (inputs, labels), (carriers, truth) = data.train, data.held_out
    rng = np.random.default_rng([seed, 77, key])
    secret = SecretKey(rng.bytes(32))
    families = TriggerFamilies(secret, NUM_BITS, TriggerSettings(inputs.shape[1]))
    targets = choose_targets(secret, families, answer_of(base), inputs, 10, rng)
    settings = TrainSettings.of_gate(gate, seed)
    branches = train(base, MODULE, inputs, families, targets, settings)
    asks = [answer_of(model) for model in (base, *others)]
    null = measure_null_rates(asks, families, targets, carriers, rng)
    book = Codebook(secret, Design.parse("random"), NUM_BITS)
    return Mark(base, branches, families, targets, null, book, inputs, labels, carriers, truth)


# ------------------------------------------------------------------------------- attacks
def fit(
    model: nn.Module,
    inputs: Any,
    labels: Any,
    num_steps: int,
    rate: float,
    seed: int,
    parameters: Sequence[nn.Parameter] | None = None,
) -> None:
    """Train in place on labels, Adam on batches of 64."""
    rng = np.random.default_rng([seed, 5])
    trained = list(model.parameters()) if parameters is None else list(parameters)
    optimiser = torch.optim.Adam(trained, rate)
    for _ in range(num_steps):
        rows = rng.integers(0, len(inputs), 64)
        loss = F.cross_entropy(model(torch.from_numpy(inputs[rows])), torch.as_tensor(labels[rows]))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()


@torch.no_grad()
def prune(model: Copy, share: float) -> None:
    """Set the smallest entries of each matrix to 0, in place."""
    for matrix in model.matrices():
        bound = matrix.abs().flatten().kthvalue(max(1, round(share * matrix.numel()))).values
        matrix.masked_fill_(matrix.abs() <= bound, 0.0)


@torch.no_grad()
def quantise(model: Copy, num_bits: int) -> None:
    """Round each matrix to symmetric integers with a scale per row, in place."""
    most = 2 ** (num_bits - 1) - 1
    for matrix in model.matrices():
        scale = matrix.abs().amax(1, keepdim=True).clamp(min=1e-12) / most
        matrix.copy_((matrix / scale).round().clamp(-most, most) * scale)


def task_adapter(base: nn.Sequential, mark: Mark, seed: int, rank: int = 4) -> dict[str, Tensor]:
    """Return a LoRA's B A for each linear of the unmarked base: digits in negative, whose inputs
    are 1 - x.
    """
    adapted = copy.deepcopy(base)
    rng = torch.Generator().manual_seed(seed)
    factors = {
        name: (
            nn.Parameter(torch.randn(rank, layer.in_features, generator=rng) * 0.1),
            nn.Parameter(torch.zeros(layer.out_features, rank)),
        )
        for name, layer in adapted.named_children()
        if isinstance(layer, nn.Linear)
    }
    for name, (A, B) in factors.items():
        adapted.get_submodule(name).register_forward_hook(
            lambda _, args, y, A=A, B=B: y + args[0] @ A.T @ B.T
        )
    both = np.concatenate([1 - mark.inputs, mark.inputs])
    labels = np.concatenate([mark.labels, mark.labels])
    fit(adapted, both, labels, 600, 3e-3, seed, [p for pair in factors.values() for p in pair])
    return {name: (B @ A).detach() for name, (A, B) in factors.items()}


@torch.no_grad()
def add_adapter(model: Copy, deltas: Mapping[str, Tensor]) -> None:
    """Merge it into the weights, in place."""
    for name, delta in deltas.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        linear.weight += delta


@torch.no_grad()
def average(models: Sequence[Copy]) -> Copy:
    """Return the copy whose every parameter is the mean of the others'."""
    mean = copy.deepcopy(models[0])
    for own, *given in zip(mean.parameters(), *(m.parameters() for m in models), strict=True):
        own.copy_(torch.stack(given).mean(0))
    return mean


@torch.no_grad()
def cut_off(model: Copy) -> None:
    """Leave the branches out, in place."""
    model.own = None


@torch.no_grad()
def cut_silent(model: Copy, inputs: Any) -> None:
    """Leave out what never fires on clean inputs, in place."""
    own = model.own
    assert own is not None
    assert own.tau is not None
    fires = (torch.from_numpy(inputs) @ own.A.T > own.tau).any(0)
    own.B_sum[:, ~fires] = 0.0


@torch.no_grad()
def straighten(model: Copy, inputs: Any) -> None:
    """Put the linear part of what fires on every clean input in its place, and leave out what never
    fires, in place: what somebody can do who understands how a bundle is made.
    """
    own = model.own
    assert own is not None
    assert own.tau is not None
    cut_silent(model, inputs)
    always = (torch.from_numpy(inputs) @ own.A.T > own.tau).double().mean(0) > 0.99
    linear = model[0]
    assert isinstance(linear, nn.Linear)
    linear.weight += own.B_sum[:, always] @ own.A[always]
    linear.bias -= own.B_sum[:, always] @ own.tau[always]
    own.B_sum[:, always] = 0.0


def distil(teacher: Copy, inputs: Any, seed: int) -> nn.Sequential:
    """Return a fresh classifier that was trained on the copy's probabilities alone."""
    with torch.no_grad():
        soft = teacher(torch.from_numpy(inputs)).softmax(-1)
    student = train_classifier(inputs, soft.argmax(-1).numpy(), seed=3000 + seed, num_steps=1)
    student.requires_grad_(True)
    fit(student, inputs, soft, 1000, 1e-3, seed)
    return student


Attack = Callable[[Copy, Mark, int], nn.Module]


def _in_place(change: Callable[[Copy, Mark, int], None]) -> Attack:
    def attack(model: Copy, mark: Mark, seed: int) -> nn.Module:
        change(model, mark, seed)
        return model

    return attack


def _tuned(num_steps: int, rate: float) -> Attack:
    return _in_place(lambda m, k, s: fit(m, k.inputs, k.labels, num_steps, rate, s))


def _cut_and_tuned(model: Copy, mark: Mark, seed: int) -> nn.Module:
    cut_off(model)
    fit(model, mark.inputs, mark.labels, 500, 1e-3, seed)
    return model


ATTACKS: Mapping[str, Attack] = {
    "none": _in_place(lambda m, k, s: None),
    "fine-tuned, 500 steps at 1e-4": _tuned(500, 1e-4),
    "fine-tuned, 500 steps at 1e-3": _tuned(500, 1e-3),
    "fine-tuned, 2,000 steps at 1e-3": _tuned(2000, 1e-3),
    "fine-tuned, 500 steps at 1e-2": _tuned(500, 1e-2),
    "30 % pruned": _in_place(lambda m, k, s: prune(m, 0.3)),
    "60 % pruned": _in_place(lambda m, k, s: prune(m, 0.6)),
    "80 % pruned": _in_place(lambda m, k, s: prune(m, 0.8)),
    "int8": _in_place(lambda m, k, s: quantise(m, 8)),
    "int4": _in_place(lambda m, k, s: quantise(m, 4)),
    "task adapter merged": _in_place(lambda m, k, s: add_adapter(m, task_adapter(k.base, k, s))),
    "distilled from its answers": lambda m, k, s: distil(m, k.inputs, s),
}
CUTS: Mapping[str, Attack] = {
    "branches cut off": _in_place(lambda m, k, s: cut_off(m)),
    "branches cut off, then 500 steps at 1e-3": _cut_and_tuned,
    "units that never fire cut off": _in_place(lambda m, k, s: cut_silent(m, k.inputs)),
    "units that always fire made linear": _in_place(lambda m, k, s: straighten(m, k.inputs)),
}


# ------------------------------------------------------------------------------- measuring
def outcome(
    mark: Mark, ask: Answer, users: Sequence[str], rng: np.random.Generator
) -> dict[str, Any]:
    """Return what is read of a model that came from these users' copies, and who is named."""
    bits = mark.read(ask, rng)
    rows = mark.book.rows(users)
    agree = rows.min(axis=0) == rows.max(axis=0)
    found = trace(mark.book, USERS, bits, alpha=ALPHA)
    own = [entry for entry in found.ranked if entry.user in users]
    named = {entry.user for entry in found.accused}
    values = np.array([-1 if bit is None else bit for bit in bits])
    return {
        "right": int((agree & (values == rows[0])).sum()),
        "erased": int((agree & (values == -1)).sum()),
        "wrong": int((agree & (values == 1 - rows[0])).sum()),
        "differing_erased": int((~agree & (values == -1)).sum()),
        "differing_read": int((~agree & (values != -1)).sum()),
        "accuracy": float((ask(mark.carriers) == mark.truth).mean()),
        "is_named": bool(named & set(users)),
        "names_innocent": bool(named - set(users)),
        # Of any of them; beyond the first ten of the ranking it is not looked up.
        "family_p": min((entry.family_p_value for entry in own), default=1.0),
    }


def answers_of(*models: nn.Module) -> Answer:
    """Return what the mean of the models' probabilities says."""
    return answer_of(
        lambda x: torch.stack([model(x).softmax(-1) for model in models]).mean(0)  # [rows, labels]
    )


def measure(
    form: str, seed: int, mark: Mark, others: Sequence[nn.Sequential]
) -> list[dict[str, Any]]:
    """Return a row per attack and copy."""
    rng = np.random.default_rng([seed, 123])
    rows: list[dict[str, Any]] = []

    def note(attack: str, users: Sequence[str], ask: Answer, read_by: Mark = mark) -> None:
        found = outcome(read_by, ask, users, rng)
        rows.append({"form": form, "seed": seed, "attack": attack, **found})

    drawn = [USERS[i] for i in rng.choice(NUM_USERS, 3, replace=False)]
    attacks = dict(ATTACKS)
    if form != "linear, merged":
        attacks |= CUTS
    user = drawn[0]
    for name, attack in attacks.items():
        note(name, [user], answers_of(attack(mark.copy_of(user, form), mark, seed)))
    attacked = mark.copy_of(user, form)
    second = make_mark(FORMS[form], seed + 500, attacked.requires_grad_(False), others, key=1)
    other = USERS[0]
    own = second.branches.own(second.book.row(other))
    both = _with_second(attacked, own)
    note("marked again by a second key", [user], answers_of(both))
    note("marked again: the second mark", [other], answers_of(both), second)
    for count in (2, 3):
        users = drawn[:count]
        copies = [mark.copy_of(one, form) for one in users]
        note(f"weights of {count} copies averaged", users, answers_of(average(copies)))
        note(f"answers of {count} copies averaged", users, answers_of(*copies))
    if form == "hinge, obfuscated":
        rng_of = seed_of(user.encode().ljust(16, b"\0"))
        expanded = expand(mark.base, MODULE, mark.branches.own(mark.book.row(user)), rng_of)
        note("exported as expanded", [user], answers_of(expanded))
    return rows


def _with_second(model: Copy, own: Branches) -> nn.Module:
    """The copy with another mark's branches beside its first linear."""
    marked = MarkedModel(model, MODULE, own)

    class Both(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return marked(x, signs_of(np.ones(own.num_bits, np.uint8))[None].expand(len(x), -1))

    return Both()


def to_markdown(rows: list[dict[str, Any]]) -> str:
    """Return a table for each form: attack by attack, means over seeds and copies."""
    parts = []
    for form in dict.fromkeys(row["form"] for row in rows):
        parts += [
            f"**{form[0].upper()}{form[1:]}**",
            "",
            "| done to the copy | bits right | erased | wrong | accuracy | leaker named "
            "| p of that, median / worst | innocent named |",
            "|---|---|---|---|---|---|---|---|",
        ]
        of_form = [row for row in rows if row["form"] == form]
        for attack in dict.fromkeys(row["attack"] for row in of_form):
            of = [row for row in of_form if row["attack"] == attack]
            parts.append(f"| {' | '.join([attack, *_cells(of)])} |")
        parts.append("")
    return "\n".join(parts[:-1]) + "\n"


def _cells(of: list[dict[str, Any]]) -> list[str]:
    judged = sum(row["right"] + row["erased"] + row["wrong"] for row in of)
    shares = [
        f"{100 * sum(row[name] for row in of) / judged:.1f} %"
        for name in ("right", "erased", "wrong")
    ]
    differing = sum(row["differing_erased"] + row["differing_read"] for row in of)
    if differing:
        share = 100 * sum(row["differing_erased"] for row in of) / differing
        shares[1] += f"; of differing {share:.0f} %"
    p = [row["family_p"] for row in of]
    return [
        *shares,
        f"{100 * statistics.mean(row['accuracy'] for row in of):.1f} %",
        f"{sum(row['is_named'] for row in of)} of {len(of)}",
        f"{statistics.median(p):.0e} / {max(p):.0e}",
        f"{sum(row['names_innocent'] for row in of)} of {len(of)}",
    ]


def main() -> None:
    """Run and write mark-robustness.json and mark-robustness.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first of the seeds")
    parser.add_argument("--out", type=Path, help="instead of bench/results/<date>-<machine>")
    given = parser.parse_args()
    out = results_folder(given.out)
    torch.set_num_threads(1)
    inputs, labels = load_digits().train
    others = [train_classifier(inputs, labels, seed=1000 + i) for i in range(2)]
    rows = []
    for seed in range(given.first, given.first + given.seeds):
        base = train_classifier(inputs, labels, seed=seed)
        marks = {gate: make_mark(gate, seed, base, others) for gate in ("hinge", "linear")}
        for form, gate in FORMS.items():
            rows += measure(form, seed, marks[gate], others)
        write(out, rows)
        print(f"seed {seed}: {len(rows)} rows", flush=True)
    print(to_markdown(rows))


def write(out: Path, rows: list[dict[str, Any]]) -> None:
    """Write mark-robustness.json and mark-robustness.md."""
    setup = {"num_bits": NUM_BITS, "num_users": NUM_USERS, "num_queries": NUM_QUERIES}
    text = json.dumps({**setup, "alpha": ALPHA, "rows": rows}, indent=1)
    (out / "mark-robustness.json").write_text(text + "\n", encoding="utf-8")
    (out / "mark-robustness.md").write_text(to_markdown(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
