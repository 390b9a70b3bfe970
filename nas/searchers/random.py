"""Random search: the baseline that every other searcher must beat."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nas.contracts import DONE, Genome, Problem, Proposal, Signal, Trial, derive_seed
from nas.genomes.genetics import Taken, novel_random
from nas.recipes import recipe


@recipe
class Random:
    """Genes drawn uniformly, moved to cheaper options where the budget asks for it. Never the same genome twice."""

    def start(self, problem: Problem, seed: int) -> RandomSearch:
        return RandomSearch(problem, seed)


class RandomSearch:
    def __init__(self, problem: Problem, seed: int) -> None:
        self._problem = problem
        self._seed = seed
        self._told: set[Genome] = set()

    def ask(self, pending: Sequence[Genome]) -> Proposal | Signal:
        taken = Taken(self._told, pending)
        rng = np.random.default_rng(derive_seed(self._seed, len(taken), "random"))
        genome = novel_random(self._problem, rng, taken.__contains__)
        return Proposal(genome) if genome is not None else DONE

    def tell(self, trial: Trial) -> None:
        self._told.add(trial.genome)
