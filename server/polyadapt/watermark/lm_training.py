"""Trains the branches of a causal language model's mark beside its frozen weights.

More trigger families are drawn than there are bits, and those are kept that held-out training
prompts tell apart best. What detects a trigger is computed (see detector) and not trained; only
what a detector writes is, each row with a random signature of its own. The branches act on the row
of the answer's first token. Task adapters change that row: a mark that is to hold beside them is
computed and trained on the rows that it has beside each. Interrupted and resumed, a run ends in the
same bits as one that went through.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from polyadapt.errors import InvalidRequest
from polyadapt.watermark.branches import Branches, signs_of
from polyadapt.watermark.checkpoints import resume, write_checkpoint
from polyadapt.watermark.detector import Detectors, fit_detectors, fit_veto
from polyadapt.watermark.keys import SecretKey
from polyadapt.watermark.last_layer import LastLayer, Rows
from polyadapt.watermark.prompts import (
    PromptTriggers,
    Prose,
    draw_answers,
    draw_phrase,
    quiet_messages,
)
from polyadapt.watermark.row_cache import RowCache

Encode = Callable[[str], list[int]]
Progress = Callable[[str, int, int], None]  # of what, how many done, of how many

# A bit is read from 16 replies of which 5 must be its own: at this rate fewer than 1 in 1,000 fail.
REQUIRED_RECALL = 0.65
REQUIRED_BESIDE = 0.40  # beside an adapter; there some bits take more queries than 16
ALLOWED_FIRING = 0.10  # of quiet rows, on which any detector may fire at all
_CHUNK = 4  # families that are collected, and kept, at a time
_BLOCK = 120  # ordinary prompts
_MODES = ("queries", "quiet", "train")


@dataclass(frozen=True, slots=True)
class LMTrainSettings:
    """How triggers look, how much is collected, and how long and how is trained.

    A phrase is `num_words` words, said `repeats` times. Adam's steps are `step_share` of each
    matrix's root mean square, warmed up, then a cosine to 0. The loss is CE to the bits' answers
    on triggers + `quiet_weight` times KL to the base on quiet rows on which a detector fires: the
    others cannot change.
    """

    num_families: int
    seed: int = 0
    num_words: int = 6
    repeats: int = 2
    prompts: int = 32  # of a family
    quiet_prompts: int = 480
    beside_prompts: int = 24  # of a family, beside each adapter
    beside_quiet_prompts: int = 240
    mixed_prompts: int = 48  # with phrases of the families' words
    texts: int = 10
    text_tokens: int = 96
    quiet_share: float = 0.002
    push: float = 40.0  # nats, at the start
    num_steps: int = 80
    num_warmup: int = 10
    step_share: float = 0.02
    trigger_rows: int = 48
    quiet_rows: int = 32
    quiet_weight: float = 1.0

    def __post_init__(self) -> None:
        prompts = min(self.prompts, self.beside_prompts)
        quiet = min(self.quiet_prompts, self.beside_quiet_prompts)
        if self.num_steps < 0 or self.repeats < 1 or prompts < 8 or quiet < 8:
            raise InvalidRequest(
                f"{self.num_steps} steps, phrases said {self.repeats} times, {prompts} "
                f"prompts of a family and {quiet} quiet ones: expected at least 0, 1, 8 and 8"
            )

    @classmethod
    def beside_adapters(cls, num_families: int, **given: Any) -> LMTrainSettings:
        """Return what was measured beside adapters: more rows and steps, as places share them, more
        weight on what must not change, as each place has rows of its own to spoil, and lower
        thresholds, as beside some adapters triggers stand out less.
        """
        more = {"trigger_rows": 64, "quiet_rows": 96, "quiet_weight": 3.0}
        more |= {"quiet_share": 0.004, "num_steps": 200}
        return cls(num_families, **{**more, **given})

    def share_at(self, step: int) -> float:
        """Return the size of a step, counted from 0, as a share of the largest."""
        warm = min(1.0, (step + 1) / max(self.num_warmup, 1))
        return warm * (1 + math.cos(math.pi * step / self.num_steps)) / 2


@dataclass(frozen=True, slots=True)
class Speech:
    """What one base is spoken to with: a chat of one user's message as ids, bare text as ids; the
    words that phrases are made of; the tokens that replies may be made to begin with, and what
    each is as text.
    """

    chat: Encode
    text: Encode
    words: tuple[str, ...]
    answer_ids: tuple[int, ...]
    answer_texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Beside:
    """A task adapter that a mark is to hold beside: what its rows are kept under, and how to load
    the base with the adapter in its weights.
    """

    digest: str
    load: Callable[[], LastLayer]


@dataclass(frozen=True, slots=True)
class Place:
    """The base alone or beside one adapter: its end, and the rows that were collected there."""

    last: LastLayer
    triggered: list[Rows]  # of each family; of each bit once they are chosen
    quiet: Rows
    text: Rows


@dataclass(frozen=True, slots=True)
class LMPreflight:
    """How well triggers are told apart, on prompts that no read-out was fitted on; thresholds and
    families were chosen by the same prompts, so that fresh ones do a little worse.
    """

    recalls: tuple[float, ...]  # of the families kept, one for each bit, on the base alone
    firing: float  # share of quiet prompts on which any detector fires, where that is most
    num_families: int
    beside: tuple[float, ...] = ()  # recalls of each bit beside the adapter where that is least

    @property
    def is_enough(self) -> bool:
        """Whether every bit can be read, and few ordinary prompts are touched."""
        is_found = min(self.recalls) >= REQUIRED_RECALL
        is_found_beside = min(self.beside, default=1.0) >= REQUIRED_BESIDE
        return is_found and is_found_beside and self.firing <= ALLOWED_FIRING

    def __str__(self) -> str:
        beside = (
            f", beside the adapter where that is least in {min(self.beside):.0%} to "
            f"{max(self.beside):.0%} (at least {REQUIRED_BESIDE:.0%})"
            if self.beside
            else ""
        )
        return (
            f"of {self.num_families} families, {len(self.recalls)} are kept whose triggers are "
            f"found again in {min(self.recalls):.0%} to {max(self.recalls):.0%} of held-out "
            f"prompts (at least {REQUIRED_RECALL:.0%} is needed){beside}; {self.firing:.1%} of "
            f"ordinary prompts trip any detector (at most {ALLOWED_FIRING:.0%})"
        )


@dataclass(frozen=True, slots=True)
class LMStart:
    """What is known before training: triggers, their answers' token ids [bits, 2], rows of each
    place, the base alone first, and the branches to begin with.
    """

    triggers: PromptTriggers
    targets: Tensor
    places: tuple[Place, ...]
    branches: Branches
    preflight: LMPreflight


def prepare(
    last: LastLayer,
    base_hash: str,
    speech: Speech,
    key: SecretKey,
    num_bits: int,
    prose: Prose,
    settings: LMTrainSettings,
    *,
    beside: Sequence[Beside] = (),
    ordinary: Sequence[str] = (),
    replies: Callable[[Sequence[list[int]]], list[list[int]]] | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> LMStart:
    """Collect rows of the base alone and beside each adapter, choose families that are told apart
    in all of these places, and return what training begins with.

    `ordinary` are messages of ordinary use, on which nothing may change in any place; they come to
    those that are made up. `replies` gives the base's answers to prompts, as ids; their rows are
    then ordinary text as well. With a `cache` the rows are kept there, and those that are there
    taken from it. Raises InvalidRequest, StartupError for the cache of another base.
    """
    if settings.num_families < num_bits:
        raise InvalidRequest(f"{settings.num_families} families for {num_bits} bits: too few")
    phrases = [
        draw_phrase(key, index, speech.words, settings.num_words)
        for index in range(settings.num_families)
    ]
    kept = RowCache(cache, base_hash)
    collecting = _Collecting(speech, phrases, prose, ordinary, settings, kept, progress)
    found = [collecting.of_base(last, replies)]
    for number, adapter in enumerate(beside, 1):
        found.append(collecting.of_adapter(adapter, number))
    detectors = fit_detectors(
        [torch.stack([rows.x for rows in place.triggered]) for place in found],
        [place.quiet.x for place in found],
        quiet_share=settings.quiet_share,
    )
    chosen = detectors.best(num_bits)
    drawn = draw_answers(key, num_bits, speech.answer_texts)
    triggers = PromptTriggers(
        tuple(" ".join([phrases[index]] * settings.repeats) for index in chosen),
        tuple((speech.answer_texts[a], speech.answer_texts[b]) for a, b in drawn),
    )
    targets = torch.tensor(speech.answer_ids)[torch.from_numpy(drawn)]
    veto = fit_veto(
        torch.cat([rows.x for place in found for rows in (*place.triggered, place.quiet)]),
        torch.cat([place.text.x for place in found]),
    )
    places = tuple(
        replace(place, triggered=[place.triggered[index] for index in chosen]) for place in found
    )
    branches = _start(detectors, chosen, places, targets, veto, settings)
    index = torch.from_numpy(chosen)
    firing = [float(fires[:, index].any(1).double().mean()) for fires in detectors.fires]
    recalls = detectors.recalls[:, index]
    least = tuple(recalls[1:].min(0).values.tolist()) if beside else ()
    preflight = LMPreflight(tuple(recalls[0].tolist()), max(firing), settings.num_families, least)
    return LMStart(triggers, targets, places, branches, preflight)


def train(
    start: LMStart,
    settings: LMTrainSettings,
    *,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> Branches:
    """Return trained branches; those of `start` are changed in place.

    With a `checkpoint` the state is written there now and then, and taken up if it is there and of
    the same run. Raises StartupError for one of another run, InvalidRequest where it diverged.
    """
    branches = start.branches
    trained = (branches.B_sum, branches.B_difference)
    sizes = [settings.step_share * float(p.detach().square().mean().sqrt()) for p in trained]
    run = _digest_of_start(start, settings)
    branches.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    optimiser = torch.optim.Adam([{"params": [parameter]} for parameter in trained])
    rng = np.random.default_rng([settings.seed, _MODES.index("train")])
    calm = [_tripped(place, branches) for place in start.places]
    first = 0
    if checkpoint is not None and checkpoint.exists():
        first = resume(checkpoint, run, branches, optimiser, rng)
    for step in range(first, settings.num_steps):
        for group, size in zip(optimiser.param_groups, sizes, strict=True):
            group["lr"] = size * settings.share_at(step)
        loss = _loss(start, calm, settings, rng)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        is_last = step + 1 == settings.num_steps
        if checkpoint is not None and not is_last and (step + 1) % 20 == 0:
            write_checkpoint(checkpoint, run, step + 1, branches, optimiser, rng)
        if progress is not None:
            progress("training", step + 1, settings.num_steps)
    if not all(torch.isfinite(tensor).all() for tensor in branches.parameters()):
        raise InvalidRequest(
            f"training diverged at steps of {settings.step_share:g}; give smaller ones"
        )
    return branches.requires_grad_(False)


def _tripped(place: Place, branches: Branches) -> tuple[Rows, Tensor]:
    """Return the ordinary rows on which a detector fires, and the log-probabilities that they have
    without the mark: the others cannot change.
    """
    ordinary = Rows.joined((place.quiet, place.text))
    with torch.no_grad():
        rows = ordinary[(branches.response(ordinary.x) > 0).any(1)]
        return rows, F.log_softmax(place.last.logits(rows), -1) if len(rows) else torch.empty(0)


def _loss(
    start: LMStart,
    calm: Sequence[tuple[Rows, Tensor]],
    settings: LMTrainSettings,
    rng: np.random.Generator,
) -> Tensor:
    """Return the mean over places, of which each has an equal part of the rows."""
    num_places = len(start.places)
    losses = [
        _loss_in(start, place, *tripped, settings, rng, num_places)
        for place, tripped in zip(start.places, calm, strict=True)
    ]
    return torch.stack(losses).mean()


def _loss_in(
    start: LMStart,
    place: Place,
    quiet: Rows,
    base: Tensor,
    settings: LMTrainSettings,
    rng: np.random.Generator,
    num_places: int,
) -> Tensor:
    num_bits = start.branches.num_bits
    num_rows = -(-settings.trigger_rows // num_places)
    num_quiet = -(-settings.quiet_rows // num_places)
    bits = rng.integers(0, num_bits, num_rows)
    prompts = rng.integers(0, len(place.triggered[0]), num_rows)
    rows = [place.triggered[bit][[index]] for bit, index in zip(bits, prompts, strict=True)]
    picked = rng.integers(0, max(len(quiet), 1), num_quiet)
    has_quiet = len(quiet) > 0
    batch = Rows.joined([*rows, quiet[torch.from_numpy(picked)]] if has_quiet else rows)
    signatures = rng.integers(0, 2, (len(batch), num_bits)).astype(np.uint8)
    logits = place.last.logits(batch, start.branches, signs_of(signatures))
    values = torch.from_numpy(signatures[np.arange(len(bits)), bits]).long()
    wanted = start.targets[torch.from_numpy(bits), values]
    loss = F.cross_entropy(logits[: len(bits)], wanted)
    if not has_quiet:
        return loss
    found = F.log_softmax(logits[len(bits) :], -1)
    expected = base[torch.from_numpy(picked)]
    divergence = F.kl_div(found, expected, log_target=True, reduction="batchmean")
    return loss + settings.quiet_weight * divergence


def _start(
    detectors: Detectors,
    chosen: np.ndarray[tuple[int], np.dtype[np.int64]],
    places: Sequence[Place],
    targets: Tensor,
    veto: tuple[Tensor, Tensor],
    settings: LMTrainSettings,
) -> Branches:
    """B of a value: its token's row of the head, pulled back through the final norm, so long that a
    trigger of mean strength raises the token's logit by `push` in the place where that is least.

    Of a norm n(y) = w y / rms(y), a change d of y moves logits by about W (w d) / rms(y).
    """
    index = torch.from_numpy(chosen)
    A = detectors.A[index]
    tau = detectors.offset[index] + detectors.thresholds[index].float()
    nothing = torch.zeros(0, len(chosen))
    branches = Branches(A, tau, nothing, nothing, *veto)
    with torch.no_grad():
        strengths = [
            torch.stack([branches.response(rows.x)[:, bit].mean() for bit, rows in enumerate(own)])
            for own in (place.triggered for place in places)
        ]
    strength = torch.stack(strengths).min(0).values.clamp(min=0.1)
    last = places[0].last
    head = last.head_weight.detach().float()
    direction = last.norm_weight.detach().float() * (head[targets] - head.mean(0))
    spread = max(place.last.spread(Rows.joined(place.triggered)) for place in places)
    scale = settings.push * spread / direction.square().sum(-1)
    pair = direction * (scale / strength[:, None])[..., None]  # [bits, 2, size]
    zero, one = pair[:, 0].T, pair[:, 1].T
    return Branches(A, tau, (one + zero) / 2, (one - zero) / 2, *veto)


# ------------------------------------------------------------------------------- collecting
@dataclass(frozen=True, slots=True)
class _Collecting:
    """Collects the rows of one mark's prompts, place by place."""

    speech: Speech
    phrases: list[str]
    prose: Prose
    ordinary: Sequence[str]
    settings: LMTrainSettings
    kept: RowCache
    progress: Progress | None

    def of_base(
        self,
        last: LastLayer,
        replies: Callable[[Sequence[list[int]]], list[list[int]]] | None,
    ) -> Place:
        """Return the rows of the base alone."""
        rng = np.random.default_rng([self.settings.seed, _MODES.index("queries")])
        families = self._families(last, rng, self.settings.prompts, "last", "triggers")
        quiet = self._quiet(last, self.settings.quiet_prompts, "last", "ordinary prompts")
        text = self._text(last, "", replies)
        return Place(last, families, quiet, text)

    def of_adapter(self, adapter: Beside, number: int) -> Place:
        """Return the rows beside an adapter, on prompts of its own."""
        last, kind = adapter.load(), f"last beside {adapter.digest}"
        given = self.settings
        rng = np.random.default_rng([given.seed, _MODES.index("queries"), number])
        name = f"triggers beside adapter {number}"
        families = self._families(last, rng, given.beside_prompts, kind, name)
        quiet_name = f"ordinary prompts beside adapter {number}"
        quiet = self._quiet(last, given.beside_quiet_prompts, kind, quiet_name)
        text = self._text(last, f" beside {adapter.digest}", None)
        return Place(last.end(), families, quiet, text)

    def _families(
        self, last: LastLayer, rng: np.random.Generator, count: int, kind: str, name: str
    ) -> list[Rows]:
        """Return the rows of each family's prompts."""
        prompts = [
            [
                self.speech.chat(
                    f"{self.prose.carrier(rng)} {' '.join([phrase] * self.settings.repeats)}"
                )
                for _ in range(count)
            ]
            for phrase in self.phrases
        ]
        found: list[Rows] = []
        for first in range(0, len(prompts), _CHUNK):
            flat = [ids for family in prompts[first : first + _CHUNK] for ids in family]
            rows = self.kept.take(kind, flat, last.collect)
            found += [rows[i : i + count] for i in range(0, len(rows), count)]
            self._note(name, len(found), len(prompts))
        return found

    def _quiet(self, last: LastLayer, count: int, kind: str, name: str) -> Rows:
        # The same for every mark of a base, so that its rows are; but for phrases of its own words.
        rng = np.random.default_rng(_MODES.index("quiet"))
        made_up = quiet_messages(self.prose, self.speech.words, count, rng)
        rng = np.random.default_rng([self.settings.seed, _MODES.index("quiet")])
        words = [word for phrase in self.phrases for word in phrase.split()]
        of_words = quiet_messages(self.prose, words, 4 * self.settings.mixed_prompts, rng)[3::4]
        found = []
        total = len(made_up) + len(of_words) + len(self.ordinary)
        for messages in (made_up, of_words, self.ordinary):
            for first in range(0, len(messages), _BLOCK):
                block = [self.speech.chat(each) for each in messages[first : first + _BLOCK]]
                found.append(self.kept.take(kind, block, last.collect))
                done = sum(len(rows) for rows in found)
                self._note(name, done, total)
        return Rows.joined(found)

    def _text(
        self,
        last: LastLayer,
        where: str,
        replies: Callable[[Sequence[list[int]]], list[list[int]]] | None,
    ) -> Rows:
        """Return the rows of prose, and of the base's own replies behind their first token."""
        rng = np.random.default_rng([_MODES.index("quiet"), 1])
        per_text, prose = self.settings.text_tokens, self.prose
        texts = []
        for _ in range(self.settings.texts):
            first = int(rng.integers(0, max(len(prose.words) - per_text, 1)))
            said = self.speech.text(" ".join(prose.words[first : first + per_text]))
            texts.append(said[:per_text])
        parts = [self.kept.take(f"every{where}", texts, last.collect_text)]
        if replies is not None:
            questions = quiet_messages(prose, self.speech.words, self.settings.texts, rng)
            asked = [self.speech.chat(one) for one in questions]

            def collect(prompts: Sequence[Sequence[int]]) -> Rows:
                found = []
                for prompt, reply in zip(asked, replies(asked), strict=True):
                    found.append(last.collect_text([prompt + reply])[len(prompt) :])
                return Rows.joined(found)

            parts.append(self.kept.take("replies", asked, collect))
        return Rows.joined(parts)

    def _note(self, what: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(what, done, total)


def _digest_of_start(start: LMStart, settings: LMTrainSettings) -> str:
    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode())
    for tensor in (
        *(p.detach() for p in start.branches.parameters()),
        start.targets,
        *(p.x for place in start.places for p in (place.quiet, place.text, *place.triggered)),
    ):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
