"""A language model's marked users over HTTP: how many questions name whom, of the base and beside
each demo adapter.

    python -m bench.mark_lm_http [--model DIR] [--users 5] [--out DIR]

The server of `make serve` with the committed mark of bench.mark_lm_beside (16 bits, fitted beside
the three adapters), which is required. Each user's key asks each model with `polyadapt mark who
--endpoint`, by its sequential rule, among 40 users. Before the mark is required one key asks each
model too: what is read then is of a model without a mark.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bench.places import default_model, results_folder
from tests.support.marked_model import MarkedModel, marked_model

from polyadapt.demo import demo_adapters

NAME = "mark-lm-http"
NUM_LISTED = 40


def measure(
    house: MarkedModel, model: str, rows: Mapping[str, list[int]], folder: Path, others: list[str]
) -> dict[str, Any]:
    """Ask one model as every user."""
    found: dict[str, Any] = {
        "model": model,
        "users": len(rows),
        "num_bits": house.mark.config.n_bits,
    }
    counts = dict.fromkeys(("right", "wrong", "named", "another_named"), 0)
    queries = []
    for user, row in rows.items():
        verdict = house.who(model, user, others, folder)
        pairs = list(zip(verdict.bits, row, strict=True))
        counts["right"] += sum(value == bit for value, bit in pairs)
        counts["wrong"] += sum(value not in (None, bit) for value, bit in pairs)
        counts["named"] += verdict.named == [house.ids[user]]
        counts["another_named"] += any(name != house.ids[user] for name in verdict.named)
        queries.append(verdict.num_queries)
        print(f"{model}: {user}, {verdict.num_queries} questions", flush=True)
    return {**found, **counts, "queries": queries}


def to_markdown(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return a line per model."""
    lines = [
        "| asked | users | bits right | wrong | named, and nobody else | questions of a reading "
        "| bits decided, questions without a mark |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        num_bits = row["users"] * row["num_bits"]
        cells = [
            row["model"], str(row["users"]), f"{row['right']} of {num_bits}", str(row["wrong"]),
            f"{row['named']} of {row['users']}",
            f"{min(row['queries'])} to {max(row['queries'])}",
            f"{row['unmarked_decided']}, {row['unmarked_queries']}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run, and write mark-lm-http.json and mark-lm-http.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="default: smollm2")
    parser.add_argument("--users", type=int, default=5)
    parser.add_argument("--out", type=Path, help="instead of bench/results/<date>-<machine>")
    given = parser.parse_args()
    out, model = results_folder(given.out), given.model or default_model()
    names = ["smollm2", *demo_adapters()]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, marked_model(Path(folder), model) as house:
        users = {f"user-{i}": house.add_user(f"user-{i}") for i in range(given.users)}
        others = [f"other-{i}" for i in range(NUM_LISTED - given.users)]
        unmarked = {name: house.who(name, "user-0", others, Path(folder)) for name in names}
        house.require()
        for name in names:
            before = unmarked[name]
            rows.append(
                {
                    **measure(house, name, users, Path(folder), others),
                    "unmarked_decided": sum(bit is not None for bit in before.bits),
                    "unmarked_queries": before.num_queries,
                }
            )
    text = json.dumps({"listed": NUM_LISTED, "rows": rows}, indent=1) + "\n"
    (out / f"{NAME}.json").write_text(text, encoding="utf-8")
    (out / f"{NAME}.md").write_text(to_markdown(rows), encoding="utf-8")
    print(to_markdown(rows))


if __name__ == "__main__":
    main()
