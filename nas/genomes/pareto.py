"""Pareto order of minimised objectives under constraints: ranks, crowding, front, hypervolume."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def domination(values: Array, violations: Array) -> npt.NDArray[np.bool_]:
    """matrix[i, j]: does i dominate j (Deb's constrained dominance)? values (n, m), total violations (n,).

    A feasible point dominates an infeasible one, the less violating of two infeasible ones the other; among feasible
    points the usual order holds. NaN counts as infinitely bad.
    """
    values = np.where(np.isnan(values), np.inf, values)
    no_worse = (values[:, None] <= values[None]).all(-1)
    better = (values[:, None] < values[None]).any(-1)
    excess = np.maximum(violations, 0.0)
    less_violating = excess[:, None] < excess[None]
    both_feasible = (excess[:, None] == 0) & (excess[None] == 0)
    dominating: npt.NDArray[np.bool_] = np.where(both_feasible, no_worse & better, less_violating)
    return dominating


def ranks(values: Array, violations: Array | None = None) -> npt.NDArray[np.int64]:
    """0 for the front, 1 for the front of the rest, and so on. values (n, m). O(n log n) for one or two objectives."""
    values = np.where(np.isnan(values), np.inf, values)
    excess = np.zeros(len(values)) if violations is None else np.maximum(violations, 0.0)
    rank = np.zeros(len(values), dtype=np.int64)
    feasible = excess == 0
    if feasible.any():
        chosen = values[feasible]
        if chosen.shape[1] == 1:
            rank[feasible] = np.unique(chosen[:, 0], return_inverse=True)[1]
        else:
            rank[feasible] = _ranks_of_two(chosen) if chosen.shape[1] == 2 else _ranks_of_many(chosen)
    if not feasible.all():  # behind all of them, the less violating ones first
        _, place = np.unique(excess[~feasible], return_inverse=True)
        rank[~feasible] = place + (rank[feasible].max() + 1 if feasible.any() else 0)
    return rank


def _ranks_of_two(values: Array) -> npt.NDArray[np.int64]:
    """In lexicographic order only a point before can dominate; of each rank so far, that with the least second value does so first."""
    points, place = np.unique(values, axis=0, return_inverse=True)
    least: list[float] = []  # second values of the ranks so far, rising
    found = np.empty(len(points), dtype=np.int64)
    for i, second in enumerate(points[:, 1].tolist()):
        found[i] = bisect_right(least, second)
        if found[i] == len(least):
            least.append(second)
        else:
            least[found[i]] = second
    return np.asarray(found[place.reshape(-1)])


def _ranks_of_many(values: Array) -> npt.NDArray[np.int64]:
    matrix = domination(values, np.zeros(len(values)))
    remaining = np.ones(len(values), dtype=bool)
    rank = np.zeros(len(values), dtype=np.int64)
    level = 0
    while remaining.any():
        front = remaining & ~matrix[remaining].any(0)
        rank[front] = level
        remaining &= ~front
        level += 1
    return rank


def front(values: Sequence[Sequence[float]], violations: Sequence[float] | None = None) -> list[int]:
    """Indices of the feasible non-dominated points, ordered by the last objective. Equal points all stay."""
    if not len(values):
        return []
    array = np.asarray(values, dtype=np.float64)
    excess = np.zeros(len(array)) if violations is None else np.asarray(violations, dtype=np.float64)
    best = np.flatnonzero((ranks(array, excess) == 0) & (excess <= 0))
    return sorted(best.tolist(), key=lambda i: tuple(array[i][::-1]))


def crowding(values: Array) -> Array:
    """NSGA-II's crowding distance within one front, (n,); infinite at the ends of each objective."""
    distance = np.zeros(len(values))
    for column in values.T:
        order = np.argsort(column, kind="stable")
        spread = column[order[-1]] - column[order[0]]
        distance[order[[0, -1]]] = np.inf
        if spread > 0 and np.isfinite(spread):
            distance[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / spread
    return distance


def best_first(values: Array) -> list[int]:
    """NSGA-II's order: by rank, within a rank the least crowded first, at last in the order given."""
    rank = ranks(values)
    spread = np.zeros(len(values))
    for level in np.unique(rank):
        spread[rank == level] = crowding(values[rank == level])
    return sorted(range(len(values)), key=lambda i: (rank[i], -spread[i], i))


def hypervolume(values: Sequence[Sequence[float]], reference: Sequence[float]) -> float:
    """Volume between the points and the reference that some point dominates. Exact for any number of objectives,
    by slicing along the last one; points that do not dominate the reference add nothing."""
    limit = np.asarray(reference, dtype=np.float64)
    array = np.asarray(values, dtype=np.float64).reshape(-1, len(limit))
    return _sliced_volume(array[(array < limit).all(1)], limit)


def _sliced_volume(points: Array, limit: Array) -> float:
    if not len(points):
        return 0.0
    if len(limit) == 1:
        return float(limit[0] - points.min())
    points = points[np.argsort(points[:, -1], kind="stable")]
    heights = np.append(points[1:, -1], limit[-1]) - points[:, -1]
    return sum(float(h) * _sliced_volume(points[: i + 1, :-1], limit[:-1]) for i, h in enumerate(heights) if h > 0)
