"""Which schedule a comparison tells to take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import t as student

from nas.contracts import Score, Trial
from nas.results.recommendation import compared_of, recommended
from nas.results.report import Run
from nas.study import LedgerInfo

FACTS: dict[str, Any] = {
    "objectives": ["fd", "macs"],
    "limits": {"macs_share": 0.8},
    "baseline": "uniform",
    "trials": 9,
}


def trial(number: int, share: float, fd: float, error: float | None = 0.1, status: Any = "complete") -> Trial:
    """Its replicates differ from those of every other, so that paired errors are about as large as `error`."""
    drawn = np.random.default_rng(number).normal(fd, (error or 0.0) / 20, 20)
    spread = () if error is None else tuple(drawn.tolist())
    score = Score({"fd": fd}, {"fd": spread})
    return Trial(number, (number,), f"d{number}", 64, status, score, {"macs_share": share, "macs": 100 * share})


def run(*found: Trial, uniform: tuple[Trial, ...] = (trial(90, 1.0, 2.0),), seed: int = 0) -> Run:
    def info(name: str, seed: int = 0) -> LedgerInfo:
        return LedgerInfo("s", name, seed, ("fd", "macs"), (64,), {"macs_share": 0.8}, {})

    return Run(Path("runs/s"), FACTS, [(info("uniform"), uniform), (info("evolution", seed), found)])


def test_the_cheapest_that_is_level_with_the_full_network_is_recommended() -> None:
    found = recommended(run(trial(1, 0.3, 3.0), trial(2, 0.5, 2.01), trial(3, 0.7, 1.9)), "my study.py")
    assert found is not None
    assert (found["searcher"], found["trial"]) == ("evolution", 2)
    low, high = found["interval"]
    two, full = trial(2, 0.5, 2.01).score, trial(90, 1.0, 2.0).score
    assert two is not None
    assert full is not None
    difference, error = two.difference(full, "fd")
    assert (low + high) / 2 == pytest.approx(difference)
    assert (high - low) / 2 == pytest.approx(student.ppf(0.975, 19) * error), "of 20 blocks"
    assert "on the noises that verified both, and chose it" in found["words"]
    assert "50% of the full network's MACs saved" in found["words"]
    assert "the cheapest that cannot be told from it, of 3 schedules verified" in found["words"]
    assert found["command"].startswith("nas export 'my study.py' --out runs/s --searcher evolution --trial 2")


def test_the_interval_is_of_noises_that_chose_neither_where_they_were_scored_so() -> None:
    """What is chosen for being level on some noises is level on these, whatever it is on others."""
    found = run(trial(1, 0.3, 3.0), trial(2, 0.5, 2.01), trial(3, 0.7, 1.9))
    assert {one.number for one in compared_of(found)} == {2, 90}
    again = {one.digest: one.score for one in (trial(2, 0.5, 2.4), trial(90, 1.0, 2.05)) if one.score is not None}
    told = recommended(replace(found, confirmed=again))
    assert told is not None
    assert told["trial"] == 2
    assert told["difference"] == pytest.approx(0.35)
    assert "fd 2.4 where the full network has 2.05, on noises that chose neither" in told["words"]
    assert "On these noises it can be told from it." in told["words"]


def test_of_a_full_network_that_is_guided_it_is_said() -> None:
    """Guidance doubles what it costs, so that half is saved by leaving that out."""
    guided = replace(run(trial(2, 0.5, 2.01)), facts={**FACTS, "choices": [["0-1.guidance", ["none", 2.0]]]})
    found, plain = recommended(guided), recommended(run(trial(2, 0.5, 2.01)))
    assert found is not None
    assert plain is not None
    assert found["words"] == f"{plain['words']} The full network is guided throughout."


def test_where_none_is_level_the_best_is_and_that_is_said() -> None:
    found = recommended(run(trial(1, 0.3, 5.0), trial(2, 0.5, 4.0), seed=2))
    assert found is not None
    assert found["trial"] == 2
    assert "none is level with the full network. The best is evolution's trial 2" in found["words"]
    assert "--seed 2" in found["command"]


@pytest.mark.parametrize(
    "others",
    [
        (),
        (trial(1, 0.9, 2.0),),  # over the limit
        (trial(1, 0.5, 2.0, status="pruned"),),
        (trial(90, 0.7, 2.0),),  # the full network's own schedule
    ],
)
def test_nothing_is_recommended_where_nothing_within_the_limits_is_verified(others: tuple[Trial, ...]) -> None:
    assert recommended(run(*others)) is None


def test_without_a_full_network_or_errors_no_loss_is_claimed() -> None:
    found = recommended(run(trial(1, 0.5, 2.0), uniform=()))
    assert found is not None
    assert "interval" not in found
    assert "the best of one schedule verified" in found["words"]
    found = recommended(run(trial(1, 0.5, 2.5, None), trial(2, 0.7, 1.9, None), uniform=(trial(90, 1.0, 2.0, None),)))
    assert found is not None
    assert found["trial"] == 2
    assert "interval" not in found
