"""The exact answer to what each step computes and what it reuses, against trying all."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.genomes.paths import ReusePath, Steps, paths, together


def priced(steps: Steps, ways: tuple[int, ...]) -> tuple[int, float]:
    """Cost and error of what each step does; an infinite error where the first one reuses."""
    computing = steps.computing.shape[1]
    cost, error, last = 0, 0.0, -1
    for step, way in enumerate(ways):
        if way < computing:
            cost, error, last = cost + int(steps.computing[step, way]), error + float(steps.loss[step, way]), step
        elif last < 0:
            error = math.inf
        else:
            cost += int(steps.reusing[step, way - computing])
            error += float(steps.drift[last, step, way - computing])
    return cost, error


def tried(steps: Steps) -> list[tuple[int, float]]:
    """Cost and error of all that there is, without what another beats."""
    count, computing = steps.computing.shape
    every = range(computing + steps.reusing.shape[1])
    found = [priced(steps, ways) for ways in itertools.product(every, repeat=count)]
    front: list[tuple[int, float]] = []
    for cost, error in sorted(one for one in found if math.isfinite(one[1])):
        if not front or error < front[-1][1]:
            front.append((cost, error))
    return front


@st.composite
def instances(draw: st.DrawFn, most: int = 5) -> Steps:
    """Errors are multiples of a sixteenth, whose sums are exact."""
    count, computing, reusing = draw(st.integers(1, most)), draw(st.integers(1, 2)), draw(st.integers(0, 2))
    numbers = st.one_of(st.integers(-8, 64).map(lambda n: n / 16), st.just(math.inf))

    def table(*shape: int, of: Any = numbers, dtype: Any = np.float64) -> Any:
        size = math.prod(shape)
        return np.array(draw(st.lists(of, min_size=size, max_size=size)), dtype=dtype).reshape(shape)

    whole = st.integers(0, 30)
    return Steps(
        table(count, computing, of=whole, dtype=np.int64),
        table(count, computing),
        table(count, reusing, of=whole, dtype=np.int64),
        table(count, count, reusing),
    )


@given(instances(), st.one_of(st.just(math.inf), st.integers(0, 100)))
@settings(deadline=None, max_examples=500)
def test_paths_are_those_that_trying_all_finds(steps: Steps, most: float) -> None:
    found = paths(steps, most)
    assert [(path.cost, path.error) for path in found] == [one for one in tried(steps) if one[0] <= most]
    for path in found:
        assert priced(steps, path.ways) == (path.cost, path.error)


@given(instances(6), st.integers(1, 4))
@settings(deadline=None, max_examples=100)
def test_with_few_cells_costs_stay_exact_and_errors_keep_their_bound(steps: Steps, cells: int) -> None:
    most = int(steps.computing.max(1).sum() + steps.reusing.sum())
    found = paths(steps, most, cells)
    for path in found:
        assert priced(steps, path.ways) == (path.cost, path.error)
    slack = len(steps.computing) * (most + 1) / cells
    for cost, error in tried(steps):
        if cost + slack <= most:
            assert min(path.error for path in found if path.cost <= cost + slack) <= error


@given(st.lists(instances(3), min_size=1, max_size=3), st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_parts_together_share_a_budget_best(parts: list[Steps], share: float) -> None:
    fronts = [paths(part) for part in parts]
    budget = share * sum(front[-1].cost for front in fronts if front)
    fitting = [
        sum(path.error for path in chosen)
        for chosen in itertools.product(*fronts)
        if sum(path.cost for path in chosen) <= budget
    ]
    [found] = together(fronts, [budget]) if all(fronts) else [None]
    if not fitting:
        assert found is None
        return
    assert found is not None
    assert sum(path.cost for path in found) <= budget
    assert sum(path.error for path in found) == min(fitting)


def test_a_step_far_from_the_computed_one_costs_more() -> None:
    """Of ten steps whose error grows with the square of the distance, three computed ones are spread evenly."""
    drift = np.array([[[float((m - j) ** 2)] for m in range(10)] for j in range(10)])
    costs = np.full((10, 1), 10), np.zeros((10, 1)), np.full((10, 1), 1), drift
    found = {path.ways.count(0): path for path in paths(Steps(*costs))}
    assert found[10] == ReusePath((0,) * 10, 100, 0.0)
    assert found[1].ways == (0, *[1] * 9)
    computed = [step for step, way in enumerate(found[3].ways) if way == 0]
    assert [b - a for a, b in itertools.pairwise((*computed, 10))] in ([4, 3, 3], [3, 4, 3], [3, 3, 4])


@pytest.mark.parametrize(
    "changed",
    [
        {"drift": np.zeros((2, 3, 1))},
        {"drift": np.full((2, 2, 1), np.nan)},
        {"loss": np.full((2, 1), -np.inf)},
        {"reusing": np.zeros((3, 1), np.int64)},
        {"computing": np.zeros((0, 1), np.int64)},
    ],
)
def test_what_makes_no_sense_is_refused(changed: dict[str, Any]) -> None:
    one = Steps(np.ones((2, 1), np.int64), np.zeros((2, 1)), np.zeros((2, 1), np.int64), np.zeros((2, 2, 1)))
    with pytest.raises(ValueError, match="must be"):
        paths(one._replace(**changed))
