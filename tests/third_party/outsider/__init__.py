"""A searcher of somebody else's: coordinate descent from the dearest genome that fits, over and over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nas.contracts import DONE, Genome, Problem, Proposal, Signal, Trial
from nas.genomes.genetics import dearest, near


@dataclass(frozen=True)
class Greedy:
    def start(self, problem: Problem, seed: int) -> GreedySearch:
        return GreedySearch(problem, seed)


class GreedySearch:
    def __init__(self, problem: Problem, seed: int) -> None:
        self._problem = problem
        self._seed = seed
        self._best = (float("inf"), dearest(problem.space))
        self._told: set[Genome] = set()

    def ask(self, pending: Sequence[Genome]) -> Proposal | Signal:
        taken = self._told | set(pending)
        rng = np.random.default_rng([self._seed, len(taken)])
        found = near(self._problem, self._best[1], rng, taken.__contains__)
        return Proposal(found, {"from": self._best[1]}) if found is not None else DONE

    def tell(self, trial: Trial) -> None:
        self._told.add(trial.genome)
        [value] = trial.objectives(self._problem.objectives[:1])
        if trial.scored and value < self._best[0]:
            self._best = value, trial.genome
