"""What a mark of the packaged digits' classifier reads and costs, over seeds and random signatures.

    python -m bench.mark_classifier [--seeds 5] [--out bench/results/<date>-<machine>]

Every seed has a base, a key, targets and a training of its own. Two references beside the base
calibrate; four models that are never seen before, and the base, are the unmarked suspects.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench.places import results_folder
from torch import nn

from polyadapt.watermark.branches import Branches, MarkedModel, signs_of
from polyadapt.watermark.classifier import Answer, answer_of, train_classifier
from polyadapt.watermark.dataset import load_digits
from polyadapt.watermark.keys import SecretKey
from polyadapt.watermark.reading import (
    NullRates,
    choose_targets,
    make_queries,
    measure_null_rates,
    read_answers,
    read_sequentially,
)
from polyadapt.watermark.statistics import BitRule, SequentialRule
from polyadapt.watermark.training import (
    TrainSettings,
    accuracies,
    firing_share,
    preflight,
    train,
)
from polyadapt.watermark.triggers import TriggerFamilies, TriggerSettings

NUM_SIGNATURES = 50
NUM_QUERIES = 16  # of a bit, by the fixed rule
NUM_REFERENCES, NUM_SUSPECTS = 2, 4
MODULE = "0"
Bits = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, slots=True)
class Case:
    """How many bits, and what the triggers are."""

    num_bits: int
    amplitude: float
    low: float | None = None
    high: float | None = None

    @property
    def name(self) -> str:
        """As the table has it."""
        return f"{self.num_bits} bits" + (", inputs kept in [0, 1]" if self.low == 0 else "")


CASES = (Case(16, 1.5), Case(32, 1.5), Case(32, 2.5, 0.0, 1.0))


def measure(case: Case, seed: int, models: list[nn.Sequential]) -> dict[str, Any]:
    """Train one mark on models[0], calibrate with the next two, and return what it reads."""
    data = load_digits()
    inputs, (held_out, truth) = data.train[0], data.held_out
    base, references = models[0], models[: 1 + NUM_REFERENCES]
    suspects = [base, *models[1 + NUM_REFERENCES :]]
    rng = np.random.default_rng([seed, 99])
    key = SecretKey(rng.bytes(32))
    spec = TriggerSettings(inputs.shape[1], case.amplitude, low=case.low, high=case.high)
    families = TriggerFamilies(key, case.num_bits, spec)
    found = preflight(base, MODULE, inputs, families, seed)
    targets = choose_targets(key, families, answer_of(base), inputs, 10, rng)
    started = time.perf_counter()
    branches = train(base, MODULE, inputs, families, targets, TrainSettings(seed=seed))
    seconds = time.perf_counter() - started
    null = measure_null_rates(
        [answer_of(model) for model in references], families, targets, held_out, rng
    )
    signatures = rng.integers(0, 2, (NUM_SIGNATURES, case.num_bits)).astype(np.uint8)
    accuracy = float((answer_of(base)(held_out) == truth).mean())
    marked = MarkedModel(base, MODULE, branches)
    drops = 100 * (accuracy - accuracies(marked, held_out, truth, signatures))
    ask_null = (families, targets, null, held_out, rng)
    right, wrong = _read(base, branches, signatures, *ask_null)
    false = sum(
        reading.value is not None
        for model in suspects
        for reading in _fixed(answer_of(model), *ask_null)
    )
    agreeing, erased = _averaged(base, branches, signatures[:20], *ask_null)
    steps_right, num_queries = _sequential(base, branches, signatures[:10], *ask_null)
    return {
        **asdict(case),
        "seed": seed,
        "weakest_separation": min(found.separations),
        "passes_preflight": found.is_enough,
        "base_accuracy": accuracy,
        "mean_drop": float(drops.mean()),
        "worst_drop": float(drops.max()),
        "untouched": 1 - firing_share(base, MODULE, branches, held_out),
        "bits_right": right / signatures.size,
        "bits_wrong": wrong / signatures.size,
        "bits_right_sequential": steps_right,
        "queries_per_bit_sequential": num_queries,
        "averaged_pairs_agreeing_right": agreeing,
        "averaged_pairs_differing_erased": erased,
        "unmarked_bits_decided": false,
        "unmarked_bits": len(suspects) * case.num_bits,
        "largest_null_rate": max(max(pair) for pair in null.rates),
        "foreign_answers_changed": _foreign(base, branches, signatures[0], families, held_out, rng),
        "seconds": seconds,
    }


def _copy(base: nn.Sequential, branches: Branches, bits: Bits) -> Answer:
    marked, signs = MarkedModel(base, MODULE, branches), signs_of(bits)[None]
    return answer_of(lambda x: marked(x, signs.expand(len(x), -1)))


def _fixed(
    ask: Answer,
    families: TriggerFamilies,
    targets: Any,
    null: NullRates,
    carriers: Any,
    rng: np.random.Generator,
) -> Any:
    queries = make_queries(families, carriers, NUM_QUERIES, rng)
    return read_answers(queries, ask(queries.inputs), targets, null, BitRule())


def _read(
    base: nn.Sequential, branches: Branches, signatures: Bits, *given: Any
) -> tuple[int, int]:
    right = wrong = 0
    for bits in signatures:
        values = [reading.value for reading in _fixed(_copy(base, branches, bits), *given)]
        right += sum(value == bit for value, bit in zip(values, bits.tolist(), strict=True))
        wrong += sum(
            value is not None and value != bit
            for value, bit in zip(values, bits.tolist(), strict=True)
        )
    return right, wrong


def _averaged(
    base: nn.Sequential, branches: Branches, signatures: Bits, *given: Any
) -> tuple[float, float]:
    """Read copies whose weights are the mean of two users': detectors are the same in both, so
    that at a bit where the two differ what is written is the mean of both branches, sign 0. Return
    the share of agreeing bits that are read right, and of differing ones that are erased.
    """
    marked = MarkedModel(base, MODULE, branches)
    agreeing, erased = [], []
    for one, two in zip(signatures[::2], signatures[1::2], strict=True):
        signs = (signs_of(one) + signs_of(two))[None] / 2
        ask = answer_of(lambda x, signs=signs: marked(x, signs.expand(len(x), -1)))
        for reading, a, b in zip(_fixed(ask, *given), one.tolist(), two.tolist(), strict=True):
            if a == b:
                agreeing.append(reading.value == a)
            else:
                erased.append(reading.value is None)
    return statistics.mean(agreeing), statistics.mean(erased)


def _sequential(
    base: nn.Sequential,
    branches: Branches,
    signatures: Bits,
    families: TriggerFamilies,
    targets: Any,
    null: NullRates,
    carriers: Any,
    rng: np.random.Generator,
) -> tuple[float, float]:
    right, queries = [], []
    for bits in signatures:
        ask = _copy(base, branches, bits)
        for reading, bit in zip(
            read_sequentially(ask, families, targets, carriers, null, SequentialRule(), rng),
            bits.tolist(),
            strict=True,
        ):
            right.append(reading.value == bit)
            queries.append(reading.num_queries)
    return statistics.mean(right), statistics.mean(queries)


def _foreign(
    base: nn.Sequential,
    branches: Branches,
    bits: Bits,
    families: TriggerFamilies,
    carriers: Any,
    rng: np.random.Generator,
) -> float:
    inputs = families.apply_foreign(carriers, rng)
    changed = _copy(base, branches, bits)(inputs) != answer_of(base)(inputs)
    return float(changed.mean())


def to_markdown(rows: list[dict[str, Any]]) -> str:
    """Return a line per case, over its seeds."""
    lines = [
        "| mark | seeds | bits right of 50 signatures | wrong | drop in points, mean / worst "
        "| answers untouched | weakest d' | pass the preflight | bits decided on unmarked models "
        "| averaged pairs: agreeing bits right, differing erased "
        "| queries a bit, one by one | answers to foreign patterns changed | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        of = [row for row in rows if {**row, **asdict(case)} == row]

        def span(
            name: str, of: list[dict[str, Any]] = of, scale: float = 1.0, digits: int = 2
        ) -> str:
            values = [scale * row[name] for row in of]
            low, high = (f"{value:.{digits}f}" for value in (min(values), max(values)))
            return low if low == high else f"{low} to {high}"

        cells = [
            case.name,
            str(len(of)),
            f"{span('bits_right', scale=100)} %",
            f"{span('bits_wrong', scale=100)} %",
            f"{span('mean_drop')} / {max(row['worst_drop'] for row in of):.2f}",
            f"{span('untouched', scale=100)} %",
            f"{min(row['weakest_separation'] for row in of):.1f}",
            f"{sum(row['passes_preflight'] for row in of)} of {len(of)}",
            f"{sum(row['unmarked_bits_decided'] for row in of)} of "
            f"{sum(row['unmarked_bits'] for row in of)}",
            f"{span('averaged_pairs_agreeing_right', scale=100, digits=0)} %, "
            f"{span('averaged_pairs_differing_erased', scale=100, digits=0)} %",
            span("queries_per_bit_sequential", digits=1),
            f"{span('foreign_answers_changed', scale=100, digits=1)} %",
            span("seconds", digits=0),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run and write mark-classifier.json and mark-classifier.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="instead of bench/results/<date>-<machine>")
    given = parser.parse_args()
    torch.set_num_threads(1)
    inputs, labels = load_digits().train
    num_others = NUM_REFERENCES + NUM_SUSPECTS
    others = [train_classifier(inputs, labels, seed=1000 + i) for i in range(num_others)]
    rows = []
    for seed in range(given.seeds):
        base = train_classifier(inputs, labels, seed=seed)
        for case in CASES:
            rows.append(measure(case, seed, [base, *others]))
            print(json.dumps(rows[-1]), flush=True)
    out = results_folder(given.out)
    text = json.dumps({"rows": rows}, indent=1)
    (out / "mark-classifier.json").write_text(text + "\n", encoding="utf-8")
    (out / "mark-classifier.md").write_text(to_markdown(rows), encoding="utf-8")
    print(to_markdown(rows))


if __name__ == "__main__":
    main()
