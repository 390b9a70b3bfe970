from __future__ import annotations

import datetime
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.samplers import RandomSampler
from optuna.samplers._tpe.sampler import default_weights
from optuna.samplers.nsgaii import SBXCrossover
from optuna.trial import FrozenTrial, create_trial

from nas.contracts import DONE, WAIT, Proposal, Schedule, Score, Trial, UserError, derive_seed, digest_of
from nas.engine.ledger import read_ledgers
from nas.engine.runner import Job
from nas.engine.session import open_session
from nas.engine.storage import open_storage
from nas.library import StudyRun
from nas.results.report import Run
from nas.results.trials import wall_seconds
from nas.searchers.knapsack import Knapsack
from nas.searchers.optuna_sampler import OptunaSampler
from nas.searchers.random import RandomSearch
from nas.study import Study
from tests.toy import ToyEvaluator, ToySpace, facts, run, toy_study

ROOT = Path(__file__).parent.parent


def test_a_run_searches_then_verifies_on_other_noise(tmp_path: Path) -> None:
    study = toy_study()
    trials = run(study, tmp_path)
    search = [t for t in trials if t.rung == 64]
    verified = [t for t in trials if t.rung == 256]
    assert len(search) == study.trials
    assert len(verified) == study.verified
    assert all(study.problem.feasible(t.genome) for t in trials)
    assert len({t.digest for t in search}) == len(search)
    assert {t.status for t in search} == {"pruned"}
    assert {t.status for t in verified} == {"complete"}
    assert {t.origin["rises_from"] for t in verified} <= {t.number for t in search}
    digest = verified[0].digest
    first = next(t for t in search if t.digest == digest)
    assert first.score is not None
    assert verified[0].score is not None
    assert first.score.values != verified[0].score.values


def test_the_same_command_again_does_nothing_and_more_trials_go_on(tmp_path: Path) -> None:
    whole = run(toy_study(trials=20), tmp_path / "whole")
    first = run(toy_study(trials=12), tmp_path / "parts")
    assert facts(run(toy_study(trials=12), tmp_path / "parts")) == facts(first)
    more = run(toy_study(trials=20), tmp_path / "parts")
    assert [t.genome for t in more if t.rung == 64] == [t.genome for t in whole if t.rung == 64]


def test_a_run_that_is_done_loads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of a large network takes minutes."""
    trials = run(toy_study(), tmp_path)
    monkeypatch.setattr(Study, "load", lambda *given: pytest.fail("was loaded"))
    assert facts(run(toy_study(), tmp_path)) == facts(trials)


@pytest.mark.parametrize("searcher", ["evolution", "random"])
def test_ones_own_schedules_come_first_and_count(searcher: str, tmp_path: Path) -> None:
    own = ((3, 3, 0, 0, 1, 1), (0, 0, 0, 0, 0, 0))
    study = toy_study(enqueue=own)
    trials = [t for t in run(study, tmp_path / "whole", searcher) if t.rung == 64]
    assert [t.genome for t in trials[:2]] == [*own]
    assert all(t.origin == {"operator": "enqueued"} for t in trials[:2])
    assert len(trials) == study.trials
    assert len({t.genome for t in trials}) == study.trials
    run(study, tmp_path / "parts", searcher, trials=1)
    again = [t for t in run(study, tmp_path / "parts", searcher) if t.rung == 64]
    assert [t.genome for t in again] == [t.genome for t in trials]
    # One that is thought of later is proposed next, in the same ledger.
    later = toy_study(enqueue=(*own, (0, 0, 0, 0, 0, 1)))
    more = [t for t in run(later, tmp_path / "whole", searcher, trials=study.trials + 1) if t.rung == 64]
    assert more[-1].genome == (0, 0, 0, 0, 0, 1) or (0, 0, 0, 0, 0, 1) in {t.genome for t in trials}
    assert len(more) == study.trials + 1


@pytest.mark.parametrize(
    ("genome", "words"),
    [
        ((3,) * 6, "enqueued schedule 0 costs more than the limits allow: macs_share 1 of 0.6"),
        ((9,), "is none of this space"),
    ],
)
def test_what_may_not_be_enqueued_is_refused(genome: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        toy_study(enqueue=(genome,))


def test_a_run_goes_on_in_the_database_that_it_was_begun_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever leaves --storage out would begin again; and a file of SQLite's is the same one wherever he types."""
    monkeypatch.chdir(tmp_path)
    study = toy_study(trials=6, verified=2)
    StudyRun(study, tmp_path / "run", "sqlite:///trials.db").search("random")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    StudyRun(study, tmp_path / "run").search("evolution")
    assert not (tmp_path / "run" / "journal.log").exists()
    assert not list((tmp_path / "elsewhere").iterdir())
    searched = {info.searcher for info, _ in Run.open(tmp_path / "run").ledgers}
    assert {"random", "evolution"} <= searched


def test_weights_are_not_taken_over_a_training_that_was_begun(tmp_path: Path) -> None:
    (tmp_path / "trained" / "supernet").mkdir(parents=True)
    (tmp_path / "trained" / "supernet" / "weights.safetensors").write_bytes(b"")
    (tmp_path / "run" / "supernet").mkdir(parents=True)
    (tmp_path / "run" / "supernet" / "checkpoint.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="a training that was begun; leave --weights-from out"):
        StudyRun(toy_study(), tmp_path / "run").take_weights(tmp_path / "trained")


@dataclass(frozen=True)
class Reckless:
    """Proposes what it likes."""

    genome: tuple[int, ...]

    def start(self, problem: Any, seed: int) -> Reckless:
        return self

    def ask(self, pending: Any) -> Proposal:
        return Proposal(self.genome)

    def tell(self, trial: Trial) -> None: ...


@pytest.mark.parametrize(("genome", "message"), [((3,) * 6, "breaks the limits"), ((0,) * 5, "no genome of the space")])
def test_what_a_searcher_may_not_propose_is_not_evaluated(tmp_path: Path, genome: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(toy_study(searchers={"reckless": Reckless(genome)}), tmp_path, "reckless")
    [(_, trials)] = read_ledgers(open_storage(tmp_path))
    assert trials == []


def test_the_baseline_is_whole_whatever_the_study_allows(tmp_path: Path) -> None:
    trials = run(toy_study(trials=1, verified=1), tmp_path, "uniform", trials=1)
    assert {t.genome for t in trials if t.status == "complete"} == {(i,) * 6 for i in range(4)}


@pytest.mark.parametrize("objectives", [("macs", "fd"), ("fd", "speed"), ()])
def test_the_first_objective_is_measured_and_all_are_known(objectives: Any) -> None:
    with pytest.raises(UserError, match=r"the first one measured: fd|objectives=\(\): it should have at least 1 item"):
        toy_study(objectives=objectives)


def test_a_schedule_that_another_searcher_scored_is_not_run_again(tmp_path: Path) -> None:
    log = tmp_path / "calls"
    study = toy_study(evaluator__log=str(log), trials=40)
    run(study, tmp_path)
    run(study, tmp_path, "random")
    trials = run(study, tmp_path, "uniform")
    calls = Counter(log.read_text().splitlines())
    assert max(calls.values()) == 1
    shared = [t for t in trials if "scored_by" in t.origin]
    assert shared
    assert all(t.score is not None and t.score.spent["calls"] > 0 for t in shared)


def test_a_probe_may_exceed_the_limits_and_never_wins(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Probing:
        origin: str

        def start(self, problem: Any, seed: int) -> Any:
            search = RandomSearch(problem, seed)
            ask = search.ask
            dear = (3,) * len(problem.space.choices)
            told: list[Trial] = []
            search.tell = told.append  # type: ignore[assignment, method-assign]
            search.ask = lambda pending: ask(pending) if told else Proposal(dear, {self.origin: True})  # type: ignore[method-assign]
            return search

    trials = run(toy_study(searchers={"probing": Probing("probe")}), tmp_path / "a", "probing")
    assert trials[0].genome == (3,) * 6
    assert [t.rung for t in trials if t.genome == (3,) * 6] == [64]
    assert all(v <= 0 for t in trials[1:] for v in t.violations.values())
    with pytest.raises(UserError, match="breaks the limits"):
        run(toy_study(searchers={"probing": Probing("candidate")}), tmp_path / "b", "probing")


def test_probes_beyond_the_limits_are_no_reason_to_lose_patience(tmp_path: Path) -> None:
    """A solver probes around the full network first, and solves then."""
    study = toy_study(space__genes=16, searchers={"knapsack": Knapsack()}, limits={"macs_share": 0.5}, trials=140)
    with open_session(study, tmp_path) as session:
        conductor = session.conductor("knapsack", patience=30)
        session.run(conductor)
        trials = conductor.ledger.trials
    probes = [t for t in trials if "probe" in t.origin]
    solved = [t for t in trials if t.rung == 64 and "probe" not in t.origin]
    assert len(probes) > 30
    assert len(solved) >= 30


def test_a_rounded_limit_is_another_one_and_its_place_among_them_is_none(tmp_path: Path) -> None:
    close = {"macs": 60.0000001, "params": 4.0}
    trials = run(toy_study(limits=close), tmp_path, "random")
    assert facts(run(toy_study(limits=dict(reversed(close.items()))), tmp_path, "random")) == facts(trials)
    other = toy_study(limits={**close, "macs": 60.0000002})
    assert all("scored_by" in trial.origin for trial in run(other, tmp_path, "random"))
    found = Run.open(tmp_path)
    assert [info.searcher for info, _ in found.ledgers] == ["random"]
    assert found.others == 1
    info = toy_study(limits=close).ledger_info(tmp_path, "random", 0)
    assert digest_of({**info.provenance, "limits": "macs<=60, params<=4"}) in info.digests()
    former = replace(toy_study(limits=close).ledger_info(tmp_path, "random", 0), provenance={})
    assert former.former["limits"] == "macs<=60, params<=4"


def test_searchers_that_nothing_identifies_are_refused_and_optunas_objects_are_named(tmp_path: Path) -> None:
    class Nameless:
        def start(self, problem: Any, seed: int) -> Any:
            raise AssertionError

    with pytest.raises(
        UserError, match=r"searcher mine is .* names a place in memory.* give what it is made of a __repr__"
    ):
        toy_study(searchers={"mine": Nameless()})

    def crossing(eta: float) -> OptunaSampler:
        return OptunaSampler("NSGAIISampler", {"crossover": SBXCrossover(eta), "population_size": 4})

    assert repr(crossing(3.0)) == repr(crossing(3.0)) != repr(crossing(4.0))
    weighing = OptunaSampler("TPESampler", {"weights": default_weights})
    assert "default_weights" in repr(weighing)
    assert " at 0x" not in repr(weighing)
    parts = [OptunaSampler("TPESampler", {"weights": partial(default_weights, x)}) for x in (3, 4)]
    assert repr(parts[0]) != repr(parts[1])
    assert " at 0x" not in repr(parts)
    with pytest.raises(UserError, match="draws from a state of its own"):
        OptunaSampler("CmaEsSampler", {"independent_sampler": RandomSampler(seed=0)})
    with pytest.raises(UserError, match="names a place in memory"):
        toy_study(searchers={"unnamed": OptunaSampler("TPESampler", {"gamma": lambda count: count})})
    plain = OptunaSampler("TPESampler", {"n_startup_trials": 3})
    assert repr(plain) == "OptunaSampler(sampler='TPESampler', arguments={'n_startup_trials': 3})"
    study = toy_study(searchers={"crossing": crossing(3.0)}, trials=12)
    trials = run(study, tmp_path, "crossing")
    assert facts(run(replace(study, searchers={"crossing": crossing(3.0)}), tmp_path, "crossing")) == facts(trials)
    assert {info.searcher for info, _ in Run.open(tmp_path).ledgers} == {"crossing"}


def test_rungs_between_fill_while_the_search_goes_on(tmp_path: Path) -> None:
    study = toy_study(evaluator__rungs=(16, 64, 256), trials=60, verified=5)
    trials = run(study, tmp_path)
    count = Counter(t.rung for t in trials)
    assert count[16] == 60
    assert 5 <= count[256] <= count[64] < 30
    order = [t.rung for t in trials]
    assert order.index(64) < 60 - 10, "leaders rise while the search still proposes"
    assert order.index(256) > max(i for i, rung in enumerate(order) if rung == 16), "verification waits for all"
    assert facts(run(study, tmp_path)) == facts(trials)


def test_a_schedule_is_paid_for_once(tmp_path: Path) -> None:
    """Two genomes of one schedule: the second takes the first one's score and is charged nothing."""

    @dataclass(frozen=True)
    class Folded(ToySpace):
        def decode(self, genome: Any) -> Any:
            return super().decode((min(genome[0], 1), *genome[1:]))

    trials = run(replace(toy_study(trials=40), space=Folded(genes=3)), tmp_path, "random")
    by_digest: dict[tuple[str, int], list[Trial]] = {}
    for trial in trials:
        by_digest.setdefault((trial.digest, trial.rung), []).append(trial)
    twice = [found for found in by_digest.values() if len(found) > 1]
    assert twice
    for first, *others in twice:
        assert first.score is not None
        assert first.score.spent["macs"] > 0
        assert all(t.score is not None and not t.score.spent for t in others)


def test_costs_of_another_librarys_numbers_are_booked(tmp_path: Path) -> None:
    """As of a space that adds up its own tables."""

    @dataclass(frozen=True)
    class Summed(ToySpace):
        def cost(self, genome: Any) -> Any:
            return {name: np.float32(value) for name, value in super().cost(genome).items()} | {
                "macs": sum(table[gene] for table, gene in zip(self.interval_costs(), genome, strict=True))
            }

    trials = run(replace(toy_study(trials=6), space=Summed(genes=3)), tmp_path, "random")
    assert all(type(value) in (int, float) for trial in trials for value in trial.cost.values())


@pytest.mark.parametrize("given", [{"trials": 0}, {"trials": -5}, {"seeds": 0}, {"patience": 0}])
def test_fewer_than_one_of_something_is_refused(given: dict[str, int], tmp_path: Path) -> None:
    [(name, number)] = given.items()
    with pytest.raises(UserError, match=f"{name}={number}: give 1 or more"):
        StudyRun(toy_study(), tmp_path).search("random", **given)  # type: ignore[arg-type]


def test_the_baseline_ignores_the_limits_and_says_that_it_breaks_them(tmp_path: Path) -> None:
    trials = run(toy_study(), tmp_path, "uniform")
    full = next(t for t in trials if t.genome == (3,) * 6)
    assert full.violations["macs_share"] == pytest.approx(0.4)
    assert [t.status for t in trials if t.genome == (3,) * 6] == ["pruned", "complete"]


def killed_at_random(script: str, folder: Path, kills: int, wait: tuple[float, float]) -> None:
    """Runs the script, kills it hard at random moments, and at last lets it end."""
    rng = random.Random(0)
    for number in range(kills + 1):
        process = subprocess.Popen(
            [sys.executable, "-c", script], cwd=ROOT, env={**os.environ, "RUN": str(folder)}, start_new_session=True
        )
        if number == kills:
            assert process.wait(timeout=240) == 0
            return
        before, deadline = _lines(folder), time.monotonic() + 60
        while _lines(folder) <= before + 3 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.uniform(*wait))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _lines(folder: Path) -> int:
    journal = folder / "journal.log"
    return len(journal.read_bytes().splitlines()) if journal.exists() else 0


LOCAL = """
import os
from pathlib import Path
from tests.toy import run
from tests.toy import ToySpace, toy_study
folder = Path(os.environ["RUN"])
run(toy_study(evaluator__seconds=0.02, evaluator__log=str(folder / "calls"), trials=60), folder)
"""


@pytest.mark.slow
def test_a_killed_local_run_ends_as_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = run(toy_study(trials=60), tmp_path / "whole")
    (tmp_path / "killed").mkdir()
    killed_at_random(LOCAL, tmp_path / "killed", kills=2, wait=(0.0, 0.4))
    [(_, trials)] = read_ledgers(open_storage(tmp_path / "killed"))
    assert facts(trials) == facts(whole)
    calls = Counter((tmp_path / "killed" / "calls").read_text().splitlines())
    # A candidate that was running when the process died has to be run again; a finished one never is.
    assert sum(calls.values()) <= len(trials) + 2


@dataclass(frozen=True)
class Noted(ToyEvaluator):
    """Writes down the noises that it is asked for."""

    def __call__(self, schedule: Schedule, rung: int, seed: int) -> Score:
        with open(self.log, "a") as file:
            file.write(f"{schedule.digest} {rung} {seed}\n")
        return ToyEvaluator(self.rungs)(schedule, rung, seed)


def test_searching_verifying_and_confirming_have_noises_of_their_own(tmp_path: Path) -> None:
    study = toy_study(trials=12, evaluator=Noted(log=str(tmp_path / "log")))
    with open_session(study, tmp_path / "run") as session:
        session.run(session.conductor("evolution"))
        chosen = Run.open(tmp_path / "run", session.storage).chosen()
        session.run(session.confirmation([trial.genome for trial in chosen]))
        session.run(session.confirmation([trial.genome for trial in chosen]))  # known by now
        found = Run.open(tmp_path / "run", session.storage)
    calls = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    noises = {rung: {seed for _, at, seed in calls if at == rung} for rung in ("64", "256")}
    assert noises["64"] == {str(derive_seed(0, "search noise"))}
    assert noises["256"] == {str(derive_seed(0, "verification noise")), str(derive_seed(0, "confirmation noise"))}
    third = [digest for digest, _, seed in calls if seed == str(derive_seed(0, "confirmation noise"))]
    assert sorted(third) == sorted(trial.digest for trial in chosen)
    for trial in chosen:
        expected = Noted(log=str(tmp_path / "other"))(
            study.space.decode(trial.genome), 256, derive_seed(0, "confirmation noise")
        )
        assert dict(found.confirmed[trial.digest].values) == dict(expected.values)
        assert trial.score is not None
        assert dict(trial.score.values) != dict(expected.values)
    member = next(row for row in found.compare()["searchers"] if not row["baseline"])["best_within"]["0.6"]
    digest = study.space.decode(member["genome"]).digest
    assert member["confirmed"]["fd"] == found.confirmed[digest].values["fd"]
    assert "confirmed" not in {row["searcher"] for row in found.compare()["searchers"]}
    with open_session(study, tmp_path / "run") as session:
        again = session.conductor("random", trials=6)
        assert not any(name.startswith("toy.confirmed") for name, _ in again._known.values()), (
            "no search takes them for its own"
        )


def test_a_stop_is_no_time_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, hour = toy_study(trials=3, verified=1), datetime.timedelta(hours=1)

    def made_an_hour_ago(**given: Any) -> FrozenTrial:
        trial = create_trial(**given)
        assert trial.datetime_start is not None
        trial.datetime_start -= hour
        return trial

    with monkeypatch.context() as patch, open_session(study, tmp_path) as session:
        patch.setattr("nas.engine.ledger.create_trial", made_an_hour_ago)
        assert isinstance(session.conductor("random").next(), Job)
    assert len(run(study, tmp_path, "random")) == 4
    [(_, trials)] = read_ledgers(open_storage(tmp_path))
    assert wall_seconds(trials) < hour.total_seconds() / 2


def test_what_a_run_will_close_is_planned(tmp_path: Path) -> None:
    study = toy_study()
    with open_session(study, tmp_path) as session:
        conductor = session.conductor("evolution")
        assert conductor.planned == study.trials + study.verified
        session.run(conductor)
        assert conductor.planned == len(conductor.ledger.trials)


def test_a_run_waits_while_something_is_under_way_and_is_done_when_all_of_it_is_settled(tmp_path: Path) -> None:
    study = toy_study(space__genes=2, space__options=2, limits={}, trials=4, verified=2)
    with open_session(study, tmp_path) as session:
        conductor = session.conductor("random")
        evaluate = study.evaluator.load(None, tmp_path)  # type: ignore[arg-type]
        for count in (4, 2):  # searched side by side, then verified side by side
            jobs = [conductor.next() for _ in range(count)]
            assert conductor.next() is WAIT
            for job in jobs:
                assert isinstance(job, Job)
                conductor.settle(job.trial.number, evaluate(job.schedule, job.samples, job.seed))
        assert conductor.next() is DONE
