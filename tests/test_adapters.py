"""Nevergrad's optimisers and Optuna's samplers as searchers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import nevergrad
import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution, IntDistribution
from scipy.special import ndtri
from scipy.stats import norm

from nas.contracts import Problem, Proposal, Score, Trial, UserError, derive_seed
from nas.searchers.nevergrad import Nevergrad
from nas.searchers.optuna_sampler import OptunaSampler
from nas.testing import check_searcher, closed, table_problem, toy_score
from tests.test_searchers import drive
from tests.toy import ToySpace


@pytest.mark.parametrize("optimizer", ["NGOpt", "CMA", "DE", "PSO", "TBPSA"])
def test_optimizers_of_every_kind_keep_the_laws(optimizer: str) -> None:
    check_searcher(Nevergrad(optimizer), trials=24)


@pytest.mark.parametrize(
    "searcher",
    [
        OptunaSampler("NSGAIISampler", {"population_size": 8}),
        OptunaSampler("NSGAIIISampler", {"population_size": 6}),
        OptunaSampler("QMCSampler"),
        OptunaSampler("TPESampler", {"multivariate": True, "n_startup_trials": 5}),
    ],
    ids=repr,
)
def test_samplers_of_every_kind_keep_the_laws(searcher: OptunaSampler) -> None:
    check_searcher(searcher, trials=24)


def test_a_sequence_of_low_discrepancy_is_one() -> None:
    """Each proposal is its next point."""
    problem = alone(table_problem(genes=8, options=4))
    told = drive(OptunaSampler("QMCSampler", {"scramble": True}), problem, toy_score, 32)
    assert len({trial.genome for trial in told}) == 32
    # The middle of 4 options is 1.5, of 32 points' means of 8 genes sd 0.07; the cheapest and its neighbours are below 0.5.
    assert np.mean([trial.genome for trial in told]) == pytest.approx(1.5, abs=0.3)
    # Optuna's own, of as many dimensions; the first is drawn at random, as nothing is known of the space then.
    study = optuna.create_study(
        sampler=optuna.samplers.QMCSampler(scramble=True, seed=derive_seed(0, 0, "optuna sampler"))
    )
    space: dict[str, BaseDistribution] = {choice.name: IntDistribution(0, 3) for choice in problem.space.choices}
    theirs = []
    for _ in range(32):
        asked = study.ask(space)
        theirs.append(tuple(asked.params[choice.name] for choice in problem.space.choices))
        study.tell(asked, 0.0)
    same = [mine.genome == point for mine, point in zip(told[1:], theirs[1:], strict=False)]
    assert sum(same) >= 28, "all but those that were taken and moved to a neighbour"


@pytest.mark.long
def test_a_gaussian_process_keeps_the_laws() -> None:
    check_searcher(OptunaSampler("GPSampler", {"n_startup_trials": 4}), trials=7)


def test_names_that_do_not_exist_are_refused() -> None:
    with pytest.raises(UserError, match=r"no optimizer 'SGD'"):
        Nevergrad("SGD")
    with pytest.raises(UserError, match=r"no sampler 'SGD'; use one of .*TPESampler"):
        OptunaSampler("SGD")
    with pytest.raises(UserError, match=r"cannot be made with {'depth': 3}"):
        OptunaSampler("TPESampler", {"depth": 3}).start(table_problem(), 0)
    with pytest.raises(UserError, match=r"budget=0"):
        Nevergrad(budget=0)


def test_a_sampler_of_one_objective_says_so_before_anything_is_spent() -> None:
    problem = table_problem()
    with pytest.raises(UserError, match=r"sampler CmaEsSampler cannot (search|be made)"):
        OptunaSampler("CmaEsSampler").start(problem, 0)


def alone(problem: Problem) -> Problem:
    """Unlimited, one objective: nothing is repaired."""
    return Problem(problem.space, problem.objectives[:1])


def test_nevergrad_proposes_what_the_optimizer_itself_asks_and_is_told() -> None:
    problem = alone(table_problem(genes=6, options=4))
    told = drive(Nevergrad("CMA", budget=40), problem, toy_score, 40)
    variables = nevergrad.p.Array(shape=(6,))
    variables.random_state.seed(derive_seed(0, "nevergrad"))
    optimizer = nevergrad.optimizers.registry["CMA"](variables, budget=40)
    first = told[0]
    assert first.genome == (0,) * 6
    worst = first.score.values["fd"]
    optimizer.tell(variables.spawn_child(new_value=ndtri(np.full(6, 0.5 / 4))), 1.0)
    seen = {first.genome}
    for trial in told[1:]:
        if trial.origin.get("operator") == "neighbour":
            break
        genome, draws = first.genome, -1
        while genome in seen:
            candidate = optimizer.ask()
            genome, draws = tuple(int(4 * norm.cdf(x)) for x in candidate.value), draws + 1
        assert (trial.genome, trial.origin["draw"]) == (genome, draws)
        optimizer.tell(candidate, trial.score.values["fd"] / worst)
        seen.add(genome)
    assert len(seen) > 20


def test_a_trial_that_finishes_out_of_turn_is_told_as_a_point_not_asked_for() -> None:
    problem = table_problem()
    search = Nevergrad("PSO").start(problem, 1)
    first = search.ask([])
    assert isinstance(first, Proposal)
    search.tell(closed(problem, 0, first, toy_score(first.genome)))
    asked: list[Proposal] = []
    for _ in range(2):
        proposal = search.ask([p.genome for p in asked])
        assert isinstance(proposal, Proposal)
        asked.append(proposal)
    assert len({first.genome, *(p.genome for p in asked)}) == 3
    for number, proposal in enumerate(reversed(asked), 1):
        search.tell(closed(problem, number, proposal, toy_score(proposal.genome)))
    # The last one was drawn by the optimiser as it was when it is told, the first never, and the other by one that no longer is.
    assert search._optimizer.num_tell_not_asked == 2


@pytest.mark.parametrize("order", [0, 1, 5, 9])
def test_differential_evolution_is_replayed_with_results_out_of_turn(order: int) -> None:
    """Of several individuals that are on no front nevergrad replaces whichever a set of random names lists first."""
    problem, rng = table_problem(), np.random.default_rng(order)
    search = Nevergrad("DE").start(problem, 3)
    pending: list[Proposal] = []
    told: list[Trial] = []
    for number in range(40):
        while len(pending) < 3:
            asked = search.ask([p.genome for p in pending])
            assert isinstance(asked, Proposal)
            pending.append(asked)
        done = pending.pop(int(rng.integers(3)))
        told.append(closed(problem, number, done, toy_score(done.genome)))
        search.tell(told[-1])
        if number > 26:
            again = Nevergrad("DE").start(problem, 3)
            for trial in told:
                again.tell(trial)
            waiting = [p.genome for p in pending]
            assert again.ask(waiting) == search.ask(waiting)


def test_scores_are_measured_by_the_cheapest_whoever_is_told_first() -> None:
    """An enqueued schedule, or a worker that is faster, else puts all that are worse beyond the bound of the front."""
    problem = table_problem(genes=6, options=4)
    good, cheapest = Proposal((2, 1, 1, 1, 1, 1)), Proposal((0,) * 6)
    found = []
    for order in ((good, cheapest), (cheapest, good)):
        search = Nevergrad("CMA").start(problem, 0)
        for number, proposal in enumerate(order):
            search.tell(closed(problem, number, proposal, toy_score(proposal.genome)))
        assert search._scale is not None
        found.append(search._scale.tolist())
        assert search._optimizer.num_tell_not_asked == 2
    assert (
        found == [[toy_score(cheapest.genome).values["fd"], pytest.approx(problem.limits["macs_share"] * 6 * 16)]] * 2
    )


@pytest.mark.parametrize("objectives", [("fd", "params"), ("fd", "macs"), ("fd", "latency_ms")])
def test_a_cost_is_measured_by_its_limit_or_by_the_dearest(objectives: tuple[str, str]) -> None:
    """By the cheapest all others would lie beyond the front's bound, and their scores would be nothing to learn from."""
    problem = Problem(table_problem(genes=6, options=4).space, objectives, {})
    search = Nevergrad("CMA").start(problem, 0)
    least, most = (problem.space.cost(genome) for genome in ((0,) * 6, (3,) * 6))
    score = replace(toy_score((0,) * 6), values={"fd": 2.0, "latency_ms": 5.0})
    search.tell(closed(problem, 0, Proposal((0,) * 6), score))
    expected = {"latency_ms": 5.0 * most["macs"] / least["macs"]}.get(objectives[1], most.get(objectives[1]))
    assert search._scale is not None
    assert search._scale[1] == pytest.approx(expected)


def test_samplers_learn_and_keep_their_notes() -> None:
    problem = alone(table_problem(genes=10, options=4))
    best = {
        name: min(t.score.values["fd"] for t in drive(OptunaSampler(name), problem, toy_score, 60))
        for name in ("TPESampler", "RandomSampler")
    }
    assert best["TPESampler"] < best["RandomSampler"]
    told = drive(OptunaSampler("NSGAIISampler", {"population_size": 5}), problem, toy_score, 16)
    generations = [trial.origin["attributes"]["NSGAIISampler:generation"] for trial in told]
    assert generations == [0] * 5 + [1] * 5 + [2] * 5 + [3]


def test_a_sampler_sees_finished_and_pending_trials_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    class Watching(optuna.samplers.RandomSampler):
        def infer_relative_search_space(self, study: Any, trial: Any) -> Any:
            seen.append([t.state.name for t in study.get_trials(deepcopy=False)[:-1]])
            return super().infer_relative_search_space(study, trial)

    monkeypatch.setattr(optuna.samplers, "Watching", Watching, raising=False)
    problem = table_problem()
    search = OptunaSampler("Watching").start(problem, 0)
    for number in range(3):
        proposal = search.ask([])
        assert isinstance(proposal, Proposal)
        search.tell(closed(problem, number, proposal, None if number == 1 else toy_score(proposal.genome), "fails"))
    search.ask([(0,) * 5, (1,) * 5])
    assert seen[-1] == ["COMPLETE"] * 2 + ["RUNNING"] * 2


def test_an_optimizer_that_cannot_be_copied_is_refused_before_anything_is_scored() -> None:
    """Those of scipy run in a thread of their own."""
    for name in ("Cobyla", "NGO"):  # which takes it
        with pytest.raises(UserError, match=f"optimizer '{name}' cannot be copied, which a search that resumes needs"):
            Nevergrad(name).start(Problem(ToySpace(4), ("fd",)), 0)


def test_one_that_has_drawn_all_that_it_planned_goes_on_with_neighbours() -> None:
    problem = Problem(ToySpace(4), ("fd",))
    search, seen = Nevergrad("LHSSearch", budget=3).start(problem, 0), []
    for number in range(12):
        proposal = search.ask(())
        assert isinstance(proposal, Proposal)
        seen.append(proposal)
        score = Score({"fd": float(sum(proposal.genome))})
        search.tell(Trial(number, proposal.genome, "", 1, "complete", score, {}, {}, proposal.origin))
    assert len({proposal.genome for proposal in seen}) == 12
    assert seen[-1].origin == {"operator": "neighbour"}
