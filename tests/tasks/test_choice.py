"""The arithmetic of the choice: what is common is taken away, clusters are found, ties are fair."""

from __future__ import annotations

import numpy as np
import pytest

from polyadapt.tasks.choice import (
    MAX_SHOWN,
    Candidate,
    Index,
    Space,
    centroids_of,
    left_out_scores,
    space_digest,
)

WIDTH = 24


def directions(num: int, seed: int = 0) -> np.ndarray:
    """Unit vectors [num, WIDTH] that are at right angles to each other."""
    random = np.random.default_rng(seed).standard_normal((WIDTH, WIDTH))
    return np.linalg.qr(random)[0][:num].astype(np.float32)


def around(center: np.ndarray, num: int, spread: float, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal((num, WIDTH)) * spread
    points = center + noise.astype(np.float32)
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_what_all_requests_have_in_common_is_taken_away():
    common, one, other = directions(3)
    background = 10 * common + directions(20, seed=1) * 0.5
    space = Space(background)
    a, b = 10 * common + one, 10 * common + other
    assert cosine(a, b) > 0.98
    placed = space.place(np.stack([a, b, 3 * a]))
    assert np.allclose(np.linalg.norm(placed, axis=1), 1, atol=1e-5)
    assert placed[0] @ placed[1] < 0.3
    assert np.allclose(placed[0], placed[2], atol=1e-4), "lengths do not count"


def test_in_what_all_requests_differ_anyway_tells_little():
    common, loud, one, other = directions(4)
    sizes = np.linspace(-3, 3, 40, dtype=np.float32)[:, None]
    background = 10 * common + sizes * loud + directions(24, seed=1)[np.arange(40) % 24] * 0.3
    a, b, c = 10 * common + 2 * loud + one, 10 * common + 2 * loud + other, 10 * common + one
    placed = Space(background).place(np.stack([a, b, c]))
    assert cosine(a - 10 * common, b - 10 * common) == pytest.approx(0.8, abs=1e-3)
    assert placed[0] @ placed[1] < 0.4 < 0.7 < placed[0] @ placed[2]


def test_a_space_is_made_as_its_formula_says():
    random = np.random.default_rng(5)
    background = random.standard_normal((30, 8)) + 2
    units = background / np.linalg.norm(background, axis=1, keepdims=True)
    centred = units - units.mean(axis=0)
    variances, axes = np.linalg.eigh(centred.T @ centred / 30)
    ridge = variances.mean()
    vector = random.standard_normal(8) + 2
    moved = vector / np.linalg.norm(vector) - units.mean(axis=0)
    moved = axes @ (np.sqrt(ridge / (variances + ridge)) * (axes.T @ moved))
    found = Space(background).place(vector[None])[0]
    assert np.allclose(found, moved / np.linalg.norm(moved), atol=1e-6)
    assert not np.allclose(found, (vector / np.linalg.norm(vector) - units.mean(axis=0)), atol=0.1)


def test_a_vector_of_nothing_is_no_number_of_nothing():
    space = Space(np.ones((2, 3), np.float32))
    assert np.isfinite(space.place(np.array([[0, 0, 0], [2, 2, 2]], np.float32))).all()


@pytest.mark.parametrize(("num", "expected"), [(1, 1), (3, 1), (4, 3), (7, 4), (16, 9), (99, 9)])
def test_more_examples_have_more_centroids_up_to_a_limit(num, expected):
    points = around(directions(1)[0], num, 0.1)
    centroids = centroids_of(points)
    assert centroids.shape == (expected, WIDTH)
    assert centroids.dtype == np.float32
    assert np.allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-5)


def test_the_centroids_are_where_the_examples_gather_and_halfway_to_all_of_them():
    centers = directions(8)
    points = np.concatenate([around(c, 2 + i, 0.03, seed=i) for i, c in enumerate(centers)])
    order = np.random.default_rng(2).permutation(len(points))
    centroids = centroids_of(points[order])
    whole = points.mean(axis=0) / np.linalg.norm(points.mean(axis=0))
    assert cosine(centroids[0], whole) == pytest.approx(1, abs=1e-6)
    for center in centers:
        assert max(cosine(found, center + whole) for found in centroids[1:]) > 0.99
    assert np.array_equal(centroids, centroids_of(points[order])), "no chance in it"


def test_of_few_examples_there_is_the_direction_of_the_mean_alone():
    points = around(directions(1)[0], 3, 0.3)
    mean = points.mean(axis=0)
    assert cosine(centroids_of(points)[0], mean) == pytest.approx(1, abs=1e-6)


def test_a_cluster_counts_for_what_is_like_it():
    one, other, third = directions(3)
    points = np.concatenate([around(one, 12, 0.03), around(other, 2, 0.03, seed=1)])
    whole = points.mean(axis=0) / np.linalg.norm(points.mean(axis=0))
    assert whole @ other < 0.3
    assert (centroids_of(points) @ other).max() > 0.6
    assert (centroids_of(points) @ third).max() < 0.1


def test_equal_examples_are_no_trouble():
    points = np.repeat(directions(1), 30, axis=0)
    assert np.allclose(centroids_of(points) @ points[0], 1, atol=1e-5)


def test_an_example_that_is_left_out_is_compared_with_the_others_alone():
    one, other = directions(2)
    points = np.stack([one, one, other])
    scores = left_out_scores(points)
    assert scores[0] == pytest.approx(cosine(one, one + other), abs=1e-6)
    assert scores[2] == pytest.approx(0, abs=1e-6)
    assert len(left_out_scores(points[:1])) == 0


def index(**centroids: list[np.ndarray]) -> Index:
    names = sorted(centroids)
    return Index(
        names, [f"{name}@3" for name in names], [np.stack(centroids[name]) for name in names]
    )


def test_the_nearest_centroid_of_any_adapter_wins():
    a, b, c, d = directions(4)
    made = index(two=[a, b], one=[c], zero=[d])
    for point, name in ((a, "two"), (b, "two"), (c, "one"), (d, "zero")):
        choice, model = made.rank(point, 0.5)
        assert (choice.adapter, choice.reason, model) == (name, "best", f"{name}@3")
        assert choice.score == pytest.approx(1, abs=1e-5)
        assert len(choice.candidates) == 3
        assert choice.candidates[0] == Candidate(name, choice.score)


def test_whoever_is_near_nobody_gets_the_base_and_is_told_the_scores():
    a, b, c = directions(3)
    choice, model = index(one=[a], other=[b]).rank((a + 3 * c) / np.sqrt(10), 0.5)
    assert (choice.adapter, choice.reason, model) == (None, "below_threshold", None)
    assert choice.score == pytest.approx(1 / np.sqrt(10), abs=1e-5)
    assert [candidate.name for candidate in choice.candidates] == ["one", "other"]


def test_the_threshold_itself_is_enough():
    a = np.eye(3, dtype=np.float32)[0]
    for threshold, name in ((1.0, "one"), (1.0001, None)):
        assert index(one=[a]).rank(a, threshold)[0].adapter == name


def test_of_equal_scores_the_first_name_wins_and_only_a_few_are_shown():
    a = directions(1)[0]
    names = [f"n{i:03d}" for i in range(200)]
    far, near = [name for name in names if int(name[1:]) % 3], names[::3]
    made = index(**{name: [a if name in near else -a] for name in reversed(names)})
    choice, _ = made.rank(a, 0.0)
    assert [candidate.name for candidate in choice.candidates] == near[:MAX_SHOWN]
    assert choice.adapter == "n000"
    assert made.rank(-a, 0.0)[0].adapter == far[0]


def test_a_space_is_that_of_its_base_and_its_background():
    own = space_digest("sha256:a", ["x", "y"])
    assert own == space_digest("sha256:a", ("x", "y"))
    others = (space_digest("sha256:b", ["x", "y"]), space_digest("sha256:a", ["x"]))
    assert own not in others
