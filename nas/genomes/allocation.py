"""The multiple-choice knapsack: one option for each interval, least total error within a MACs budget, for all budgets at once.

Label-setting dynamic programming: after each interval, only (cost, error) pairs that no cheaper and better pair beats go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Objective = Literal["sum", "minimax"]

CELLS = 4096
"""Above so many labels, only the best of each of so many cells of the cost axis go on."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """`options[k]`: what interval k runs. `cost`: exact MACs. `error`: as the objective has it."""

    options: tuple[int, ...]
    cost: int
    error: float


def allocate(
    costs: Sequence[Sequence[int]],
    errors: Sequence[Sequence[float]],
    budgets: Sequence[float],
    top: int = 1,
    objective: Objective = "sum",
    pairs: Sequence[npt.NDArray[np.float64]] | None = None,
    cells: int = CELLS,
) -> list[list[Allocation]]:
    """For each budget the `top` allocations of least error, best first; fewer where fewer fit. Costs are non-negative.

    "sum": the least total of `errors[k][option]`; `pairs[k][i, j]`, where given, is added for options i, j of the intervals k
    and k + 1. "minimax": the least largest error, the least total among equals, one allocation for each budget. Options with an
    infinite error are never taken.

    Exact as long as no more than `cells` x `top` labels remain after an interval. Beyond that, an allocation for budget B
    has at most the least error that is possible with B - intervals x (largest budget / cells), and its cost is exact.
    Raises ValueError where a budget is infinite, or errors are NaN.
    """
    if not all(np.isfinite(budgets)):
        raise ValueError(f"budgets must be finite, got {list(budgets)}")
    table = [np.asarray(row, dtype=np.float64) for row in errors]
    if any(np.isnan(row).any() for row in table):
        raise ValueError("errors must not be NaN")
    prices = [np.asarray(row, dtype=np.int64) for row in costs]
    if objective == "minimax":
        return [_minimax(prices, table, budget, cells) for budget in budgets]
    if pairs is None:
        paths = _paths(prices, table, max(budgets), top, cells)
    else:
        paths = _paired_paths(prices, table, pairs, max(budgets), top, cells)
    return [_cheap_enough(paths, budget, top) for budget in budgets]


@dataclass
class _Labels:
    """After some intervals: cost and error of each label, ascending in cost, and how it came about."""

    cost: npt.NDArray[np.int64]
    error: npt.NDArray[np.float64]
    option: npt.NDArray[np.int64]
    parent: npt.NDArray[np.int64]
    before: _Labels | None = None

    def trace(self, i: int) -> tuple[int, ...]:
        options: list[int] = []
        labels: _Labels | None = self
        while labels is not None and labels.before is not None:
            options.append(int(labels.option[i]))
            labels, i = labels.before, int(labels.parent[i])
        return tuple(reversed(options))


def _start() -> _Labels:
    nothing = np.zeros(1, dtype=np.int64)
    return _Labels(nothing, np.zeros(1), nothing, nothing)


def _extended(labels: _Labels, price: npt.NDArray[np.int64], error: npt.NDArray[np.float64], room: float) -> _Labels:
    """Every label with every option that has a finite error and leaves room for the rest; ascending in cost."""
    options = np.flatnonzero(np.isfinite(error))
    cost = (price[options][:, None] + labels.cost).ravel()
    total = (error[options][:, None] + labels.error).ravel()
    parent = np.tile(np.arange(len(labels.cost)), len(options))
    option = np.repeat(options, len(labels.cost))
    fits = np.flatnonzero(cost <= room)
    # One option's labels are in order already, and a stable sort merges such runs fast.
    order = fits[np.argsort(cost[fits], kind="stable")]
    return _Labels(cost[order], total[order], option[order], parent[order], labels)


def _thinned(labels: _Labels, top: int, cells: int, room: float) -> _Labels:
    """The labels among the `top` best for some budget; of too many, the best of each cell of the cost axis."""
    remaining, kept = np.arange(len(labels.cost)), []
    for _ in range(top):
        if not len(remaining):
            break
        error = labels.error[remaining]
        leads = error < np.append(np.inf, np.minimum.accumulate(error)[:-1])
        kept.append(remaining[leads])
        remaining = remaining[~leads]
    chosen = np.sort(np.concatenate(kept)) if kept else remaining
    if len(chosen) > cells * top:
        cell = (labels.cost[chosen] * (cells / (room + 1))).astype(np.int64)
        order = np.lexsort((labels.error[chosen], cell))
        starts = np.flatnonzero(np.append(True, np.diff(cell[order]) > 0))
        place = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
        chosen = np.sort(chosen[order[place < top]])
    return _picked(labels, chosen)


def _picked(labels: _Labels, chosen: npt.NDArray[np.int64]) -> _Labels:
    return _Labels(
        labels.cost[chosen], labels.error[chosen], labels.option[chosen], labels.parent[chosen], labels.before
    )


def _rooms(prices: Sequence[npt.NDArray[np.int64]], budget: float) -> list[float]:
    """What may be spent up to each interval, if the cheapest options follow."""
    after = np.append(np.cumsum([row.min() for row in prices][::-1])[::-1][1:], 0)
    return [float(budget - rest) for rest in after]


def _paths(
    prices: Sequence[npt.NDArray[np.int64]],
    table: Sequence[npt.NDArray[np.float64]],
    budget: float,
    top: int,
    cells: int,
) -> list[_Labels]:
    labels = _start()
    for price, error, room in zip(prices, table, _rooms(prices, budget), strict=True):
        labels = _thinned(_extended(labels, price, error, room), top, cells, room)
    return [labels]


def _paired_paths(
    prices: Sequence[npt.NDArray[np.int64]],
    table: Sequence[npt.NDArray[np.float64]],
    pairs: Sequence[npt.NDArray[np.float64]],
    budget: float,
    top: int,
    cells: int,
) -> list[_Labels]:
    """As `_paths`, with labels apart for each last option, which decides what the next interval adds."""
    states: list[_Labels] = []
    for k, (price, error, room) in enumerate(zip(prices, table, _rooms(prices, budget), strict=True)):
        following = []
        for option in range(len(price)):
            only = np.where(np.arange(len(price)) == option, error, np.inf)
            if k == 0:
                reached = [_extended(_start(), price, only, room)]
            else:
                reached = [_extended(labels, price, only + pairs[k - 1][i], room) for i, labels in enumerate(states)]
            following.append(_thinned(_joined(reached), top, cells, room))
        states = following
    return states


def _joined(parts: Sequence[_Labels]) -> _Labels:
    """Labels of several predecessors as one; the predecessors are joined too, so that tracing still works."""
    before = [part.before for part in parts if part.before is not None]
    offsets = np.cumsum([0, *(len(labels.cost) for labels in before)])
    parents = [part.parent + offset for part, offset in zip(parts, offsets, strict=False)]
    cost = np.concatenate([part.cost for part in parts])
    order = np.argsort(cost, kind="stable")
    error, option = np.concatenate([part.error for part in parts]), np.concatenate([part.option for part in parts])
    return _Labels(cost[order], error[order], option[order], np.concatenate(parents)[order], _stacked(before))


def _stacked(parts: Sequence[_Labels]) -> _Labels:
    """Several sets of labels one after another, for tracing alone. They share one predecessor."""
    return _Labels(
        np.concatenate([part.cost for part in parts]),
        np.concatenate([part.error for part in parts]),
        np.concatenate([part.option for part in parts]),
        np.concatenate([part.parent for part in parts]),
        parts[0].before,
    )


def _cheap_enough(paths: Sequence[_Labels], budget: float, top: int) -> list[Allocation]:
    found = []
    for labels in paths:
        fits = int(np.searchsorted(labels.cost, budget, side="right"))
        for i in np.argsort(labels.error[:fits], kind="stable")[:top]:
            found.append((float(labels.error[i]), int(labels.cost[i]), labels, int(i)))
    found.sort(key=lambda item: item[:2])
    return [Allocation(labels.trace(i), cost, error) for error, cost, labels, i in found[:top]]


def _minimax(
    prices: Sequence[npt.NDArray[np.int64]], table: Sequence[npt.NDArray[np.float64]], budget: float, cells: int
) -> list[Allocation]:
    """Bisects the largest error that is allowed: with a threshold, each interval takes its cheapest option below it."""

    def least(threshold: float) -> float:
        return sum(
            float(np.where(error <= threshold, price, np.inf).min()) for price, error in zip(prices, table, strict=True)
        )

    thresholds = np.unique(np.concatenate([row[np.isfinite(row)] for row in table]))
    low, high = 0, len(thresholds)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if least(thresholds[middle]) <= budget else (middle + 1, high)
    if low == len(thresholds):
        return []
    allowed = [np.where(row <= thresholds[low], row, np.inf) for row in table]
    best = _cheap_enough(_paths(prices, allowed, budget, 1, cells), budget, 1)
    return [
        Allocation(found.options, found.cost, max(float(row[i]) for row, i in zip(table, found.options, strict=True)))
        for found in best
    ]
