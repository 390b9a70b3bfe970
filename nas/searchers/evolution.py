"""Constrained multi-objective evolution: NSGA-II's selection (Deb et al. 2002) in steady state.

There are no generations to wait for: each told trial competes with the `population` best so far, so workers that finish at
different times are never idle. Mutation acts on every gene. Infeasible offspring are repaired to the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nas.contracts import DONE, Genome, Problem, Proposal, Signal, Trial, UserError, derive_seed
from nas.genetics import cross, mutate, novel, random_genome, repair, uniform_genomes
from nas.pareto import best_first


@dataclass(frozen=True)
class Evolution:
    """`population`: parents kept; the first `population` proposals are the feasible uniform schedules, then random ones.

    `mutation_rate`: chance of each gene to change, 1 / genes where None. `crossover_rate`: chance of two-point crossover.
    """

    population: int = 20
    mutation_rate: float | None = None
    crossover_rate: float = 0.9

    def __post_init__(self) -> None:
        if self.population < 2:
            raise UserError(f"population {self.population} is too small to select from; use at least 2")

    def start(self, problem: Problem, seed: int) -> EvolutionSearch:
        return EvolutionSearch(self, problem, seed)


class EvolutionSearch:
    def __init__(self, settings: Evolution, problem: Problem, seed: int) -> None:
        self._settings = settings
        self._problem = problem
        self._seed = seed
        self._seeds = [genome for genome in uniform_genomes(problem.space) if problem.feasible(genome)]
        self._rate = 1 / len(problem.space.choices) if settings.mutation_rate is None else settings.mutation_rate
        self._seen: set[Genome] = set()
        self._survivors: list[Trial] = []

    def ask(self, pending: Sequence[Genome]) -> Proposal | Signal:
        taken = self._seen | set(pending)
        rng = np.random.default_rng(derive_seed(self._seed, len(taken), "evolution"))
        for genome in self._seeds[: self._settings.population]:
            if genome not in taken:
                return Proposal(genome, {"operator": "uniform"})
        if len(taken) < self._settings.population or len(self._survivors) < 2:
            drawn = novel(self._problem, lambda: random_genome(self._problem, rng), taken.__contains__)
            return Proposal(drawn, {"operator": "random"}) if drawn is not None else DONE
        parents: list[int] = []

        def offspring() -> Genome:
            chosen = [self._survivors[min(rng.integers(len(self._survivors), size=2))] for _ in range(2)]
            parents[:] = [trial.number for trial in chosen]
            first, second = (trial.genome for trial in chosen)
            child = cross(first, second, rng) if rng.random() < self._settings.crossover_rate else first
            return repair(self._problem, mutate(self._problem.space, child, rng, self._rate), rng)

        child = novel(self._problem, offspring, taken.__contains__)
        return Proposal(child, {"operator": "offspring", "parents": list(parents)}) if child is not None else DONE

    def tell(self, trial: Trial) -> None:
        self._seen.add(trial.genome)
        if trial.scored and all(np.isfinite(trial.objectives(self._problem.objectives))):
            self._survivors.append(trial)
            self._select()

    def _select(self) -> None:
        """Survivors stand best first, so a binary tournament is the smaller of two indices."""
        values = np.array([trial.objectives(self._problem.objectives) for trial in self._survivors])
        self._survivors = [self._survivors[i] for i in best_first(values)[: self._settings.population]]
