"""The user's own schedules, before whatever a searcher proposes."""

from __future__ import annotations

from collections.abc import Sequence

from nas.contracts import Genome, Problem, Proposal, Search, Signal, Trial


class Enqueued:
    """A search that proposes these genomes first, those within the limits that it was not told yet, in order; then it is the search itself, which is
    told of them as of its own. One that counts what it has proposed has an attribute `enqueued`, which they are set to."""

    def __init__(self, search: Search, genomes: Sequence[Genome], problem: Problem) -> None:
        self._search = search
        self._left = [genome for genome in dict.fromkeys(genomes) if problem.feasible(genome)]
        if hasattr(search, "enqueued"):
            search.enqueued = frozenset(self._left)

    def ask(self, pending: Sequence[Genome]) -> Proposal | Signal:
        own = next((genome for genome in self._left if genome not in pending), None)
        return self._search.ask(pending) if own is None else Proposal(own, {"operator": "enqueued"})

    def tell(self, trial: Trial) -> None:
        self._left = [genome for genome in self._left if genome != trial.genome]
        self._search.tell(trial)
