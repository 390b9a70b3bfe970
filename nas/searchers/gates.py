"""Reuse learned by gradients, for any budget from one fit, after DiP-GO (Zhu et al., NeurIPS 2024), with settings of our own: the number of
steps, the batch of fresh noises, the weight and the floor of the sparsity loss are not those of the published training.

What is learned are keep probabilities of blocks by step (`nas.searchers.pruner`). From them a schedule within a budget is made in one of three
ways, and proposed like anybody else's: only its score counts. "bisection" is the paper's: one threshold on all of them, the lowest that
keeps the budget. "greedy" is the released code's: thresholds on the skip probability from 0.95 down, from the output's side block by
block, the steps surest to be skipped first, until the budget is kept. "knapsack" is the exact answer to the question that both
approximate: the least total of -log(skip probability) over the blocks that are skipped, by dynamic programming. "threshold" is that of
Learning-to-Cache: what is kept with more than a given probability, where that keeps the budget, or else as by bisection.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import field
from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from nas.contracts import (
    DONE,
    Genome,
    ImageSet,
    Learned,
    LoadedSupernet,
    Problem,
    Progress,
    Proposal,
    Signal,
    Snapshot,
    Trial,
    UserError,
    derive_seed,
)
from nas.genomes.genetics import Taken, dearest, near, novel_random
from nas.recipes import recipe
from nas.searchers.choosers import BitChooser, Chooser, Choosing, meanings
from nas.searchers.pruner import Pruner, arch_of
from nas.searchers.router import Router


@recipe
class Gates:
    """`pruner`: how the gates are learned, by DiP-GO's `Pruner` or by Learning-to-Cache's `Router`. `choosing`: ways to make a schedule of them, in
    turn."""

    pruner: Pruner | Router = field(default_factory=Pruner)
    choosing: Annotated[tuple[Choosing, ...], Field(min_length=1)] = ("bisection", "greedy", "knapsack")
    learns = True
    for_any_limits = True

    def learn(
        self,
        problem: Problem,
        supernet: LoadedSupernet,
        images: ImageSet,
        seed: int,
        so_far: Snapshot | None = None,
    ) -> Generator[Progress | Snapshot, None, Learned]:
        """Keep probabilities, (steps - 1, blocks), and what each option of the space means for the gates. Raises UserError for a
        space that offers no reuse."""
        full = problem.space.decode(dearest(problem.space))
        if hasattr(problem.space, "gates"):  # a bit for each gate, of which nothing has to be found out
            names = supernet.blocks(arch_of(full), True)
            if not self.pruner.finer:
                raise UserError("the space has a bit for each branch; give gates for them, Pruner(finer=True)")
            told = {"bits": torch.tensor(problem.space.gates(names), dtype=torch.long)}
        else:
            told = meanings(problem, supernet, full, self.pruner.finer)
        keep, spent = yield from self.pruner.learn(supernet, full, images, seed, so_far)
        return {"keep": keep, **told}, spent

    def start(self, problem: Problem, seed: int, learned: Mapping[str, torch.Tensor] | None = None) -> GatesSearch:
        return GatesSearch(self, problem, seed, learned)


class GatesSearch:
    """Without anything learned it proposes at random, and says so."""

    def __init__(
        self, settings: Gates, problem: Problem, seed: int, learned: Mapping[str, torch.Tensor] | None
    ) -> None:
        self._settings = settings
        self._problem = problem
        self._seed = seed
        self._told: set[Genome] = set()
        self.enqueued: frozenset[Genome] = frozenset()
        self._chooser: Chooser | BitChooser | None = None
        if learned is not None:
            self._chooser = (BitChooser if "bits" in learned else Chooser)(problem, learned, settings.pruner.threshold)

    def ask(self, pending: Sequence[Genome]) -> Proposal | Signal:
        taken = Taken(self._told, pending)
        rng = np.random.default_rng(derive_seed(self._seed, len(taken), "gates"))
        if self._chooser is None:
            drawn = novel_random(self._problem, rng, taken.__contains__)
            return DONE if drawn is None else Proposal(drawn, {"operator": "random, nothing learned"})
        number = taken.beside(self.enqueued)
        way = self._settings.choosing[number % len(self._settings.choosing)]
        least, most = self._chooser.budgets
        share = _van_der_corput(number // len(self._settings.choosing) + 1)
        budget = least + (most - least) * share
        wanted = self._chooser.genome(way, budget)
        found = near(self._problem, wanted, rng, taken.__contains__)
        if found is None:
            return DONE
        how = way if found == wanted else f"near {way}"
        return Proposal(found, {"operator": how, "budget": budget})

    def tell(self, trial: Trial) -> None:
        self._told.add(trial.genome)


def _van_der_corput(number: int) -> float:
    """1/2, 1/4, 3/4, 1/8, ...: shares that fill the range ever more densely; the range's end first."""
    if number == 1:
        return 1.0
    number -= 1
    share, step = 0.0, 0.5
    while number:
        share += step * (number % 2)
        number //= 2
        step /= 2
    return share
