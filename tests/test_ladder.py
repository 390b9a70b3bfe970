"""Who rises: leaders, and whoever the paired error cannot tell apart from them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas.contracts import Score, Trial, jackknife_error
from nas.engine.ladder import Climb, Ladder, clearly_beaten, paired_errors


def trial(
    number: int, fd: float, macs: float, noise: tuple[float, ...] = (), rung: int = 16, excess: float = -1
) -> Trial:
    replicates = {"fd": tuple(fd + x for x in noise)} if noise else {}
    return Trial(
        number,
        (number,),
        f"digest {number}",
        rung,
        "pruned",
        Score({"fd": fd}, replicates),
        {"macs": macs},
        {"macs": excess},
    )


def ladder(trials: int = 16, verified: int = 2, rungs: tuple[int, ...] = (16, 64, 256)) -> Ladder:
    return Ladder(rungs, ("fd", "macs"), trials, verified)


def test_leaders_are_the_front_and_those_not_told_apart_from_it() -> None:
    shared = tuple(np.random.default_rng(0).standard_normal(20) * 0.1)
    other = tuple(np.random.default_rng(1).standard_normal(20) * 0.1)
    trials = [
        trial(0, 1.0, 10, shared),
        trial(1, 1.1, 10, other),  # behind by less than the error of independent noise
        trial(2, 1.1, 11, shared),  # behind by as much, but with the same noise: told apart
        trial(3, 2.0, 5, shared),
        trial(4, 9.0, 12, shared),
        trial(5, 0.1, 12, shared, excess=1.0),  # over budget
    ]
    assert [t.number for t in ladder().leaders(trials, 16)] == [0, 3, 1]
    assert [t.number for t in ladder().leaders(trials, 64)] == []
    everyone = replace(ladder(), everything=True)
    assert {t.number for t in everyone.leaders(trials, 16)} == set(range(6))


def test_one_schedule_rises_once() -> None:
    trials = [trial(0, 1.0, 10), replace(trial(0, 1.0, 10), number=1)]
    assert [t.number for t in ladder().leaders(trials, 16)] == [0]


@given(st.integers(0, 1000))
def test_paired_errors_are_those_of_the_scores(seed: int) -> None:
    rng = np.random.default_rng(seed)
    trials = [trial(i, 1.0, 1.0, tuple(rng.standard_normal(20))) for i in range(4)]
    errors = paired_errors(trials, "fd")
    for i, a in enumerate(trials):
        for j, b in enumerate(trials):
            assert a.score is not None
            assert b.score is not None
            assert errors[i, j] == pytest.approx(a.score.difference(b.score, "fd")[1], abs=1e-7)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_without_errors_a_trial_is_beaten_by_whoever_is_better_and_no_dearer(points: list[tuple[int, int]]) -> None:
    trials = [trial(i, float(fd), float(macs)) for i, (fd, macs) in enumerate(points)]
    expected = [any(f < fd and m <= macs for f, m in points) for fd, macs in points]
    assert clearly_beaten(trials, ("fd", "macs")).tolist() == expected


def test_rungs_keep_equal_shares() -> None:
    assert [ladder(64, 4).room(level) for level in range(3)] == [64, 16, 4]
    assert [ladder(3, 12).room(level) for level in range(3)] == [3, 3, 3]


def test_room_grows_with_what_is_scored_and_verification_waits() -> None:
    front = [trial(i, 20.0 - i, float(i)) for i in range(16)]
    rising = ladder(trials=16, verified=4)  # 16, 8, 4
    assert rising.next(front[:1], searching=True) is None
    assert rising.next(front[:2], searching=True) is not None
    risen = [*front[:4], trial(0, 1.0, 0.0, rung=64), trial(3, 1.0, 3.0, rung=64)]
    assert rising.next(risen, searching=True) is None
    done = [*front, *(trial(i, 20.0 - i, float(i), rung=64) for i in range(8))]
    assert rising.next(done, searching=True) is None
    top = rising.next(done, searching=False)
    assert top is not None
    running = [*done, replace(trial(9, 0.0, 9.0), number=99, status="running", score=None)]
    early = rising.next(running, searching=False)
    assert early is not None
    assert early.rung == 64, "verification begins with what is known while a straggler runs"


@pytest.mark.parametrize(("errors", "told"), [(1.9, False), (2.1, True)])
def test_scores_are_told_apart_by_two_standard_errors_of_their_difference(errors: float, told: bool) -> None:
    noise, other = (tuple(np.random.default_rng(seed).standard_normal(20)) for seed in (0, 1))
    error = jackknife_error([a - b for a, b in zip(noise, other, strict=True)])
    trials = [trial(0, 1.0, 10, noise), trial(1, 1.0 + errors * error, 10, other)]
    assert clearly_beaten(trials, ("fd", "macs")).tolist() == [False, told]


@given(st.integers(0, 1000))
def test_who_rises_is_the_same_however_it_is_found_out(seed: int) -> None:
    """Trial by trial, where few compared with the room are unbeaten, as by the order of all of them anew."""
    rng = np.random.default_rng(seed)
    own = ladder(trials=24, verified=int(rng.integers(2, 20)))
    climb, trials = Climb(own), []
    for number in range(24):
        shared = rng.standard_normal(20) * 0.1
        fd, macs = (float(x) for x in rng.integers(1, 8, 2))
        noise = tuple(shared if number % 3 else rng.standard_normal(20) * 0.3)
        trials.append(trial(number, fd / 4, macs, noise))
        climb.note(trials[-1])
        while (risen := climb.next(searching=True)) is not None:
            anew = Climb(own, trials)
            assert anew.next(searching=True) == risen
            leaders = list(Climb(own, trials).leaders(16))
            room = math.floor(own.room(1) / own.room(0) * (number + 1))
            tried = {t.digest for t in trials if t.rung == 64}
            waiting = [t for t in leaders[:room] if t.digest not in tried]
            assert risen == min(waiting, key=lambda one: one.number)
            trials.append(replace(risen, number=100 + len(trials), rung=64))
            climb.note(trials[-1])


def test_by_costs_alone_a_trial_is_beaten_by_whoever_is_no_dearer_in_any_and_cheaper_in_one() -> None:
    costs = ((10, 5), (10, 5), (9, 5), (11, 4), (12, 6))
    trials = [replace(trial(i, 0.0, a), cost={"macs": a, "params": b}) for i, (a, b) in enumerate(costs)]
    assert clearly_beaten(trials, ("macs", "params")).tolist() == [True, True, False, False, True]
