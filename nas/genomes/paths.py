"""What each step computes and what it takes from an earlier one, exactly, where what reuse costs in error depends on how far back the computed step lies
(DPCache's idea): a shortest path over (last computed step, step), for all budgets at once.

Label-setting: for each last computed step only those (cost, error) pairs go on that no cheaper and better one beats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nas.genomes.allocation import allocate

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

CELLS = 1024
"""Above so many labels of one last computed step, only the best of each of so many cells of the cost axis go on."""


TOGETHER = 2048
"""As many labels of several parts together."""


class Steps(NamedTuple):
    """Ways to run each of some steps. `computing`: (steps, ways), what each way costs that computes; `loss`: (steps, ways), its error, whatever came
    before. `reusing`: (steps, ways), what each way costs that reuses; `drift`: (steps, steps, ways), `drift[j, m]` the error of step m > j where step j
    was the last that computed. An infinite error is one that must not be."""

    computing: Integers
    loss: Floats
    reusing: Integers
    drift: Floats


class ReusePath(NamedTuple):
    """`ways`: of each step, those that compute counted first. `cost`: exact, of all steps together."""

    ways: tuple[int, ...]
    cost: int
    error: float


class _Labels(NamedTuple):
    """Of one last computed step: cost and error of each path to here, the way of the present step, and which label it continues: of which last computed
    step, and which of its."""

    cost: Integers
    error: Floats
    way: Integers
    state: Integers
    parent: Integers


def paths(steps: Steps, most: float = math.inf, cells: int = CELLS) -> list[ReusePath]:
    """All paths of at most this cost that no cheaper and better one beats, the cheapest first. The first step computes.

    Exact as long as no last computed step has more than `cells` labels; beyond, costs stay exact, and an error is at most the least that is possible with
    steps x most / cells less to spend. Raises ValueError where shapes differ, or an error is NaN or endlessly good.
    """
    count, ways = steps.computing.shape
    if (
        not count
        or not ways
        or steps.loss.shape != (count, ways)
        or steps.reusing.shape[:1] != (count,)
        or steps.drift.shape != (count, count, steps.reusing.shape[1])
    ):
        raise ValueError(f"the shapes {[part.shape for part in steps]} must be of the same steps and ways")
    drift = steps.drift[np.triu_indices(count, 1)]
    for errors in (steps.loss, drift):
        if np.isnan(errors).any() or (errors == -np.inf).any():
            raise ValueError("errors must be numbers, or infinite where a way must not be")
    least = np.minimum(steps.computing.min(1), steps.reusing.min(1, initial=np.iinfo(np.int64).max))
    after = np.append(least[::-1].cumsum()[::-1][1:], 0)
    passed: list[dict[int, _Labels]] = []
    nothing = np.zeros(1, np.int64)
    start = _Labels(nothing, np.zeros(1), nothing, nothing, nothing)
    here = {-1: start}
    for step in range(count):
        room = most - after[step]
        found: dict[int, list[_Labels]] = {}
        for last, labels in here.items():
            found.setdefault(step, []).append(_taken(labels, last, steps.computing[step], steps.loss[step], 0, room))
            if last >= 0 and steps.reusing.shape[1]:
                drifted = _taken(labels, last, steps.reusing[step], steps.drift[last, step], ways, room)
                found.setdefault(last, []).append(drifted)
        joined = {last: _pruned(parts, room, cells) for last, parts in found.items()}
        here = {last: labels for last, labels in joined.items() if len(labels.cost)}
        passed.append(here)
    ends = [
        (labels.cost[i], labels.error[i], last, i) for last, labels in here.items() for i in range(len(labels.cost))
    ]
    best: list[ReusePath] = []
    for cost, error, last, place in sorted(ends):
        if not best or error < best[-1].error:
            best.append(ReusePath(_traced(passed, last, place), int(cost), float(error)))
    return best


def together(fronts: Sequence[Sequence[ReusePath]], budgets: Sequence[float]) -> list[tuple[ReusePath, ...] | None]:
    """For each budget a path of each part of the network, of the least total error that it allows, as exactly as `allocate` is with `TOGETHER` cells; None
    where it allows none. `fronts`: of each part, as `paths` gives them."""
    costs = [[path.cost for path in front] for front in fronts]
    errors = [[path.error for path in front] for front in fronts]
    chosen = allocate(costs, errors, budgets, cells=TOGETHER)
    return [
        tuple(front[option] for front, option in zip(fronts, best[0].options, strict=True)) if best else None
        for best in chosen
    ]


def _taken(labels: _Labels, last: int, costs: Integers, errors: Floats, offset: int, room: float) -> _Labels:
    """Every label with every way that has a finite error and leaves room for the rest."""
    allowed = np.flatnonzero(np.isfinite(errors))
    cost = (costs[allowed][:, None] + labels.cost).ravel()
    fits = np.flatnonzero(cost <= room)
    error = (errors[allowed][:, None] + labels.error).ravel()
    way, parent = np.divmod(fits, len(labels.cost))
    return _Labels(cost[fits], error[fits], allowed[way] + offset, np.full(len(fits), last), parent)


def _pruned(parts: Sequence[_Labels], room: float, cells: int) -> _Labels:
    joined = _Labels(
        np.concatenate([part.cost for part in parts]),
        np.concatenate([part.error for part in parts]),
        np.concatenate([part.way for part in parts]),
        np.concatenate([part.state for part in parts]),
        np.concatenate([part.parent for part in parts]),
    )
    order = np.lexsort((joined.error, joined.cost))
    error = joined.error[order]
    kept = order[error < np.minimum.accumulate(np.concatenate([[np.inf], error[:-1]]))] if len(order) else order
    if len(kept) > cells:
        top = room if math.isfinite(room) else float(joined.cost[kept[-1]])
        cell = (joined.cost[kept] * (cells / (top + 1))).astype(np.int64)
        kept = kept[np.append(np.diff(cell) > 0, True)]  # of each cell the last, which is the best
    return _Labels(joined.cost[kept], joined.error[kept], joined.way[kept], joined.state[kept], joined.parent[kept])


def _traced(passed: Sequence[dict[int, _Labels]], last: int, place: int) -> tuple[int, ...]:
    """The ways of a path that ends there."""
    found = []
    for labels in reversed(passed):
        here = labels[last]
        found.append(int(here.way[place]))
        last, place = int(here.state[place]), int(here.parent[place])
    return tuple(reversed(found))
