"""Which steps compute a block and which take its output from an earlier one, exactly, where what that costs in error depends on how far back the
computed step lies (DPCache's idea): a shortest path over the computed steps, for all budgets at once.

A path visits the steps that compute; between two of them every step reuses the first. Label-setting: at each step only those (cost, error) pairs go on
that no cheaper and better one beats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nas.genomes.allocation import allocate

Floats = npt.NDArray[np.float64]


class ReusePath(NamedTuple):
    """`computed`: the steps that compute, the first of all among them. `cost`: exact, of all steps together."""

    computed: tuple[int, ...]
    cost: int
    error: float


class _Labels(NamedTuple):
    """Of one step: cost and error of each path that ends by computing it, and where it comes from."""

    cost: npt.NDArray[np.int64]
    error: Floats
    before: npt.NDArray[np.int64]
    """(paths, 2): the computed step before, and which of its paths."""


def paths(errors: Floats, whole: Sequence[int], reused: Sequence[int]) -> list[ReusePath]:
    """All paths that no cheaper and better one beats, the cheapest first. errors: (steps, steps), `errors[j, m]` that of step m > j where it reuses what
    step j has computed, non-negative or infinite where it must not. `whole`, `reused`: what a step costs that computes, and one that does not.

    Raises ValueError where shapes differ, an error is NaN or negative, or reuse costs more than computing.
    """
    table = np.asarray(errors, dtype=np.float64)
    dear, cheap = np.asarray(whole, dtype=np.int64), np.asarray(reused, dtype=np.int64)
    steps = len(dear)
    if table.shape != (steps, steps) or cheap.shape != (steps,) or not steps:
        raise ValueError(f"errors {table.shape}, whole {dear.shape} and reused {cheap.shape} must be of the same steps")
    upper = table[np.triu_indices(steps, 1)]
    if np.isnan(upper).any() or (upper < 0).any() or (cheap > dear).any():
        raise ValueError("errors must not be NaN or negative, and reuse must not cost more than computing")
    lost = np.where(np.triu(np.ones((steps, steps), dtype=bool), 1), table, 0.0).cumsum(axis=1)  # of steps j + 1 .. m
    spent = np.concatenate([[0], cheap.cumsum()])
    found = [_Labels(dear[:1].copy(), np.zeros(1), np.full((1, 2), -1))]
    for here in range(1, steps + 1):  # the last one is behind the end, and computes nothing
        own = int(dear[here]) if here < steps else 0
        parts = [
            _Labels(
                labels.cost + (spent[here] - spent[j + 1]) + own,
                labels.error + lost[j, here - 1],
                np.stack([np.full(len(labels.cost), j), np.arange(len(labels.cost))], axis=1),
            )
            for j, labels in enumerate(found)
        ]
        found.append(_pruned(_Labels(*(np.concatenate(field) for field in zip(*parts, strict=True)))))
    ends = found[steps]
    return [
        ReusePath(_computed(found, steps, place), int(ends.cost[place]), float(ends.error[place]))
        for place in range(len(ends.cost))
    ]


def together(fronts: Sequence[Sequence[ReusePath]], budgets: Sequence[float]) -> list[tuple[ReusePath, ...] | None]:
    """For each budget a path of each block, of the least total error that it allows; None where it allows none. `fronts`: of each block, as `paths` gives
    them."""
    costs = [[path.cost for path in front] for front in fronts]
    errors = [[path.error for path in front] for front in fronts]
    chosen = allocate(costs, errors, budgets)
    return [
        tuple(front[option] for front, option in zip(fronts, best[0].options, strict=True)) if best else None
        for best in chosen
    ]


def _pruned(labels: _Labels) -> _Labels:
    order = np.lexsort((labels.error, labels.cost))
    error = labels.error[order]
    least = np.minimum.accumulate(np.concatenate([[np.inf], error[:-1]]))
    kept = order[error < least]
    return _Labels(labels.cost[kept], labels.error[kept], labels.before[kept])


def _computed(found: Sequence[_Labels], step: int, place: int) -> tuple[int, ...]:
    """The computed steps of a path that ends there."""
    steps = []
    while step > 0:
        step, place = (int(value) for value in found[step].before[place])
        steps.append(step)
    return tuple(reversed(steps))
