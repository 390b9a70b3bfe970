from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from nas.contracts import DONE, WAIT, Genome, Problem, Proposal, Score, Trial, UserError
from nas.genomes.genetics import feasible_genomes, most_within, uniform_genomes
from nas.genomes.pareto import hypervolume
from nas.searchers.ddsm import DDSM
from nas.searchers.evolution import Evolution
from nas.searchers.knapsack import Knapsack
from nas.searchers.random import Random
from nas.searchers.uniform import Uniform
from nas.testing import TableSpace, check_searcher, closed, joint_problem, table_problem, toy_score
from tests.test_genetics import Flat

REGISTERED = {point.name: point for point in entry_points(group="nas.searchers")}


@pytest.mark.parametrize("name", sorted(REGISTERED))
def test_registered_searchers_keep_the_laws(name: str) -> None:
    check_searcher(
        REGISTERED[name].load()(), 20 if name == "routing" else 40
    )  # whose policy learns anew in each replay


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


@pytest.mark.parametrize("name", REGISTERED)
def test_searchers_keep_limits_that_the_fastest_schedule_breaks(name: str) -> None:
    """As on a device on which all options take about as long."""
    problem = Problem(Flat(5), ("fd", "macs"), {"latency_ms": 0.0022, "macs_share": 0.2})
    told = drive(REGISTERED[name].load()(), problem, toy_score, 60)
    kept = [trial for trial in told if all(over <= 0 for over in trial.violations.values())]
    assert all("probe" in trial.origin for trial in told if trial not in kept)
    assert len(kept) >= 2


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


def drive(searcher: Any, problem: Any, score: Any, trials: int) -> list[Any]:
    search = searcher.start(problem, 0)
    told = []
    for number in range(trials):
        proposal = search.ask([])
        if not isinstance(proposal, Proposal):
            break
        told.append(closed(problem, number, proposal, score(proposal.genome)))
        search.tell(told[-1])
    return told


def scored(value: float) -> Score:
    return Score({"fd": value}, {"fd": tuple(value + 0.01 * i for i in range(20))})


@pytest.mark.parametrize(
    "searcher",
    [
        Knapsack(objective="minimax"),
        Knapsack(objective="pairwise"),
        Knapsack(around="full", budgets=3, top=1),
        Knapsack(around="smallest"),
        Knapsack(probes=5),
        Knapsack(options=2),
    ],
    ids=repr,
)
def test_every_kind_of_knapsack_keeps_the_laws(searcher: Knapsack) -> None:
    check_searcher(searcher)


@pytest.mark.parametrize("around", ["full", "smallest", "both"])
def test_the_knapsack_finds_the_optimum_of_an_additive_score_at_every_budget(around: Any) -> None:
    problem = table_problem(genes=6, options=4, limit=0.7)
    told = drive(Knapsack(around=around, budgets=6, top=1), problem, toy_score, 19 * (1 + (around == "both")) + 6)
    every = list(feasible_genomes(problem))
    solved = [trial for trial in told if "predicted" in trial.origin]
    assert len(solved) >= 5
    for trial in solved:
        within = [toy_score(g).values["fd"] for g in every if problem.space.cost(g)["macs"] <= trial.origin["budget"]]
        assert trial.score.values["fd"] == pytest.approx(min(within))
        assert trial.origin["predicted"] == pytest.approx(min(within))


def test_probes_are_ordinary_trials_and_say_so() -> None:
    problem = table_problem(genes=4, options=3, limit=0.5)
    told = drive(Knapsack(), problem, toy_score, 18)
    probes = [trial for trial in told if "probe" in trial.origin]
    assert len(probes) == 2 + 2 * 4 * 2
    assert any(not problem.feasible(trial.genome) for trial in probes)
    assert len(drive(Knapsack(probes=7), problem, toy_score, 7)) == 7


def test_neighbours_that_interact_are_solved_in_pairs_alone() -> None:
    """Lowering two neighbours together costs far more than each alone: the sum is misled."""
    problem = table_problem(genes=4, options=2, limit=0.7)

    def score(genome: Any) -> Score:
        single = sum(price * (1 - gene) for price, gene in zip((0.1, 0.1, 0.2, 0.4), genome, strict=True))
        both = sum(5.0 for a, b in pairwise(genome) if a == b == 0)
        return scored(single + both)

    def first_solution(objective: Any) -> Any:
        searcher = Knapsack(objective=objective, around="full", budgets=1, top=1)
        return next(t for t in drive(searcher, problem, score, 40) if "predicted" in t.origin)

    paired, summed = first_solution("pairwise"), first_solution("sum")
    assert paired.score.values["fd"] == pytest.approx(0.3) == paired.origin["predicted"]
    assert summed.score.values["fd"] == pytest.approx(5.2)
    assert summed.origin["predicted"] == pytest.approx(0.2)


def two_choices_for_each_of_three_intervals() -> Problem:
    """4 x 5 = 20 options."""
    options = tuple(tuple(first + second for second in range(2, 12, 2)) for first in range(1, 5))
    return Problem(TableSpace((options,) * 3), ("fd", "macs"), {"macs_share": 0.7})


def test_intervals_of_many_options_are_screened_gene_by_gene() -> None:
    problem = two_choices_for_each_of_three_intervals()

    def score(genome: Any) -> Score:
        return scored(sum((i + 1) / (gene + 1) for i, gene in enumerate(genome)))

    told = drive(Knapsack(around="full", options=8, budgets=4, top=1), problem, score, 60)
    kinds = [trial.origin.get("probe", "") for trial in told]
    assert sum("one gene" in kind for kind in kinds) == 3 * (3 + 4)
    assert sum(kind.startswith("full, interval") for kind in kinds) <= 3 * 10
    solved = [trial for trial in told if "predicted" in trial.origin]
    every = list(feasible_genomes(problem))
    for trial in solved[:4]:
        within = [score(g).values["fd"] for g in every if problem.space.cost(g)["macs"] <= trial.origin["budget"]]
        assert trial.score.values["fd"] <= min(within) * 1.15


@pytest.mark.parametrize("wide", [False, True])
def test_few_probes_are_spread_over_all_intervals(wide: bool) -> None:
    """In every stage: what is known of the first intervals alone says nothing of a trajectory."""
    row: Any = tuple(tuple((i + 1) * (j + 1) for j in range(4)) for i in range(4)) if wide else (1, 4, 9, 16)
    problem = Problem(TableSpace((row,) * 40), ("fd", "macs"), {"macs_share": 0.5})
    told = drive(Knapsack(probes=60, options=6), problem, toy_score, 90)
    kinds = [trial.origin.get("probe", "") for trial in told]
    assert sum(map(bool, kinds)) == 60
    for stage in ("one gene of interval ", "full, interval ") if wide else ("full, interval ", "smallest, interval "):
        places = [int(kind.rpartition(" ")[2]) for kind in kinds if stage in kind]
        assert min(places) <= 4
        assert max(places) >= 35 if stage != "full, interval " or not wide else max(places) > min(places)
    assert any("predicted" in trial.origin for trial in told)


def test_an_exact_solver_keeps_to_limits_that_do_not_add_up() -> None:
    """Its budgets end where schedules do that keep to all limits: beyond there is nothing but chance."""
    problem = replace(table_problem(8, 4, 1.0), limits={"params": 3.0})
    told = drive(Knapsack(around="smallest", budgets=4), problem, toy_score, 60)
    solved = [trial for trial in told if "budget" in trial.origin]
    assert len(solved) >= 4
    most = most_within(problem)
    assert most == 8 * 9  # the third option everywhere, one kind of three parameters
    # Of two genes the dearest that keeps to it need not be of the same option of both.
    joint = replace(joint_problem(1.0), limits={"params": 4.0})
    assert most_within(joint) == max(joint.space.cost(genome)["macs"] for genome in feasible_genomes(joint)) == 96
    assert all(trial.origin["budget"] <= most for trial in solved)


@dataclass(frozen=True)
class GivesUp:
    """Breaks the law of failures: it is done after the first one."""

    def start(self, problem: Any, seed: int) -> Any:
        inner = Random().start(problem, seed)
        failed: list[Any] = []

        class Search:
            def ask(self, pending: Any) -> Any:
                return DONE if failed else inner.ask(pending)

            def tell(self, trial: Any) -> None:
                inner.tell(trial)
                failed.extend([trial] if trial.status == "failed" else [])

        return Search()


@dataclass(frozen=True)
class Forgets:
    """Breaks the law of replay with something pending: how often it was asked counts, though nobody books that."""

    def start(self, problem: Any, seed: int) -> Any:
        asked: list[int] = []
        heard: list[Any] = []

        class Search:
            def ask(self, pending: Any) -> Any:
                asked.append(0)
                number = len(asked) if pending else 0
                return Random().start(problem, seed + number).ask([*pending, *heard])

            def tell(self, trial: Any) -> None:
                heard.append(trial.genome)

        return Search()


@pytest.mark.parametrize(("searcher", "law"), [(GivesUp(), "go on after failures"), (Forgets(), "must ask the same")])
def test_the_laws_catch_what_only_a_cluster_or_a_bad_day_would_show(searcher: Any, law: str) -> None:
    with pytest.raises(AssertionError, match=law):
        check_searcher(searcher)


@pytest.mark.parametrize("searcher", [DDSM(population=5, mutation="intended"), DDSM(population=3)], ids=repr)
def test_every_kind_of_ddsm_keeps_the_laws(searcher: DDSM) -> None:
    check_searcher(searcher)


def test_ddsm_proceeds_in_generations_of_the_published_operators() -> None:
    problem = table_problem(genes=8, options=4, limit=1.0)
    told = drive(DDSM(population=20), problem, toy_score, 60)
    assert [trial.origin["generation"] for trial in told] == [0] * 20 + [1] * 20 + [2] * 20
    assert {trial.genome for trial in told[:4]} == {(i,) * 8 for i in range(4)}

    def value(trial: Any) -> float:
        return float(trial.score.values["fd"] + 1.6 * trial.cost["macs_share"])

    parents = [trial.genome for trial in sorted(told[:20], key=value)]
    for child in told[20:40]:  # mutation as released changes next to nothing, so children are two pieces of parents
        assert any(
            child.genome in (a[:cut] + b[cut:], b[:cut] + a[cut:]) for a in parents for b in parents for cut in range(8)
        )


def test_ddsm_waits_for_a_generation() -> None:
    problem = table_problem(genes=5, options=4, limit=1.0)
    search = DDSM(population=6).start(problem, 0)
    pending: list[Proposal] = []
    for _ in range(6):
        proposal = search.ask([p.genome for p in pending])
        assert isinstance(proposal, Proposal)
        pending.append(proposal)
    assert search.ask([p.genome for p in pending]) is WAIT
    for number, asked in enumerate(pending):
        search.tell(closed(problem, number, asked, toy_score(asked.genome)))
    assert isinstance(search.ask([]), Proposal)


def test_wrong_settings_of_ddsm_are_refused() -> None:
    with pytest.raises(UserError, match="population=1"):
        DDSM(population=1)
    with pytest.raises(UserError, match="'none'"):
        DDSM(mutation="none")  # type: ignore[arg-type]


def test_screening_needs_the_full_net_whatever_is_probed_later() -> None:
    problem = two_choices_for_each_of_three_intervals()

    def score(genome: Any) -> Score:
        return scored(100.0 + sum((i + 1) / (gene + 1) for i, gene in enumerate(genome)))

    probed = {}
    for around in ("full", "smallest"):
        told = drive(Knapsack(around=around, options=8), problem, score, 60)
        kind = f"{around}, interval 0"
        probed[around] = {t.genome[:2] for t in told if t.origin.get("probe") == kind}
    ends = {(0, 0), *((i, 4) for i in range(4)), *((3, i) for i in range(5))}  # probed for other reasons too
    assert probed["full"] - ends == probed["smallest"] - ends != set()


def test_a_knapsack_without_probes_is_refused() -> None:
    with pytest.raises(UserError, match="probes=0"):
        Knapsack(probes=0)


def test_a_population_of_one_is_refused() -> None:
    with pytest.raises(UserError, match="population=1"):
        Evolution(population=1)


def told(problem: Problem, number: int, genome: Genome, fd: float) -> Trial:
    return Trial(
        number, genome, str(genome), 64, "pruned", Score({"fd": fd}), problem.space.cost(genome), {"macs_share": -1.0}
    )


def test_the_better_parent_wins_the_tournament() -> None:
    """Of the survivors, all on one front or behind it, those ahead have more children than those behind."""
    problem = table_problem(genes=8, limit=1.0)
    places = []
    for seed in range(120):
        search = Evolution(population=10, screened=1, uniform=False).start(problem, seed)
        for number in range(10):  # one cost, so that the rank is the number
            genome = (
                tuple(np.roll((3, 2, 1, 0, 0, 0, 0, 0), number % 8).tolist())
                if number < 8
                else (0, 0, 0, 0, 3, number - 8, 2, 1)
            )
            search.tell(told(problem, number, genome, float(number)))
        order = [trial.number for trial in search._survivors]
        proposal = search.ask([])
        assert isinstance(proposal, Proposal)
        places += [order.index(parent) for parent in proposal.origin["parents"]]
    # Drawn evenly, the mean place of ten is 4.5; the better of two has 2.85, the worse 6.15. 240 draws: standard error 0.16.
    assert np.mean(places) < 3.6


def test_ddsm_weighs_macs_and_keeps_the_best_of_all_generations() -> None:
    problem = table_problem(genes=6, limit=1.0)
    search = DDSM(population=8, macs_weight=2.0).start(problem, 0)
    first = list(search._generation)
    for number, genome in enumerate(first):  # all alike but for their MACs
        search.tell(told(problem, number, genome, 1.0))
    shares = [problem.space.cost(genome)["macs_share"] for _, genome in search._survivors]
    assert shares == sorted(shares)
    assert search._survivors[0][0] == pytest.approx(1.0 + 2.0 * shares[0])
    best = search._survivors[:3]
    for number, genome in enumerate(list(search._generation), len(first)):
        search.tell(told(problem, number, genome, 50.0))
    assert search._survivors[:3] == best, "children that are worse drive out nobody"
