"""What of a language model's mark survives what a thief may do with a copy.

    python -m bench.mark_lm_robustness [--model DIR] [--work DIR] [--out bench/results/...]

One trained mark (16 bits, bench.mark_lm's seed 3), copies of five users: the whole model with that
user's own branches beside the last o_proj, which act on every position. The thief changes weights
and branches alike. Every changed model is run on 16 new prompts a bit; a change of the base is the
same for all users, so its rows of the last layer are collected once and each user's branches
replayed on them, which is the same forward pass. Rule and null rates are bench.mark_lm's. What the
changed models answer without branches shows whether a bit is read where there is no mark.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench.places import default_model, results_folder, work_folder
from torch import Tensor, nn
from torch.nn import functional as F

from bench import mark_lm
from polyadapt.demo import demo_adapters
from polyadapt.offline.mark_lm import LanguageModel, load_lm
from polyadapt.watermark.branches import Branches, signs_of
from polyadapt.watermark.codebook import Codebook, Design
from polyadapt.watermark.keys import SecretKey
from polyadapt.watermark.last_layer import LastLayer, Rows
from polyadapt.watermark.lm_training import LMStart, prepare, train
from polyadapt.watermark.prompts import load_prose
from polyadapt.watermark.queries import NUM_QUERIES
from polyadapt.watermark.reading import NullRates, count_values, read_counts
from polyadapt.watermark.row_cache import RowCache
from polyadapt.watermark.statistics import Bit, BitRule
from polyadapt.watermark.trace import trace

SEED, OTHER_SEED, NUM_BITS, ALPHA = 3, 2, 16, 1e-3
USERS = tuple(f"user-{i}" for i in range(1000))
FEW = 60  # users that 16 bits can tell apart at ALPHA: 60 / 2^16 is below it
NUM_COPIES = 5
NUM_TEXTS, TEXT_TOKENS = 8, 96
TUNE_STEPS, TUNE_RATES = 40, (2e-5, 1e-4)


@dataclass(frozen=True, slots=True)
class Mark:
    """One trained mark, what it is read with, and the prompts that its copies are asked."""

    start: LMStart
    branches: Branches
    null: NullRates
    book: Codebook
    prompts: list[list[int]]  # NUM_QUERIES of bit 0, of bit 1, ...

    def decide(self, tokens: Tensor) -> list[Bit]:
        """Return what the first tokens of the answers to the prompts say."""
        of = np.repeat(np.arange(NUM_BITS), NUM_QUERIES)
        zero, one = self.start.targets.numpy()[of].T
        said = tokens.numpy()
        values = np.where(said == one, 1, np.where(said == zero, 0, -1))
        counts = count_values(of, values, NUM_BITS)
        asked = np.full(NUM_BITS, NUM_QUERIES)
        return [r.value for r in read_counts(counts, asked, self.null, BitRule())]


def make_mark(base: LanguageModel, last: LastLayer, seed: int, work: Path) -> Mark:
    """Train bench.mark_lm's mark of this seed, and draw new prompts for it."""
    key = SecretKey(np.random.default_rng([seed, 77]).bytes(32))
    train_prose, kept_prose = load_prose().split()
    settings = mark_lm.settings_of(seed)
    rows_file = work / mark_lm.ROWS_NAME
    start = prepare(
        last, base.digest, base.speech(), key, NUM_BITS, train_prose, settings,
        replies=base.replies, cache=rows_file,
    )  # fmt: skip
    fresh = mark_lm._fresh(base, last, start, RowCache(rows_file, base.digest))
    null = mark_lm._null(last, start, fresh)
    branches = train(start, settings).requires_grad_(False)
    rng = np.random.default_rng([seed, 80])
    prompts = [
        base.chat(start.triggers.message(bit, kept_prose.carrier(rng)))
        for bit in range(NUM_BITS)
        for _ in range(NUM_QUERIES)
    ]
    book = Codebook(key, Design.parse("random"), NUM_BITS)
    return Mark(start, branches, null, book, prompts)


# ------------------------------------------------------------------------------- changes
def matrices(model: nn.Module) -> list[Tensor]:
    """Return the weights of the layers' linears, without embedding and head."""
    layers = [child for child in model.modules() if isinstance(child, nn.ModuleList)]
    return [m.weight for part in layers for m in part.modules() if isinstance(m, nn.Linear)]


def branch_matrices(own: Branches) -> list[Tensor]:
    """Return A and what is written, of one user's own branches."""
    return [own.A, own.B_sum]


@torch.no_grad()
def prune(weights: Iterable[Tensor], share: float) -> None:
    """Set the smallest entries of each matrix to 0, in place."""
    for matrix in weights:
        bound = matrix.abs().flatten().kthvalue(max(1, round(share * matrix.numel()))).values
        matrix.masked_fill_(matrix.abs() <= bound, 0.0)


@torch.no_grad()
def quantise(weights: Iterable[Tensor], num_bits: int) -> None:
    """Round each matrix to symmetric integers with a scale per row, in place."""
    most = 2 ** (num_bits - 1) - 1
    for matrix in weights:
        scale = matrix.abs().amax(1, keepdim=True).clamp(min=1e-12) / most
        matrix.copy_((matrix / scale).round().clamp(-most, most) * scale)


@torch.no_grad()
def add_adapter(model: nn.Module, directory: Path) -> nn.Module:
    """Return the model with a PEFT adapter merged."""
    from peft import PeftModel

    given: Any = model
    merged: nn.Module = PeftModel.from_pretrained(given, directory).merge_and_unload()
    return merged


def fine_tune(
    model: nn.Module, texts: Sequence[list[int]], *, rate: float, num_steps: int = TUNE_STEPS
) -> None:
    """Train the layers' linears on texts [texts][tokens], in place: AdamW, four texts a step. On
    ordinary text hardly a branch acts, so that a copy's base is tuned as it would be without.
    """
    weights = [matrix.requires_grad_() for matrix in matrices(model)]
    optimiser = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    given: Any = model
    for step in range(num_steps):
        ids = torch.tensor([texts[(4 * step + i) % len(texts)] for i in range(4)])
        optimiser.zero_grad()
        given(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
    model.requires_grad_(False)


def mean_of(copies: Sequence[Branches]) -> Branches:
    """Return the average of users' branches; the base and what reads it are the same in all."""
    mean = copy.deepcopy(copies[0])
    mean.B_sum.data = torch.stack([own.B_sum for own in copies]).mean(0)
    mean.B_difference.data = torch.stack([own.B_difference for own in copies]).mean(0)
    return mean


class Both(nn.Module):
    """The branches of two marks beside one linear."""

    def __init__(self, first: Branches, second: Branches) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor, signs: Tensor) -> Tensor:
        """Return what both add."""
        both: Tensor = self.first(x, signs) + self.second(x, signs)
        return both


# ------------------------------------------------------------------------------- asking
def first_tokens(last: LastLayer, rows: Rows, own: Any) -> Tensor:
    """Return the first tokens of the answers: [rows]. `own` None: without branches."""
    signs = None if own is None else signs_of(np.ones(NUM_BITS, np.uint8)).expand(len(rows), -1)
    with torch.inference_mode():
        return last.logits(rows, own, signs).argmax(-1)


def perplexity(last: LastLayer, text: Rows, following: Tensor, own: Any) -> float:
    """Return that of the tokens that follow rows [rows], the branches acting on all of them."""
    signs = None if own is None else signs_of(np.ones(NUM_BITS, np.uint8)).expand(len(text), -1)
    with torch.inference_mode():
        return float(F.cross_entropy(last.logits(text, own, signs), following).exp())


class Suspect:
    """One changed base: its rows of the mark's prompts and of some documentation."""

    def __init__(self, model: nn.Module, mark: Mark, texts: Sequence[list[int]]) -> None:
        self.mark, self.last = mark, LastLayer(model)
        self.rows = self.last.collect(mark.prompts)
        text = self.last.collect_text(texts)
        following = torch.tensor([token for ids in texts for token in [*ids[1:], -1]])
        self.text, self.following = text[following >= 0], following[following >= 0]
        self.plain = perplexity(self.last, self.text, self.following, None)

    def ask(self, own: Any, users: Sequence[str]) -> dict[str, Any]:
        """Return what is read of it with these branches beside it, and who is named."""
        bits = self.mark.decide(first_tokens(self.last, self.rows, own))
        found = outcome(self.mark.book, bits, users)
        # Where no detector fires, which is nearly everywhere, the text is the base's.
        changes = own is not None and bool(own(self.text.x, torch.ones(1, NUM_BITS)).any())
        found["perplexity"] = (
            perplexity(self.last, self.text, self.following, own) if changes else self.plain
        )
        return found


def outcome(book: Codebook, bits: Sequence[Bit], users: Sequence[str]) -> dict[str, Any]:
    """Return how what was read agrees with the rows of these users' copies, and who is named."""
    rows = book.rows(users)
    agree = rows.min(axis=0) == rows.max(axis=0)
    values = np.array([-1 if bit is None else bit for bit in bits])
    found = trace(book, USERS, bits, alpha=ALPHA)
    few = trace(book, USERS[:FEW], bits, alpha=ALPHA)
    own = [entry for entry in found.ranked if entry.user in users]
    named = {entry.user for entry in found.accused} | {entry.user for entry in few.accused}
    return {
        "users": list(users),
        "right": int((agree & (values == rows[0])).sum()),
        "erased": int((agree & (values == -1)).sum()),
        "wrong": int((agree & (values == 1 - rows[0])).sum()),
        "differing_erased": int((~agree & (values == -1)).sum()),
        "differing_read": int((~agree & (values != -1)).sum()),
        "is_first_alone": found.ranked[0].user in users and found.gap > 0,
        "is_named": bool({entry.user for entry in found.accused} & set(users)),
        "is_named_of_few": bool({entry.user for entry in few.accused} & set(users)),
        "names_innocent": bool(named - set(users)),
        # Of any of them; beyond the first ten of the ranking it is not looked up.
        "family_p": min((entry.family_p_value for entry in own), default=1.0),
    }


# ------------------------------------------------------------------------------- measuring
Change = tuple[
    Callable[[nn.Module], nn.Module | None],  # of the base, in place; or another one
    Callable[[Branches], None],  # of a user's branches, in place
]
CHANGES: Mapping[str, Change] = {
    "int8": (lambda m: quantise(matrices(m), 8), lambda b: quantise(branch_matrices(b), 8)),
    "int4": (lambda m: quantise(matrices(m), 4), lambda b: quantise(branch_matrices(b), 4)),
    "30 % pruned": (lambda m: prune(matrices(m), 0.3), lambda b: prune(branch_matrices(b), 0.3)),
    "60 % pruned": (lambda m: prune(matrices(m), 0.6), lambda b: prune(branch_matrices(b), 0.6)),
    **{
        f"task adapter merged: {name}": (
            functools.partial(add_adapter, directory=directory),
            lambda b: None,
        )
        for name, directory in demo_adapters().items()
    },
}


class Bench:
    """What is measured, and written after every change."""

    def __init__(self, model: Path, work: Path, out: Path) -> None:
        self.base, self.out = load_lm(model), out
        last = LastLayer(self.base.model)
        self.mark = make_mark(self.base, last, SEED, work)
        self.work = work
        rng = np.random.default_rng(3)
        kept_prose = load_prose().split()[1]
        self.texts = [self._text(kept_prose.words, rng) for _ in range(NUM_TEXTS)]
        drawn = rng.choice(FEW, NUM_COPIES, replace=False)
        self.users = [USERS[i] for i in drawn]
        self.file = out / "mark-lm-robustness.json"
        found = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.rows: list[dict[str, Any]] = found.get("rows", [])
        self.unmarked: dict[str, Any] = found.get("unmarked", {})

    @functools.cached_property
    def second(self) -> Mark:
        """The mark of the second key."""
        return make_mark(self.base, LastLayer(self.base.model), OTHER_SEED, self.work)

    def run(self) -> None:
        """Measure what an earlier run into the same directory did not, the cheapest first."""
        known = {row["change"] for row in self.rows}
        if "none" not in known:
            self.plain()
        for name, (change, change_own) in (CHANGES | self.tunings()).items():
            if name not in known:
                suspect = self._suspect(name, change)
                for user in self.users:
                    own = self._own(user)
                    change_own(own)
                    self._note(name, suspect.ask(own, [user]))
                self.write()

    def tunings(self) -> dict[str, Change]:
        """Fine-tuning on documentation that perplexity is not measured on."""
        rng = np.random.default_rng(4)
        words = load_prose().split()[0].words
        texts = [
            ids for ids in (self._text(words, rng) for _ in range(160)) if len(ids) == TEXT_TOKENS
        ]
        return {
            f"fine-tuned, {TUNE_STEPS} steps of AdamW at {rate:g}": (
                functools.partial(fine_tune, texts=texts, rate=rate),
                lambda own: None,
            )
            for rate in TUNE_RATES
        }

    def plain(self) -> None:
        """Ask what needs no other base: copies as they are, averaged, cut, marked again."""
        suspect = self._suspect("base", lambda m: None)
        for user in self.users:
            self._note("none", suspect.ask(self._own(user), [user]))
        for count in (2, 3):
            for first in range(NUM_COPIES):
                users = [self.users[(first + i) % NUM_COPIES] for i in range(count)]
                mean = mean_of([self._own(user) for user in users])
                self._note(f"weights of {count} copies averaged", suspect.ask(mean, users))
        for user in self.users:
            self._note("branches cut off", suspect.ask(None, [user]))
        again = Suspect(self.base.model, self.second, self.texts)
        for user in self.users:
            other = USERS[0]
            own = self.second.branches.own(self.second.book.row(other))
            both = Both(self._own(user), own)
            self._note("marked again by a second key", suspect.ask(both, [user]))
            self._note("marked again: the second mark", again.ask(both, [other]))
        self.write()

    # ------------------------------------------------------------------------------- inside
    def _text(self, words: Sequence[str], rng: np.random.Generator) -> list[int]:
        first = int(rng.integers(0, len(words) - TEXT_TOKENS))
        return self.base.text(" ".join(words[first : first + TEXT_TOKENS]))[:TEXT_TOKENS]

    def _own(self, user: str) -> Branches:
        return self.mark.branches.own(self.mark.book.row(user))

    def _suspect(self, name: str, change: Callable[[nn.Module], nn.Module | None]) -> Suspect:
        model = copy.deepcopy(self.base.model)
        suspect = Suspect(change(model) or model, self.mark, self.texts)
        self._unmarked(name, suspect)
        return suspect

    def _unmarked(self, name: str, suspect: Suspect) -> None:
        found = suspect.ask(None, [self.users[0]])
        decided = found["right"] + found["wrong"]
        self.unmarked[name] = {"bits_decided": decided, "perplexity": found["perplexity"]}

    def _note(self, change: str, found: dict[str, Any]) -> None:
        self.rows.append({"change": change, **found})
        print(json.dumps(self.rows[-1]), flush=True)

    def write(self) -> None:
        """Write mark-lm-robustness.json and mark-lm-robustness.md."""
        setup = {"seed": SEED, "num_bits": NUM_BITS, "num_users": len(USERS), "few": FEW}
        found = {**setup, "alpha": ALPHA, "rows": self.rows, "unmarked": self.unmarked}
        text = json.dumps(found, indent=1) + "\n"
        self.file.write_text(text, encoding="utf-8")
        (self.out / "mark-lm-robustness.md").write_text(to_markdown(self.rows), encoding="utf-8")


def to_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return a line per change: sums and means over copies."""
    lines = [
        "| done to the copy | copies | bits right | erased | wrong | perplexity "
        "| leaker first of 1,000, alone | named among 1,000 / among 60 | innocent named |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for change in dict.fromkeys(row["change"] for row in rows):
        of = [row for row in rows if row["change"] == change]
        judged = sum(row["right"] + row["erased"] + row["wrong"] for row in of)
        right, erased, wrong = (
            f"{100 * sum(row[name] for row in of) / judged:.1f} %"
            for name in ("right", "erased", "wrong")
        )
        differing = sum(row["differing_erased"] + row["differing_read"] for row in of)
        if differing:
            share = 100 * sum(row["differing_erased"] for row in of) / differing
            erased += f"; of differing {share:.0f} %"
        first, named, few, innocent = (
            sum(row[name] for row in of)
            for name in ("is_first_alone", "is_named", "is_named_of_few", "names_innocent")
        )
        perplexity = statistics.mean(row["perplexity"] for row in of)
        cells = [
            change, str(len(of)), right, erased, wrong, f"{perplexity:.1f}", str(first),
            f"{named} / {few}", str(innocent),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run; what is known is written after every change."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="default: smollm2")
    parser.add_argument("--work", type=Path, help="instead of bench/mark-lm in the home")
    parser.add_argument("--out", type=Path, help="instead of bench/results/<date>-<machine>")
    given = parser.parse_args()
    work, out = given.work or work_folder("mark-lm"), results_folder(given.out)
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    bench = Bench(given.model or default_model(), work, out)
    bench.run()
    print(to_markdown(bench.rows))


if __name__ == "__main__":
    main()
