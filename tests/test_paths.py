"""The exact answer to which steps compute and which reuse, against trying all."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.genomes.paths import Floats, ReusePath, paths, together


def tried(errors: Floats, whole: list[int], reused: list[int]) -> list[tuple[int, float]]:
    """Cost and error of every choice of computed steps, those that no other beats."""
    steps = len(whole)
    every = []
    for count in range(steps):
        for others in itertools.combinations(range(1, steps), count):
            computed, cost, error, last = {0, *others}, 0, 0.0, 0
            for step in range(steps):
                last = step if step in computed else last
                cost += whole[step] if step in computed else reused[step]
                error += 0.0 if step in computed else float(errors[last, step])
            if math.isfinite(error):
                every.append((cost, error))
    front: list[tuple[int, float]] = []
    for cost, error in sorted(every):
        if not front or error < front[-1][1] - 1e-12:
            front.append((cost, error))
    return front


@st.composite
def instances(draw: st.DrawFn, most: int = 7) -> tuple[Floats, list[int], list[int]]:
    """Errors are multiples of a sixteenth, whose sums are exact."""
    steps = draw(st.integers(1, most))
    numbers = st.integers(0, 64).map(lambda n: n / 16)
    rows = st.lists(st.one_of(numbers, st.just(math.inf)), min_size=steps, max_size=steps)
    errors = np.array(draw(st.lists(rows, min_size=steps, max_size=steps)))
    whole = draw(st.lists(st.integers(5, 30), min_size=steps, max_size=steps))
    reused = [draw(st.integers(0, price)) for price in whole]
    return errors, whole, reused


@given(instances())
@settings(deadline=None, max_examples=500)
def test_paths_are_those_that_trying_all_finds(instance: tuple[Floats, list[int], list[int]]) -> None:
    errors, whole, reused = instance
    found = paths(errors, whole, reused)
    assert [(path.cost, path.error) for path in found] == tried(errors, whole, reused)
    for path in found:
        assert path.computed[0] == 0
        cost = sum(whole[s] if s in path.computed else reused[s] for s in range(len(whole)))
        last = [max(c for c in path.computed if c <= s) for s in range(len(whole))]
        assert cost == path.cost
        assert path.error == sum(float(errors[j, s]) for s, j in enumerate(last) if j != s)


@given(st.lists(instances(4), min_size=1, max_size=3), st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_blocks_together_share_a_budget_best(blocks: list[tuple[Floats, list[int], list[int]]], share: float) -> None:
    fronts = [paths(*block) for block in blocks]
    dearest = sum(front[-1].cost for front in fronts)
    budget = share * dearest
    [found] = together(fronts, [budget])
    fitting = [
        sum(path.error for path in chosen)
        for chosen in itertools.product(*fronts)
        if sum(path.cost for path in chosen) <= budget
    ]
    if not fitting:
        assert found is None
        return
    assert found is not None
    assert sum(path.cost for path in found) <= budget
    assert sum(path.error for path in found) == min(fitting)


def test_a_step_far_from_the_computed_one_costs_more() -> None:
    """Of ten steps whose error grows with the square of the distance, three computed ones are spread evenly."""
    errors = np.array([[float((m - j) ** 2) for m in range(10)] for j in range(10)])
    found = {len(path.computed): path for path in paths(errors, [10] * 10, [1] * 10)}
    assert found[10] == ReusePath(tuple(range(10)), 100, 0.0)
    assert found[1].computed == (0,)
    assert [b - a for a, b in itertools.pairwise((*found[3].computed, 10))] in ([4, 3, 3], [3, 4, 3], [3, 3, 4])


@pytest.mark.parametrize(
    ("errors", "whole", "reused"),
    [
        (np.zeros((2, 3)), [1, 1], [0, 0]),
        (np.full((2, 2), np.nan), [1, 1], [0, 0]),
        (np.full((2, 2), -1.0), [1, 1], [0, 0]),
        (np.zeros((2, 2)), [1, 1], [0, 2]),
        (np.zeros((0, 0)), [], []),
    ],
)
def test_what_makes_no_sense_is_refused(errors: Floats, whole: list[int], reused: list[int]) -> None:
    with pytest.raises(ValueError, match="must"):
        paths(errors, whole, reused)
