"""The uniform schedules: one option for the whole trajectory. What a step-aware schedule has to beat."""

from __future__ import annotations

from collections.abc import Sequence

from nas.contracts import DONE, Genome, Problem, Proposal, Signal, Trial
from nas.genomes.genetics import Taken, uniform_genomes
from nas.recipes import recipe


@recipe
class Uniform:
    """Proposes each feasible uniform schedule once, the dearest first; without limits the first is the full net."""

    def start(self, problem: Problem, seed: int) -> UniformSearch:
        return UniformSearch([genome for genome in uniform_genomes(problem.space)[::-1] if problem.feasible(genome)])


class UniformSearch:
    """Proposes what is listed, in this order."""

    def __init__(self, genomes: Sequence[Genome]) -> None:
        self._genomes = genomes
        self._told: set[Genome] = set()

    def ask(self, pending: Sequence[Genome]) -> Proposal | Signal:
        taken = Taken(self._told, pending)
        return next((Proposal(genome) for genome in self._genomes if genome not in taken), DONE)

    def tell(self, trial: Trial) -> None:
        self._told.add(trial.genome)
