"""Whether tracing keeps its word: every lone leaker found, one of each averaged pair, and innocents
named no more often than alpha allows. Simulated, seeded, with counts.

    python -m bench.mark_tracing [--trials 300] [--out bench/results/<date>-<machine>]

1,000 users. Pairs are averaged: where copies differ, 38 % of the positions come out as erased and
the others as one of the copies'. For the error the leaker is none of the users who are compared, so
that whoever is named is innocent.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.mark_codes import Setting, simulate
from bench.places import results_folder

from polyadapt.watermark.statistics import binomial_tail, rate_upper_bound

NUM_USERS, ALPHA = 1000, 1e-3
CONFIDENCE = 0.99
SINGLE = (
    Setting("random", 32, 1),
    Setting("random", 48, 1, 0.05, 0.1),
    Setting("random", 64, 1, 0.05, 0.1),
)
PAIRS = (
    Setting("nuida2", 128, 2),
    Setting("nuida2", 192, 2),
    Setting("nuida2", 192, 2, 0.05, 0.1),
    Setting("nuida2", 256, 2),
)
OUTSIDE = (Setting("random", 64, 1, 0.05, 0.1), Setting("nuida2", 192, 2))
ALPHAS = (0.05, ALPHA)  # at the first one there is something to count


def run(num_trials: int) -> list[dict[str, Any]]:
    """Return a row per setting: pairs are tried a third as often, they take longer."""
    rows = []
    for setting in (*SINGLE, *PAIRS):
        is_pair = setting.num_colluders > 1
        trials = num_trials // 3 if is_pair else num_trials
        attack = "averaging" if is_pair else "interleaving"
        rows.append(_row(setting, attack, trials, ALPHA, is_outside=False))
    for setting in OUTSIDE:
        for alpha in ALPHAS:
            attack = "averaging" if setting.num_colluders > 1 else "interleaving"
            rows.append(_row(setting, attack, num_trials, alpha, is_outside=True))
    return rows


def _row(
    setting: Setting, attack: str, num_trials: int, alpha: float, *, is_outside: bool
) -> dict[str, Any]:
    found = simulate(
        setting,
        attack,
        num_trials=num_trials,
        num_users=NUM_USERS,
        alpha=alpha,
        seed=1,
        is_outside=is_outside,
    )
    row = {**asdict(setting), "attack": attack, "alpha": alpha, "is_outside": is_outside}
    return {**row, **asdict(found)}


def holds(row: dict[str, Any]) -> bool:
    """Whether as many innocents named are to be expected at alpha: not unless chance would give as
    many with less than 1 %.
    """
    tail = binomial_tail(row["num_accused_innocent"], row["num_trials"], row["alpha"])
    return tail >= 1 - CONFIDENCE


def to_markdown(rows: list[dict[str, Any]]) -> str:
    """Return both tables."""
    lines = [
        "| code | bits | leakers | flips + erasures | one of them named | in truth at least (99 %) "
        "| innocent named, at 1e-3 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if not row["is_outside"]:
            caught, trials = row["num_caught_any"], row["num_trials"]
            least = 1 - rate_upper_bound(trials - caught, trials, CONFIDENCE)
            cells = [*_setting(row), f"{caught} of {trials}", f"{least:.3f}"]
            cells.append(f"{row['num_accused_innocent']} of {trials}")
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| leakers who are not in the list | bits | leakers | flips + erasures | alpha "
        "| innocent named | in truth at most (99 %) | alpha holds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["is_outside"]:
            named, trials = row["num_accused_innocent"], row["num_trials"]
            most = rate_upper_bound(named, trials, CONFIDENCE)
            cells = [*_setting(row), f"{row['alpha']:g}", f"{named} of {trials}", f"{most:.3f}"]
            lines.append(f"| {' | '.join([*cells, 'yes' if holds(row) else 'NO'])} |")
    return "\n".join(lines) + "\n"


def _setting(row: dict[str, Any]) -> list[str]:
    noise = f"{row['flip_rate']:.0%} + {row['erasure_rate']:.0%}" if row["flip_rate"] else "none"
    return [row["design"], str(row["length"]), str(row["num_colluders"]), noise]


def main() -> None:
    """Run and write mark-tracing.json and mark-tracing.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--out", type=Path, help="instead of bench/results/<date>-<machine>")
    given = parser.parse_args()
    rows = run(given.trials)
    out = results_folder(given.out)
    text = json.dumps({"num_users": NUM_USERS, "rows": rows}, indent=1)
    (out / "mark-tracing.json").write_text(text + "\n", encoding="utf-8")
    (out / "mark-tracing.md").write_text(to_markdown(rows), encoding="utf-8")
    print(to_markdown(rows))


if __name__ == "__main__":
    main()
