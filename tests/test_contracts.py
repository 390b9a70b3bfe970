from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import evaluators
import nas
import search_spaces
from nas.contracts import Schedule, Score, Step, derive_seed, frozen, jackknife_error

ARCHS = st.recursive(st.floats(0, 1) | st.integers(0, 9) | st.text(max_size=3), lambda inner: st.tuples(inner, inner))
STEPS = st.lists(st.integers(0, 999), min_size=1, max_size=8, unique=True).flatmap(
    lambda times: st.tuples(
        *(st.builds(Step, st.just(t), ARCHS, st.just(()) | st.just(("up_blocks.0",))) for t in sorted(times)[::-1])
    )
)


@given(STEPS)
def test_schedule_survives_json(steps: tuple[Step, ...]) -> None:
    schedule = Schedule(steps)
    again = Schedule.from_json(schedule.to_json())
    assert again == schedule
    assert again.digest == schedule.digest
    assert hash(again) == hash(schedule)


def test_schedules_that_differ_have_other_digests() -> None:
    a = Schedule((Step(9, (0.5,)), Step(3, (1.0,))))
    assert a.digest != Schedule((Step(9, (0.5,)), Step(3, (0.5,)))).digest
    assert a.digest != Schedule((Step(9, (0.5,)), Step(3, (1.0,), ("mid",)))).digest
    assert a.archs == ((0.5,), (1.0,))


@pytest.mark.parametrize("timesteps", [(), (3, 3), (3, 5), (5, -1)])
def test_schedule_refuses_timesteps_that_do_not_decrease(timesteps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="decrease"):
        Schedule(tuple(Step(t, 0) for t in timesteps))


def test_jackknife_error_of_a_mean_is_the_standard_error() -> None:
    values = np.random.default_rng(0).standard_normal(20)
    replicates = [float(np.delete(values, i).mean()) for i in range(20)]
    assert jackknife_error(replicates) == pytest.approx(values.std(ddof=1) / math.sqrt(20))
    assert math.isnan(jackknife_error([1.0]))


def test_paired_difference_is_sharper_than_two_errors() -> None:
    shared = np.random.default_rng(0).standard_normal(20)
    a = Score({"fd": 1.0}, {"fd": tuple(shared)})
    b = Score({"fd": 0.5}, {"fd": tuple(shared + 0.01 * np.arange(20))})
    difference, error = a.difference(b, "fd")
    assert difference == 0.5
    assert error < 0.2 * a.error("fd")
    assert Score.from_json(a.to_json()) == a


def test_derived_seeds_differ_by_every_part() -> None:
    seeds = {derive_seed(s, t, p) for s in range(5) for t in range(5) for p in ("a", "b")}
    assert len(seeds) == 50
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_frozen_makes_tuples_of_nested_lists() -> None:
    assert frozen([1, [2.0, ["a"]]]) == (1, (2.0, ("a",)))


CHANGING = {"Meter", "Walked", "_Rung", "_Labels", "GradientSimilarity", "Partitions", "StepEffects"}


def test_values_are_frozen() -> None:
    """All dataclasses but those few that are no values: what is counted, learned or measured as it goes."""
    found = {}
    for package in (nas, search_spaces, evaluators):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if module.name.endswith("__main__"):
                continue
            for kind in vars(importlib.import_module(module.name)).values():
                if isinstance(kind, type) and kind.__module__ == module.name and dataclasses.is_dataclass(kind):
                    found[kind.__qualname__] = kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert len(found) > 80
    assert {name for name, frozen in found.items() if not frozen} == CHANGING
