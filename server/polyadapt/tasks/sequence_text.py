"""One sequence's way from tokens to text: detokenised, cut at stop strings, with its logprobs.

Knows no engine and no wire format.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from polyadapt.tasks.detokenizer import Decoder, Detokenizer
from polyadapt.tasks.stop_strings import StopStrings
from polyadapt.types import FinishReason, TokenLogprob, Tokens


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token's logprob and where its text begins, in characters from the sequence's start."""

    score: TokenLogprob
    text_offset: int


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What one engine event added to one sequence.

    `token_ids` are all generated ids, a stop token included; `scored` leaves out the stop token and
    the tokens whose text lies behind a stop string, and a token is held back with its text.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    scored: tuple[ScoredToken, ...] = ()
    finish_reason: FinishReason | None = None


class SequenceText:
    """The text of sequence `index`; after its finish further tokens are ignored."""

    def __init__(
        self, index: int, decoder: Decoder, *, stop: Sequence[str], min_tokens: int
    ) -> None:
        """Start empty; stop strings count only behind the first `min_tokens` tokens."""
        self.index = index
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.is_cut = False  # ended by a stop string, of which the engine knows nothing
        self._detokenizer = Detokenizer(decoder)
        self._stops = StopStrings(stop)
        self._has_stops = bool(stop)
        self._min_tokens = min_tokens
        self._num_decoded = 0  # characters that came out of the detokenizer
        self._num_released = 0  # characters that were returned
        self._unreleased: deque[ScoredToken] = deque()

    def take(self, event: Tokens) -> TextDelta | None:
        """Take the engine's tokens; None when the sequence has ended already."""
        if self.finish_reason is not None:
            return None
        if event.finish_reason is None and not (self._has_stops or event.logprobs):
            return self._take_plain(event)
        pieces: list[str] = []
        num_taken = 0
        for position, token_id in enumerate(event.token_ids):
            num_taken += 1
            self.num_tokens += 1
            is_last = position == len(event.token_ids) - 1
            if is_last and event.stop_token_id is not None:
                break
            if event.logprobs:
                score = event.logprobs[position]
                self._unreleased.append(ScoredToken(score, self._num_decoded))
            if self._scan(self._detokenizer.push(token_id), pieces):
                break
        if event.finish_reason is not None and not self.finish_reason:
            self._finish(event.finish_reason, pieces)
        return TextDelta(
            index=self.index,
            text="".join(pieces),
            token_ids=event.token_ids[:num_taken],
            scored=self._take_scored(),
            finish_reason=self.finish_reason,
        )

    def _take_plain(self, event: Tokens) -> TextDelta:
        """Take tokens that nothing ends and nobody scores, which is most of them."""
        push = self._detokenizer.push
        text = "".join([push(token_id) for token_id in event.token_ids])
        self.num_tokens += len(event.token_ids)
        self._num_decoded += len(text)
        self._num_released += len(text)
        return TextDelta(self.index, text, event.token_ids)

    def _finish(self, reason: FinishReason, pieces: list[str]) -> None:
        """Release everything that was held back, unless a stop string ends in it."""
        if self._scan(self._detokenizer.flush(), pieces):
            return
        self.finish_reason = reason
        self._release(self._stops.flush(), pieces)
        self._num_released = self._num_decoded + 1  # the last tokens may have no text

    def _scan(self, piece: str, pieces: list[str]) -> bool:
        """Release what is certain of `piece`; True when a stop string has ended the sequence."""
        self._num_decoded += len(piece)
        may_stop = self.num_tokens > self._min_tokens
        scan = self._stops.push(piece) if may_stop else self._stops.skip(piece)
        self._release(scan.text, pieces)
        if scan.is_stopped:
            self.finish_reason = "stop"
            self.is_cut = True
        return scan.is_stopped

    def _release(self, text: str, pieces: list[str]) -> None:
        pieces.append(text)
        self._num_released += len(text)

    def _take_scored(self) -> tuple[ScoredToken, ...]:
        taken: list[ScoredToken] = []
        while self._unreleased and self._unreleased[0].text_offset < self._num_released:
            taken.append(self._unreleased.popleft())
        return tuple(taken)
