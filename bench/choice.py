"""How well `model: "auto"` chooses on a real model: its own code and engine, texts of bench/.

    python -m bench.choice --model DIRECTORY

For the three demo adapters, for six other topics and for all nine: the leave-out figures that a
default threshold is chosen by, and what becomes of requests that are nobody's example. No adapter
is loaded: profiles are made of the base's embeddings alone. Prints Markdown.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bench.choice_texts import DEMO_HELD_OUT, FRESH, FRESH_NOBODYS, TOPICS
from tests.demo.judges import BEHAVIOURS
from tests.support.engines import Driver, new_engine

from polyadapt.demo import DEMOS
from polyadapt.tasks.background import BACKGROUND
from polyadapt.tasks.choice import Index, Space, centroids_of, left_out_scores
from polyadapt.tasks.tokenizer import Tokenizer
from polyadapt.types import Embedded, Request, SamplingParams

_FOLDS = 8
_THRESHOLDS = (0.25, 0.30, 0.33, 0.35, 0.37, 0.39, 0.42, 0.45)
_DEMO = {demo.name: demo.examples for demo in DEMOS}
_EXAMPLES = _DEMO | {name: examples for name, (examples, _) in TOPICS.items()}
_HELD_OUT = {
    **DEMO_HELD_OUT,
    "tea-house": BEHAVIOURS["tea-house"].prompts,
    **{name: held for name, (_, held) in TOPICS.items()},
}
# General questions. A few might as well be asked of a topic ("Suggest something for dinner.").
_NOBODYS = (*BEHAVIOURS["pirate"].prompts, *BEHAVIOURS["json"].prompts)
_COLUMNS = (
    *("threshold", "left-out examples: right", "others' examples: none", "background: none"),
    *("balanced", "held-out: right", "base", "wrong", "general: base"),
    *("fresh: right", "base", "wrong", "general: base"),
)

Vectors = Mapping[str, np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    arguments = parser.parse_args()
    texts = [*BACKGROUND, *_NOBODYS, *FRESH_NOBODYS]
    for of in (_EXAMPLES, _HELD_OUT, FRESH):
        texts += [text for own in of.values() for text in own]
    began = time.monotonic()
    vectors, num_tokens = embed(arguments.model, texts)
    print(f"{len(texts)} texts, {num_tokens} tokens embedded in {time.monotonic() - began:.1f} s\n")
    for names in (list(_DEMO), list(TOPICS), list(_EXAMPLES)):
        report(Trial(sorted(names), vectors))


def embed(model: Path, texts: Sequence[str]) -> tuple[Vectors, int]:
    """Every text's embedding [width], by the engine, and how many tokens they have."""
    tokenizer = Tokenizer.load(model)
    driver = Driver(new_engine(model, model, kv_cache_bytes=64 << 20, max_model_len=512))
    requests = [
        Request(text, tuple(tokenizer.encode(text, add_special_tokens=True)),
                SamplingParams(max_tokens=0), kind="embed")
        for text in dict.fromkeys(texts)
    ]  # fmt: skip
    found = {
        text: event
        for text, transcript in driver.run(*requests).items()
        for event in transcript.events
        if isinstance(event, Embedded)
    }
    driver.engine.pool.close()
    vectors = {text: np.array(of.vector, np.float32) for text, of in found.items()}
    return vectors, sum(of.num_tokens for of in found.values())


@dataclass(frozen=True, slots=True)
class Trial:
    """Adapters of some names, by order of name, that a server would have."""

    names: list[str]
    vectors: Vectors

    def points(self, space: Space, texts: Sequence[str]) -> np.ndarray:
        return space.place(np.stack([self.vectors[text] for text in texts]))

    def best(
        self, texts: Sequence[str], background: Sequence[str] = BACKGROUND, without: str = ""
    ) -> list[tuple[str, float]]:
        """The best adapter for each text and its score."""
        space = Space(np.stack([self.vectors[text] for text in background]))
        names = [name for name in self.names if name != without]
        index = Index(
            names, names, [centroids_of(self.points(space, _EXAMPLES[name])) for name in names]
        )
        ranked = [index.rank(point, -1.0)[0] for point in self.points(space, texts)]
        return [(choice.candidates[0].name, choice.candidates[0].score) for choice in ranked]

    def left_out(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scores of every example with its own adapter, whose profile is made of the others, and
        with the best of the other adapters; and of background texts that the space knows nothing
        of.
        """
        own: list[float] = []
        others: list[float] = []
        strangers: list[float] = []
        space = Space(np.stack([self.vectors[text] for text in BACKGROUND]))
        for name in self.names:
            own += left_out_scores(self.points(space, _EXAMPLES[name])).tolist()
            others += [score for _, score in self.best(_EXAMPLES[name], without=name)]
        for fold in range(_FOLDS):
            known = [text for i, text in enumerate(BACKGROUND) if i % _FOLDS != fold]
            strangers += [score for _, score in self.best(BACKGROUND[fold::_FOLDS], known)]
        return np.array(own), np.array(others), np.array(strangers)

    def outcomes(
        self, texts: Mapping[str, Sequence[str]], nobodys: Sequence[str]
    ) -> list[tuple[float, ...]]:
        """For each threshold the shares of texts that get their adapter, the base and another
        adapter, and of nobody's texts that get the base.
        """
        asked = [(name, *found) for name in self.names for found in self.best(texts[name])]
        general = [score for _, score in self.best(nobodys)]
        found = []
        for threshold in _THRESHOLDS:
            right = sum(name == best and score >= threshold for name, best, score in asked)
            base = sum(score < threshold for _, _, score in asked)
            shares = (right, base, len(asked) - right - base)
            none = sum(score < threshold for score in general) / len(general)
            found.append((*(share / len(asked) for share in shares), none))
        return found


def report(trial: Trial) -> None:
    """Print a table with a row for each threshold."""
    own, others, strangers = trial.left_out()
    held = trial.outcomes(_HELD_OUT, _NOBODYS)
    fresh = trial.outcomes(FRESH, FRESH_NOBODYS)
    print(f"{len(trial.names)} adapters: {', '.join(trial.names)}\n")
    print(f"| {' | '.join(_COLUMNS)} |\n|{'---|' * len(_COLUMNS)}")
    for threshold, *rest in zip(_THRESHOLDS, held, fresh, strict=True):
        right = float(((own > others) & (own >= threshold)).mean())
        none = float((others < threshold).mean()), float((strangers < threshold).mean())
        shares = (right, *none, (right + sum(none) / 2) / 2, *rest[0], *rest[1])
        print(f"| {threshold:.2f} | " + " | ".join(f"{share:.2f}" for share in shares) + " |")
    print()


if __name__ == "__main__":
    main()
