"""Any optimiser of Nevergrad, by its name, over the space's choices.

The optimiser moves in one normally distributed variable per gene, whose quantiles are the gene's options in their order, so that
continuous and discrete methods alike can be used. It is rebuilt by replay: a trial that was drawn when all before it had been
told is drawn again and told; one that finished out of turn is told as a point that the optimiser did not draw itself.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import nevergrad as ng
import numpy as np
import numpy.typing as npt
from nevergrad.common.errors import TellNotAskedNotSupportedError
from nevergrad.optimization.differentialevolution import _DE
from scipy.special import ndtr, ndtri

from nas.base.files import first_line
from nas.contracts import DONE, Genome, Problem, Proposal, Signal, Trial, UserError, derive_seed
from nas.genomes.genetics import LATENCY, TRIES, Taken, anchor, budget_of, dearest, near, repair
from nas.recipes import Count, recipe

_tell_not_asked = _DE._internal_tell_not_asked


def _take_in(self: Any, candidate: Any, loss: float) -> None:
    """In place of nevergrad's own where there are several objectives and no room: of those on no front it replaces any, another one in each process, so that no
    search could be replayed; here the one whose line is the oldest."""
    if self.num_objectives == 1 or len(self.population) < self.llambda:
        _tell_not_asked(self, candidate, loss)
        return
    front = {one.uid for one in self.pareto_front()}
    beaten = next((line for line, one in self.population.items() if one.uid not in front), None)
    if candidate.uid in front and beaten is not None:
        del self.population[beaten]
        self._uid_queue.discard(beaten)
        _tell_not_asked(self, candidate, loss)


_DE._internal_tell_not_asked = _take_in


@recipe
class Nevergrad:
    """`optimizer`: a name of `nevergrad.optimizers.registry`, such as "NGOpt", "CMA", "DE", "TBPSA". `budget`: evaluations that it
    plans for; some choose their method by it.

    The cheapest schedule that keeps the limits is scored first: its score, and of costs the limit or what the dearest schedule has, are what several objectives
    are measured by; what is scored before it is told after it. What exceeds the budget is repaired, and the repaired genome's score is told for what was drawn.
    """

    optimizer: str = "DE"
    budget: Count = 100

    def __post_init__(self) -> None:
        if self.optimizer not in ng.optimizers.registry:
            raise UserError(
                f"Nevergrad has no optimizer {self.optimizer!r}; see nevergrad.optimizers.registry, for example NGOpt, CMA, DE"
            )

    def start(self, problem: Problem, seed: int) -> NevergradSearch:
        """Raises UserError for an optimiser that cannot be copied, as those of scipy that Nevergrad runs in a thread of their own."""
        return NevergradSearch(self, problem, seed)


class NevergradSearch:
    def __init__(self, settings: Nevergrad, problem: Problem, seed: int) -> None:
        self._problem = problem
        self._seed = seed
        self._sizes = np.array([len(choice.options) for choice in problem.space.choices])
        self._first = anchor(problem)
        self._told: set[Genome] = set()
        self._scale: npt.NDArray[np.float64] | None = None
        self._waiting: list[tuple[Trial, int]] = []
        variables = ng.p.Array(shape=(len(self._sizes),))
        variables.random_state.seed(derive_seed(seed, "nevergrad"))
        self._optimizer: Any = ng.optimizers.registry[settings.optimizer](variables, budget=settings.budget)
        try:
            probe = copy.deepcopy(self._optimizer)
            getattr(probe, "optim", None)  # some choose a method of another's when they are first asked for it
            copy.deepcopy(probe)
        except Exception as error:
            raise UserError(
                f"Nevergrad's optimizer {settings.optimizer!r} cannot be copied, which a search that resumes needs ({first_line(error)}); take another one, "
                "for example NGOpt, CMA, DE"
            ) from error

    def ask(self, pending: Sequence[Genome]) -> Proposal | Signal:
        taken = Taken(self._told, pending)
        if self._first not in taken:
            return Proposal(self._first, {"operator": "cheapest"})
        optimizer = copy.deepcopy(self._optimizer)  # drawing moves an optimiser on; only what is told may
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            genome = self._first
            for draw in range(TRIES):
                try:
                    drawn = optimizer.ask()
                except AssertionError:  # those that plan all of their draws beforehand have no more than their budget
                    break
                genome = self._genome(drawn.value, draw)
                if genome not in taken:
                    return Proposal(genome, {"tells": len(self._told), "draw": draw})
        rng = np.random.default_rng(derive_seed(self._seed, len(taken), "nevergrad neighbour"))
        found = near(self._problem, genome, rng, taken.__contains__)
        return Proposal(found, {"operator": "neighbour"}) if found is not None else DONE

    def tell(self, trial: Trial) -> None:
        self._waiting.append((trial, len(self._told)))
        self._told.add(trial.genome)
        if self._first not in self._told:
            return
        waiting, self._waiting = self._waiting, []
        alone = len(waiting) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for told, tells in sorted(waiting, key=lambda one: one[0].genome != self._first):
                self._learn(told, tells if alone else None)

    def _learn(self, trial: Trial, tells: int | None) -> None:
        """`tells`: how many were told before it, None where it is told later than that."""
        values = np.array(trial.objectives(self._problem.objectives))
        if not trial.scored or not np.isfinite(values).all():
            return
        if self._scale is None:
            self._measure_by(values)
        drawn = self._drawn(trial, tells)
        losses = (values / self._scale).tolist()
        try:
            self._optimizer.tell(drawn, losses[0] if len(losses) == 1 else losses)
        except (TellNotAskedNotSupportedError, KeyError):
            if "draw" in trial.origin and trial.origin.get("tells") == tells:
                raise
            return  # it learns from its own points alone; DE says so by a KeyError

    def _drawn(self, trial: Trial, tells: int | None) -> Any:
        """The optimiser's own candidate of this trial, or one at the middle of the genome's quantiles."""
        if tells is not None and trial.origin.get("tells") == tells:
            return [self._optimizer.ask() for _ in range(trial.origin["draw"] + 1)][-1]
        middle = ndtri((np.array(trial.genome) + 0.5) / self._sizes)
        return self._optimizer.parametrization.spawn_child(new_value=middle)

    def _measure_by(self, values: npt.NDArray[np.float64]) -> None:
        """Objectives are told as shares of what bounds the front, which 1 does then: scores of what the cheapest schedule has, costs of their limit, or of what the
        dearest schedule has; a time that is measured alone grows as the multiply-adds do."""
        problem = self._problem
        least, most = (dict(problem.space.cost(genome)) for genome in (self._first, dearest(problem.space)))
        grown = most["macs"] / least["macs"]
        if LATENCY not in problem.limits:
            within = min(1.0, budget_of(problem) / most["macs"])
            most |= {name: within * most[name] for name in ("macs", "macs_share")}
        most |= {name: min(limit, most.get(name, limit)) for name, limit in problem.limits.items()}
        scale = [
            most[name] if name in least else value * grown if name == LATENCY else value
            for name, value in zip(problem.objectives, values, strict=True)
        ]
        self._scale = np.where(np.array(scale) > 0, scale, 1.0)
        if len(values) > 1:
            self._optimizer.tell(ng.p.MultiobjectiveReference(), [1.0 + 1e-6] * len(values))

    def _genome(self, values: npt.NDArray[np.float64], draw: int) -> Genome:
        genes = np.minimum((ndtr(values) * self._sizes).astype(int), self._sizes - 1)
        rng = np.random.default_rng(derive_seed(self._seed, len(self._told), draw, "nevergrad repair"))
        return repair(self._problem, tuple(genes.tolist()), rng)
