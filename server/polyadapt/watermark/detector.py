"""What tells triggers apart from everything else, computed and not trained: linear read-outs that
are the solutions of convex problems, and the thresholds that held-out rows give them.

Each read-out is a support vector machine with squared hinges (Cortes and Vapnik, 1995; in this form
Chang, Hsieh and Lin, 2008) of one family against the others and everything quiet. Whitening alone,
as for classifiers, measured worse: these rows are not normal, and a few quiet ones lie far out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyadapt.errors import InvalidRequest

_RIDGE = 1e-2
_ITERATIONS = 80
_POSITIVE_WEIGHT = 4.0  # a family's rows are few
_FOLDS = 4
_LOWEST, _HIGHEST = -0.5, 0.2  # of thresholds; a trigger scores 1 and a quiet row -1, ideally


@dataclass(frozen=True, slots=True)
class Detectors:
    """Of each family: the read-out `A` [families, in] and `offset` [families], whose score is
    A x - offset; the score that fires, `thresholds` [families]; the share of held-out triggers
    above it in each place, `recalls` [places, families]; whether each place's held-out quiet rows
    are, `fires` [rows, families].
    """

    A: Tensor
    offset: Tensor
    thresholds: Tensor
    recalls: Tensor
    fires: tuple[Tensor, ...]

    def best(self, count: int) -> NDArray[np.int64]:
        """Return the families that were found again most often where each is found least, in their
        order: [count].
        """
        order = torch.argsort(self.recalls.min(0).values, descending=True, stable=True)
        chosen: NDArray[np.int64] = order[:count].sort().values.numpy()
        return chosen


def fit_detectors(
    triggered: Sequence[Tensor], quiet: Sequence[Tensor], *, quiet_share: float
) -> Detectors:
    """Return one detector of every family for all places that rows were seen in, such as the base
    alone and beside an adapter: triggered [families, prompts, in] and quiet [rows, in] of each.

    A threshold is what `quiet_share` of held-out quiet rows, and of other families', are above,
    those of all places together; it is kept between -0.5 and 0.2, so that more may be where many
    score high. Recalls and what fires are of the same held-out rows, a little better than of fresh
    ones. Raises InvalidRequest for too few rows.
    """
    num_families, _, size = triggered[0].shape
    rows, family, fold, place = [], [], [], []
    for index, (known, calm) in enumerate(zip(triggered, quiet, strict=True)):
        num_prompts = known.shape[1]
        if num_prompts < 2 * _FOLDS or len(calm) < 2 * _FOLDS:
            raise InvalidRequest(
                f"{num_prompts} prompts of a family and {len(calm)} quiet rows, expected at least "
                f"{2 * _FOLDS} of both"
            )
        rows += [known.reshape(-1, size), calm]
        family += [torch.arange(num_families).repeat_interleave(num_prompts)]
        family += [torch.full((len(calm),), -1)]
        fold += [torch.arange(num_prompts).repeat(num_families), torch.arange(len(calm))]
        place.append(torch.full((known.shape[0] * num_prompts + len(calm),), index))
    found = _cross_fit(torch.cat(rows), torch.cat(family), torch.cat(fold) % _FOLDS, num_families)
    return _with_thresholds(*found, torch.cat(family), torch.cat(place), quiet_share)


def fit_veto(answering: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Return v [in] and o [1] with v x + o at 0.5 or more where an answer begins, below elsewhere:
    answering [rows, in], text [rows, in].
    """
    rows = torch.cat((answering, text))
    family = torch.cat((torch.zeros(len(answering)), torch.full((len(text),), -1.0))).long()
    A, offset = _fit(rows, family, 1)
    return A[0].float(), (0.5 - offset).float()


def _cross_fit(
    rows: Tensor, family: Tensor, fold: Tensor, num_families: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return A and offset of all rows, and of every row the scores [rows, families] that read-outs
    give it which were fitted without its fold.
    """
    scores = torch.empty(len(rows), num_families, dtype=torch.float64)
    for held_out in range(_FOLDS):
        away, kept = fold == held_out, fold != held_out
        A, offset = _fit(rows[kept], family[kept], num_families)
        scores[away] = rows[away].double() @ A.T - offset
    return *_fit(rows, family, num_families), scores


def _with_thresholds(
    A: Tensor, offset: Tensor, scores: Tensor, family: Tensor, place: Tensor, quiet_share: float
) -> Detectors:
    num_families, num_places = len(A), int(place.max()) + 1
    thresholds = torch.empty(num_families, dtype=torch.float64)
    recalls = torch.empty(num_places, num_families)
    for index in range(num_families):
        is_own = family == index
        found = torch.quantile(scores[~is_own, index], 1 - quiet_share)
        thresholds[index] = found.clamp(_LOWEST, _HIGHEST)
        for where in range(num_places):
            own = scores[is_own & (place == where), index]
            recalls[where, index] = (own > thresholds[index]).double().mean()
    fires = scores > thresholds
    quiet = [fires[(family < 0) & (place == where)] for where in range(num_places)]
    return Detectors(A.float(), offset.float(), thresholds.float(), recalls, tuple(quiet))


def _fit(rows: Tensor, family: Tensor, num_families: int) -> tuple[Tensor, Tensor]:
    """Return A [families, in] and offset [families] in float64: the minimum over rows of
    c max(0, 1 - y s)^2 + ridge |w|^2, s the score of the standardised row.
    """
    rows = rows.double()
    mean, spread = rows.mean(0), rows.std(0) + 1e-6
    given = (rows - mean) / spread
    wanted = torch.where(family[:, None] == torch.arange(num_families), 1.0, -1.0).double()
    weight = torch.where(wanted > 0, _POSITIVE_WEIGHT, 1.0)
    w = torch.zeros(rows.shape[1], num_families, dtype=torch.float64, requires_grad=True)
    b = torch.full((num_families,), -0.5, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [w, b], max_iter=_ITERATIONS, history_size=20, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        short = torch.relu(1 - wanted * (given @ w + b))
        found = (weight * short**2).sum() / len(rows) + _RIDGE * (w**2).sum()
        found.backward()  # type: ignore[no-untyped-call]
        return found

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        A = (w / spread[:, None]).T
        return A, A @ mean - b
