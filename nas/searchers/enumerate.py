"""Every feasible genome, once (`feasible_genomes`): the true front of a small study."""

from __future__ import annotations

from collections.abc import Sequence

from nas.contracts import DONE, Genome, Problem, Proposal, Signal, Trial
from nas.genomes.genetics import PATIENCE, feasible_genomes
from nas.recipes import recipe


@recipe
class Enumerate:
    """In lexicographic order of the intervals' options, cheap ones first, so that neighbours share their beginnings. With fewer
    trials than feasible genomes it sees one corner of the space alone. Where another limit than one on multiply-adds or times is broken by ten thousand genomes
    one after another, it ends."""

    def start(self, problem: Problem, seed: int) -> EnumerateSearch:
        return EnumerateSearch(problem)


class EnumerateSearch:
    def __init__(self, problem: Problem) -> None:
        self._order = feasible_genomes(problem, PATIENCE)
        self._ahead: list[Genome] = []
        self._told: set[Genome] = set()

    def ask(self, pending: Sequence[Genome]) -> Proposal | Signal:
        for genome in self._ahead:
            if genome not in pending:
                return Proposal(genome)
        for genome in self._order:
            if genome not in self._told:
                self._ahead.append(genome)
                if genome not in pending:
                    return Proposal(genome)
        return DONE

    def tell(self, trial: Trial) -> None:
        self._told.add(trial.genome)
        self._ahead = [genome for genome in self._ahead if genome != trial.genome]
