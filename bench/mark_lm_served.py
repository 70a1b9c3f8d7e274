"""A language model's mark in the server's own engine: is what users' copies say first what was
measured from collected rows, and are the same bits read from it?

    python -m bench.mark_lm_served [--model DIR] [--seed 3] [--work DIR] [--out DIR]

Trains the mark of bench.mark_lm of that seed from the rows in --work, converts it as `polyadapt
convert --from markboard` does, and asks engine and offline model the same fresh questions.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench.places import default_model, results_folder, work_folder
from numpy.typing import NDArray
from safetensors.torch import save_file
from tests.support.engines import Driver, greedy_request, new_engine, put_blob

from bench import mark_lm
from polyadapt.adapters.families.conversion import Given
from polyadapt.offline.convert import convert, read_source
from polyadapt.offline.mark_lm import LanguageModel, load_lm
from polyadapt.types import AdapterId, AppliedAdapter, Request
from polyadapt.watermark.branches import Branches
from polyadapt.watermark.codebook import Codebook, Design
from polyadapt.watermark.keys import SecretKey
from polyadapt.watermark.last_layer import LastLayer
from polyadapt.watermark.lm_training import LMStart, prepare, train
from polyadapt.watermark.mark_directory import BRANCHES_NAME, MarkDirectory
from polyadapt.watermark.prompts import load_prose
from polyadapt.watermark.queries import NUM_QUERIES, ChatQuery, queries_for, read_replies
from polyadapt.watermark.reading import NullRates
from polyadapt.watermark.row_cache import RowCache
from polyadapt.watermark.statistics import BitRule

USERS = ("alice", "bob")
RESULT_NAME = "mark-lm-served.json"
NUM_ANSWERS, ANSWER_TOKENS = 16, 16  # whole greedy answers to ordinary questions
DESIGN = Design.parse("random")


def measure(
    model: Path, work: Path, *, num_bits: int = 16, seed: int = 3, per_bit: int = NUM_QUERIES
) -> dict[str, Any]:
    """Serve the mark to two users in one batch and return what agrees, is read and changes."""
    base, settings = load_lm(model), mark_lm.settings_of(seed)
    last = LastLayer(base.model)
    key = SecretKey(np.random.default_rng([seed, 77]).bytes(32))
    start = prepare(
        last, base.digest, base.speech(), key, num_bits, load_prose().split()[0], settings,
        replies=base.replies, cache=work / mark_lm.ROWS_NAME,
    )  # fmt: skip
    kept = RowCache(work / mark_lm.ROWS_NAME, base.digest)
    null = mark_lm._null(last, start, mark_lm._fresh(base, last, start, kept))
    branches = train(start, settings)
    codes = Codebook(key, DESIGN, num_bits)
    bits: dict[str, NDArray[np.uint8]] = {user: codes.row(user) for user in USERS}
    rng = np.random.default_rng([seed, 80])
    asked = queries_for(start.triggers, load_prose().split()[1], per_bit, rng)
    questions = mark_lm.questions()
    messages = [*(query.message for query in asked), *questions]

    rows = kept.take("last", [base.chat(message) for message in messages], last.collect)
    offline: dict[str, list[int]] = {"": mark_lm._tokens(last, rows, None, None).tolist()}
    for user in USERS:
        offline[user] = mark_lm._tokens(last, rows, branches, bits[user]).tolist()

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        _convert(base, last, start, branches, num_bits, root)
        mark = put_blob(root / "blobs", root / "adapter", "mark")
        engine = new_engine(
            model, root / "blobs", kv_cache_bytes=256 << 20, max_num_seqs=32,
            max_num_batched_tokens=1024,
        )  # fmt: skip
        driver = Driver(engine)
        driver.load(mark)
        began = time.perf_counter()
        first = _run(driver, base, mark, bits, messages, 1)
        seconds = time.perf_counter() - began
        whole = _run(driver, base, mark, bits, questions[:NUM_ANSWERS], ANSWER_TOKENS)
        engine.pool.close()
    served = {user: [tokens[0] for tokens in first[user]] for user in first}
    found: dict[str, Any] = {
        "num_bits": num_bits,
        "seed": seed,
        "queries_per_bit": per_bit,
        "requests_of_one_token": len(messages) * len(first),
        "engine_s": seconds,
        "base_first_tokens_as_offline": _same(served[""], offline[""]),
        "queries": len(asked),
        "questions": len(questions),
        "users": {},
    }
    for user in USERS:
        inside = _read(base, start, asked, served[user], null)
        outside = _read(base, start, asked, offline[user], null)
        found["users"][user] = {
            "signature": "".join(map(str, bits[user])),
            "first_tokens_as_offline": _same(served[user], offline[user]),
            "of": len(messages),
            "bits_served": inside,
            "bits_offline": outside,
            "readings_equal": inside == outside,
            "bits_right": sum(a == b for a, b in zip(inside, bits[user].tolist(), strict=True)),
            "first_tokens_of_questions_changed": len(questions)
            - _same(served[user][len(asked) :], served[""][len(asked) :]),
            "answers_changed": NUM_ANSWERS - _same(whole[user], whole[""]),
            "answers": NUM_ANSWERS,
            "answer_tokens": ANSWER_TOKENS,
        }
    return found


def _convert(
    base: LanguageModel, last: LastLayer, start: LMStart, branches: Branches, num_bits: int,
    root: Path,
) -> None:  # fmt: skip
    """Write the mark as `polyadapt mark train` does, and of it the adapter that is served."""
    mark = MarkDirectory.create(root / "mark", DESIGN, num_bits, SecretKey(bytes(32)), task="lm")
    stored = {f"{last.module}.{name}": each for name, each in branches.pair_tensors().items()}
    save_file(stored, mark.path / BRANCHES_NAME)
    mark.trained(base.digest, last.module, start.triggers, start.targets.numpy())
    source = read_source(mark.path, "markboard")
    convert("markboard", source, Given(), root / "adapter", force=False)


def _run(
    driver: Driver, base: LanguageModel, mark: AdapterId, bits: dict[str, NDArray[np.uint8]],
    messages: Sequence[str], num_tokens: int,
) -> dict[str, list[list[int]]]:  # fmt: skip
    """Ask everything as every user and as nobody, side by side; tokens by user and message."""
    applied: dict[str, tuple[AppliedAdapter, ...]] = {"": ()}
    for user, row in bits.items():
        options = (("signature", "".join(map(str, row))),)
        applied[user] = (AppliedAdapter(mark, options=options, is_mandatory=True),)
    requests: list[Request] = []
    for index, message in enumerate(messages):
        ids = base.chat(message)
        for user, adapters in applied.items():
            request = greedy_request(f"{num_tokens}-{user}-{index}", ids, None, num_tokens)
            requests.append(replace(request, adapters=adapters))
    done = driver.run(*requests)
    return {
        user: [done[f"{num_tokens}-{user}-{index}"].tokens for index in range(len(messages))]
        for user in applied
    }


def _read(
    base: LanguageModel, start: LMStart, asked: Sequence[ChatQuery], tokens: Sequence[int],
    null: NullRates,
) -> list[int | None]:  # fmt: skip
    """Return each bit as decided from the texts of first tokens; None where it is not."""
    replies = [base.tokenizer.decode([token]) for token in tokens[: len(asked)]]
    return [each.value for each in read_replies(start.triggers, asked, replies, null, BitRule())]


def _same(some: Sequence[Any], others: Sequence[Any]) -> int:
    return sum(a == b for a, b in zip(some, others, strict=True))


def main() -> None:
    """Run and write mark-lm-served.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="default: smollm2")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--per-bit", type=int, default=NUM_QUERIES)
    parser.add_argument("--work", type=Path, help="instead of bench/mark-lm in the home")
    parser.add_argument("--out", type=Path, help="instead of bench/results/<date>-<machine>")
    given = parser.parse_args()
    work, out = given.work or work_folder("mark-lm"), results_folder(given.out)
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    model = given.model or default_model()
    found = measure(model, work, seed=given.seed, per_bit=given.per_bit)
    text = json.dumps(found, indent=1) + "\n"
    (out / RESULT_NAME).write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
