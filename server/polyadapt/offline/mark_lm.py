"""What `polyadapt mark` does for causal language models: training beside a frozen base,
calibrating, and asking a model that lies in a directory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save as save_tensors
from torch import nn

from polyadapt.adapters.registry import open_adapter
from polyadapt.errors import AdapterRejected, InvalidRequest, StartupError
from polyadapt.models.load import load_base, model_digest
from polyadapt.offline.apply import directory_digest
from polyadapt.offline.dense import NotDenseError, write_into
from polyadapt.tasks.tokenizer import Tokenizer
from polyadapt.watermark.branches import Branches, signs_of
from polyadapt.watermark.last_layer import LastLayer
from polyadapt.watermark.lm_training import (
    Beside,
    LMPreflight,
    LMStart,
    LMTrainSettings,
    Progress,
    Speech,
    prepare,
    train,
)
from polyadapt.watermark.mark_directory import (
    BRANCHES_NAME,
    CHECKPOINT_NAME,
    ROWS_NAME,
    MarkDirectory,
)
from polyadapt.watermark.prompts import Prose
from polyadapt.watermark.queries import (
    REPLY_TOKENS,
    AskChats,
    measure_null_rates,
    queries_for,
    values_in,
)
from polyadapt.watermark.reading import NullRates
from polyadapt.watermark.secrets import write_file
from polyadapt_store.checkpoint import Checkpoint
from polyadapt_store.manifest import weight_files

MIN_WORDS = 4096
NUM_SIGNATURES = 20  # random ones that a training is measured with, on prompts kept from it
_WORD, _ANSWER, _LETTERS = (re.compile(p) for p in (r" [a-z]{4,}", r"[a-z]{4,}", r"[A-Za-z]+"))
_MANY_ANSWERS = 256  # below, shorter ones are taken as well
_REPLY_TOKENS = 32
_CONSONANTS, _VOWELS = "bdfghjklmnprstvwxyz", "aeiou"


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """A base: frozen, in float32, with its tokenizer and the digest that the server reports."""

    model: nn.Module
    tokenizer: Tokenizer
    digest: str

    def chat(self, message: str) -> list[int]:
        """Return the ids of a chat of one user's message, as the server makes them."""
        messages = [{"role": "user", "content": message}]
        return self.tokenizer.encode_chat(messages, add_generation_prompt=True)

    def text(self, text: str) -> list[int]:
        """Return the ids of bare text."""
        return self.tokenizer.encode(text, add_special_tokens=True)

    def speech(self) -> Speech:
        """Return what triggers and answers are made of: words and beginnings that are one token of
        this tokenizer's each; made-up words where it has too few.
        """
        texts = {
            index: self.tokenizer.token_bytes(index).decode("utf-8", "replace")
            for index in range(self.tokenizer.vocab_size)
            if not self.tokenizer.is_special(index)
        }
        words = tuple(sorted({text[1:] for text in texts.values() if _WORD.fullmatch(text)}))
        if len(words) < MIN_WORDS:
            pairs = [c + v for c in _CONSONANTS for v in _VOWELS]
            words = tuple(one + two for one in pairs for two in pairs)
        answers = _beginnings(texts, _ANSWER)
        if len(answers) < _MANY_ANSWERS:
            answers = _beginnings(texts, _LETTERS)
        ids, spoken = tuple(answers), tuple(answers.values())
        return Speech(self.chat, self.text, words, ids, spoken)

    def replies(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """Return the beginnings of the model's greedy replies."""
        found = []
        for prompt in prompts:
            with torch.inference_mode():
                ids = self.model.generate(  # type: ignore[operator]
                    torch.tensor([prompt]),
                    attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                    max_new_tokens=_REPLY_TOKENS,
                    do_sample=False,
                    pad_token_id=0,
                )
            found.append(ids[0, len(prompt) :].tolist())
        return found


@dataclass(frozen=True, slots=True)
class TrainedLM:
    """What was trained, on prompts that were kept from training, over random signatures."""

    preflight: LMPreflight
    hits: float  # share of triggers that are answered with the signature's own answer
    weakest: float  # of the bits


def load_lm(directory: Path) -> LanguageModel:
    """Load a base from its directory; raises StartupError."""
    from transformers import AutoModelForCausalLM

    if not (directory / "config.json").is_file():
        raise StartupError(
            f"{directory} has no config.json; give the directory of a causal language model"
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise StartupError(f"{directory} is no causal language model: {error}") from None
    model.eval().requires_grad_(False)
    return LanguageModel(model, Tokenizer.load(directory), model_digest(directory))


def load_beside(directory: Path, adapter: Path) -> LanguageModel:
    """Load a base with a task adapter of any family written into its weights; raises StartupError
    for an adapter that is none of this base's, or that no weights of it can say.
    """
    base = load_lm(directory)
    served = load_base(
        directory,
        name=directory.name,
        device=torch.device("cpu"),
        dtype=torch.float32,
        max_model_len=None,
    )
    try:
        family, config = open_adapter(adapter)
        with Checkpoint(weight_files(adapter, family.files)) as checkpoint:
            family.plan(config, checkpoint.header, served.spec)
            deltas = family.read(config, checkpoint, served.spec, served)
        write_into(base.model, deltas, served.spec)
    except (AdapterRejected, NotDenseError) as error:
        raise StartupError(f"{adapter} cannot be written into {directory}: {error}") from None
    return base


def besides(directory: Path, adapters: Sequence[Path]) -> list[Beside]:
    """Return the adapters that a mark of this base is to hold beside, each loaded when its turn
    comes; raises StartupError for a directory without one.
    """
    found = []
    for path in adapters:
        try:
            open_adapter(path)
        except AdapterRejected as error:
            raise StartupError(f"{path} is no adapter to train beside: {error}") from None
        found.append(Beside(directory_digest(path), partial(_end_beside, directory, path)))
    return found


def preflight(
    mark: MarkDirectory,
    base: LanguageModel,
    prose: Prose,
    settings: LMTrainSettings,
    progress: Progress | None = None,
    *,
    beside: Sequence[Beside] = (),
    ordinary: Sequence[str] = (),
) -> LMPreflight:
    """Say how well the triggers are told apart, in the worst place if the mark is to hold beside
    adapters; what was collected is kept for `train`.
    """
    last = LastLayer(base.model)
    start = _prepare(mark, last, base, prose, settings, progress, beside, ordinary)
    return start.preflight


def train_mark(
    mark: MarkDirectory,
    base: LanguageModel,
    prose: Prose,
    settings: LMTrainSettings,
    progress: Progress | None = None,
    *,
    beside: Sequence[Beside] = (),
    ordinary: Sequence[str] = (),
) -> TrainedLM:
    """Train the branches and note them; taken up where an earlier run of the same was interrupted.
    With adapters `beside`, so that the mark is also read beside each of them; `ordinary` messages
    are left alone as those are that are made up.

    Raises InvalidRequest where the triggers are not told apart: no training mends that.
    """
    mark.require("lm")
    last = LastLayer(base.model)
    start = _prepare(mark, last, base, prose, settings, progress, beside, ordinary)
    if not start.preflight.is_enough:
        raise InvalidRequest(
            f"triggers do not stand out enough: {start.preflight}; draw more --families, collect "
            "more --prompts, or ask for fewer bits"
        )
    checkpoint = mark.path / CHECKPOINT_NAME
    branches = train(start, settings, checkpoint=checkpoint, progress=progress)
    stored = {f"{last.module}.{name}": tensor for name, tensor in branches.pair_tensors().items()}
    write_file(mark.path / BRANCHES_NAME, save_tensors(stored))
    mark.trained(base.digest, last.module, start.triggers, start.targets.numpy())
    for file in (checkpoint, mark.path / ROWS_NAME):
        file.unlink(missing_ok=True)
    rng = np.random.default_rng([settings.seed, 9])
    hits = _hits(mark, base, last, branches, prose.split()[1], rng)
    return TrainedLM(start.preflight, float(hits.mean()), float(hits.min()))


def calibrate(
    mark: MarkDirectory,
    references: Sequence[LanguageModel],
    prose: Prose,
    *,
    num_per_bit: int = 200,
    seed: int = 0,
) -> NullRates:
    """Measure what unmarked models answer to the triggers, and note it."""
    words = [answer for pair in mark.prompts.answers for answer in pair]
    null = measure_null_rates(
        [ask_of(reference, words) for reference in references],
        mark.prompts,
        prose.split()[1],
        np.random.default_rng([seed, 8]),
        num_per_bit=num_per_bit,
    )
    mark.calibrated(null)
    return null


def ask_of(base: LanguageModel, answers: Iterable[str] = ()) -> AskChats:
    """Return what answers for a model, as a stranger would ask it: messages in, the beginning of
    each greedy reply as text out. That is its first token, and more where that one is less than
    one of the `answers` and might become it: "b" begins "both".
    """
    end, wanted = LastLayer(base.model), tuple(answers)

    def ask(messages: Sequence[str]) -> list[str]:
        chats = [base.chat(message) for message in messages]
        rows = end.collect(chats)
        with torch.inference_mode():
            tokens = [
                token
                for i in range(0, len(rows), 64)
                for token in end.logits(rows[i : i + 64]).argmax(-1).tolist()
            ]
        found = [base.tokenizer.decode([token]) for token in tokens]
        for index, text in enumerate(found):
            begun = text.lstrip()
            if any(answer != begun and answer.startswith(begun) for answer in wanted):
                (reply,) = base.replies([chats[index]])
                found[index] = base.tokenizer.decode(reply[:REPLY_TOKENS])
        return found

    return ask


def _end_beside(directory: Path, adapter: Path) -> LastLayer:
    return LastLayer(load_beside(directory, adapter).model)


def _hits(
    mark: MarkDirectory,
    base: LanguageModel,
    last: LastLayer,
    branches: Branches,
    prose: Prose,
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """Return the share of right answers of each bit over signatures: [bits]."""
    triggers = mark.prompts
    queries = queries_for(triggers, prose, 8, rng)
    of = np.array([query.bit for query in queries])
    rows = last.collect([base.chat(query.message) for query in queries])
    right = np.zeros(triggers.num_bits)
    for _ in range(NUM_SIGNATURES):
        bits = rng.integers(0, 2, triggers.num_bits).astype(np.uint8)
        with torch.inference_mode():
            signs = signs_of(bits)[None].expand(len(rows), -1)
            tokens = last.logits(rows, branches, signs).argmax(-1).tolist()
        values = values_in(triggers, queries, [base.tokenizer.decode([t]) for t in tokens])
        np.add.at(right, of, values == bits[of])
    found: NDArray[np.float64] = right / (NUM_SIGNATURES * np.bincount(of))
    return found


def _prepare(
    mark: MarkDirectory,
    last: LastLayer,
    base: LanguageModel,
    prose: Prose,
    settings: LMTrainSettings,
    progress: Progress | None,
    beside: Sequence[Beside],
    ordinary: Sequence[str],
) -> LMStart:
    mark.require("lm")
    return prepare(
        last,
        base.digest,
        base.speech(),
        mark.secrets.key,
        mark.config.n_bits,
        prose.split()[0],
        settings,
        beside=beside,
        ordinary=ordinary,
        replies=base.replies,
        cache=mark.path / ROWS_NAME,
        progress=progress,
    )


def _beginnings(texts: dict[int, str], pattern: re.Pattern[str]) -> dict[int, str]:
    """Return the tokens of this form, none of which begins as another does."""
    found = sorted((text, index) for index, text in texts.items() if pattern.fullmatch(text))
    kept: dict[int, str] = {}
    last = None
    for text, index in found:
        # Sorted, a text follows right after what it begins with, or after others that do.
        if last is None or not text.startswith(last):
            kept[index], last = text, text
    return kept
