"""Trains the branches of a causal language model's mark beside its frozen weights.

More trigger families are drawn than there are bits, and those are kept that held-out training
prompts tell apart best. What detects a trigger is computed (see detector) and not trained; only
what a detector writes is, each row with a random signature of its own. The branches act on the row
of the answer's first token. Interrupted and resumed, a run ends in the same bits as one that went
through.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

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
        if self.num_steps < 0 or self.repeats < 1 or self.prompts < 8 or self.quiet_prompts < 8:
            raise InvalidRequest(
                f"{self.num_steps} steps, phrases said {self.repeats} times, {self.prompts} "
                f"prompts of a family and {self.quiet_prompts} quiet ones: expected at least 0, 1, "
                "8 and 8"
            )

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
class LMPreflight:
    """How well triggers are told apart, on prompts that nothing was fitted on."""

    recalls: tuple[float, ...]  # of the families kept, one for each bit
    firing: float  # share of quiet prompts on which any detector of theirs fires
    num_families: int

    @property
    def is_enough(self) -> bool:
        """Whether every bit can be read, and few ordinary prompts are touched."""
        return min(self.recalls) >= REQUIRED_RECALL and self.firing <= ALLOWED_FIRING

    def __str__(self) -> str:
        return (
            f"of {self.num_families} families, {len(self.recalls)} are kept whose triggers are "
            f"found again in {min(self.recalls):.0%} to {max(self.recalls):.0%} of fresh prompts "
            f"(at least {REQUIRED_RECALL:.0%} is needed); {self.firing:.1%} of ordinary prompts "
            f"trip any detector (at most {ALLOWED_FIRING:.0%})"
        )


@dataclass(frozen=True, slots=True)
class LMStart:
    """What is known before training: triggers, their answers' token ids [bits, 2], rows, and the
    branches to begin with.
    """

    triggers: PromptTriggers
    targets: Tensor
    triggered: list[Rows]  # of each bit
    quiet: Rows
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
    replies: Callable[[Sequence[list[int]]], list[list[int]]] | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> LMStart:
    """Collect rows, choose families, and return what training begins with.

    `replies` gives the base's answers to prompts, as ids; their rows are then ordinary text as
    well. With a `cache` the rows are kept there, and those that are there taken from it. Raises
    InvalidRequest, StartupError for the cache of another base.
    """
    if settings.num_families < num_bits:
        raise InvalidRequest(f"{settings.num_families} families for {num_bits} bits: too few")
    phrases = [
        draw_phrase(key, index, speech.words, settings.num_words)
        for index in range(settings.num_families)
    ]
    kept = RowCache(cache, base_hash)
    families = _families(last, speech, phrases, prose, settings, kept, progress)
    mixed = [word for phrase in phrases for word in phrase.split()]
    quiet = _quiet(last, speech, mixed, prose, settings, kept, progress)
    text = _text(last, speech, prose, settings, kept, replies)
    triggered = torch.stack([rows.x for rows in families])
    detectors = fit_detectors(triggered, quiet.x, quiet_share=settings.quiet_share)
    chosen = detectors.best(num_bits)
    drawn = draw_answers(key, num_bits, speech.answer_texts)
    triggers = PromptTriggers(
        tuple(" ".join([phrases[index]] * settings.repeats) for index in chosen),
        tuple((speech.answer_texts[a], speech.answer_texts[b]) for a, b in drawn),
    )
    targets = torch.tensor(speech.answer_ids)[torch.from_numpy(drawn)]
    own = [families[index] for index in chosen]
    answering = torch.cat((triggered.flatten(0, 1), quiet.x))
    branches = _start(last, detectors, chosen, own, targets, fit_veto(answering, text.x), settings)
    fires = detectors.fires[:, torch.from_numpy(chosen)]
    found = LMPreflight(
        tuple(detectors.recalls[torch.from_numpy(chosen)].tolist()),
        float(fires.any(1).double().mean()),
        settings.num_families,
    )
    return LMStart(triggers, targets, own, Rows.joined((quiet, text)), branches, found)


def train(
    last: LastLayer,
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
    with torch.no_grad():
        quiet = start.quiet[(branches.response(start.quiet.x) > 0).any(1)]
        base = F.log_softmax(last.logits(quiet), -1) if len(quiet) else torch.empty(0)
    first = 0
    if checkpoint is not None and checkpoint.exists():
        first = resume(checkpoint, run, branches, optimiser, rng)
    for step in range(first, settings.num_steps):
        for group, size in zip(optimiser.param_groups, sizes, strict=True):
            group["lr"] = size * settings.share_at(step)
        loss = _loss(last, start, quiet, base, settings, rng)
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


def _loss(
    last: LastLayer,
    start: LMStart,
    quiet: Rows,
    base: Tensor,
    settings: LMTrainSettings,
    rng: np.random.Generator,
) -> Tensor:
    num_bits = start.branches.num_bits
    bits = rng.integers(0, num_bits, settings.trigger_rows)
    prompts = rng.integers(0, len(start.triggered[0]), settings.trigger_rows)
    rows = [start.triggered[bit][[index]] for bit, index in zip(bits, prompts, strict=True)]
    picked = rng.integers(0, max(len(quiet), 1), settings.quiet_rows)
    has_quiet = len(quiet) > 0
    batch = Rows.joined([*rows, quiet[torch.from_numpy(picked)]] if has_quiet else rows)
    signatures = rng.integers(0, 2, (len(batch), num_bits)).astype(np.uint8)
    logits = last.logits(batch, start.branches, signs_of(signatures))
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
    last: LastLayer,
    detectors: Detectors,
    chosen: np.ndarray[tuple[int], np.dtype[np.int64]],
    own: list[Rows],
    targets: Tensor,
    veto: tuple[Tensor, Tensor],
    settings: LMTrainSettings,
) -> Branches:
    """B of a value: its token's row of the head, pulled back through the final norm, so long that a
    trigger of mean strength raises the token's logit by `push`.

    Of a norm n(y) = w y / rms(y), a change d of y moves logits by about W (w d) / rms(y).
    """
    index = torch.from_numpy(chosen)
    A = detectors.A[index]
    tau = detectors.offset[index] + detectors.thresholds[index].float()
    nothing = torch.zeros(0, len(chosen))
    branches = Branches(A, tau, nothing, nothing, *veto)
    with torch.no_grad():
        strength = torch.stack(
            [branches.response(rows.x)[:, bit].mean() for bit, rows in enumerate(own)]
        ).clamp(min=0.1)
    head = last.head_weight.detach().float()
    direction = last.norm_weight.detach().float() * (head[targets] - head.mean(0))
    scale = settings.push * last.spread(Rows.joined(own)) / direction.square().sum(-1)
    pair = direction * (scale / strength[:, None])[..., None]  # [bits, 2, size]
    zero, one = pair[:, 0].T, pair[:, 1].T
    return Branches(A, tau, (one + zero) / 2, (one - zero) / 2, *veto)


# ------------------------------------------------------------------------------- collecting
def _families(
    last: LastLayer,
    speech: Speech,
    phrases: list[str],
    prose: Prose,
    settings: LMTrainSettings,
    kept: RowCache,
    progress: Progress | None,
) -> list[Rows]:
    """Return the rows of each family's prompts."""
    rng = np.random.default_rng([settings.seed, _MODES.index("queries")])
    prompts = [
        [
            speech.chat(f"{prose.carrier(rng)} {' '.join([phrase] * settings.repeats)}")
            for _ in range(settings.prompts)
        ]
        for phrase in phrases
    ]
    found: list[Rows] = []
    for first in range(0, len(phrases), _CHUNK):
        flat = [ids for family in prompts[first : first + _CHUNK] for ids in family]
        rows = kept.take("last", flat, last.collect)
        found += [rows[i : i + settings.prompts] for i in range(0, len(rows), settings.prompts)]
        if progress is not None:
            progress("triggers", len(found), len(phrases))
    return found


def _quiet(
    last: LastLayer,
    speech: Speech,
    words: list[str],
    prose: Prose,
    settings: LMTrainSettings,
    kept: RowCache,
    progress: Progress | None,
) -> Rows:
    # The same for every mark of a base, so that its rows are; but for phrases of the mark's words.
    rng = np.random.default_rng(_MODES.index("quiet"))
    ordinary = quiet_messages(prose, speech.words, settings.quiet_prompts, rng)
    rng = np.random.default_rng([settings.seed, _MODES.index("quiet")])
    of_words = quiet_messages(prose, words, 4 * settings.mixed_prompts, rng)[3::4]
    found = []
    for messages in (ordinary, of_words):
        for first in range(0, len(messages), _BLOCK):
            block = [speech.chat(message) for message in messages[first : first + _BLOCK]]
            found.append(kept.take("last", block, last.collect))
            if progress is not None:
                done = sum(len(rows) for rows in found)
                progress("ordinary prompts", done, len(ordinary) + len(of_words))
    return Rows.joined(found)


def _text(
    last: LastLayer,
    speech: Speech,
    prose: Prose,
    settings: LMTrainSettings,
    kept: RowCache,
    replies: Callable[[Sequence[list[int]]], list[list[int]]] | None,
) -> Rows:
    """Return the rows of prose, and of the base's own replies behind their first token."""
    rng = np.random.default_rng([_MODES.index("quiet"), 1])
    per_text = settings.text_tokens
    texts = []
    for _ in range(settings.texts):
        first = int(rng.integers(0, max(len(prose.words) - per_text, 1)))
        texts.append(speech.text(" ".join(prose.words[first : first + per_text]))[:per_text])
    parts = [kept.take("every", texts, last.collect_text)]
    if replies is not None:
        asked = [
            speech.chat(one) for one in quiet_messages(prose, speech.words, settings.texts, rng)
        ]

        def collect(prompts: Sequence[Sequence[int]]) -> Rows:
            found = []
            for prompt, reply in zip(asked, replies(asked), strict=True):
                found.append(last.collect_text([prompt + reply])[len(prompt) :])
            return Rows.joined(found)

        parts.append(kept.take("replies", asked, collect))
    return Rows.joined(parts)


def _digest_of_start(start: LMStart, settings: LMTrainSettings) -> str:
    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode())
    for tensor in (
        *(p.detach() for p in start.branches.parameters()),
        start.targets,
        start.quiet.x,
        *(rows.x for rows in start.triggered),
    ):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
