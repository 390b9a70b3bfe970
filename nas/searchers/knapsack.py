"""Exact search on an additive model: probe each interval alone, then solve the multiple-choice knapsack for every budget.

A schedule's score is modelled as the full net's plus one term for each interval. Probes change one interval of the full net, or
raise one interval of the cheapest net; a least-squares fit makes the table of terms from all that was measured, so that the
schedules it leads to correct it. What is solved is proposed like any other schedule: only real scores count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise, product
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from nas.contracts import DONE, WAIT, Genome, Problem, Proposal, Signal, Trial, derive_seed
from nas.genomes.allocation import allocate
from nas.genomes.genetics import IntervalCosts, Taken, most_within, novel_random
from nas.genomes.pareto import front
from nas.recipes import Few, recipe

Option = tuple[int, ...]
"""What one interval runs: an option index for each of its genes."""

MOST = 64
"""Solutions for each budget after which the search goes on at random."""


@recipe
class Knapsack:
    """`objective`: least "sum" of the intervals' terms, least largest term ("minimax"), or the sum with terms for neighbouring
    intervals, which are probed in pairs ("pairwise"). `around`: which net is probed, "full", "smallest" or "both".
    `budgets`: how many, equally spaced up to the limit (where several costs are limited, up to about the dearest that keeps to all). `top`: solutions for each budget before the table is trusted further.
    `probes`: upper limit of their number; of more, every so many. `options`: how many an interval is probed with; where several genes make more, each
    gene is probed alone first, and options from the front of the genes' sums are probed then.

    Around one net there is a probe for each option of each interval but one, around both twice as many; the study's trials
    should be a good many more. Probes of the full net exceed most limits. They are ordinary trials, charged and shown, but cannot win.
    """

    objective: Literal["sum", "minimax", "pairwise"] = "sum"
    around: Literal["full", "smallest", "both"] = "both"
    budgets: Few = 8
    top: Annotated[int, Field(ge=1, le=MOST)] = 3
    probes: Annotated[int, Field(ge=1, le=10**6)] = 256
    options: Annotated[int, Field(ge=2, le=4096)] = 12

    def start(self, problem: Problem, seed: int) -> KnapsackSearch:
        return KnapsackSearch(self, problem, seed)


class KnapsackSearch:
    def __init__(self, settings: Knapsack, problem: Problem, seed: int) -> None:
        self._settings = settings
        self._problem = problem
        self._seed = seed
        self._intervals = _Intervals(problem)
        self._measured: dict[Genome, float] = {}
        self._told: set[Genome] = set()
        self._solved: tuple[int, list[tuple[Genome, float, float]]] | None = None
        self._screened: list[list[Option]] | None = None
        self._most = most_within(problem)

    def ask(self, pending: Sequence[Genome]) -> Proposal | Signal:
        taken = Taken(self._told, pending)
        probes = self._probes()
        for genome, kind in probes:
            if genome not in taken:
                return Proposal(genome, {"probe": kind})
        if any(genome in pending for genome, _ in probes):
            return WAIT
        for genome, predicted, budget in self._solutions():
            if genome not in taken:
                return Proposal(genome, {"predicted": predicted, "budget": budget})
        rng = np.random.default_rng(derive_seed(self._seed, len(taken), "knapsack"))
        drawn = novel_random(self._problem, rng, taken.__contains__)
        return Proposal(drawn, {"operator": "random"}) if drawn is not None else DONE

    def tell(self, trial: Trial) -> None:
        self._told.add(trial.genome)
        value = self._problem.quality(trial)
        if value is not None:
            self._measured[trial.genome] = value

    def _probes(self) -> list[tuple[Genome, str]]:
        """What is to be measured before anything is solved, in order: (genome, what it is a probe of). Of too many in each stage every so many, so that no
        part of the trajectory is left out; genes are screened with half of them at most."""
        around, intervals, most = self._settings.around, self._intervals, self._settings.probes
        wide = intervals.wide(self._settings.options)
        ends: dict[Genome, str] = {intervals.full: "full"} if around != "smallest" or wide else {}
        ends |= {intervals.smallest: "smallest"} if around != "full" else {}
        screening = _evenly(
            {
                intervals.changed(intervals.full, {k: genes}): f"full, one gene of interval {k}"
                for k in wide
                for genes in intervals.single_genes(k)
            },
            max(1, (most - len(ends)) // 2),
        )
        found = dict([*(ends | screening).items()][:most])
        if self._told.issuperset(found):
            # What is screened is settled then, whatever is measured later.
            options = self._options({genome: self._measured[genome] for genome in found if genome in self._measured})
            found |= _evenly(
                {g: kind for g, kind in self._options_probed(options) if g not in found}, most - len(found)
            )
        return list(found.items())

    def _options_probed(self, options: list[list[Option]]) -> Iterator[tuple[Genome, str]]:
        around, intervals = self._settings.around, self._intervals
        for anchor, name in ((intervals.full, "full"), (intervals.smallest, "smallest")):
            if around in (name, "both"):
                for k, row in enumerate(options):
                    for option in row:
                        yield intervals.changed(anchor, {k: option}), f"{name}, interval {k}"
        if self._settings.objective == "pairwise":
            for k, (first, second) in enumerate(pairwise(options)):
                for a, b in product(first, second):
                    yield intervals.changed(intervals.full, {k: a, k + 1: b}), f"full, intervals {k} and {k + 1}"

    def _options(self, measured: Mapping[Genome, float]) -> list[list[Option]]:
        """For each interval, the options that are probed and solved for, by what was `measured` in screening. All of them, where they are few."""
        if self._screened is None:
            self._screened = [*self._screen(measured)]
        return self._screened

    def _screen(self, measured: Mapping[Genome, float]) -> Iterator[list[Option]]:
        intervals, most = self._intervals, self._settings.options
        for k, options in enumerate(intervals.options):
            if len(options) <= most:
                yield options
                continue
            single = {
                genes: measured.get(intervals.changed(intervals.full, {k: genes}), np.inf)
                for genes in intervals.single_genes(k)
            }
            finite = [value for value in single.values() if np.isfinite(value)]
            full = measured.get(intervals.full, float(np.mean(finite)) if finite else 0.0)
            effect = {genes: value - full for genes, value in single.items()}
            top = intervals.option(intervals.full, k)
            sums = [
                sum(effect.get((*top[:i], gene, *top[i + 1 :]), 0.0) for i, gene in enumerate(option))
                for option in options
            ]
            costs = intervals.costs[k]
            best = front([(value, float(cost)) for value, cost in zip(sums, costs, strict=True)])
            kept = {best[i] for i in np.linspace(0, len(best) - 1, min(most, len(best))).round().astype(int)}
            ends = (top, intervals.option(intervals.smallest, k))
            yield [option for i, option in enumerate(options) if i in kept or option in ends]

    def _solutions(self) -> list[tuple[Genome, float, float]]:
        """(genome, predicted score, budget), the best for each budget first, then the second best, and so on."""
        if self._solved is None or self._solved[0] != len(self._told):
            self._solved = len(self._told), list(self._solve())
        return self._solved[1]

    def _solve(self) -> Iterator[tuple[Genome, float, float]]:
        assert self._screened is not None, "all probes are told"
        options = self._screened
        base, table, pairs = self._table(options)
        costs = [[self._intervals.cost(k, option) for option in row] for k, row in enumerate(options)]
        least = sum(min(row) for row in costs)
        most = min(self._most, sum(max(row) for row in costs))
        budgets = [least + (most - least) * i / self._settings.budgets for i in range(1, self._settings.budgets + 1)]
        objective: Literal["sum", "minimax"] = "minimax" if self._settings.objective == "minimax" else "sum"
        top = self._settings.top
        seen: set[Genome] = set()
        while top <= MOST:
            found = allocate(costs, table, budgets, top, objective, pairs)
            for place in range(max(map(len, found))):
                for budget, allocations in zip(budgets, found, strict=True):
                    if place < len(allocations):
                        chosen = dict(
                            enumerate(row[i] for row, i in zip(options, allocations[place].options, strict=True))
                        )
                        genome = self._intervals.changed(self._intervals.full, chosen)
                        if genome not in seen and self._problem.feasible(genome):
                            seen.add(genome)
                            terms = allocations[place].error
                            if objective == "minimax":
                                terms = sum(row[i] for row, i in zip(table, allocations[place].options, strict=True))
                            yield genome, base + terms, budget
            if seen - self._told or objective == "minimax":
                return
            top *= 2

    def _table(
        self, options: list[list[Option]]
    ) -> tuple[float, list[list[float]], list[npt.NDArray[np.float64]] | None]:
        """The full net's score, each interval's terms, and where neighbours count those of their pairs: fitted to all that was
        measured. Infinite for options never seen, 0 for pairs never seen."""
        intervals = self._intervals
        place_of = [{option: place for place, option in enumerate(row)} for row in options]
        tops = [known[intervals.option(intervals.full, k)] for k, known in enumerate(place_of)]
        # A column for each term: the full net's score, then one for each option of each interval, then one for each pair of
        # options of neighbours.
        starts = np.cumsum([1, *(len(row) for row in options)])
        paired = self._settings.objective == "pairwise"
        sizes = [len(first) * len(second) for first, second in pairwise(options)] if paired else []
        pair_starts = np.cumsum([starts[-1], *sizes])
        design, values = [], []
        for genome, value in self._measured.items():
            chosen = [intervals.option(genome, k) for k in range(len(options))]
            if not all(option in known for option, known in zip(chosen, place_of, strict=True)):
                continue
            places = [known[option] for option, known in zip(chosen, place_of, strict=True)]
            line = np.zeros(pair_starts[-1])
            line[0] = 1.0
            for k, place in enumerate(places):
                if place != tops[k]:
                    line[starts[k] + place] = 1.0
            for k in range(len(sizes)):
                if places[k] != tops[k] and places[k + 1] != tops[k + 1]:
                    line[pair_starts[k] + places[k] * len(options[k + 1]) + places[k + 1]] = 1.0
            design.append(line)
            values.append(value)
        if not design:
            return 0.0, [[0.0] * len(row) for row in options], None
        matrix = np.array(design)
        fitted, *_ = np.linalg.lstsq(matrix, np.array(values), rcond=None)
        known = np.asarray(matrix.any(0))
        table = [
            [
                float(fitted[starts[k] + i]) if known[starts[k] + i] else (0.0 if i == tops[k] else np.inf)
                for i in range(len(row))
            ]
            for k, row in enumerate(options)
        ]
        if not paired:
            return float(fitted[0]), table, None
        shapes = [(len(first), len(second)) for first, second in pairwise(options)]
        pairs = [
            fitted[start:stop].reshape(shape)
            for (start, stop), shape in zip(pairwise(pair_starts), shapes, strict=True)
        ]
        return float(fitted[0]), table, pairs


def _evenly(probes: Mapping[Genome, str], most: int) -> dict[Genome, str]:
    """Of more than so many, these spread over all."""
    every = list(probes.items())
    places = np.linspace(0, len(every) - 1, max(0, min(most, len(every)))).round().astype(int)
    return dict(every[place] for place in places)


class _Intervals:
    """The genes of a space, grouped by the interval that they describe."""

    def __init__(self, problem: Problem) -> None:
        costs = IntervalCosts(problem.space)
        self._genes = costs.genes
        self._shapes = [table.shape for table in costs.tables]
        self.cost = costs.of
        self.changed = costs.changed
        self.full = costs.dearest()
        self.smallest = costs.cheapest()
        self.options: list[list[Option]] = [list(product(*map(range, table.shape))) for table in costs.tables]
        self.costs: list[list[int]] = [table.ravel().tolist() for table in costs.tables]

    def option(self, genome: Genome, k: int) -> Option:
        return genome[self._genes[k]]

    def wide(self, most: int) -> list[int]:
        """Intervals with more than `most` options."""
        return [k for k, options in enumerate(self.options) if len(options) > most]

    def single_genes(self, k: int) -> list[Option]:
        """Options of interval k that differ from the full net's in one gene."""
        top = self.option(self.full, k)
        return [
            (*top[:place], gene, *top[place + 1 :])
            for place, size in enumerate(self._shapes[k])
            for gene in range(size)
            if gene != top[place]
        ]
