from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from nevergrad.optimization.multiobjective.hypervolume import HypervolumeIndicator

from nas.genomes.pareto import best_first, crowding, domination, front, hypervolume, ranks

POINTS = st.integers(1, 4).flatmap(
    lambda m: hnp.arrays(np.float64, st.tuples(st.integers(1, 12), st.just(m)), elements=st.integers(0, 6).map(float))
)


def dominates(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((a <= b).all() and (a < b).any())


@given(POINTS)
def test_rank_zero_is_what_nothing_dominates_and_every_rank_has_a_reason(points: np.ndarray) -> None:
    rank = ranks(points)
    for i, point in enumerate(points):
        better = [rank[j] for j, other in enumerate(points) if dominates(other, point)]
        assert rank[i] == (max(better) + 1 if better else 0)


@given(POINTS)
def test_hypervolume_equals_nevergrad(points: np.ndarray) -> None:
    reference = [7.0 + 2 * k for k in range(points.shape[1])]
    expected = HypervolumeIndicator(reference_point=np.array(reference)).compute(list(points))
    assert hypervolume(points.tolist(), reference) == pytest.approx(expected)


def test_hypervolume_ignores_points_beyond_the_reference() -> None:
    assert hypervolume([(1, 1), (5, 0)], (3, 3)) == 4
    assert hypervolume([], (3, 3)) == 0


def test_feasible_beats_infeasible_and_less_violation_beats_more() -> None:
    values = np.array([[0.0, 0.0], [9.0, 9.0], [1.0, 1.0]])
    assert ranks(values, np.array([2.0, 0.0, 1.0])).tolist() == [2, 0, 1]
    assert front(values.tolist(), [2.0, 0.0, 1.0]) == [1]
    assert front(values.tolist(), [2.0, 1.0, 1.0]) == []


def test_nan_is_worse_than_anything() -> None:
    assert ranks(np.array([[np.nan, 0.0], [5.0, 0.0]])).tolist() == [1, 0]


def test_crowding_keeps_the_ends() -> None:
    distance = crowding(np.array([[0.0, 4.0], [1.0, 3.0], [1.1, 2.9], [4.0, 0.0]]))
    assert np.isinf(distance[[0, 3]]).all()
    assert distance[1] < distance[2]


def test_crowding_is_the_published_distance_in_units_of_each_objectives_range() -> None:
    """Deb et al. 2002: for each objective the gap between both neighbours over the range. The second objective is a thousand times larger."""
    front = np.array([[0.0, 10_000.0], [1.0, 6_000.0], [4.0, 3_000.0], [10.0, 0.0]])
    distance = crowding(front)
    assert distance[1] == pytest.approx((4 - 0) / 10 + (10 - 3) / 10)
    assert distance[2] == pytest.approx((10 - 1) / 10 + (6 - 0) / 10)
    assert best_first(front) == [0, 3, 2, 1], "the ends, then the least crowded"
    assert best_first(np.array([[2.0, 2.0], [0.0, 4.0], [1.0, 1.0]])) == [1, 2, 0], "a better rank before any distance"


def test_what_exceeds_the_reference_in_one_objective_alone_adds_nothing() -> None:
    assert hypervolume([(1, 5), (2, 1)], (3, 3)) == 2
    assert hypervolume([(5, 1), (1, 2)], (3, 3)) == 2
    assert hypervolume([(1, 1, 5), (2, 2, 2)], (3, 3, 3)) == 1


@given(POINTS, st.integers(0, 2))
def test_ranks_of_two_objectives_are_those_of_any_number(points: np.ndarray, worse: int) -> None:
    """A third objective that is the same for all changes nothing; less violating points come first."""
    two = points[:, :2] if points.shape[1] >= 2 else np.hstack([points, points])
    same = np.hstack([two, np.full((len(two), 1), 7.0)])
    assert ranks(two).tolist() == ranks(same).tolist()
    violations = np.arange(len(two), dtype=np.float64) % (worse + 1)
    assert ranks(two, violations).tolist() == ranks(same, violations).tolist()


@given(POINTS, st.integers(0, 2**32 - 1))
def test_domination_is_debs_with_constraints(points: np.ndarray, seed: int) -> None:
    excess = np.random.default_rng(seed).choice([-1.0, 0.0, 1.0, 2.0], len(points))
    found = domination(points, excess)
    over = np.maximum(excess, 0)
    for i, j in np.ndindex(found.shape):
        expected = dominates(points[i], points[j]) if over[i] == over[j] == 0 else over[i] < over[j]
        assert found[i, j] == expected


@given(st.lists(st.integers(0, 20), min_size=1, max_size=30))
def test_ranks_of_one_objective_are_those_of_it_twice(values: list[int]) -> None:
    column = np.array(values, dtype=np.float64)[:, None]
    assert ranks(column).tolist() == ranks(np.hstack([column, column])).tolist()


def test_ranks_of_two_points_with_three_objectives() -> None:
    assert ranks(np.array([[0.0, 1.0, 5.0], [1.0, 1.0, 0.0]])).tolist() == [0, 0]
    assert ranks(np.array([[1.0, 0.0, 5.0], [1.0, 0.0, 6.0]])).tolist() == [0, 1]


def test_an_objective_that_is_the_same_for_all_crowds_nobody() -> None:
    distance = crowding(np.array([[0.0, 3.0], [1.0, 3.0], [4.0, 3.0]]))
    assert np.isinf(distance[[0, 2]]).all()
    assert distance[1] == pytest.approx(
        1.0
    )  # of the first objective alone: the whole of its range between both neighbours
