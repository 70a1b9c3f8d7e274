"""Who leaked: every user's score against what was read, with the error of naming anybody wrongly.

"Nobody" is an answer. Knows no models; torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from polyadapt.errors import InvalidRequest
from polyadapt.watermark.codebook import Codebook
from polyadapt.watermark.statistics import Bit, InnocentScores, holm, scores_of

NUM_SHOWN = 10  # of the users, best first


@dataclass(frozen=True, slots=True)
class Suspicion:
    """How well one user's row agrees with what was read."""

    user: str
    score: float
    num_matches: int  # of the bits that were read
    p_value: float  # of an innocent scoring as much
    family_p_value: float  # of any innocent of all that were compared doing so (Holm)


@dataclass(frozen=True, slots=True)
class Trace:
    """The answer. `accused` is empty where it is nobody, which is not an acquittal."""

    accused: tuple[Suspicion, ...]
    ranked: tuple[Suspicion, ...]  # the first NUM_SHOWN, accused or not
    num_users: int
    num_bits: int
    num_decided: int
    alpha: float  # of naming any innocent at all
    threshold: float  # the score that one user alone would need
    gap: float  # in score, between the first and the second; 0 where there is no second
    note: str  # what limits the answer; "" where nothing does

    @property
    def is_nobody(self) -> bool:
        """Whether nobody can be named at this error."""
        return not self.accused


def trace(
    codebook: Codebook, users: Sequence[str], bits: Sequence[Bit], *, alpha: float = 1e-3
) -> Trace:
    """Compare what was read with every user's row.

    With chance at most `alpha` anybody is accused who had no part, whatever those who had did with
    the positions where their copies differ. This needs the users to be fixed before the reading.
    Raises InvalidRequest for no users, a user twice, or bits of another length.
    """
    if not users:
        raise InvalidRequest("no users to compare with; list those who were given a copy")
    if len(set(users)) != len(users):
        raise InvalidRequest("a user is listed twice; each may be counted once")
    if not 0.0 < alpha < 0.5:
        raise InvalidRequest(f"alpha is {alpha}, expected between 0 and 0.5", param="alpha")
    rows, biases = codebook.rows(users), codebook.biases
    scores = scores_of(rows, biases, bits)
    innocent = InnocentScores(biases, bits)
    p_values = innocent.p_values(scores)
    family = holm(p_values)
    read = np.array([-1 if bit is None else bit for bit in bits])

    def suspicion(index: int) -> Suspicion:
        return Suspicion(
            user=users[index],
            score=float(scores[index]),
            num_matches=int((rows[index] == read).sum()),
            p_value=float(p_values[index]),
            family_p_value=float(family[index]),
        )

    order = np.argsort(-scores, kind="stable")
    num_accused = int((family <= alpha).sum())
    best, second = (scores[order[0]], scores[order[1]]) if len(users) > 1 else (0.0, 0.0)
    return Trace(
        accused=tuple(suspicion(int(i)) for i in order[:num_accused]),
        ranked=tuple(suspicion(int(i)) for i in order[:NUM_SHOWN]),
        num_users=len(users),
        num_bits=codebook.length,
        num_decided=innocent.num_positions,
        alpha=alpha,
        threshold=innocent.threshold(alpha / len(users)),
        gap=float(best - second),
        note=_note(codebook, innocent, bits, num_accused, alpha / len(users)),
    )


def _note(
    codebook: Codebook,
    innocent: InnocentScores,
    bits: Sequence[Bit],
    num_accused: int,
    alpha: float,
) -> str:
    perfect = np.array([[bit or 0 for bit in bits]], dtype=np.uint8)
    best = scores_of(perfect, codebook.biases, bits)
    if innocent.p_values(best)[0] > alpha:
        return (
            f"{innocent.num_positions} bits that were read cannot tell so many users apart at this "
            "error, even with every bit right: use a longer code or read more bits"
        )
    most = codebook.design.max_colluders
    if num_accused > most:
        return (
            f"{num_accused} users are accused and the code is made for {most}: each accusation "
            "holds at the stated error, but others who took part may be missing"
        )
    return ""
