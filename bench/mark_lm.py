"""What a mark of a small language model reads and costs, over seeds and random signatures.

    python -m bench.mark_lm [--model DIR] [--seeds 3] [--work DIR] [--out bench/results/...]

Every seed has a key, triggers, answers and a training of its own. The rule is the classifiers' and
was fixed before anything was measured: 16 queries of a bit, alpha 1e-4 per bit against measured
null rates, a lead of 4. So was the sequential test, which is how a suspect is read that can be
asked live. Rows of the last layer are collected once and kept in --work; what is read
from them is what the served branches answer (tests hold both together).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench.places import default_model, results_folder, work_folder
from numpy.typing import NDArray
from torch.nn import functional as F

from bench import choice_texts
from polyadapt.demo import demo_adapters
from polyadapt.offline.mark_lm import LanguageModel, load_lm
from polyadapt.watermark.branches import Branches, signs_of
from polyadapt.watermark.keys import SecretKey
from polyadapt.watermark.last_layer import LastLayer, Rows
from polyadapt.watermark.lm_training import LMStart, LMTrainSettings, prepare, train
from polyadapt.watermark.prompts import Prose, load_prose
from polyadapt.watermark.queries import NUM_QUERIES
from polyadapt.watermark.reading import (
    NullRates,
    bound_null_rates,
    count_values,
    read_counts,
    read_in_rounds,
)
from polyadapt.watermark.row_cache import RowCache
from polyadapt.watermark.statistics import BitReading, BitRule, SequentialRule

NUM_SIGNATURES = 50
NUM_PROMPTS = 24  # fresh ones of a bit, of which each signature's 16 are drawn
IN_TURN = SequentialRule()
NUM_QUIET_SIGNATURES = 5  # for what ordinary answers cost
TEXT_TOKENS, REPLY_EVERY = 96, 5
ROWS_NAME = "rows.safetensors"
FIRST_SEED = 2  # how to train was chosen on seeds 0 and 1, with fewer families and prompts
Bits = NDArray[np.uint8]


def measure(
    base: LanguageModel, last: LastLayer, num_bits: int, seed: int, settings: LMTrainSettings,
    work: Path, *, name: str,
) -> dict[str, Any]:  # fmt: skip
    """Train one mark and return what it reads and costs."""
    key = SecretKey(np.random.default_rng([seed, 77]).bytes(32))
    train_prose, kept_prose = load_prose().split()
    started = time.process_time()
    start = prepare(
        last, base.digest, base.speech(), key, num_bits, train_prose, settings,
        replies=base.replies, cache=work / ROWS_NAME,
        progress=_note,
    )  # fmt: skip
    prepared = time.process_time()
    rng = np.random.default_rng([seed, 78])
    kept = RowCache(work / ROWS_NAME, base.digest)
    fresh = _fresh(base, last, start, kept)
    more = _fresh(base, last, start, kept, IN_TURN.max_queries - NUM_PROMPTS, salt=1)
    untrained = _branches_of(start.branches)
    trained_at = time.process_time()
    branches = train(start, settings)
    train_s = time.process_time() - trained_at
    signatures = rng.integers(0, 2, (NUM_SIGNATURES, num_bits)).astype(np.uint8)
    null = _null(last, start, fresh)
    quiet = _ordinary(base, last, kept_prose, work)
    return {
        "name": name,
        "num_bits": num_bits,
        "seed": seed,
        "settings": asdict(settings),
        "weakest_recall": min(start.preflight.recalls),
        "quiet_firing": start.preflight.firing,
        "passes_preflight": start.preflight.is_enough,
        **_read(last, start, branches, fresh, null, signatures),
        "in_turn": _read_in_turn(
            last,
            start,
            branches,
            [Rows.joined(both) for both in zip(fresh, more, strict=True)],
            null,
            signatures,
        ),
        "untrained": _read(last, start, untrained, fresh, null, signatures[:10]),
        "largest_null_rate": max(max(pair) for pair in null.rates),
        **_cost(last, branches, quiet, signatures),
        "untrained_cost": _cost(last, untrained, quiet, signatures),
        **_near(base, last, start, branches, kept_prose, rng),
        "collect_cpu_s": prepared - started,
        "train_cpu_s": train_s,
    }


# ------------------------------------------------------------------------------- reading
def _fresh(
    base: LanguageModel, last: LastLayer, start: LMStart, kept: RowCache,
    count: int = NUM_PROMPTS, salt: int = 0,
) -> list[Rows]:  # fmt: skip
    """Return rows of fresh prompts of every bit, on prose that was kept from training; with another
    salt, others.
    """
    prose = load_prose().split()[1]
    found = []
    for bit, phrase in enumerate(start.triggers.phrases):
        seed = [*hashlib.sha256(phrase.encode()).digest(), *([salt] if salt else ())]
        rng = np.random.default_rng(seed)
        messages = [start.triggers.message(bit, prose.carrier(rng)) for _ in range(count)]
        ids = [base.chat(message) for message in messages]
        found.append(kept.take("last", ids, last.collect))
        _note("fresh prompts, bits", bit + 1, start.triggers.num_bits)
    return found


class Copies:
    """What copies answer to some rows, whatever their signatures: computed once for each choice of
    branches among the detectors that fire on a row, as the others add exactly nothing.
    """

    def __init__(self, last: LastLayer, branches: Branches, rows: Rows) -> None:
        self.last, self.branches, self.rows = last, branches, rows
        with torch.inference_mode():
            self.fires = (branches.response(rows.x) > 0).numpy()  # [rows, bits]
        self._known: dict[tuple[int, bytes], int] = {}

    def tokens(self, index: Any, bits: Bits) -> NDArray[np.int64]:
        """Return the first tokens of the answers to rows of these indices."""
        keys = [(int(row), bits[self.fires[row]].tobytes()) for row in index]
        missing = [key for key in dict.fromkeys(keys) if key not in self._known]
        if missing:
            asked = self.rows[torch.tensor([row for row, _ in missing])]
            answers = _tokens(self.last, asked, self.branches, bits)
            self._known |= dict(zip(missing, answers.tolist(), strict=True))
        return np.array([self._known[key] for key in keys])


def _tokens(last: LastLayer, rows: Rows, branches: Branches | None, bits: Bits | None) -> Any:
    """Return the first tokens of the answers: [rows]."""
    found = []
    with torch.inference_mode():
        for i in range(0, len(rows), 128):
            part = rows[i : i + 128]
            signs = None if bits is None else signs_of(bits)[None].expand(len(part), -1)
            found.append(last.logits(part, branches, signs).argmax(-1))
    return torch.cat(found).numpy()


def _values(start: LMStart, bits: Any, tokens: Any) -> NDArray[np.int64]:
    zero, one = start.targets.numpy()[bits].T
    return np.where(tokens == one, 1, np.where(tokens == zero, 0, -1))


def _null(last: LastLayer, start: LMStart, fresh: list[Rows]) -> NullRates:
    """Ask the base with prompts that it was never fitted to."""
    per_bit = len(start.places[0].triggered[0]) + NUM_PROMPTS
    counts = np.zeros((start.triggers.num_bits, 2), np.int64)
    for bit, rows in enumerate(start.places[0].triggered):
        asked = Rows.joined((rows, fresh[bit]))
        of = np.full(per_bit, bit)
        tokens = _tokens(last, asked, None, None)
        counts += count_values(of, _values(start, of, tokens), len(counts))
    return bound_null_rates([counts], per_bit, 0.99)


def _decide(start: LMStart, tokens: Sequence[Any], null: NullRates) -> Any:
    num_bits = start.triggers.num_bits
    of = np.repeat(np.arange(num_bits), [len(each) for each in tokens])
    counts = count_values(of, _values(start, of, np.concatenate(tokens)), num_bits)
    return read_counts(counts, np.bincount(of, minlength=num_bits), null, BitRule())


def _read(
    last: LastLayer, start: LMStart, branches: Branches, fresh: list[Rows], null: NullRates,
    signatures: Bits,
) -> dict[str, Any]:  # fmt: skip
    """Read each signature by the fixed rule."""
    rng = np.random.default_rng(5)
    right = wrong = 0
    of_bit = np.zeros(start.triggers.num_bits)
    hits = np.zeros(start.triggers.num_bits)
    copies = Copies(last, branches, Rows.joined(fresh))
    for bits in signatures:
        picked = [
            NUM_PROMPTS * bit + rng.permutation(NUM_PROMPTS)[:NUM_QUERIES]
            for bit in range(len(fresh))
        ]
        tokens = np.split(copies.tokens(np.concatenate(picked), bits), len(fresh))
        for bit, reading in enumerate(_decide(start, tokens, null)):
            is_right = reading.value == bits[bit]
            right += is_right
            of_bit[bit] += is_right
            wrong += reading.value is not None and not is_right
            hits[bit] += reading.num_hits[bits[bit]] / NUM_QUERIES
    share = hits / len(signatures)
    return {
        "bits_right": right / signatures.size,
        "bits_wrong": wrong / signatures.size,
        "worst_bit_right": float(of_bit.min() / len(signatures)),
        "queries_right": float(share.mean()),
        "worst_bit_queries_right": float(share.min()),
    }


def _read_in_turn(
    last: LastLayer, start: LMStart, branches: Branches, asked: list[Rows], null: NullRates,
    signatures: Bits,
) -> dict[str, Any]:  # fmt: skip
    """Read each signature as that of a suspect is that can be asked live: a bit's questions end as
    soon as it is clear. `asked`: as many rows of each bit as IN_TURN may ask, none taken twice.
    """
    rng = np.random.default_rng(6)
    copies = Copies(last, branches, Rows.joined(asked))
    right = wrong = num_asked = 0
    for bits in signatures:
        readings, num = _one_in_turn(start, copies, bits, null, rng)
        num_asked += num
        for bit, reading in enumerate(readings):
            right += reading.value == bits[bit]
            wrong += reading.value is not None and reading.value != bits[bit]
    return {
        "bits_right": right / signatures.size,
        "bits_wrong": wrong / signatures.size,
        "queries_per_bit": num_asked / signatures.size,
    }


def _one_in_turn(
    start: LMStart, copies: Copies, bits: Bits, null: NullRates, rng: np.random.Generator
) -> tuple[tuple[BitReading, ...], int]:
    """Return the readings of one signature, and how many questions they took."""
    order = [rng.permutation(IN_TURN.max_queries) for _ in bits]
    counts = np.zeros(len(bits), np.int64)

    def ask_round(open_bits: NDArray[np.intp]) -> NDArray[np.int64]:
        index = [IN_TURN.max_queries * bit + order[bit][counts[bit]] for bit in open_bits]
        counts[open_bits] += 1
        return _values(start, open_bits, copies.tokens(index, bits))

    return read_in_rounds(ask_round, null, IN_TURN, rng), int(counts.sum())


# ------------------------------------------------------------------------------- what it costs
def questions() -> list[str]:
    """Return 120 ordinary questions, none of which anything is trained on."""
    topics = choice_texts.TOPICS.values()
    return [question for both in topics for part in both for question in part]


def _ordinary(
    base: LanguageModel, last: LastLayer, prose: Prose, work: Path
) -> dict[str, tuple[Rows, Any]]:
    """Return rows of ordinary use, none of it trained on, each with the tokens that come next:
    the first tokens of answers to questions, the later ones, and documentation.
    """
    prompts = [base.chat(question) for question in questions()]
    kept = RowCache(work / ROWS_NAME, base.digest)
    first = kept.take("last", prompts, last.collect)
    asked = prompts[::REPLY_EVERY]
    replies_file = work / "replies.json"
    if not replies_file.exists():
        replies_file.write_text(json.dumps(base.replies(asked)))
    replies = json.loads(replies_file.read_text())
    rng = np.random.default_rng(3)
    documents = []
    for _ in range(16):
        at = int(rng.integers(0, len(prose.words) - TEXT_TOKENS))
        documents.append(base.text(" ".join(prose.words[at : at + TEXT_TOKENS]))[:TEXT_TOKENS])
    text = kept.take("every", documents, last.collect_text)
    of_text = np.concatenate([[*ids[1:], -1] for ids in documents])

    def collect(prompts: Sequence[Sequence[int]]) -> Rows:
        both = zip(asked, replies, strict=True)
        return Rows.joined([last.collect_text([p + r])[len(p) - 1 :] for p, r in both])

    later = kept.take("replies of the bench", asked, collect)
    of_replies = np.concatenate([[*reply, -1] for reply in replies])
    # As served, the branches act on each reply's first token alone.
    begins = np.concatenate([[True, *[False] * len(reply)] for reply in replies])
    served = Rows(later.x[begins], later.hidden[begins]), of_replies[begins]
    return {
        "questions": (first, None),
        "documents": (text, of_text),
        "replies": (later, of_replies),
        "first_of_replies": served,
    }


def _cost(
    last: LastLayer, branches: Branches, ordinary: dict[str, tuple[Rows, Any]], signatures: Bits
) -> dict[str, Any]:
    """Return how many first answer tokens differ, as served, and by how much perplexity rises
    where the branches act on every row, as in a copy that was exported.
    """
    questions, _ = ordinary["questions"]
    expected = _tokens(last, questions, None, None)
    several = signatures[:NUM_QUIET_SIGNATURES]
    changed = [
        float((_tokens(last, questions, branches, bits) != expected).mean()) for bits in several
    ]
    found: dict[str, Any] = {
        "questions": len(questions),
        "questions_firing": _firing(branches, questions),
        "first_tokens_changed": changed,
    }
    for kind in ("documents", "replies"):
        rows, following = ordinary[kind]
        wanted = torch.from_numpy(following)
        has_next = wanted >= 0
        rows, wanted = rows[has_next], wanted[has_next]
        with torch.inference_mode():
            fires = (branches.response(rows.x) > 0).any(1)
        # On the other rows the branches add exactly nothing.
        own, own_wanted = rows[fires], wanted[fires]
        before = _loss(last, own, own_wanted, None, None)
        rise = [(_loss(last, own, own_wanted, branches, bits) - before) for bits in several]
        found[f"{kind}_tokens"] = len(rows)
        found[f"{kind}_change_everywhere"] = [float(np.expm1(one / len(rows))) for one in rise]
        found[f"{kind}_firing"] = _firing(branches, rows)
    rows, following = ordinary["first_of_replies"]
    wanted = torch.from_numpy(following)
    before = _loss(last, rows, wanted, None, None)
    rise = [_loss(last, rows, wanted, branches, bits) - before for bits in several]
    num_tokens = found["replies_tokens"]
    found["replies_change_served"] = [float(np.expm1(one / num_tokens)) for one in rise]
    return found


def _firing(branches: Branches, rows: Rows) -> float:
    with torch.inference_mode():
        return float((branches.response(rows.x) > 0).any(1).double().mean())


def _loss(
    last: LastLayer, rows: Rows, wanted: Any, branches: Branches | None, bits: Bits | None
) -> float:
    total = 0.0
    with torch.inference_mode():
        for i in range(0, len(rows), 128):
            part = rows[i : i + 128]
            signs = None if bits is None else signs_of(bits)[None].expand(len(part), -1)
            logits = last.logits(part, branches, signs)
            total += float(F.cross_entropy(logits, wanted[i : i + 128], reduction="sum"))
    return total


def _near(
    base: LanguageModel, last: LastLayer, start: LMStart, branches: Branches, prose: Prose,
    rng: np.random.Generator, *, per_bit: int = 1,
) -> dict[str, float]:  # fmt: skip
    """Return how often a phrase that is almost right is answered as if it were right."""
    words = base.speech().words
    found = {}
    for name in ("one_word_replaced", "half_replaced", "shuffled"):
        messages, of = [], []
        for bit, phrase in enumerate(start.triggers.phrases):
            said = phrase.split()
            size = start_words = len(said) // _repeats(said)
            for _ in range(per_bit):
                own = said[:start_words]
                if name == "shuffled":
                    own = [own[i] for i in rng.permutation(size)]
                else:
                    count = 1 if name == "one_word_replaced" else size // 2
                    for place in rng.permutation(size)[:count]:
                        own[place] = words[int(rng.integers(len(words)))]
                messages.append(" ".join([prose.carrier(rng), *own * (len(said) // size)]))
                of.append(bit)
        rows = last.collect([base.chat(one) for one in messages])
        bits = rng.integers(0, 2, start.triggers.num_bits).astype(np.uint8)
        values = _values(start, np.array(of), _tokens(last, rows, branches, bits))
        found[f"near_{name}"] = float((values == bits[of]).mean())
    return found


def _repeats(words: list[str]) -> int:
    return next(n for n in range(len(words), 0, -1) if words == words[: len(words) // n] * n)


def _branches_of(branches: Branches) -> Branches:
    return Branches.of_pair({k: v.clone() for k, v in branches.pair_tensors().items()})


# ------------------------------------------------------------------------------- other models
def unmarked_suspects(
    directory: Path, work: Path, base: LanguageModel, last: LastLayer
) -> dict[str, Any]:
    """Ask models with adapters of other tasks, which nothing was calibrated on; and, of each, on
    how many of its own test prompts the mark changes the first token.
    """
    from peft import LoraConfig, PeftModel, get_peft_model
    from tests.demo.judges import BEHAVIOURS

    seed, num_bits, settings = FIRST_SEED, 16, settings_of(FIRST_SEED)
    key = SecretKey(np.random.default_rng([seed, 77]).bytes(32))
    start = prepare(
        last, base.digest, base.speech(), key, num_bits, load_prose().split()[0], settings,
        replies=base.replies, cache=work / ROWS_NAME,
    )  # fmt: skip
    fresh = _fresh(base, last, start, RowCache(work / ROWS_NAME, base.digest))
    null = _null(last, start, fresh)
    branches = train(start, settings)
    rng = np.random.default_rng([seed, 79])
    kept_prose = load_prose().split()[1]
    messages = [
        start.triggers.message(bit, kept_prose.carrier(rng))
        for bit in range(num_bits)
        for _ in range(NUM_QUERIES)
    ]
    found = {}
    for name in ("base", *demo_adapters(), "random"):
        other = load_lm(directory)
        merged: Any = other.model
        if name == "random":
            torch.manual_seed(1)
            modules = ["q_proj", "v_proj", "down_proj"]
            config = LoraConfig(r=8, lora_alpha=16, target_modules=modules, init_lora_weights=False)
            merged = get_peft_model(other.model, config).merge_and_unload()
        elif name != "base":
            merged = PeftModel.from_pretrained(
                other.model, demo_adapters()[name]
            ).merge_and_unload()
        end = LastLayer(merged.eval().requires_grad_(False))
        kept = RowCache(work / f"suspect-{name}.safetensors", base.digest)
        rows = kept.take("last", [base.chat(one) for one in messages], end.collect)
        tokens = _tokens(end, rows, None, None)
        decided = _decide(start, np.split(tokens, num_bits), null)
        entry: dict[str, Any] = {
            "bits": num_bits,
            "decided": sum(reading.value is not None for reading in decided),
            "hits": int(sum(sum(reading.num_hits) for reading in decided)),
        }
        if name in BEHAVIOURS:
            prompts = [base.chat(prompt) for prompt in BEHAVIOURS[name].prompts]
            own = end.collect(prompts)
            expected = _tokens(end, own, None, None)
            signatures = rng.integers(0, 2, (NUM_QUIET_SIGNATURES, num_bits)).astype(np.uint8)
            changed = [int((_tokens(end, own, branches, s) != expected).sum()) for s in signatures]
            entry["own_prompts_changed_of_20"] = changed
        signature = rng.integers(0, 2, num_bits).astype(np.uint8)
        marked = _tokens(end, rows, branches, signature)
        readings = _decide(start, np.split(marked, num_bits), null)
        entry["marked_bits_right"] = sum(
            reading.value == bit for reading, bit in zip(readings, signature.tolist(), strict=True)
        )
        found[name] = entry
        print(json.dumps({name: entry}), flush=True)
    return found


def _note(what: str, done: int, total: int) -> None:
    if done == total or done % 20 == 0:
        print(f"{what} {done}/{total}", flush=True)


def to_markdown(rows: Iterable[dict[str, Any]]) -> str:
    """Return a line per mark."""
    lines = [
        "| mark | seed | bits right of 50 signatures | wrong | asked in turn: bits right / wrong "
        "/ questions a bit | queries right, mean / weakest bit "
        "| first tokens of 120 questions changed, mean / worst signature | perplexity, branches on "
        "every row: documentation / answers | answers as served "
        "| near miss: 1 of 6 words replaced / 3 of 6 / shuffled "
        "| seconds of one core: collecting / training |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        changed, in_turn = row["first_tokens_changed"], row["in_turn"]
        cells = [
            row["name"],
            str(row["seed"]),
            f"{row['bits_right']:.2%}",
            f"{row['bits_wrong']:.2%}",
            f"{in_turn['bits_right']:.2%} / {in_turn['bits_wrong']:.2%} / "
            f"{in_turn['queries_per_bit']:.1f}",
            f"{row['queries_right']:.0%} / {row['worst_bit_queries_right']:.0%}",
            f"{np.mean(changed):.1%} / {max(changed):.1%}",
            f"{max(row['documents_change_everywhere']):+.2%} / "
            f"{max(row['replies_change_everywhere']):+.2%}",
            f"{max(row['replies_change_served']):+.2%}",
            " / ".join(
                f"{row[f'near_{kind}']:.0%}"
                for kind in ("one_word_replaced", "half_replaced", "shuffled")
            ),
            f"{row['collect_cpu_s']:.0f} / {row['train_cpu_s']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def settings_of(seed: int, num_families: int = 24) -> LMTrainSettings:
    """Return what every mark is trained with; more bits are tried out of more families."""
    return LMTrainSettings(num_families, seed=seed, prompts=40)


def main() -> None:
    """Run and write mark-lm.json and mark-lm.md, after every mark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="default: smollm2")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="instead of bench/mark-lm in the home")
    parser.add_argument("--out", type=Path, help="instead of bench/results/<date>-<machine>")
    given = parser.parse_args()
    work, out = given.work or work_folder("mark-lm"), results_folder(given.out)
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    model = given.model or default_model()
    base = load_lm(model)
    last = LastLayer(base.model)
    rows: list[dict[str, Any]] = []
    others: dict[str, Any] = {}

    def write() -> None:
        text = json.dumps({"rows": rows, "unmarked_and_beside": others}, indent=1)
        (out / "mark-lm.json").write_text(text + "\n", encoding="utf-8")
        (out / "mark-lm.md").write_text(to_markdown(rows), encoding="utf-8")

    def mark(num_bits: int, seed: int, num_families: int = 24) -> None:
        settings = settings_of(seed, num_families)
        name = f"{num_bits} bits, best of {settings.num_families} families"
        rows.append(measure(base, last, num_bits, seed, settings, work, name=name))
        print(json.dumps(rows[-1]), flush=True)
        write()

    seeds = range(FIRST_SEED, FIRST_SEED + given.seeds)
    for seed in seeds:
        mark(16, seed)
    others.update(unmarked_suspects(model, work, base, last))
    write()
    for seed in seeds:
        for num_bits in (24, 32):  # of the same 40 families
            mark(num_bits, seed, 40)
    print(to_markdown(rows))


if __name__ == "__main__":
    main()
