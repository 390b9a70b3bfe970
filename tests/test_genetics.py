from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nas.contracts import DONE, Genome, Price, Problem, Proposal, Trial, UserError, frozen
from nas.genomes.genetics import (
    anchor,
    check_reachable,
    cross,
    dearest,
    feasible_genomes,
    mutate,
    novel,
    random_genome,
    repair,
    uniform_genomes,
)
from nas.genomes.timed import TimedSpace, calls, key
from nas.searchers.enumerate import Enumerate
from nas.testing import TableSpace, limited_problem, table_problem, timed_limited_problem
from tests.toy import ToySpace


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Any cost tables, of one or two choices for each interval, with any reachable budget."""
    tables = []
    for _ in range(draw(st.integers(1, 4))):
        shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=2))
        tables.append(draw(arrays(np.int64, tuple(shape), elements=st.integers(1, 50))))
    least, most = (sum(int(end(table)) for table in tables) for end in (np.min, np.max))
    space = TableSpace(tuple(frozen(table.tolist()) for table in tables))
    return Problem(space, ("fd", "macs"), {"macs": draw(st.integers(least, most))})


@given(problems())
def test_enumeration_equals_brute_force(problem: Problem) -> None:
    sizes = [range(len(choice.options)) for choice in problem.space.choices]
    expected = {genome for genome in itertools.product(*sizes) if problem.feasible(genome)}
    found = list(feasible_genomes(problem))
    assert len(found) == len(set(found))
    assert set(found) == expected


@given(problems(), st.integers(0, 2**32 - 1))
def test_repaired_genomes_keep_the_budget_and_feasible_ones_stay(problem: Problem, seed: int) -> None:
    rng = np.random.default_rng(seed)
    genome = tuple(int(rng.integers(len(choice.options))) for choice in problem.space.choices)
    repaired = repair(problem, genome, rng)
    assert problem.feasible(repaired)
    if problem.feasible(genome):
        assert repaired == genome
    assert problem.feasible(random_genome(problem, rng))


@dataclass(frozen=True)
class Flat(ToySpace):
    """All options take about as long, as on a device that waits for its calls: the fastest is not the one of the fewest multiply-adds."""

    times: ClassVar[tuple[int, ...]] = (410, 400, 420, 430)

    def cost(self, genome: Genome) -> dict[str, float]:
        return {**super().cost(genome), "latency_ms": sum(self.times[gene] for gene in genome) / 1e6}

    def interval_costs(self, price: Price | None = None) -> tuple[np.ndarray, ...]:
        return (np.array(self.times),) * self.genes


def test_limits_that_the_fastest_schedule_breaks_may_be_kept_by_others() -> None:
    problem = Problem(Flat(5), ("fd", "macs"), {"latency_ms": 0.0022, "macs_share": 0.2})
    assert not problem.feasible((1,) * 5)
    check_reachable(problem)
    rng = np.random.default_rng(0)
    for _ in range(100):
        genome = random_genome(problem, rng)
        assert problem.feasible(genome)
        assert repair(problem, genome, rng) == genome
    assert len([*feasible_genomes(problem)]) > 10
    narrow = replace(problem, limits={"latency_ms": 0.0022, "params": 1})
    check_reachable(narrow)
    assert narrow.feasible(anchor(narrow))
    # Within this time a part of the intervals may run the slower network of fewer multiply-adds, and no network will do throughout.
    mixed = Problem(Flat(18), ("fd", "macs"), {"latency_ms": 0.0073, "macs_share": 0.18})
    assert not any(map(mixed.feasible, uniform_genomes(mixed.space)))
    check_reachable(mixed)
    assert problem.feasible(anchor(problem))
    assert mixed.feasible(anchor(mixed))
    for limits, words in (
        (
            {"latency_ms": 0.0022, "macs_share": 0.05},
            r"no schedule was found that keeps latency_ms<=0\.0022, macs_share<=0\.05",
        ),
        (
            {"macs_share": 0.2, "latency_ms": 0.0019},
            r"limit latency_ms=0\.0019 cannot be met: the cheapest schedule, 1 everywhere",
        ),
    ):
        with pytest.raises(UserError, match=words):
            check_reachable(replace(problem, limits=limits))


@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_mutation_changes_genes_within_their_options(seed: int, rate: float) -> None:
    space = TableSpace(((1, 2), (1,), (1, 2, 3)))
    child = mutate(space, (0, 0, 1), np.random.default_rng(seed), rate)
    assert child != (0, 0, 1)
    space.decode(child)


def test_mutation_rate_is_per_gene() -> None:
    problem = table_problem(genes=1000)
    changed = np.array(mutate(problem.space, (0,) * 1000, np.random.default_rng(0), 0.05)) != 0
    assert 30 <= changed.sum() <= 70


def test_crossover_takes_each_gene_from_a_parent_at_its_place() -> None:
    rng = np.random.default_rng(0)
    children = [cross((0,) * 8, (1,) * 8, rng) for _ in range(50)]
    assert {sum(child) for child in children} >= set(range(1, 8))


def test_uniform_genomes_run_from_cheapest_to_dearest() -> None:
    assert uniform_genomes(TableSpace(((1, 4, 9), (1, 4)))) == [(0, 0), (1, 1), (2, 1)]


def test_a_new_genome_is_found_in_bounded_time_when_one_is_left() -> None:
    problem = Problem(TableSpace(((1, 2),) * 200), ("macs",), {"macs": 201})
    every = list(feasible_genomes(problem))
    assert len(every) == 201
    rng = np.random.default_rng(0)
    left = every[137]
    started = time.monotonic()
    taken = set(every) - {left}
    assert novel(problem, lambda: random_genome(problem, rng), taken.__contains__) == left
    assert novel(problem, lambda: random_genome(problem, rng), set(every).__contains__) is None
    assert time.monotonic() - started < 5


def test_a_limit_that_does_not_add_up_ends_the_search_for_a_new_genome_too() -> None:
    """One of 4^20 genomes keeps to it, and it is taken."""
    problem = Problem(ToySpace(20), ("macs",), {"params": 1})
    only = (0,) * 20
    assert next(feasible_genomes(problem)) == only
    assert novel(problem, lambda: only, {only}.__contains__) is None


def test_an_enumeration_ends_where_such_a_limit_leaves_nothing_more() -> None:
    search, only = Enumerate().start(Problem(ToySpace(20), ("macs",), {"params": 1}), 0), (0,) * 20
    assert search.ask(()) == Proposal(only)
    search.tell(Trial(0, only, "", 1, "complete"))
    assert search.ask(()) is DONE


def test_an_unreachable_budget_names_the_cheapest() -> None:
    with pytest.raises(UserError, match=r"macs=3 cannot be met: the cheapest schedule, 0 everywhere, costs macs=4"):
        check_reachable(Problem(TableSpace(((1, 5),) * 4), ("macs",), {"macs": 3}))
    with pytest.raises(UserError, match="'watts' is not one that a search can keep to"):
        check_reachable(Problem(TableSpace(((1, 5),) * 4), ("macs",), {"watts": 3}))
    check_reachable(Problem(TableSpace(((1, 5),) * 4), ("macs",), {"macs": math.inf}))


@pytest.mark.parametrize("problem", [limited_problem(), timed_limited_problem()], ids=["parameters", "time and work"])
def test_all_limits_are_kept_at_once(problem: Problem) -> None:
    rng = np.random.default_rng(0)
    every = set(feasible_genomes(problem))
    sizes = [len(choice.options) for choice in problem.space.choices]
    assert every == {g for g in itertools.product(*map(range, sizes)) if problem.feasible(g)}
    assert len(every) < len(set(feasible_genomes(replace(problem, limits=dict([next(iter(problem.limits.items()))])))))
    for _ in range(300):
        drawn = tuple(int(rng.integers(size)) for size in sizes)
        repaired = repair(problem, drawn, rng)
        assert repaired in every
        assert repaired == drawn or drawn not in every


def test_what_counts_once_is_saved_kind_by_kind() -> None:
    """Of twenty intervals and four options, room for two kinds: what is drawn is not the cheapest throughout with a gene or two beside."""
    space = TableSpace(((1, 4, 9, 16),) * 20)
    problem = Problem(space, ("fd", "macs"), {"params": 5.0})
    rng = np.random.default_rng(0)
    drawn = [random_genome(problem, rng) for _ in range(100)]
    assert all(map(problem.feasible, drawn))
    assert np.mean([sum(gene > 0 for gene in genome) for genome in drawn]) > 4


def test_the_full_network_is_of_the_most_multiply_adds_whatever_is_slowest() -> None:
    """Where calls wait for a GPU a narrow one may be the slowest."""
    space = TableSpace(((1, 4, 9, 16),) * 3)
    times = {key(step): (0.43, 0.4, 0.42, 0.41)[step.arch[0]] for step in calls(space)}
    assert dearest(TimedSpace(space, times)) == dearest(space) == (3, 3, 3)


def test_a_limit_that_the_space_does_not_know_is_refused() -> None:
    with pytest.raises(UserError, match="'macs_share_without_attention' is no cost of this space; it has macs"):
        check_reachable(Problem(TableSpace(((1, 5),) * 4), ("macs",), {"macs_share_without_attention": 0.5}))


def test_genes_of_two_options_move_too() -> None:
    space = TableSpace((frozen([1, 2]), frozen([1]), frozen([1, 2])))
    rng = np.random.default_rng(0)
    children = [mutate(space, (0, 0, 1), rng, rate=0.0) for _ in range(40)]
    assert {(1, 0, 1), (0, 0, 0)} == set(children)


@given(st.integers(0, 2**32 - 1))
def test_repair_stops_as_soon_as_the_budget_holds(seed: int) -> None:
    """Every move saves 100 of 200 or more and 5 are too many, so one gene changes."""
    space = TableSpace((frozen([100, 200, 400]),) * 6)
    rng = np.random.default_rng(seed)
    genome = tuple(rng.permutation([1, 1, 1, 1, 0, 2]).tolist())
    problem = Problem(space, ("fd", "macs"), {"macs": 4 * 200 + 100 + 400 - 5})
    repaired = repair(problem, genome, rng)
    assert sum(before != after for before, after in zip(genome, repaired, strict=True)) == 1


def test_repair_lowers_several_genes_of_an_interval_together_where_no_single_one_saves_enough() -> None:
    space = TableSpace((frozen([[10, 30], [30, 30]]), frozen([5, 6])))
    problem = Problem(space, ("fd", "macs"), {"macs": 16})
    for seed in range(20):
        assert problem.feasible(repair(problem, (1, 1, 1), np.random.default_rng(seed)))


def test_a_mutated_gene_moves_by_a_third_of_its_options_in_the_mean() -> None:
    """From the cheapest of 300 options it can only rise: by a geometric step of mean 100, cut at 299."""
    space = TableSpace((frozen(list(range(1, 301))),))
    rng = np.random.default_rng(0)
    steps = [mutate(space, (0,), rng, rate=1.0)[0] for _ in range(4000)]
    expected = sum((1 - 1 / 100) ** k for k in range(299))
    assert np.mean(steps) == pytest.approx(expected, abs=4 * float(np.std(steps)) / math.sqrt(len(steps)))


@given(st.integers(0, 2**32 - 1))
def test_a_budget_that_is_met_exactly_is_met(seed: int) -> None:
    space = TableSpace((frozen([100, 200]),) * 6)
    problem = Problem(space, ("fd", "macs"), {"macs": 6 * 200 - 100})
    assert sum(repair(problem, (1,) * 6, np.random.default_rng(seed))) == 5
