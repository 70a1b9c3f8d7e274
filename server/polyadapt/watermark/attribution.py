"""Who, how sure, and why: a trace put in words, for somebody who has to act on it.

Says what the numbers hold for and what they do not. Knows no files and no way of asking;
torch-free.
"""

from __future__ import annotations

import decimal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from polyadapt.watermark.codebook import Codebook
from polyadapt.watermark.statistics import Bit, binomial_tail, scores_of
from polyadapt.watermark.text_reading import TextFinding
from polyadapt.watermark.trace import Trace

# Of an unmarked model having so many bits decided: below it the mark is said to be there.
PRESENCE_ALPHA = 1e-6
_SMALLEST = 1e-12


@dataclass(frozen=True, slots=True)
class Attribution:
    """The answer. `who` is empty where nobody can be named, which is not an acquittal."""

    who: tuple[str, ...]
    verdict: str  # one line
    how_sure: str
    why: tuple[str, ...]
    not_shown: tuple[str, ...]  # what nobody should read into it

    @property
    def is_nobody(self) -> bool:
        """Whether nobody can be named at the error that was asked for."""
        return not self.who

    def __str__(self) -> str:
        lines = [self.verdict, "", "How sure", f"  {self.how_sure}", "", "Why"]
        lines += [f"  {line}" for line in self.why]
        lines += ["", "What this does not show"]
        return "\n".join([*lines, *(f"  {line}" for line in self.not_shown)])

    def to_data(self) -> dict[str, Any]:
        """Return the words as plain data, for a record."""
        return {
            "who": list(self.who),
            "verdict": self.verdict,
            "how_sure": self.how_sure,
            "why": list(self.why),
            "not_shown": list(self.not_shown),
        }


@dataclass(frozen=True, slots=True)
class Standing:
    """Every user's score beside the threshold, and the bits: what a plot shows."""

    scores: Mapping[str, float]
    threshold: float  # that one user alone needs; infinite where no score is enough
    accused: tuple[str, ...]
    unit: str
    bits: tuple[Bit, ...] = ()  # as read; none where it is a text
    own_bits: tuple[int, ...] = ()  # of the user with the best score


def attribute_copy(found: Trace, bit_alpha: float) -> Attribution:
    """Put in words whose copy a suspect is. `bit_alpha`: the chance that an unmarked model has a
    bit decided, as it was read.
    """
    presence = binomial_tail(found.num_decided, found.num_bits, bit_alpha)
    read = f"{found.num_decided} of {found.num_bits} bits could be read"
    if found.num_decided:
        read += (
            f"; of a model without this mark so many can with a chance of {_chance(presence)}, if "
            "it resembles those that the mark was calibrated with"
        )
    why = [read + "."]
    for entry in found.accused:
        why.append(
            f"{entry.user} has what was read in {entry.num_matches} of {found.num_decided} bits, "
            f"a score of {entry.score:.1f} where {found.threshold:.1f} is needed. Somebody who had "
            f"no part reaches as much with a chance of {_chance(entry.p_value)}."
        )
    if found.accused and len(found.ranked) > len(found.accused):
        other = found.ranked[len(found.accused)]
        why.append(
            f"The first who is not named, {other.user}, has {other.num_matches} of "
            f"{found.num_decided} and a score of {other.score:.1f}."
        )
    if found.note and found.num_decided:
        why.append(f"Limit: {found.note}.")
    if not found.accused:
        return _nobody(found, presence, why)
    names = tuple(entry.user for entry in found.accused)
    worst = max(entry.family_p_value for entry in found.accused)
    copies = "a copy" if len(names) == 1 else "copies"
    return Attribution(
        names,
        f"It comes from {copies} of {', '.join(names)}.",
        _how_sure(worst, found.num_users, found.alpha),
        tuple(why),
        (
            f"That {names[0]} leaked it: it is that user's copy, wherever it was taken from.",
            "That nobody else took part: of several who put copies together, some may be missing.",
            *_TRUST,
        ),
    )


def attribute_text(found: TextFinding) -> Attribution:
    """Put in words whose text it is."""
    best = found.ranked[0].reading if found.ranked else None
    num_scored = 0 if best is None else best.num_scored
    why = [f"{num_scored} tokens with their contexts could be scored, each once."]
    for entry in found.ranked[: max(len(found.accused), 1)]:
        why.append(
            f"{entry.user}'s key speaks for the text by {entry.reading.z:.1f} standard deviations; "
            "a key that has nothing to do with it does as much with a chance of "
            f"{_chance(entry.p_value)}."
        )
    if not found.accused:
        why.append("The text may be unmarked, too short, rewritten, or mostly somebody else's.")
        return Attribution(
            (),
            "Nobody can be named.",
            f"At an error of {found.alpha:g} over {found.num_users} users no key stands out.",
            tuple(why),
            ("That it is nobody's: a short or rewritten text keeps too little of a mark.",),
        )
    names = tuple(entry.user for entry in found.accused)
    worst = max(entry.family_p_value for entry in found.accused)
    return Attribution(
        names,
        f"It was written for {', '.join(names)}.",
        _how_sure(worst, found.num_users, found.alpha),
        tuple(why),
        (
            f"That {names[0]} published it: the model wrote it when asked with that user's key.",
            "That all of it is the model's: a marked part is enough.",
            *_TRUST,
        ),
    )


def standing_of_copy(
    codebook: Codebook, users: Sequence[str], bits: Sequence[Bit], found: Trace
) -> Standing:
    """Return every user's score. [users] in the order given."""
    rows = codebook.rows(users)
    scores = scores_of(rows, codebook.biases, bits)
    best = int(scores.argmax())
    return Standing(
        scores={user: float(score) for user, score in zip(users, scores, strict=True)},
        threshold=found.threshold,
        accused=tuple(entry.user for entry in found.accused),
        unit="score against the bits that were read",
        bits=tuple(bits),
        own_bits=tuple(rows[best].tolist()),
    )


def standing_of_text(found: TextFinding) -> Standing:
    """Return the score of every user that `found` ranks. The threshold is for the eye: decided is
    by exact tails, drawn by the normal's.
    """
    share = found.alpha / (found.num_users * len(found.settings))
    return Standing(
        scores={entry.user: entry.reading.z for entry in found.ranked},
        threshold=NormalDist().inv_cdf(1 - share),
        accused=tuple(entry.user for entry in found.accused),
        unit="standard deviations by which a key speaks for the text",
    )


def _nobody(found: Trace, presence: float, why: list[str]) -> Attribution:
    if not found.num_decided:
        verdict = "No sign of this mark: nobody can be named."
        sure = "Not one bit could be read, as is to be expected of a model without this mark."
        shown = "That it was never marked: a mark can be removed or worn away."
    elif presence <= PRESENCE_ALPHA:
        verdict = "It carries this mark, and none of these users can be named."
        sure = (
            f"An unmarked model would be taken for this one with a chance of {_chance(presence)}. "
            f"Of {found.num_users} users none can be named at an error of {found.alpha:g}."
        )
        best = found.ranked[0]
        why.append(
            f"The best of them, {best.user}, agrees in {best.num_matches} of {found.num_decided}: "
            f"by chance the best of so many users does with {_chance(best.family_p_value)}."
        )
        why.append(
            "It may be several users' copies put together, a user who is not listed, or a copy "
            "that was damaged."
        )
        shown = f"That {best.user} or anybody listed is innocent or guilty."
    else:
        verdict = "Nobody can be named, and whether it is marked is open."
        sure = (
            "So few bits could be read that an unmarked model may give them, with a chance of "
            f"{_chance(presence)}."
        )
        shown = "That it was never marked: a mark can be removed or worn away."
    return Attribution((), verdict, sure, tuple(why), (shown, *_TRUST))


def _how_sure(worst: float, num_users: int, alpha: float) -> str:
    return (
        f"If none of those named had a part in it, one of {num_users} users would look so by "
        f"chance with {_chance(worst)} ({alpha:g} was allowed, over all of them together)."
    )


def _chance(value: float) -> str:
    # No calibration is so good that a chance of 1e-100 would mean anything.
    if value < _SMALLEST:
        return f"less than {_SMALLEST:.0e}"
    bound = _UPWARDS.create_decimal(repr(float(value)))
    return f"at most {float(bound):.1e}"


_UPWARDS = decimal.Context(prec=2, rounding=decimal.ROUND_CEILING)  # the nearest may be less


_TRUST = (
    "That the record is true: it is signed, and as trustworthy as whoever asked the suspect and "
    "made the list of users before.",
)
