"""Which adapter a request is for: its vector beside those of each adapter's examples.

Pure arithmetic on numpy arrays, float32. Knows no engine, no store and no text.

Final hidden states of one model all point nearly the same way, so that their plain cosines are all
near one. What a request has in common with any other is therefore taken away first: the mean over
background requests and, in part, the directions in which those differ most among themselves. The
first is from "All-but-the-Top" (arXiv 1702.01417); the second is the whitening of arXiv 2103.15316
with a ridge, for there are fewer background requests than dimensions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

MAX_SHOWN = 5  # candidates in a reply
_SCHEME = 1  # of everything that vectors are made by; another number makes profiles stale
_MAX_CLUSTERS = 8
_PER_CLUSTER = 2  # examples that one more cluster needs
_MAX_ROUNDS = 10

Array = np.ndarray
Reason = Literal["best", "below_threshold", "no_profiles", "empty_prompt"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One adapter that could have been chosen."""

    name: str
    score: float


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen, and from what: `adapter` None is the base; candidates best first."""

    adapter: str | None
    reason: Reason
    score: float | None
    threshold: float
    candidates: tuple[Candidate, ...] = ()


def space_digest(base_digest: str, background: Sequence[str]) -> str:
    """Return the digest of what decides a vector: the base, the background and this scheme."""
    content = json.dumps([_SCHEME, base_digest, list(background)])
    return f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"


class Space:
    """Where vectors of one model lie beside its background.

    Semantics: u = v / |v| - mean of the background's v / |v|. Along the background's principal
    direction i, of variance s_i, u is multiplied by sqrt(s / (s_i + s)), where s is the mean of all
    s_i that are not zero by construction; across them it stays. Then its length is made one.
    """

    def __init__(self, background: Array) -> None:
        """background [texts, width], as the engine embeds them."""
        units = _unit(background)
        self._mean = units.mean(axis=0)
        _, singular, self._directions = np.linalg.svd(units - self._mean, full_matrices=False)
        variances = singular**2 / len(units)
        ridge = variances.mean()
        self._factors = (
            np.sqrt(ridge / (variances + ridge)) if ridge > 0 else np.ones_like(singular)
        )

    def place(self, vectors: Array) -> Array:
        """Return where vectors [n, width] lie: unit vectors [n, width]."""
        centred = _unit(vectors) - self._mean
        along = centred @ self._directions.T  # [n, directions]
        return _unit(centred + (along * (self._factors - 1)) @ self._directions)


def centroids_of(points: Array) -> Array:
    """Return the directions [k, width] that points [n, width] gather around; k grows with n.

    The first is that of all points. The others are those of clusters, each drawn halfway to the
    first: a cluster is a few points, whose direction says less than that of all.
    """
    whole = _unit(points.mean(axis=0))[None]
    num = min(_MAX_CLUSTERS, len(points) // _PER_CLUSTER)
    if num < 2:
        return whole.astype(np.float32)
    drawn = _unit(_clusters(points, num) + whole)
    return np.concatenate([whole, drawn]).astype(np.float32)


def _clusters(points: Array, num: int) -> Array:
    """The directions of clusters [num, width] by spherical k-means (Dhillon and Modha, Machine
    Learning 42, 2001), begun with the point nearest to the mean and then, each time, the one
    farthest from all (Gonzalez, 1985): no chance in it.
    """
    chosen = [int((points @ points.mean(axis=0)).argmax())]
    while len(chosen) < num:
        chosen.append(int((points @ points[chosen].T).max(axis=1).argmin()))
    centroids = points[chosen]
    nearest = np.full(len(points), -1)
    for _ in range(_MAX_ROUNDS):
        found = (points @ centroids.T).argmax(axis=1)
        if (found == nearest).all():
            break
        nearest = found
        members = [points[nearest == i] for i in range(num)]
        centroids = np.stack(
            [
                _unit(own.mean(axis=0)) if len(own) else old
                for own, old in zip(members, centroids, strict=True)
            ]
        )
    return centroids


def left_out_scores(points: Array) -> Array:
    """Return for each of points [n, width] its score when the centroids are those of the others
    [n]; empty for a single point.
    """
    if len(points) < 2:
        return np.zeros(0, np.float32)
    scores = [
        (centroids_of(np.delete(points, i, axis=0)) @ point).max() for i, point in enumerate(points)
    ]
    return np.array(scores, np.float32)


class Index:
    """The centroids of many adapters, one under the other."""

    def __init__(self, names: Sequence[str], models: Sequence[str], centroids: list[Array]) -> None:
        """Names in order, what `model` is to be for each, and its centroids [k, width]."""
        self.names = list(names)
        self.models = list(models)
        self._centroids = np.concatenate(centroids) if centroids else np.zeros((0, 0), np.float32)
        sizes = np.array([len(own) for own in centroids], np.int64)
        self._starts = np.cumsum(sizes) - sizes

    def rank(self, point: Array, threshold: float) -> tuple[Choice, str | None]:
        """Return the choice for a point [width], and its model; of equal scores the first name."""
        scores = np.maximum.reduceat(self._centroids @ point, self._starts)
        order = np.argsort(-scores, kind="stable")
        best = int(order[0])
        shown = tuple(Candidate(self.names[i], float(scores[i])) for i in order[:MAX_SHOWN])
        is_clear = bool(scores[best] >= threshold)
        choice = Choice(
            self.names[best] if is_clear else None,
            "best" if is_clear else "below_threshold",
            float(scores[best]),
            threshold,
            shown,
        )
        return choice, self.models[best] if is_clear else None


def _unit(vectors: Array) -> Array:
    """Vectors [..., width] of length one; zero stays zero."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    unit: Array = vectors / np.where(lengths > 0, lengths, 1)
    return unit
