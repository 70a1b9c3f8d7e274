"""Choose the next tokens of a step's sequences on the device, without waiting for it.

Each row's choice is the one that sampler.py makes, which is its definition. What decides it beside
the logits is known on the host before the step and is sent in one copy; what comes of it stays on
the device as the next step's input and is copied back while the host goes on.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from polyadapt.engine.device_tokens import DeviceTokens
from polyadapt.engine.request import Sequence
from polyadapt.engine.sampler import GREEDY_BELOW
from polyadapt.engine.text_marks import RowMark, row_marks
from polyadapt.engine.token_counts import TokenCounts
from polyadapt.engine.uniform import uniforms
from polyadapt.ops.device import Device
from polyadapt.types import SamplingParams
from polyadapt.watermark.prf import spread
from polyadapt.watermark.text import FLOOR, GreenList, Race, Reshaping, Tournament, reach

# Rows whose distributions are made at a time: several tables as large as their logits.
_ROWS_AT_ONCE = 64
# Entries of a distribution that are summed first, to find the one block that is looked through.
_BLOCK = 256


class DeviceSampler:
    """Samples on one device; owns the stream of copies that bring tokens to the host."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._copies = device.copy_stream()

    @torch.inference_mode()
    def sample(
        self,
        logits: torch.Tensor,
        sequences: Seq[Sequence],
        end_token_ids: Seq[tuple[int, ...]],
    ) -> DeviceTokens:
        """Enqueue the choice of every sequence's next token.

        logits [rows, vocabulary] of any float dtype, on the device, left unchanged: row i is of
        sequence i, and rows behind the last sequence are of nobody. end_token_ids are forbidden to
        each sequence until its min_tokens is reached. Raises IndexError for a token id outside of
        the vocabulary in a bias, an end or a penalised text.
        """
        logits = logits[: len(sequences)]
        asked = _Asked(sequences, end_token_ids, logits.shape[1])
        staged, sent = asked.upload.send(self._device)
        largest, ids = logits.max(-1)  # of equal ones the first; NaN counts as the largest
        is_finite = largest.isfinite()
        scores = logits
        if asked.adjustments:
            scores = logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            for adjustment in asked.adjustments:
                adjustment.apply(scores.view(-1), sent)
            largest, ids = scores.max(-1)
            is_finite &= largest.isfinite()
        for raises in asked.raises:
            if scores is logits:
                scores = logits.to(torch.float32, copy=True)
            raises.apply(scores, ids, sent)
        for draws in asked.draws:
            rows = sent[draws.rows]
            ids.index_copy_(0, rows, draws.draw(scores.index_select(0, rows).float(), sent))
        packed = _pack(ids, is_finite, logits, asked, sent)
        host = self._device.pinned(tuple(packed.shape), torch.int32)
        self._copies.follow(self._device.mark())
        self._copies.copy(host, packed)
        return DeviceTokens(ids, host, self._copies.mark(), asked.num_logprobs, (packed, staged))


def is_penalised(params: SamplingParams) -> bool:
    """Whether the tokens so far, and not only how many they are, change the next one's scores."""
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )


class _Upload:
    """Numbers that go to the device in one copy: int64 words, floats as the bits of float64."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []
        self._size = 0

    def add(self, numbers: Seq[int] | np.ndarray) -> slice:
        """Where integers will lie in what is sent."""
        return self._add(np.asarray(numbers, np.int64))

    def add_floats(self, numbers: Seq[float] | np.ndarray) -> slice:
        """The same for floats; see `_floats`."""
        return self._add(np.asarray(numbers, np.float64).view(np.int64))

    def send(self, device: Device) -> tuple[torch.Tensor, torch.Tensor]:
        """The numbers on the host, which have to stay until they are copied, and on the device."""
        host = device.pinned((self._size,), torch.int64)
        if self._parts:
            np.concatenate(self._parts, out=host.numpy())
        return host, host.to(device.torch_device, non_blocking=True)

    def _add(self, words: np.ndarray) -> slice:
        start, self._size = self._size, self._size + len(words)
        self._parts.append(words)
        return slice(start, self._size)


def _floats(sent: torch.Tensor, at: slice) -> torch.Tensor:
    """float64 as they were added."""
    return sent[at].view(torch.float64)


@dataclass(frozen=True, slots=True)
class _Adjustment:
    """One step of sampler._adjust for all rows that have it: entries of the flat table of scores
    and, unless they are forbidden, a number for each. No entry comes twice.
    """

    at: slice
    by: slice
    kind: Literal["repeat", "add", "forbid"]

    def apply(self, flat: torch.Tensor, sent: torch.Tensor) -> None:
        """Change the entries of float32 [rows * vocabulary] in place."""
        index = sent[self.at]
        if self.kind == "forbid":
            flat.index_fill_(0, index, float("-inf"))
            return
        by, old = _floats(sent, self.by).float(), flat.index_select(0, index)
        new = old + by if self.kind == "add" else torch.where(old > 0, old / by, old * by)
        flat.index_copy_(0, index, new)


@dataclass(frozen=True, slots=True)
class _Cut:
    """How rows have their distributions cut; num_kept: no row keeps more than so many tokens."""

    num_kept: int
    top_k: slice  # the whole vocabulary where it is off
    is_top_k: slice
    top_p: slice  # infinite where it is off
    min_p: slice


@dataclass(frozen=True, slots=True)
class _Raises:
    """Rows whose favoured tokens' scores are raised; see watermark.text.raise_favoured."""

    rows: slice
    seeds: slice
    bounds: slice
    bias: slice
    reach: slice

    def apply(self, scores: torch.Tensor, ids: torch.Tensor, sent: torch.Tensor) -> None:
        """Change the rows of float32 [rows, vocabulary] in place, and their best `ids` [rows]."""
        rows = sent[self.rows]
        own = scores.index_select(0, rows)
        words = spread(sent[self.seeds][:, None], _places(own))
        is_green = ((words >> 32) & 0xFFFFFFFF) < sent[self.bounds][:, None]
        floor = own.amax(-1, keepdim=True) - _floats(sent, self.reach).float()[:, None]
        raised = own + _floats(sent, self.bias).float()[:, None]
        own = torch.where(is_green & (own >= floor), raised, own)
        scores.index_copy_(0, rows, own)
        ids.index_copy_(0, rows, own.argmax(-1))


@dataclass(frozen=True, slots=True)
class _Reshape:
    """How the distributions of rows are marked; see watermark.text.reshape_kept."""

    scheme: Reshaping
    seeds: slice

    def reshape(
        self, weights: torch.Tensor, tokens: torch.Tensor | None, sent: torch.Tensor
    ) -> torch.Tensor:
        """Return weights [rows, tokens] of the same dtype; tokens None: 0, 1, ..."""
        given = weights.double()
        is_in = given >= given.amax(-1, keepdim=True) * FLOOR
        kept = torch.where(is_in, given, 0.0)
        total = kept.sum(-1, keepdim=True)
        words = spread(sent[self.seeds][:, None], _places(weights) if tokens is None else tokens)
        if isinstance(self.scheme, Tournament):
            p = kept / total
            for layer in range(self.scheme.depth):
                coins = ((words >> layer) & 1).double()
                p = p * (coins + (1.0 - (coins * p).sum(-1, keepdim=True)))
            found = p * total
        else:
            number = (((words >> 11) & ((1 << 53) - 1)).double() + 0.5) * 2.0**-53
            arrivals = torch.where(is_in, -number.log() / kept, float("inf"))
            winner = arrivals.argmin(-1, keepdim=True)
            found = torch.zeros_like(kept).scatter_(1, winner, total)
        return torch.where(is_in, found, given).to(weights.dtype)


@dataclass(frozen=True, slots=True)
class _Draws:
    """Rows that are drawn together, all with a cut of their distribution or all without, and all
    marked in one way or none.
    """

    rows: slice
    uniform: slice
    temperature: slice
    cut: _Cut | None = None
    mark: _Reshape | None = None

    def draw(self, scores: torch.Tensor, sent: torch.Tensor) -> torch.Tensor:
        """Token ids int64 [rows] from scores float32 [rows, vocabulary]; see sampler._draw."""
        uniform = _floats(sent, self.uniform)[:, None]
        temperature = _floats(sent, self.temperature).float()[:, None]
        weights = ((scores - scores.amax(-1, keepdim=True)) / temperature).exp()
        if self.cut is None:
            if self.mark is not None:
                weights = self.mark.reshape(weights, None, sent)
            return _invert(weights, uniform)
        cut = self.cut
        # Of tokens that have an equal weight top_k takes those of the largest score.
        is_top_k = sent[cut.is_top_k][:, None].bool()
        order = _order(torch.where(is_top_k, scores, weights), cut.num_kept)
        weights = weights.gather(1, order)
        places = torch.arange(cut.num_kept, device=weights.device)
        weights = weights.masked_fill(places >= sent[cut.top_k][:, None], 0.0)
        probs = weights.double() / weights.sum(-1, keepdim=True, dtype=torch.float64)
        # The smallest set whose mass reaches top_p: whoever starts below it.
        below = probs.cumsum(-1) - probs
        probs = probs.masked_fill(below >= _floats(sent, cut.top_p)[:, None], 0.0)
        probs = probs.masked_fill(probs < _floats(sent, cut.min_p)[:, None] * probs[:, :1], 0.0)
        if self.mark is not None:
            probs = self.mark.reshape(probs, order, sent)
        cumulative = probs.cumsum(-1)
        place = (cumulative <= uniform * cumulative[:, -1:]).sum(-1, keepdim=True)
        place = torch.minimum(place, _last(probs))
        return order.gather(1, place)[:, 0]


class _Asked:
    """What the sequences of one step ask of their choice, laid out for the device."""

    def __init__(
        self, sequences: Seq[Sequence], end_token_ids: Seq[tuple[int, ...]], num_vocab: int
    ) -> None:
        self.upload = _Upload()
        self.adjustments: list[_Adjustment] = []
        self.draws: list[_Draws] = []
        self.raises: list[_Raises] = []
        self._num_vocab = num_vocab
        params = [sequence.group.request.sampling for sequence in sequences]
        # Of the rows that want logprobs: how many of the likeliest.
        self.num_logprobs = {
            row: own.num_logprobs for row, own in enumerate(params) if own.num_logprobs is not None
        }
        self.logprob_rows = self.upload.add(list(self.num_logprobs))
        self._adjust(sequences, params, end_token_ids)
        self._marks = row_marks(sequences, num_vocab)
        self._raise(params)
        drawn = [row for row, own in enumerate(params) if own.temperature >= GREEDY_BELOW]
        if drawn:
            self._draw(sequences, params, drawn)

    def _adjust(
        self,
        sequences: Seq[Sequence],
        params: list[SamplingParams],
        end_token_ids: Seq[tuple[int, ...]],
    ) -> None:
        """The steps of sampler._adjust, in its order; numbers are float32 as there."""
        repeat, lower, bias, forbid = _Entries(), _Entries(), _Entries(), _Entries()
        for row, (sequence, own) in enumerate(zip(sequences, params, strict=True)):
            if is_penalised(own):
                if sequence.counts is None:
                    sequence.counts = TokenCounts(sequence.num_prompt)
                sequence.counts.follow(sequence.token_ids)
                if own.repetition_penalty != 1.0:
                    seen = sequence.counts.seen()
                    repeat.add(row, seen, np.full(len(seen), own.repetition_penalty))
                if own.presence_penalty or own.frequency_penalty:
                    ids, times = sequence.counts.generated()
                    each = np.float32(own.frequency_penalty) * times
                    lower.add(row, ids, -(np.float32(own.presence_penalty) + each))
            if own.logit_bias:
                biased = np.array([token_id for token_id, _ in own.logit_bias])
                bias.add(row, biased, np.array([added for _, added in own.logit_bias]))
            if sequence.num_output < own.min_tokens and end_token_ids[row]:
                ends = np.unique(end_token_ids[row])
                forbid.add(row, ends, np.zeros(0))
        self._put("repeat", repeat)
        self._put("add", lower)
        self._put("add", bias)
        self._put("forbid", forbid)

    def _put(self, kind: Literal["repeat", "add", "forbid"], entries: _Entries) -> None:
        if entries.rows:
            at = self.upload.add(entries.flat(self._num_vocab))
            by = self.upload.add_floats(np.concatenate(entries.numbers))
            self.adjustments.append(_Adjustment(at, by, kind))

    def _raise(self, params: list[SamplingParams]) -> None:
        marked: list[tuple[int, RowMark, GreenList]] = []
        for row, mark in enumerate(self._marks):
            if mark is not None and mark.raising is not None:
                assert isinstance(mark.scheme, GreenList), "other schemes are applied on the host"
                marked.append((row, mark, mark.scheme))
        add, add_floats = self.upload.add, self.upload.add_floats
        for first in range(0, len(marked), _ROWS_AT_ONCE):
            part = marked[first : first + _ROWS_AT_ONCE]
            reaches = [reach(scheme, params[row].temperature) for row, _, scheme in part]
            self.raises.append(
                _Raises(
                    add([row for row, _, _ in part]),
                    add([int(mark.seed[0]) for _, mark, _ in part]),
                    add([scheme.bound for _, _, scheme in part]),
                    add_floats([scheme.bias for _, _, scheme in part]),
                    add_floats(reaches),
                )
            )

    def _reshape(self, rows: list[int], scheme: Reshaping | None) -> _Reshape | None:
        if scheme is None:
            return None
        seeds = [int(mark.seed[0]) for row in rows if (mark := self._marks[row]) is not None]
        return _Reshape(scheme, self.upload.add(seeds))

    def _draw(
        self, sequences: Seq[Sequence], params: list[SamplingParams], drawn: list[int]
    ) -> None:
        uniform = np.zeros(len(sequences))
        uniform[drawn] = uniforms(
            [params[row].seed for row in drawn],
            [sequences[row].index for row in drawn],
            [sequences[row].num_output for row in drawn],
        )
        # By the scheme that reshapes them; equal ones are one.
        whole: dict[Tournament | Race | None, list[int]] = {}
        cut: dict[Tournament | Race | None, list[int]] = {}
        for row in drawn:
            own, mark = params[row], self._marks[row]
            is_cut = own.top_p < 1.0 or own.min_p > 0.0 or 0 < own.top_k < self._num_vocab
            reshaping = None if mark is None else mark.reshaping
            (cut if is_cut else whole).setdefault(reshaping, []).append(row)
        add, add_floats = self.upload.add, self.upload.add_floats
        for scheme, members in whole.items():
            for rows in _parts(members):
                temperature = add_floats([params[row].temperature for row in rows])
                of_scheme = self._reshape(rows, scheme)
                self.draws.append(
                    _Draws(add(rows), add_floats(uniform[rows]), temperature, mark=of_scheme)
                )
        for scheme, members in cut.items():
            self._draw_cut(params, members, uniform, scheme)

    def _draw_cut(
        self,
        params: list[SamplingParams],
        cut: list[int],
        uniform: np.ndarray,
        scheme: Reshaping | None,
    ) -> None:
        add, add_floats = self.upload.add, self.upload.add_floats
        # Rows that keep few tokens need no whole order, so they shall not be among those that do.
        num_vocab = self._num_vocab
        asked = {row: params[row].top_k for row in cut}
        limits = {row: k if 0 < k < num_vocab else num_vocab for row, k in asked.items()}
        for rows in _parts(sorted(cut, key=lambda row: limits[row])):
            own_params = [params[row] for row in rows]
            top_k = [limits[row] for row in rows]
            cut_as = _Cut(
                max(top_k),
                add(top_k),
                add([k < num_vocab for k in top_k]),
                add_floats([own.top_p if own.top_p < 1.0 else np.inf for own in own_params]),
                add_floats([own.min_p for own in own_params]),
            )
            temperature = add_floats([own.temperature for own in own_params])
            mark = self._reshape(rows, scheme)
            self.draws.append(
                _Draws(add(rows), add_floats(uniform[rows]), temperature, cut_as, mark)
            )


class _Entries:
    """Entries of a table of scores, row by row."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.ids: list[np.ndarray] = []
        self.numbers: list[np.ndarray] = []

    def add(self, row: int, ids: np.ndarray, numbers: np.ndarray) -> None:
        """The entries of `ids` in a row, with a number each, or none at all."""
        self.rows.append(row)
        self.ids.append(ids)
        self.numbers.append(numbers)

    def flat(self, num_vocab: int) -> np.ndarray:
        """Where they lie, int64; an id outside of the vocabulary would be another row's."""
        ids = np.concatenate(self.ids)
        if len(ids) and not 0 <= ids.min() <= ids.max() < num_vocab:
            raise IndexError(f"token ids {ids.min()} to {ids.max()} in {num_vocab} of a vocabulary")
        rows = np.repeat(np.array(self.rows), [len(own) for own in self.ids])
        flat: np.ndarray = rows * num_vocab + ids
        return flat


def _places(table: torch.Tensor) -> torch.Tensor:
    """0, 1, ... along a row of a table, int64 [1, columns]."""
    return torch.arange(table.shape[1], device=table.device)[None]


def _parts(rows: list[int]) -> list[list[int]]:
    return [rows[i : i + _ROWS_AT_ONCE] for i in range(0, len(rows), _ROWS_AT_ONCE)]


def _order(keys: torch.Tensor, count: int) -> torch.Tensor:
    """Indices int64 [rows, count] of the largest of float32 [rows, vocabulary], in falling order;
    of equal ones the first.
    """
    if count == keys.shape[1]:
        return keys.sort(dim=-1, descending=True, stable=True).indices
    # topk leaves open which of equal ones it takes, so each becomes an integer of its own: the
    # float's bits, which order as its value once those of negative numbers are turned round, and
    # below them the index. Adding 0 makes one zero of both.
    bits = (keys + 0.0).view(torch.int32).long()
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    index = torch.arange(keys.shape[1], device=keys.device)
    return ((bits << 32) + (0xFFFFFFFF - index)).topk(count, dim=-1).indices


def _invert(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Index int64 [rows] of the first entry at which the cumulative sum of float32 [rows,
    vocabulary] exceeds uniform * total; see sampler._invert. uniform float64 [rows, 1].
    """
    missing = -weights.shape[1] % _BLOCK
    if missing:
        weights = torch.nn.functional.pad(weights, (0, missing))
    blocks = weights.view(len(weights), -1, _BLOCK)
    sums = blocks.sum(-1, dtype=torch.float64)
    ends = sums.cumsum(-1)
    target = uniform * ends[:, -1:]
    # The product may round up to the total.
    block = torch.minimum((ends <= target).sum(-1, keepdim=True), _last(sums))
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK))[:, 0]
    cumulative = inside.cumsum(-1, dtype=torch.float64)
    before = torch.where(block > 0, ends.gather(1, (block - 1).clamp(min=0)), 0.0)
    found = (cumulative <= target - before).sum(-1, keepdim=True)
    # The same block's two sums may differ in the last bit.
    return (block * _BLOCK + torch.minimum(found, _last(inside)))[:, 0]


def _last(weights: torch.Tensor) -> torch.Tensor:
    """The last index of each row that has any weight, int64 [rows, 1]; 0 where none has."""
    index = torch.arange(weights.shape[1], device=weights.device)
    return torch.where(weights > 0, index, 0).amax(-1, keepdim=True)


def _pack(
    ids: torch.Tensor,
    is_finite: torch.Tensor,
    logits: torch.Tensor,
    asked: _Asked,
    sent: torch.Tensor,
) -> torch.Tensor:
    """All that the host reads, int32: ids [rows], flags [rows] and, of the rows that want
    logprobs, the chosen token's [n], the largest [n, k] as the bits of float32, and their ids.
    """
    parts = [ids.int(), is_finite.int()]
    if asked.num_logprobs:
        num_top = max(asked.num_logprobs.values())
        chosen, values, tops = [], [], []
        for rows in torch.split(sent[asked.logprob_rows], _ROWS_AT_ONCE):
            logprobs = torch.log_softmax(logits.index_select(0, rows).float(), -1)
            chosen.append(logprobs.gather(1, ids.index_select(0, rows)[:, None]).flatten())
            largest, top = logprobs.topk(num_top)
            values.append(largest.flatten())
            tops.append(top.int().flatten())
        parts += [part.view(torch.int32) for part in (*chosen, *values)] + tops
    return torch.cat(parts)
