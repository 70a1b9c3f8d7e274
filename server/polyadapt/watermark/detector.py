"""What tells triggers apart from everything else, computed and not trained: linear read-outs that
are the solutions of convex problems, and the thresholds that held-out rows give them.

Each read-out is a support vector machine with squared hinges (Cortes and Vapnik, 1995; in this form
Chang, Hsieh and Lin, 2008) of one family against the others and everything quiet. Whitening alone,
as for classifiers, measured worse: these rows are not normal, and a few quiet ones lie far out.
"""

from __future__ import annotations

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
    above it, `recalls` [families]; whether held-out quiet rows are, `fires` [rows, families].
    """

    A: Tensor
    offset: Tensor
    thresholds: Tensor
    recalls: Tensor
    fires: Tensor

    def best(self, count: int) -> NDArray[np.int64]:
        """Return the families that were found again most often, in their order: [count]."""
        order = torch.argsort(self.recalls, descending=True, stable=True)
        chosen: NDArray[np.int64] = order[:count].sort().values.numpy()
        return chosen


def fit_detectors(triggered: Tensor, quiet: Tensor, *, quiet_share: float) -> Detectors:
    """Return detectors of every family: triggered [families, prompts, in], quiet [rows, in].

    A threshold is what at most `quiet_share` of held-out quiet rows, and of other families', are
    above. Raises InvalidRequest for too few rows.
    """
    num_families, num_prompts, size = triggered.shape
    if num_prompts < 2 * _FOLDS or len(quiet) < 2 * _FOLDS:
        raise InvalidRequest(
            f"{num_prompts} prompts of a family and {len(quiet)} quiet rows, expected at least "
            f"{2 * _FOLDS} of both"
        )
    rows = torch.cat((triggered.reshape(-1, size), quiet))
    family = torch.cat(
        (
            torch.arange(num_families).repeat_interleave(num_prompts),
            torch.full((len(quiet),), -1),
        )
    )
    fold = torch.cat((torch.arange(num_prompts).repeat(num_families), torch.arange(len(quiet))))
    fold = fold % _FOLDS
    scores = torch.empty(len(rows), num_families, dtype=torch.float64)
    for held_out in range(_FOLDS):
        away, kept = fold == held_out, fold != held_out
        A, offset = _fit(rows[kept], family[kept], num_families)
        scores[away] = rows[away].double() @ A.T - offset
    own = family[:, None] == torch.arange(num_families)
    thresholds, recalls = [], []
    for index in range(num_families):
        others = scores[~own[:, index], index]
        found = float(torch.quantile(others, 1 - quiet_share).clamp(_LOWEST, _HIGHEST))
        thresholds.append(found)
        recalls.append(float((scores[own[:, index], index] > found).double().mean()))
    A, offset = _fit(rows, family, num_families)
    return Detectors(
        A.float(),
        offset.float(),
        torch.tensor(thresholds),
        torch.tensor(recalls),
        scores[family < 0] > torch.tensor(thresholds, dtype=torch.float64),
    )


def fit_veto(answering: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Return v [in] and o [1] with v x + o at 0.5 or more where an answer begins, below elsewhere:
    answering [rows, in], text [rows, in].
    """
    rows = torch.cat((answering, text))
    family = torch.cat((torch.zeros(len(answering)), torch.full((len(text),), -1.0))).long()
    A, offset = _fit(rows, family, 1)
    return A[0].float(), (0.5 - offset).float()


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
