"""What a language model's mark reads and costs beside task adapters: those that it was fitted
beside, and one at a time that it never saw.

    python -m bench.mark_lm_beside [--model DIR] [--seeds 2] [--work DIR] [--out DIR]

The adapters are the demo adapters, merged. A mark of every seed is fitted beside all three; of the
first seed one more beside each two of them, which is read beside the third. The rule is
bench.mark_lm's and was fixed before anything was measured: 16 queries of a bit, alpha 1e-4 per bit
against measured null rates, a lead of 4. Null rates are the base's alone, 104 prompts a bit; that
no adapter without a mark has a bit decided by them is counted. Ordinary messages are
ordinary_messages.txt and what the demo adapters were trained to be asked; what is measured on,
prompts of the adapters' tests and bench.mark_lm's questions, are none of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench.places import default_model, results_folder, work_folder
from safetensors.torch import save_file
from tests.demo.judges import BEHAVIOURS

from bench import mark_lm
from polyadapt.demo import demo_adapters
from polyadapt.offline.mark_lm import LanguageModel, besides, load_beside, load_lm
from polyadapt.watermark.branches import Branches
from polyadapt.watermark.keys import SecretKey
from polyadapt.watermark.last_layer import LastLayer, Rows
from polyadapt.watermark.lm_training import LMStart, LMTrainSettings, prepare, train
from polyadapt.watermark.prompts import load_prose
from polyadapt.watermark.queries import NUM_QUERIES
from polyadapt.watermark.reading import NullRates, bound_null_rates, count_values
from polyadapt.watermark.row_cache import RowCache

NUM_BITS, NUM_FAMILIES = 16, 24
NUM_NULL = 48  # prompts a bit that nothing else is asked with; with the others 104
HERE = Path(__file__).resolve().parent
NAME = "mark-lm-beside"
# Of quiet rows, what may trip a detector, and steps: that of marks of the base, and the default.
STRICT, LOOSE = (0.002, 80), (0.004, 200)


def ordinary_messages() -> list[str]:
    """Return what a platform would know of ordinary requests."""
    path = HERE.parent / "tools" / "demo_adapters" / "data.py"
    spec = importlib.util.spec_from_file_location("demo_adapters_data", path)
    assert spec is not None
    assert spec.loader is not None
    data: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = data  # dataclasses look their own module up
    spec.loader.exec_module(data)
    lines = (HERE / "ordinary_messages.txt").read_text(encoding="utf-8").splitlines()
    asked = [item.question for item in data.ITEMS]
    asked += [question for questions, _ in data._FACTS for question in questions[::2]]
    return [*filter(None, lines), *asked]


class Measured:
    """One base, its adapters, and the rows that were collected of them."""

    def __init__(self, directory: Path, work: Path) -> None:
        self.directory, self.work = directory, work
        self.base = load_lm(directory)
        self.last = LastLayer(self.base.model)
        self.adapters = dict(zip(demo_adapters(), besides(directory, [*demo_adapters().values()]),
                                 strict=True))  # fmt: skip
        self.train_prose, self.kept_prose = load_prose().split()

    def start(self, settings: LMTrainSettings, names: Iterable[str]) -> LMStart:
        """Return what training of this seed begins with beside these adapters."""
        return prepare(
            self.last, self.base.digest, self.base.speech(), key_of(settings.seed), NUM_BITS,
            self.train_prose, settings, beside=[self.adapters[name] for name in names],
            ordinary=ordinary_messages(), replies=self.base.replies, cache=self._file,
            progress=mark_lm._note,
        )  # fmt: skip

    def place(self, name: str, seed: int, start: LMStart) -> Place:
        """Return what was never trained on of the base (`base`) or beside an adapter."""
        model = self.base if name == "base" else self._beside(name)
        last = self.last if name == "base" else LastLayer(model.model)
        kind = "last" if name == "base" else f"last beside {self.adapters[name].digest}"
        kept = RowCache(self._file, self.base.digest)

        def rows(messages: Sequence[str]) -> Rows:
            return kept.take(kind, [self.base.chat(each) for each in messages], last.collect)

        fresh = [rows(self._asked(phrase, seed, NUM_QUERIES)) for phrase in start.triggers.phrases]
        null = []
        if name == "base":
            null = [
                rows(self._asked(phrase, seed + 1000, NUM_NULL))
                for phrase in start.triggers.phrases
            ]
        own = {
            each: rows(BEHAVIOURS[each].prompts)
            for each in ([name] if name != "base" else BEHAVIOURS)
        }
        return Place(last.end(), fresh, null, own, rows(mark_lm.questions()))

    @property
    def _file(self) -> Path:
        return self.work / mark_lm.ROWS_NAME

    def _beside(self, name: str) -> LanguageModel:
        return load_beside(self.directory, demo_adapters()[name])

    def _asked(self, phrase: str, seed: int, count: int) -> list[str]:
        # By the phrase and not by its place, so that marks of the same key share their rows.
        rng = np.random.default_rng([seed, 81, zlib.crc32(phrase.encode())])
        return [f"{self.kept_prose.carrier(rng)} {phrase}" for _ in range(count)]


class Place:
    """The base or what an adapter makes of it: rows of fresh prompts of each bit, of those that
    null rates are measured with, of the adapters' own test prompts, and of ordinary questions.
    """

    def __init__(
        self, last: LastLayer, fresh: list[Rows], null: list[Rows], own: Mapping[str, Rows],
        questions: Rows,
    ) -> None:  # fmt: skip
        self.last, self.fresh, self.null = last, fresh, null
        self.own, self.questions = own, questions


def null_rates(start: LMStart, base: Place) -> NullRates:
    """Return bounds on what the base answers to the triggers."""
    counts = np.zeros((NUM_BITS, 2), np.int64)
    for bit in range(NUM_BITS):
        asked = Rows.joined((start.places[0].triggered[bit], base.fresh[bit], base.null[bit]))
        tokens = mark_lm._tokens(base.last, asked, None, None)
        of = np.full(len(asked), bit)
        counts += count_values(of, mark_lm._values(start, of, tokens), NUM_BITS)
    return bound_null_rates([counts], len(asked), 0.99)


def read(
    start: LMStart, branches: Branches, place: Place, null: NullRates, seed: int
) -> dict[str, Any]:
    """Read 50 signatures and nobody's, and count what else changes."""
    rng = np.random.default_rng([seed, 82])
    signatures = rng.integers(0, 2, (mark_lm.NUM_SIGNATURES, NUM_BITS)).astype(np.uint8)
    copies = mark_lm.Copies(place.last, branches, Rows.joined(place.fresh))
    every = np.arange(NUM_BITS * NUM_QUERIES)
    right = wrong = 0
    hits = np.zeros(NUM_BITS)
    for bits in signatures:
        tokens = np.split(copies.tokens(every, bits), NUM_BITS)
        for bit, reading in enumerate(mark_lm._decide(start, tokens, null)):
            right += reading.value == bits[bit]
            wrong += reading.value is not None and reading.value != bits[bit]
            hits[bit] += reading.num_hits[bits[bit]] / NUM_QUERIES
    plain = np.split(mark_lm._tokens(place.last, Rows.joined(place.fresh), None, None), NUM_BITS)
    unmarked = mark_lm._decide(start, plain, null)
    share = hits / len(signatures)
    several = signatures[: mark_lm.NUM_QUIET_SIGNATURES]
    own = Rows.joined([*place.own.values()])
    return {
        "bits_right": right / signatures.size,
        "bits_wrong": wrong / signatures.size,
        "queries_right": float(share.mean()),
        "worst_bit_queries_right": float(share.min()),
        "own_prompts": len(own),
        "own_changed": _changed(place.last, own, branches, several),
        "questions": len(place.questions),
        "questions_changed": _changed(place.last, place.questions, branches, several),
        "unmarked_bits_decided": sum(reading.value is not None for reading in unmarked),
        "unmarked_hits": int(sum(sum(reading.num_hits) for reading in unmarked)),
        "largest_null_rate": max(max(pair) for pair in null.rates),
    }


def _changed(last: LastLayer, rows: Rows, branches: Branches, signatures: Any) -> list[int]:
    expected = mark_lm._tokens(last, rows, None, None)
    return [
        int((mark_lm._tokens(last, rows, branches, bits) != expected).sum()) for bits in signatures
    ]


def key_of(seed: int) -> SecretKey:
    """Return bench.mark_lm's key of a seed."""
    return SecretKey(np.random.default_rng([seed, 77]).bytes(32))


def settings_of(seed: int, quiet_share: float, num_steps: int) -> LMTrainSettings:
    """Return what a mark is trained with."""
    return LMTrainSettings.beside_adapters(
        NUM_FAMILIES, seed=seed, prompts=40, quiet_share=quiet_share, num_steps=num_steps
    )


def to_markdown(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return a line per mark and place."""
    lines = [
        "| seed | quiet share, steps | fitted beside | read beside | bits right of 50 signatures "
        "| wrong | queries right, mean / weakest bit | first tokens changed, worst of 5 "
        "signatures: own test prompts / 120 questions | bits decided without the mark |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        fitted = ", ".join(row["fitted_beside"]) or "the base alone"
        cells = [
            str(row["seed"]), f"{row['quiet_share']:.1%}, {row['num_steps']}", fitted,
            row["read_beside"] if row["was_seen"] else f"**{row['read_beside']}**, never seen",
            f"{row['bits_right']:.1%}", f"{row['bits_wrong']:.1%}",
            f"{row['queries_right']:.0%} / {row['worst_bit_queries_right']:.0%}",
            f"{max(row['own_changed'])} of {row['own_prompts']} / {max(row['questions_changed'])}",
            str(row["unmarked_bits_decided"]),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Write mark-lm-beside.json and mark-lm-beside.md."""
    (out / f"{NAME}.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    (out / f"{NAME}.md").write_text(to_markdown(rows), encoding="utf-8")


def save(start: LMStart, branches: Branches, file: Path) -> None:
    """Write the mark for tests/demo, whose key is no secret: branches, phrases and answers."""
    said = {"phrases": start.triggers.phrases, "answers": start.triggers.answers}
    stored = {name: tensor.contiguous() for name, tensor in branches.pair_tensors().items()}
    save_file(stored, file, {"triggers": json.dumps(said)})


def main() -> None:
    """Run; what is known is written after every place."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="default: smollm2")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=mark_lm.FIRST_SEED)
    parser.add_argument("--work", type=Path, help="instead of bench/mark-lm in the home")
    parser.add_argument("--out", type=Path, help="instead of bench/results/<date>-<machine>")
    given = parser.parse_args()
    work, out = given.work or work_folder("mark-lm"), results_folder(given.out)
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    measured = Measured(given.model or default_model(), work)
    every = list(demo_adapters())
    rows: list[dict[str, Any]] = []
    for seed in range(given.first_seed, given.first_seed + given.seeds):
        fits = [(STRICT, every, ["base", *every]), (LOOSE, every, ["base", *every])]
        if seed == mark_lm.FIRST_SEED:
            fits += [(STRICT, [e for e in every if e != name], [name]) for name in every]
        for (quiet_share, num_steps), fitted, places in fits:
            settings = settings_of(seed, quiet_share, num_steps)
            start = measured.start(settings, fitted)
            branches = train(start, settings)
            base = measured.place("base", seed, start)
            null = null_rates(start, base)
            if fitted == every:
                save(start, branches, out / f"{NAME}-{seed}-{quiet_share:g}.safetensors")
            for name in places:
                place = base if name == "base" else measured.place(name, seed, start)
                found = {
                    "seed": seed,
                    "quiet_share": quiet_share,
                    "num_steps": num_steps,
                    "fitted_beside": fitted,
                    "read_beside": name,
                    "was_seen": name == "base" or name in fitted,
                }
                rows.append({**found, **read(start, branches, place, null, seed)})
                print(json.dumps(rows[-1]), flush=True)
                write(rows, out)
    print(to_markdown(rows))


if __name__ == "__main__":
    main()
