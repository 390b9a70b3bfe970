from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

import pytest

from nas.contracts import Proposal, UserError
from nas.genetics import uniform_genomes
from nas.pareto import hypervolume
from nas.searchers.evolution import Evolution
from nas.searchers.random import Random
from nas.searchers.uniform import Uniform
from nas.testing import check_searcher, closed, table_problem, toy_score

REGISTERED = {point.name: point for point in entry_points(group="nas.searchers")}


@pytest.mark.parametrize("name", sorted(REGISTERED))
def test_registered_searchers_keep_the_laws(name: str) -> None:
    check_searcher(REGISTERED[name].load()())


@pytest.mark.parametrize("searcher", [Evolution(population=4, mutation_rate=0.5), Evolution(population=30)])
def test_settings_do_not_break_the_laws(searcher: Evolution) -> None:
    check_searcher(searcher)


@dataclass(frozen=True)
class Stuck:
    """Breaks the law of novelty: always the same proposal."""

    def start(self, problem: Any, seed: int) -> Stuck:
        return self

    def ask(self, pending: Any) -> Proposal:
        return Proposal((0,) * 5)

    def tell(self, trial: Any) -> None: ...


def test_the_laws_catch_a_searcher_that_breaks_them() -> None:
    with pytest.raises(AssertionError, match="proposed before"):
        check_searcher(Stuck())


def test_evolution_starts_from_the_feasible_uniform_schedules() -> None:
    problem = table_problem(limit=0.3)
    search = Evolution(population=10).start(problem, 0)
    asked = []
    for number in range(4):
        proposal = search.ask([])
        assert isinstance(proposal, Proposal)
        asked.append(proposal.genome)
        search.tell(closed(problem, number, proposal, toy_score(proposal.genome)))
    feasible = [genome for genome in uniform_genomes(problem.space) if problem.feasible(genome)]
    assert asked[: len(feasible)] == feasible
    assert len(feasible) == 2


def run_to(searcher: Any, seed: int, trials: int) -> float:
    problem = table_problem(genes=10, options=4, limit=0.6)
    search = searcher.start(problem, seed)
    points = []
    for number in range(trials):
        proposal = search.ask([])
        trial = closed(problem, number, proposal, toy_score(proposal.genome))
        points.append(trial.objectives(("fd", "macs")))
        search.tell(trial)
    return hypervolume(points, (60.0, 160.0))


def test_evolution_beats_random_search() -> None:
    wins = [run_to(Evolution(), seed, 150) > run_to(Random(), seed, 150) for seed in range(5)]
    assert all(wins)


def test_uniform_proposes_the_full_net_first_without_limits() -> None:
    problem = table_problem(limit=1.0)
    proposal = Uniform().start(problem, 0).ask([])
    assert isinstance(proposal, Proposal)
    assert proposal.genome == (3,) * 5


def test_a_population_of_one_is_refused() -> None:
    with pytest.raises(UserError, match="population 1"):
        Evolution(population=1)
