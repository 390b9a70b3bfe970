"""Constrained multi-objective evolution: NSGA-II's selection (Deb et al. 2002) in steady state.

There are no generations to wait for: each told trial competes with the `population` best so far, so workers that finish at
different times are never idle. Mutation acts on every gene. Infeasible offspring are repaired to the budget. Offspring may be
screened by a model of the scores before one of them is proposed (OMS-DPM, Liu et al. 2023, screens model schedules so).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from nas.contracts import DONE, Genome, Problem, Proposal, Signal, Trial, derive_seed
from nas.genomes.genetics import Taken, cheapest, cross, mutate, novel, novel_random, repair, uniform_genomes
from nas.genomes.pareto import best_first, front
from nas.recipes import Few, Share, recipe
from nas.searchers.ranking import MOST, Ranking

DRAWN = 2
"""Offspring drawn at most, for each that is wanted."""

REFIT = 8
"""The screening model is fitted again after so many scores."""


@recipe
class Evolution:
    """`population`: parents kept; the first `population` proposals are the feasible uniform schedules (unless `uniform` is False), then
    random ones.

    `mutation_rate`: chance of each gene to change, 1 / genes where None. `crossover_rate`: chance of two-point crossover.
    `screened`: offspring made for each that is proposed, the one that a ranking model of the scores expects to gain most at its cost;
    1 for none. Where the model's held-out Kendall tau is below `least_tau`, offspring are proposed as they come, and say so. Only one
    measured objective can be screened for, against one cost or none.
    """

    population: Annotated[int, Field(ge=2, le=10**5)] = 20
    mutation_rate: Share | None = None
    crossover_rate: Share = 0.9
    uniform: bool = True
    screened: Few = 16
    least_tau: Annotated[float, Field(ge=-1, le=2)] = 0.3

    def start(self, problem: Problem, seed: int) -> EvolutionSearch:
        return EvolutionSearch(self, problem, seed)


class EvolutionSearch:
    def __init__(self, settings: Evolution, problem: Problem, seed: int) -> None:
        self._settings = settings
        self._problem = problem
        self._seed = seed
        uniform = uniform_genomes(problem.space) if settings.uniform else []
        self._seeds = [genome for genome in uniform if problem.feasible(genome)]
        self._rate = 1 / len(problem.space.choices) if settings.mutation_rate is None else settings.mutation_rate
        self._seen: set[Genome] = set()
        self._survivors: list[Trial] = []
        self._scored: list[tuple[Genome, float, float]] = []
        """Each with its score and its price."""
        others = problem.objectives[1:]
        costs = problem.space.cost(cheapest(problem.space))
        self._wanted = settings.screened if len(others) < 2 and all(name in costs for name in others) else 1
        self._fitted: tuple[int, Ranking, npt.NDArray[np.float64], npt.NDArray[np.float64]] | None = None

    def ask(self, pending: Sequence[Genome]) -> Proposal | Signal:
        taken = Taken(self._seen, pending)
        rng = np.random.default_rng(derive_seed(self._seed, len(taken), "evolution"))
        for genome in self._seeds[: self._settings.population]:
            if genome not in taken:
                return Proposal(genome, {"operator": "uniform"})
        if len(taken) < self._settings.population or len(self._survivors) < 2:
            drawn = novel_random(self._problem, rng, taken.__contains__)
            return Proposal(drawn, {"operator": "random"}) if drawn is not None else DONE
        parents: dict[Genome, list[int]] = {}
        children: list[Genome] = []

        def offspring() -> Genome:
            child, numbers = self._offspring(rng, taken)
            parents[child] = numbers
            return child

        # Late in a search most offspring were told before: how many are drawn does not grow with that.
        for _ in range(DRAWN * self._wanted):
            child = offspring()
            if child not in taken and child not in children and self._problem.feasible(child):
                children.append(child)
            if len(children) == self._wanted:
                break
        if not children:
            found = novel(self._problem, offspring, taken.__contains__)
            if found is None:
                return DONE
            children.append(found)
        child, screening = self._screen(children)
        return Proposal(child, {"operator": "offspring", "parents": parents.get(child, []), **screening})

    def tell(self, trial: Trial) -> None:
        self._seen.add(trial.genome)
        if trial.scored and all(np.isfinite(trial.objectives(self._problem.objectives))):
            price = self._price(trial.genome) if self._wanted > 1 else 0.0
            self._scored.append((trial.genome, trial.objectives(self._problem.objectives[:1])[0], price))
            self._survivors.append(trial)
            self._select()

    def _offspring(self, rng: np.random.Generator, taken: Taken) -> tuple[Genome, list[int]]:
        """A child, and the trials that it comes from. One that was told before is within the budget already."""
        chosen = [self._survivors[min(rng.integers(len(self._survivors), size=2))] for _ in range(2)]
        first, second = (trial.genome for trial in chosen)
        child = cross(first, second, rng) if rng.random() < self._settings.crossover_rate else first
        mutated = mutate(self._problem.space, child, rng, self._rate)
        repaired = mutated if mutated in taken else repair(self._problem, mutated, rng)
        return repaired, [trial.number for trial in chosen]

    def _screen(self, children: list[Genome]) -> tuple[Genome, dict[str, Any]]:
        """The child that is expected to gain most over what was scored at no more MACs, and how it was chosen."""
        if len(children) == 1:
            return children[0], {}
        ranking, prices, best = self._model()
        if ranking.tau < self._settings.least_tau:
            return children[0], {"screened": 1, "tau": ranking.tau}
        places = np.searchsorted(prices, [self._price(c) for c in children], side="right")
        reached = np.where(places > 0, best[np.maximum(places - 1, 0)], best[0] + 1.0)
        gains = reached - ranking.predict(children)
        return children[int(gains.argmax())], {"screened": len(children), "tau": ranking.tau}

    def _price(self, genome: Genome) -> float:
        """What it costs, where an objective is a cost."""
        names = self._problem.objectives
        return float(self._problem.space.cost(genome)[names[1]]) if len(names) > 1 else 0.0

    def _model(self) -> tuple[Ranking, npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Fitted to the first objective of what was scored last, and of what led before, when the last `REFIT` were complete; with the prices of these, rising, and the
        best rank at no more than each."""
        count = max(len(self._scored) // REFIT * REFIT, min(len(self._scored), 2))
        if self._fitted is None or self._fitted[0] != count:
            start = max(0, count - MOST)
            # What leads stays known, however long ago it was scored.
            before = [(score, price) for _, score, price in self._scored[:start]]
            latest = [*(self._scored[i] for i in front(before)), *self._scored[start:count]]
            genomes = [genome for genome, _, _ in latest]
            sizes = [len(choice.options) for choice in self._problem.space.choices]
            ranking = Ranking(genomes, [score for _, score, _ in latest], sizes)
            known = sorted(zip((price for _, _, price in latest), ranking.ranks.tolist(), strict=True))
            prices, ranks = (np.array(column, dtype=np.float64) for column in zip(*known, strict=True))
            self._fitted = count, ranking, prices, np.minimum.accumulate(ranks)
        return self._fitted[1:]

    def _select(self) -> None:
        """Survivors stand best first, so a binary tournament is the smaller of two indices."""
        values = np.array([trial.objectives(self._problem.objectives) for trial in self._survivors])
        self._survivors = [self._survivors[i] for i in best_first(values)[: self._settings.population]]
