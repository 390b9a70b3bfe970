"""The knapsack against brute force."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.genomes.allocation import Allocation, _Labels, _thinned, allocate

ROW = st.lists(
    st.tuples(st.integers(0, 40), st.one_of(st.integers(-5, 5), st.floats(-3, 3, allow_nan=False))),
    min_size=1,
    max_size=4,
)
INSTANCE = st.lists(ROW, min_size=1, max_size=5)


def split(instance: list[list[tuple[int, float]]]) -> tuple[list[list[int]], list[list[float]]]:
    return [[c for c, _ in row] for row in instance], [[float(e) for _, e in row] for row in instance]


def everything(costs: Any, errors: Any, combine: Any) -> list[Allocation]:
    found = []
    for options in itertools.product(*(range(len(row)) for row in costs)):
        chosen = [row[i] for row, i in zip(errors, options, strict=True)]
        found.append(
            Allocation(options, sum(row[i] for row, i in zip(costs, options, strict=True)), combine(options, chosen))
        )
    return found


def check(found: Allocation, costs: Any, errors: Any) -> None:
    assert found.cost == sum(row[i] for row, i in zip(costs, found.options, strict=True))


@given(INSTANCE, st.lists(st.integers(0, 150), min_size=1, max_size=4), st.integers(1, 4))
@settings(max_examples=500)
def test_the_best_for_every_budget_equal_brute_force(instance: Any, budgets: list[int], top: int) -> None:
    costs, errors = split(instance)
    brute = everything(costs, errors, lambda options, chosen: sum(chosen))
    for budget, found in zip(budgets, allocate(costs, errors, budgets, top), strict=True):
        expected = sorted(a.error for a in brute if a.cost <= budget)[:top]
        assert [a.error for a in found] == pytest.approx(expected, abs=1e-9)
        assert len({a.options for a in found}) == len(found)
        for allocation in found:
            check(allocation, costs, errors)
            assert allocation.cost <= budget


@given(INSTANCE, st.integers(0, 150))
@settings(max_examples=200)
def test_minimax_equals_brute_force_and_breaks_ties_by_the_sum(instance: Any, budget: int) -> None:
    costs, errors = split(instance)
    within = [a for a in everything(costs, errors, lambda o, chosen: (max(chosen), sum(chosen))) if a.cost <= budget]
    [found] = allocate(costs, errors, [budget], objective="minimax")
    assert bool(found) == bool(within)
    if within:
        errors_and_sums: list[Any] = [a.error for a in within]
        least, total = min(errors_and_sums)
        assert found[0].error == least
        chosen = [row[i] for row, i in zip(errors, found[0].options, strict=True)]
        assert sum(chosen) == pytest.approx(total, abs=1e-9)
        assert found[0].cost <= budget


@given(INSTANCE, st.integers(0, 150), st.integers(0, 2**32 - 1), st.integers(1, 3))
@settings(max_examples=200)
def test_interactions_of_neighbours_equal_brute_force(instance: Any, budget: int, seed: int, top: int) -> None:
    costs, errors = split(instance)
    rng = np.random.default_rng(seed)
    pairs = [rng.normal(size=(len(a), len(b))) for a, b in itertools.pairwise(costs)]

    def total(options: Any, chosen: Any) -> float:
        return sum(chosen) + sum(table[i, j] for table, (i, j) in zip(pairs, itertools.pairwise(options), strict=True))

    expected = sorted(a.error for a in everything(costs, errors, total) if a.cost <= budget)[:top]
    [found] = allocate(costs, errors, [budget], top, pairs=pairs)
    assert [a.error for a in found] == pytest.approx(expected, abs=1e-9)
    for allocation in found:
        check(allocation, costs, errors)
        chosen = [row[i] for row, i in zip(errors, allocation.options, strict=True)]
        assert total(allocation.options, chosen) == pytest.approx(allocation.error, abs=1e-9)


def test_a_million_schedules_equal_brute_force() -> None:
    rng = np.random.default_rng(0)
    costs = rng.integers(1, 10**7, size=(10, 4)).tolist()
    errors = rng.normal(size=(10, 4))
    grid = np.indices((4,) * 10).reshape(10, -1)
    cost = sum(np.array(costs[k])[grid[k]] for k in range(10))
    error = sum(errors[k][grid[k]] for k in range(10))
    budgets = [int(q) for q in np.quantile(cost, [0.01, 0.2, 0.5, 0.9])]
    for budget, found in zip(budgets, allocate(costs, errors.tolist(), budgets, cells=10**6), strict=True):
        assert found[0].error == pytest.approx(error[cost <= budget].min(), abs=1e-9)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_thinned_labels_keep_their_bound(seed: int) -> None:
    rng = np.random.default_rng(seed)
    costs = rng.integers(1, 10**6, size=(6, 8)).tolist()
    errors = rng.normal(size=(6, 8)).tolist()
    budget, cells = 3_000_000, 64
    [[coarse]] = allocate(costs, errors, [budget], cells=cells)
    [[exact]] = allocate(costs, errors, [budget], cells=10**6)
    [[lower]] = allocate(costs, errors, [budget - 6 * math.ceil(budget / cells)], cells=10**6)
    assert exact.error <= coarse.error <= lower.error + 1e-9
    assert coarse.cost <= budget


def test_options_without_a_finite_error_are_never_taken() -> None:
    [[found]] = allocate([[1, 2], [1, 2]], [[math.inf, 0.5], [0.0, math.inf]], [10])
    assert found.options == (1, 0)
    assert allocate([[1]], [[math.inf]], [10]) == [[]]
    with pytest.raises(ValueError, match="NaN"):
        allocate([[1]], [[math.nan]], [10])
    with pytest.raises(ValueError, match="finite"):
        allocate([[1]], [[0.0]], [math.inf])


def test_minimax_where_all_intervals_have_the_same_least_error() -> None:
    [found] = allocate([[5, 1], [5, 1]], [[1.0, 9.0], [1.0, 9.0]], [10], objective="minimax")
    assert (found[0].options, found[0].error) == ((0, 0), 1.0)


def test_thinning_keeps_the_best_of_each_cell_of_the_cost_axis() -> None:
    """Of 400 labels whose errors fall with their costs, 40 cells keep two each: the dearest two, which are the best."""
    labels = _Labels(np.arange(400), np.arange(400.0, 0.0, -1.0), np.zeros(400, int), np.zeros(400, int), None)
    kept = _thinned(labels, top=2, cells=40, room=399)
    assert kept.cost.tolist() == [10 * cell + place for cell in range(40) for place in (8, 9)]
