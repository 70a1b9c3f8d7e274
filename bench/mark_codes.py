"""How well codes of a length name leakers and coalitions: simulated, seeded, as a table.

    python -m bench.mark_codes [--trials 20] [--out bench/results/<date>-<machine>]

Nothing is trained: a reading is made from the colluders' rows by an attack, plus noise, and traced.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench.places import results_folder

from polyadapt.watermark.codebook import Codebook, Design
from polyadapt.watermark.keys import SecretKey
from polyadapt.watermark.trace import trace

ERASED = -1
Rows = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Setting:
    """One code and who attacks it."""

    design: str
    length: int
    num_colluders: int
    flip_rate: float = 0.0  # of positions that are read wrongly
    erasure_rate: float = 0.0

    def __str__(self) -> str:
        noise = f" {self.flip_rate:.0%}+{self.erasure_rate:.0%}" if self.flip_rate else ""
        return f"{self.design}/{self.length} against {self.num_colluders}{noise}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of `num_trials` traces."""

    num_trials: int
    num_caught_any: int
    num_caught_all: int
    num_accused_innocent: int  # traces that named one


def _majority(rows: Rows, rng: np.random.Generator) -> Rows:
    twice = 2 * rows.sum(axis=0)
    coin = rng.integers(0, 2, rows.shape[1])
    return np.where(twice == len(rows), coin, twice > len(rows))


def _minority(rows: Rows, rng: np.random.Generator) -> Rows:
    differ = rows.min(axis=0) != rows.max(axis=0)
    return np.where(differ, 1 - _majority(rows, rng), rows[0])


def _interleaving(rows: Rows, rng: np.random.Generator) -> Rows:
    return rows[rng.integers(0, len(rows), rows.shape[1]), np.arange(rows.shape[1])]


def _all_ones(rows: Rows, rng: np.random.Generator) -> Rows:
    return rows.max(axis=0)


def _averaging(rows: Rows, rng: np.random.Generator) -> Rows:
    """As weights averaged behaved on a toy: where copies differ, 38 % of the positions come out as
    erased and the others as one of the copies'.
    """
    differ = rows.min(axis=0) != rows.max(axis=0)
    gone = differ & (rng.random(rows.shape[1]) < 0.38)
    return np.where(gone, ERASED, _interleaving(rows, rng))


def _erasure(rows: Rows, rng: np.random.Generator) -> Rows:
    differ = rows.min(axis=0) != rows.max(axis=0)
    return np.where(differ, ERASED, rows[0])


# What a coalition may do at positions where its copies differ; where they agree it can do nothing.
ATTACKS: dict[str, Callable[[Rows, np.random.Generator], Rows]] = {
    "majority": _majority,
    "minority": _minority,
    "interleaving": _interleaving,
    "all ones": _all_ones,
    "averaging": _averaging,
    "erasure": _erasure,
}

SETTINGS = (
    Setting("random", 32, 1),
    Setting("random", 48, 1, 0.05, 0.1),
    Setting("random", 64, 1, 0.05, 0.1),
    Setting("nuida2", 96, 2),
    Setting("nuida2", 128, 2),
    Setting("nuida2", 192, 2),
    Setting("nuida2", 192, 2, 0.05, 0.1),
    Setting("nuida2", 256, 2),
    Setting("nuida4", 400, 3),
    Setting("nuida4", 500, 3),
    Setting("nuida4", 800, 4),
    Setting("tardos3", 600, 3),
)


def simulate(
    setting: Setting,
    attack: str,
    *,
    num_trials: int,
    num_users: int,
    alpha: float,
    seed: int,
    is_outside: bool = False,
) -> Outcome:
    """Trace that many attacks, each under a key of its own. With `is_outside` the colluders are
    none of the users who are compared.
    """
    rng = np.random.default_rng([seed, *setting.design.encode(), setting.length])
    users = tuple(f"user-{i}" for i in range(num_users))
    any_caught = all_caught = innocent = 0
    for _ in range(num_trials):
        book = Codebook(SecretKey(rng.bytes(32)), Design.parse(setting.design), setting.length)
        drawn = rng.choice(num_users, setting.num_colluders, replace=False)
        colluders = {f"{'outsider' if is_outside else 'user'}-{i}" for i in drawn}
        read = ATTACKS[attack](book.rows(sorted(colluders)).astype(int), rng)
        flipped = (rng.random(setting.length) < setting.flip_rate) & (read != ERASED)
        read = np.where(flipped, 1 - read, read)
        read = np.where(rng.random(setting.length) < setting.erasure_rate, ERASED, read)
        bits = [None if bit == ERASED else int(bit) for bit in read]
        accused = {entry.user for entry in trace(book, users, bits, alpha=alpha).accused}
        any_caught += bool(accused & colluders)
        all_caught += colluders <= accused
        innocent += bool(accused - colluders)
    return Outcome(num_trials, any_caught, all_caught, innocent)


def run(num_trials: int, num_users: int = 1000, alpha: float = 1e-3) -> list[dict[str, Any]]:
    """Return every setting under every attack that means something to so many colluders."""
    rows = []
    for setting in SETTINGS:
        attacks = list(ATTACKS) if setting.num_colluders > 1 else ["interleaving"]
        for attack in attacks:
            # Lone leakers are cheap, and none may be missed.
            trials = num_trials * (5 if setting.num_colluders == 1 else 1)
            outcome = simulate(
                setting, attack, num_trials=trials, num_users=num_users, alpha=alpha, seed=0
            )
            rows.append({**asdict(setting), "attack": attack, **asdict(outcome)})
    return rows


def to_markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table: of each setting the attack that came off best, and erasure by itself."""
    lines = [
        "| code | bits | colluders | flips + erasures | at least one named, worst attack "
        "| all named | at least one, every difference erased | innocent named |",
        "|---|---|---|---|---|---|---|---|",
    ]
    keys = ("design", "length", "num_colluders", "flip_rate", "erasure_rate")
    for key in dict.fromkeys(tuple(row[name] for name in keys) for row in rows):
        of = [row for row in rows if tuple(row[name] for name in keys) == key]
        hybrid = [row for row in of if row["attack"] != "erasure"]
        worst = min(hybrid, key=lambda row: (row["num_caught_any"], row["num_caught_all"]))
        erased = next((row for row in of if row["attack"] == "erasure"), None)
        trials = worst["num_trials"]
        is_pair = key[2] > 1
        cells = [
            key[0],
            str(key[1]),
            str(key[2]),
            f"{key[3]:.0%} + {key[4]:.0%}" if key[3] else "none",
            f"{worst['num_caught_any'] / trials:.2f}"
            + (f" ({worst['attack']})" if is_pair else ""),
            f"{worst['num_caught_all'] / trials:.2f}" if is_pair else "-",
            f"{erased['num_caught_any'] / trials:.2f}" if erased else "-",
            f"{sum(row['num_accused_innocent'] for row in of)} of "
            f"{sum(row['num_trials'] for row in of)}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run and write mark-codes.json and mark-codes.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--out", type=Path, help="instead of bench/results/<date>-<machine>")
    given = parser.parse_args()
    rows = run(given.trials)
    out = results_folder(given.out)
    text = json.dumps({"num_users": 1000, "alpha": 1e-3, "rows": rows}, indent=1)
    (out / "mark-codes.json").write_text(text + "\n", encoding="utf-8")
    (out / "mark-codes.md").write_text(to_markdown(rows), encoding="utf-8")
    print(to_markdown(rows))


if __name__ == "__main__":
    main()
