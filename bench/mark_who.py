"""The picture of docs/attribution.md, from a reading and a list of users that lie beside it.

    python -m bench.mark_who bench/results/<date>-<machine> [--read]

With --read a copy of the packaged digits' classifier is made, marked and read anew, which writes
mark-who.json: what was read, and every one of 1,000 users' scores. Without it only the picture is
drawn from that file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from polyadapt.watermark.attribution import Standing
from polyadapt.watermark.figure import figure

LEAKER = "user-412"
PICTURE = Path(__file__).parents[1] / "docs" / "attribution.svg"


def read(seed: int = 0) -> dict[str, Any]:
    """Return one attribution of an obfuscated copy that was pruned by 30 % after it had leaked."""
    import numpy as np
    import torch
    from bench.mark_robustness import USERS, answers_of, make_mark, prune

    from polyadapt.watermark.attribution import attribute_copy, standing_of_copy
    from polyadapt.watermark.classifier import train_classifier
    from polyadapt.watermark.dataset import load_digits
    from polyadapt.watermark.statistics import BitRule
    from polyadapt.watermark.trace import trace

    torch.set_num_threads(1)
    inputs, labels = load_digits().train
    base, *others = (train_classifier(inputs, labels, seed=n) for n in (seed, 1000, 1001))
    mark = make_mark("hinge", seed, base, others)
    leaked = mark.copy_of(LEAKER, "hinge, obfuscated")
    prune(leaked, 0.3)
    bits = mark.read(answers_of(leaked), np.random.default_rng(seed))
    found = trace(mark.book, USERS, bits)
    standing = standing_of_copy(mark.book, USERS, bits, found)
    return {
        "words": attribute_copy(found, BitRule().alpha).to_data(),
        "scores": {user: round(score, 6) for user, score in standing.scores.items()},
        "threshold": standing.threshold,
        "accused": list(standing.accused),
        "unit": standing.unit,
        "bits": list(standing.bits),
        "own_bits": list(standing.own_bits),
    }


def draw(found: dict[str, Any]) -> str:
    """Return the picture as SVG."""
    standing = Standing(
        found["scores"],
        found["threshold"],
        tuple(found["accused"]),
        found["unit"],
        tuple(found["bits"]),
        tuple(found["own_bits"]),
    )
    return figure(found["words"]["verdict"], standing)


def main() -> None:
    """Draw docs/attribution.svg from a folder of results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--read", action="store_true")
    given = parser.parse_args()
    file = given.folder / "mark-who.json"
    if given.read:
        file.write_text(json.dumps(read(), indent=1) + "\n", encoding="utf-8")
    found = json.loads(file.read_text(encoding="utf-8"))
    PICTURE.write_text(draw(found), encoding="utf-8")


if __name__ == "__main__":
    main()
