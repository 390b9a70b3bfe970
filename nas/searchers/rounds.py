"""Proxy-based Pruning (Li, Su et al., arXiv 2312.13307, section on pruning as multi-round decision making): per interval and
budget, a proposer sees what was tried, proposes, and learns from the score. The loop's shape is that of GENIUS (arXiv 2304.10970).

A round changes one interval of the best schedule within one budget. The rounds go over the intervals, and over the budgets in each
interval; rounds of neighbouring intervals start from each other's best. What the interval takes beyond its share is paid for by the
other intervals, where that is expected to cost least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from nas.contracts import DONE, Genome, Problem, Proposal, Signal, Trial, derive_seed
from nas.genomes.genetics import IntervalCosts, Taken, most_within, near
from nas.recipes import Few, recipe
from nas.searchers.proposers import Local, Option, Proposer, Question, RefusedError, Remembered, read_answer
from nas.searchers.ranking import MOST, Ranking

SHOWN = 500
"""Characters of an answer that are booked, and shown to the proposer again."""

REFIT = 4
"""Importance is fitted again after so many scores."""


@recipe
class Rounds:
    """`budgets`: how many, equally spaced up to the limit. `split`: "learned" lets intervals pay for each other; "equal" gives each
    the same share of what a budget adds to the cheapest schedule; "linear" shares that in the proportions of the paper's rule, i/N + (N-i)/N *
    least, i = 1 the noisiest interval. It is not the paper's rule itself, under which the cleanest interval may run the full net: that is
    a space's `budgets=linear_budgets(...)`. `remembered`: rounds shown to the proposer, 0 for none, and then importance and incumbents are not used
    either. `attempts`: answers asked for in a round before a neighbour of the best is taken.
    """

    proposer: Proposer = field(default_factory=Local)
    budgets: Few = 6
    split: Literal["learned", "equal", "linear"] = "learned"
    least: Annotated[float, Field(gt=0, le=1)] = 0.5
    remembered: Annotated[int, Field(ge=0, le=4096)] = 8
    attempts: Annotated[int, Field(ge=1, le=64)] = 4

    def start(self, problem: Problem, seed: int) -> RoundsSearch:
        return RoundsSearch(self, problem, seed)


class RoundsSearch:
    def __init__(self, settings: Rounds, problem: Problem, seed: int) -> None:
        self._settings = settings
        self._problem = problem
        self._seed = seed
        self._costs = IntervalCosts(problem.space)
        least, most = (self._costs.total(end) for end in (self._costs.cheapest(), self._costs.dearest()))
        limit = min(float(most), most_within(problem))
        self._budgets = [least + (limit - least) * (i + 1) / settings.budgets for i in range(settings.budgets)]
        self._least = np.array([int(table.min()) for table in self._costs.tables], dtype=np.float64)
        self._shares = self._rule(settings.split if settings.split != "learned" else "equal")
        self._starts = [self._start_of(budget) for budget in self._budgets]
        # Budgets keep to limits on further costs in the main alone.
        self._first = list(dict.fromkeys(genome for genome in self._starts if problem.feasible(genome)))
        self._told: set[Genome] = set()
        self.enqueued: frozenset[Genome] = frozenset()
        self._scored: dict[Genome, float] = {}
        self._numbers: dict[Genome, int] = {}
        self._memory: dict[tuple[int, int], list[tuple[Option, float, float]]] = {}
        self._best: dict[int, tuple[float, Genome]] = {}
        self._fitted: tuple[int, tuple[npt.NDArray[np.float64], ...]] = (0, ())
        self._answered: tuple[tuple[int, frozenset[Genome]], Proposal | Signal] | None = None

    def ask(self, pending: Sequence[Genome]) -> Proposal | Signal:
        taken = Taken(self._told, pending)
        for genome in self._first:
            if genome not in taken:
                return Proposal(genome, {"operator": "start"})
        key = len(self._told), frozenset(pending)
        if (
            self._answered is None or self._answered[0] != key
        ):  # a proposer may be slow, and need not say the same twice
            self._answered = key, self._round(taken)
        return self._answered[1]

    def tell(self, trial: Trial) -> None:
        self._told.add(trial.genome)
        self._numbers[trial.genome] = trial.number
        value = self._problem.quality(trial)
        if value is None:
            return
        if "interval" in trial.origin:
            k, budget = trial.origin["interval"], trial.origin["budget"]
            best, _ = self._incumbent(budget)
            option = trial.genome[self._costs.genes[k]]
            self._memory.setdefault((k, budget), []).append((option, value, best - value))
        self._scored[trial.genome] = value
        macs = self._costs.total(trial.genome)
        for place, most in enumerate(self._budgets if self._settings.remembered else ()):
            if macs <= most:
                self._best[place] = min(self._best.get(place, (np.inf, ())), (value, trial.genome))

    def _round(self, taken: Taken) -> Proposal | Signal:
        number = taken.beside(self.enqueued.difference(self._first)) - len(self._first)
        intervals = len(self._costs.genes)
        budget, k = number % len(self._budgets), number // len(self._budgets) % intervals
        _, incumbent = self._incumbent(budget)
        seed = derive_seed(self._seed, number, "rounds")
        importance = self._importance()
        refused: list[tuple[str, str]] = []
        log: list[dict[str, str]] = []
        origin = {"round": number, "interval": k, "budget": budget, "answers": log}
        for _ in range(self._settings.attempts):
            question = self._question(number, k, budget, incumbent, importance, tuple(refused), seed)
            answer = self._settings.proposer.propose(question)
            try:
                option, note = read_answer(answer, question)
                genome = self._paid(incumbent, k, option, self._budgets[budget], importance)
                if not self._problem.feasible(genome):
                    over = [name for name, excess in self._problem.violations(genome).items() if excess > 0]
                    raise RefusedError(f"it exceeds the limit on {', '.join(over)}")
                if genome in taken:
                    known = self._numbers.get(genome)
                    raise RefusedError("it is being scored now" if known is None else f"it is that of trial {known}")
            except RefusedError as reason:
                refused.append((answer[:SHOWN], str(reason)))
                log.append({"answer": answer[:SHOWN], "refused": str(reason)})
                continue
            log.append({"answer": answer[:SHOWN], **({"repaired": note} if note else {})})
            return Proposal(genome, origin)
        rng = np.random.default_rng(seed)
        found = near(self._problem, incumbent, rng, taken.__contains__)
        return DONE if found is None else Proposal(found, {"round": number, "operator": "neighbour", "answers": log})

    def _question(
        self,
        number: int,
        k: int,
        budget: int,
        incumbent: Genome,
        importance: tuple[npt.NDArray[np.float64], ...],
        refused: tuple[tuple[str, str], ...],
        seed: int,
    ) -> Question:
        genes = self._costs.genes[k]
        return Question(
            number=number,
            interval=k,
            intervals=len(self._costs.genes),
            choices=tuple(self._problem.space.choices[genes]),
            costs=self._costs.tables[k],
            allowance=self._allowance(k, self._budgets[budget]),
            current=incumbent[genes],
            memory=self._remembered(k, budget),
            importance=importance[genes] if importance else (),
            refused=refused,
            seed=seed,
        )

    def _remembered(self, k: int, budget: int) -> tuple[Remembered, ...]:
        """The best rounds of the interval within the budget, then what the neighbouring intervals' best rounds ran."""
        most = self._settings.remembered
        own = sorted(self._memory.get((k, budget), []), key=lambda entry: entry[1])[:most]
        table = self._costs.tables[k]
        rows = [
            Remembered(option, int(table[option]), score, gain, rank + 1)
            for rank, (option, score, gain) in enumerate(own)
        ]
        for other in (k - 1, k + 1):
            lent = min(self._memory.get((other, budget), []), key=lambda entry: entry[1], default=None)
            if most and lent is not None and self._costs.tables[other].shape == table.shape:
                option, score, gain = lent
                rows.append(Remembered(option, int(table[option]), score, gain, len(rows) + 1, borrowed=True))
        return tuple(rows)

    def _incumbent(self, budget: int) -> tuple[float, Genome]:
        """The score and the best schedule within the budget; its start where there is none yet or nothing is remembered."""
        return self._best.get(budget, (np.inf, self._starts[budget]))

    def _importance(self) -> tuple[npt.NDArray[np.float64], ...]:
        """What each option of each gene is expected to add to the score's normal rank."""
        count = len(self._scored) // REFIT * REFIT
        if not count or not self._settings.remembered:
            return ()
        if self._fitted[0] != count:
            known = list(self._scored.items())[max(0, count - MOST) : count]
            sizes = [len(choice.options) for choice in self._problem.space.choices]
            ranking = Ranking([genome for genome, _ in known], [score for _, score in known], sizes)
            self._fitted = count, tuple(ranking.effects())
        return self._fitted[1]

    def _rule(self, split: str) -> npt.NDArray[np.float64]:
        """Each interval's share of what a budget adds to the cheapest schedule."""
        weights = np.array([float(table.max()) for table in self._costs.tables])
        if split == "linear":
            place = np.arange(1, len(weights) + 1) / len(weights)
            weights *= place + (1 - place) * self._settings.least
        shares: npt.NDArray[np.float64] = weights / weights.sum()
        return shares

    def _allowance(self, k: int, budget: float) -> float:
        """MACs that interval k may take of a budget."""
        spare = budget - float(self._least.sum())
        share = 1.0 if self._settings.split == "learned" else float(self._shares[k])
        return float(self._least[k]) + spare * share

    def _start_of(self, budget: float) -> Genome:
        """Each interval at the dearest configuration within its share, an equal one where shares are to be learned."""
        allowances = self._least + (budget - self._least.sum()) * self._shares
        genome: Genome = ()
        for allowance, table in zip(allowances, self._costs.tables, strict=True):
            within = np.where(table <= allowance * (1 + 1e-12), table, -1)
            genome += tuple(int(i) for i in np.unravel_index(int(within.argmax()), table.shape))
        return genome

    def _paid(
        self,
        incumbent: Genome,
        k: int,
        option: Option,
        budget: float,
        importance: tuple[npt.NDArray[np.float64], ...],
    ) -> Genome:
        """The schedule with the interval changed, within the budget: genes of other intervals are lowered where a saved MAC is
        expected to cost least."""
        genome = list(incumbent)
        own = self._costs.genes[k]
        genome[own] = option
        excess = self._costs.total(tuple(genome)) - budget
        others = [gene for gene in range(len(genome)) if not own.start <= gene < own.stop]
        while excess > 0:
            best: tuple[tuple[float, int], int, int, int] | None = None
            for gene in others:
                row = self._costs.by_option(genome, gene)
                here = row[genome[gene]]
                for place, macs in enumerate(row):
                    if macs < here:
                        saved = here - macs
                        lost = float(importance[gene][place] - importance[gene][genome[gene]]) if importance else 0.0
                        price = max(lost, 0.0) / min(saved, excess), saved  # of equals the least change
                        if best is None or price < best[0]:
                            best = price, gene, place, saved
            if best is None:
                break
            _, gene, place, saved = best
            genome[gene] = place
            excess -= saved
        return tuple(genome)
