"""Candidates that fail: their second attempt, streaks that end a run, and what a run that goes on makes of them."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nas.contracts import Proposal, Schedule, Score, Step, UserError, derive_seed
from nas.engine.ladder import Ladder
from nas.engine.ledger import Ledger, read_ledgers
from nas.engine.runner import FAILURES_IN_A_ROW, Conductor, Job, attempt
from nas.engine.session import open_session
from nas.engine.storage import open_storage
from nas.library import StudyRun
from nas.results.report import Run
from nas.searchers.random import RandomSearch
from tests.toy import ToyEvaluator, facts, run, toy_study


def test_a_failing_candidate_is_tried_twice_and_the_search_goes_on(tmp_path: Path) -> None:
    failing = (1, 1, 1, 1, 1, 1)
    trials = run(toy_study(evaluator__failing=(failing,)), tmp_path)
    failed = [t for t in trials if t.status == "failed"]
    assert [t.genome for t in failed] == [failing, failing]
    assert failed[1].origin["retry"] == failed[0].number
    assert all("was told to fail" in t.reason for t in failed)
    assert sum(t.rung == 64 and t.status == "pruned" for t in trials) == 29


def test_a_score_that_is_no_number_is_a_failure(tmp_path: Path) -> None:
    bad = (2, 2, 2, 2, 2, 2)
    trials = run(toy_study(evaluator__not_a_number=(bad,)), tmp_path)
    failed = [t for t in trials if t.status == "failed"]
    assert {t.genome for t in failed} == {bad}
    assert "not finite" in failed[0].reason


def test_an_evaluator_that_always_fails_ends_the_run_with_its_reason(tmp_path: Path) -> None:
    every = tuple(itertools.product(range(4), repeat=3))
    study = toy_study(space__genes=3, evaluator__failing=every)
    with pytest.raises(UserError, match="in a row failed, the last with: RuntimeError: genome"):
        run(study, tmp_path)


def test_failures_with_a_cause_outside_do_not_count_once_it_is_gone(tmp_path: Path) -> None:
    every = tuple(itertools.product(range(4), repeat=3))
    broken = toy_study(space__genes=3, evaluator__failing=every)
    for _ in range(2):
        with pytest.raises(UserError, match="in a row failed"):
            run(broken, tmp_path, "uniform")
    trials = run(toy_study(space__genes=3), tmp_path, "uniform")
    assert {t.genome for t in trials if t.status == "complete"} == {(i,) * 3 for i in range(4)}
    assert facts(run(toy_study(space__genes=3), tmp_path, "uniform")) == facts(trials)


def test_a_candidate_that_still_fails_after_such_a_streak_is_not_proposed_again(tmp_path: Path) -> None:
    every = tuple(itertools.product(range(4), repeat=3))
    with pytest.raises(UserError, match="in a row failed"):
        run(toy_study(space__genes=3, evaluator__failing=every), tmp_path, "random")
    [(_, trials)] = read_ledgers(open_storage(tmp_path))
    bad = trials[0].genome
    run(toy_study(space__genes=3, evaluator__failing=(bad,), trials=10), tmp_path, "random")
    trials = run(toy_study(space__genes=3, evaluator__failing=(bad,), trials=25), tmp_path, "random")
    first = [t.genome for t in trials if t.rung == 64 and "retry" not in t.origin]
    assert len(first) == 25
    assert len(set(first)) == 25


def test_what_a_streak_left_for_good_is_told_on_replay(tmp_path: Path) -> None:
    study = toy_study(space__genes=3)
    ledger = Ledger(open_storage(tmp_path, writing=True), study.ledger_info(tmp_path, "random", 0), study.problem)
    bad, good = (0, 0, 0), (1, 1, 1)

    def opened(genome: tuple[int, ...]) -> int:
        return ledger.open(Proposal(genome), study.space.decode(genome), 64).number

    for genome in (bad, good, bad, good, (2, 0, 0), (2, 0, 0)):
        ledger.fail(opened(genome), "out of memory")
    for genome in (good, (2, 0, 0)):
        ledger.close(opened(genome), Score({"fd": 10.0}))
    search = RandomSearch(study.problem, 0)
    Conductor(ledger, search, study.problem, Ladder((64, 256), ("fd", "macs"), 30, 5), 0)
    assert search._told == {bad, good, (2, 0, 0)}


def test_a_run_that_is_killed_while_it_tries_a_streak_again_goes_on_with_the_rest(tmp_path: Path) -> None:
    """What had no second chance has it, though the first of them has been scored since."""
    study = toy_study(space__genes=3)
    ledger = Ledger(open_storage(tmp_path, writing=True), study.ledger_info(tmp_path, "random", 0), study.problem)
    bad = [(gene, 0, 0) for gene in range(4)] + [(0, 1, 0)]

    def opened(genome: tuple[int, ...], **origin: Any) -> int:
        return ledger.open(Proposal(genome, origin), study.space.decode(genome), 64).number

    for genome in bad:
        ledger.fail(opened(genome), "out of memory")
    ledger.close(opened(bad[0], retry=0), Score({"fd": 10.0}))
    search = RandomSearch(study.problem, 0)
    conductor = Conductor(ledger, search, study.problem, Ladder((64, 256), ("fd", "macs"), 30, 5), 0)
    assert search._told == {bad[0]}
    again = []
    for _ in range(4):
        job = conductor.next()
        assert isinstance(job, Job)
        again.append(job.trial.genome)
        conductor.settle(job.trial.number, Score({"fd": 9.0}))
    assert again == bad[1:]


@pytest.mark.parametrize("under_way", [False, True])
def test_a_second_attempt_is_no_sign_that_a_run_has_ended(under_way: bool, tmp_path: Path) -> None:
    """Of two that fail for good and one that fails once, a run that goes on knows what the one that was stopped knew."""
    study = toy_study(space__genes=3)
    ledger = Ledger(open_storage(tmp_path, writing=True), study.ledger_info(tmp_path, "random", 0), study.problem)
    bad, worse, once = (0, 0, 0), (1, 1, 1), (2, 0, 0)

    def opened(genome: tuple[int, ...], **origin: Any) -> int:
        return ledger.open(Proposal(genome, origin), study.space.decode(genome), 64).number

    first: dict[tuple[int, ...], int] = {}
    for genome in (bad, worse, bad, worse, once):
        number = opened(genome, **({"retry": first[genome]} if genome in first else {}))
        first.setdefault(genome, number)
        ledger.fail(number, "out of memory")
    again = opened(once, retry=first[once])
    if not under_way:
        ledger.close(again, Score({"fd": 10.0}))
    search = RandomSearch(study.problem, 0)
    conductor = Conductor(ledger, search, study.problem, Ladder((64, 256), ("fd", "macs"), 30, 5), 0)
    assert {bad, worse} <= search._told
    job = conductor.next()
    assert isinstance(job, Job)
    assert (job.trial.number == again) is under_way
    assert "retry" not in job.trial.origin or under_way


def test_a_run_that_was_killed_over_another_candidate_had_not_ended(tmp_path: Path) -> None:
    """Three were given up before; that something was under way says that there were others."""
    study = toy_study(space__genes=3)
    ledger = Ledger(open_storage(tmp_path, writing=True), study.ledger_info(tmp_path, "random", 0), study.problem)
    bad = [(gene, 0, 0) for gene in range(3)]
    for genome in [one for one in bad for _ in range(2)]:
        ledger.fail(ledger.open(Proposal(genome), study.space.decode(genome), 64).number, "out of memory")
    ledger.open(Proposal((3, 3, 3)), study.space.decode((3, 3, 3)), 64)
    search = RandomSearch(study.problem, 0)
    Conductor(ledger, search, study.problem, Ladder((64, 256), ("fd", "macs"), 30, 5), 0)
    assert search._told == {*bad}


def test_a_third_attempt_says_that_a_run_had_ended(tmp_path: Path) -> None:
    """Though the first failure of who has it lies before the others'."""
    study = toy_study(space__genes=3)
    ledger = Ledger(open_storage(tmp_path, writing=True), study.ledger_info(tmp_path, "random", 0), study.problem)
    early, late, later, good = (0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 3, 3)

    def opened(genome: tuple[int, ...], **origin: Any) -> int:
        return ledger.open(Proposal(genome, origin), study.space.decode(genome), 64).number

    ledger.fail(opened(early), "out of memory")
    ledger.close(opened(good), Score({"fd": 10.0}))
    last = {}
    for genome in (early, late, later, late, later):
        last[genome] = opened(genome)
        ledger.fail(last[genome], "out of memory")
    again = opened(early, retry=last[early])
    search = RandomSearch(study.problem, 0)
    conductor = Conductor(ledger, search, study.problem, Ladder((64, 256), ("fd", "macs"), 30, 5), 0)
    jobs = [conductor.next() for _ in range(3)]
    assert [job.trial.genome for job in jobs if isinstance(job, Job)] == [early, late, later]
    assert isinstance(jobs[0], Job)
    assert jobs[0].trial.number == again


def test_who_cannot_be_verified_keeps_nobodys_place(tmp_path: Path) -> None:
    """The next takes it, so that as many are verified as were asked for."""
    study = toy_study(space__genes=6, trials=40, verified=3)
    trials = run(study, tmp_path / "whole", "random")
    first = [trial.genome for trial in trials if trial.status == "complete"]
    assert len(first) == 3

    picky = toy_study(space__genes=6, trials=40, verified=3, evaluator=Unverifiable(genome=first[0]))
    trials = run(picky, tmp_path / "picky", "random")
    done = [trial.genome for trial in trials if trial.status == "complete"]
    assert len(done) == 3
    assert first[0] not in done


@dataclass(frozen=True)
class Unverifiable(ToyEvaluator):
    """One schedule fails on the last rung."""

    genome: tuple[int, ...] = ()

    def __call__(self, schedule: Schedule, rung: int, seed: int) -> Score:
        if rung == self.rungs[-1] and tuple(step.arch for step in schedule.steps) == self.genome:
            raise RuntimeError("cannot be verified")
        return super().__call__(schedule, rung, seed)


@dataclass(frozen=True)
class Short(ToyEvaluator):
    """Memory is short on the third noise, as long as a file is there."""

    while_there: str = ""

    def __call__(self, schedule: Schedule, rung: int, seed: int) -> Score:
        if seed == derive_seed(0, "confirmation noise") and os.path.exists(self.while_there):
            raise RuntimeError("out of memory")
        return super().__call__(schedule, rung, seed)


def test_what_could_not_be_confirmed_is_tried_again_by_the_next_command(tmp_path: Path) -> None:
    """Though it failed as often as a candidate may."""
    short = tmp_path / "short"
    # Two are chosen: of three that fail one after another it is said so at once.
    limits = {"macs_share": 0.26}
    study = toy_study(trials=12, verified=2, limits=limits, evaluator=Short(while_there=str(short)))
    short.touch()
    for _ in range(3):
        with pytest.raises(UserError, match="could not be scored once more: RuntimeError: out of memory; once the"):
            StudyRun(study, tmp_path / "run").search("evolution")
    with pytest.raises(UserError, match="could not be scored once more: RuntimeError: out of memory"):
        StudyRun(study, tmp_path / "run").best(macs_share=0.5)
    short.unlink()
    assert StudyRun(study, tmp_path / "run").best(macs_share=0.5).confirmed is not None
    StudyRun(study, tmp_path / "run").search("evolution")
    found = Run.open(tmp_path / "run")
    assert {trial.digest for trial in found.chosen()} <= set(found.confirmed)


def test_a_run_ends_after_so_many_candidates_in_a_row_failed_and_not_before(tmp_path: Path) -> None:
    every = tuple(itertools.product(range(4), repeat=3))
    with pytest.raises(UserError, match=f"^{FAILURES_IN_A_ROW} candidates in a row failed.* tries them again$"):
        run(toy_study(space__genes=3, evaluator__failing=every), tmp_path)
    [(_, trials)] = read_ledgers(open_storage(tmp_path))
    failed = [trial.digest for trial in trials if trial.status == "failed"]
    assert len(set(failed)) == FAILURES_IN_A_ROW
    assert len(set(failed[:-1])) < FAILURES_IN_A_ROW


def test_a_few_bad_candidates_in_a_row_end_nothing(tmp_path: Path) -> None:
    """They are as many failures as end a run, each tried twice, yet say nothing of others."""
    bad = tuple((i,) * 6 for i in range(3))
    trials = run(toy_study(evaluator__not_a_number=bad), tmp_path, "uniform")
    assert sorted(t.genome for t in trials if t.status == "failed") == [genome for genome in bad for _ in range(2)]
    assert {t.genome for t in trials if t.status == "complete"} == {(3,) * 6}
    again = run(toy_study(evaluator__not_a_number=bad), tmp_path, "uniform")
    assert facts(again) == facts(trials), "what failed for good is not tried for ever"


def test_failures_of_jobs_that_ran_side_by_side_end_a_run_too(tmp_path: Path) -> None:
    with open_session(toy_study(), tmp_path) as session:
        conductor = session.conductor("random")
        jobs = [conductor.next() for _ in range(FAILURES_IN_A_ROW + 3)]
        for job in jobs:
            assert isinstance(job, Job)
            conductor.settle(job.trial.number, "Traceback\nRuntimeError: no")
        with pytest.raises(
            UserError, match=f"^{len(jobs)} candidates in a row failed, the last with: RuntimeError: no"
        ):
            conductor.next()


def test_a_candidate_that_was_scored_meanwhile_is_not_tried_again(tmp_path: Path) -> None:
    """It failed in one run, and another one on the same ledger scored it: its second attempt has nothing to show."""
    study = toy_study(space__genes=1, space__options=2, limits={}, trials=2, verified=1)
    with open_session(study, tmp_path) as session:
        conductor = session.conductor("random")
        first = conductor.next()
        assert isinstance(first, Job)
        conductor.settle(first.trial.number, "RuntimeError: once")
        again = conductor.next()
        assert isinstance(again, Job)
        assert again.trial.origin["retry"] == first.trial.number
        conductor.settle(again.trial.number, "RuntimeError: twice")
        session.run(conductor)
        tried = [trial for trial in conductor.ledger.trials if trial.digest == first.trial.digest and trial.rung == 64]
    assert len(tried) == 2


def test_a_reason_ends_with_the_last_calls_before_it() -> None:
    def fail(depth: int) -> Score:
        if depth:
            return onward(depth - 1)
        raise RuntimeError("no")

    def onward(depth: int) -> Score:  # in turns, since a traceback does not repeat itself
        return fail(depth)

    reason = attempt(lambda *arguments: fail(20), Schedule((Step(0, ()),)), 1, 0)
    assert isinstance(reason, str)
    assert reason.count('File "') == 5
    assert reason.rstrip().endswith("RuntimeError: no")


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        (({"fd": np.float32(0.5)}, {"fd": (np.float64(1), torch.tensor(2.0))}, {"macs": np.int64(3)}, {}), 0.5),
        (({"fd": torch.tensor(0.5)}, {}, {}, {}), 0.5),
        ({"fd": 0.5}, "the evaluator returned dict; a call returns a Score"),
        (None, "the evaluator returned NoneType"),
        (({"fd": "much"}, {}, {}, {}), "could not convert string to float"),
    ],
)
def test_an_evaluators_answer_is_a_score_of_floats_or_a_failure(answer: Any, kept: Any) -> None:
    given = Score(*answer) if isinstance(answer, tuple) else answer
    found = attempt(lambda *_: given, Schedule((Step(0, 0),)), 8, 0)
    if isinstance(kept, str):
        assert isinstance(found, str)
        assert kept in found
    else:
        assert isinstance(found, Score)
        assert Score.from_json(json.loads(json.dumps(found.to_json()))) == found
        assert found.values == {"fd": kept}


@pytest.mark.parametrize("answer", [None, (0, 1, 0, 1, 0, 1)])
def test_a_searchers_answer_that_is_none_ends_in_words(answer: Any, tmp_path: Path) -> None:
    class Odd:
        def start(self, problem: Any, seed: int) -> Any:
            return self

        def ask(self, pending: Any) -> Any:
            return answer

        def tell(self, trial: Any) -> None: ...

        def __repr__(self) -> str:
            return "Odd()"

    with pytest.raises(UserError, match=r"searcher odd answered .*; `ask` returns Proposal"):
        run(toy_study(searchers={"odd": Odd()}), tmp_path, "odd")
