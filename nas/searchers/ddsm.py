"""The search of DDSM (Yang et al., ICLR 2024), as published: a baseline to beat.

A genetic algorithm on one number, quality plus weighted MACs, in generations. NSGA-II's operators with a single objective: the
uniform schedules and random ones at the start, binary tournaments, one-point crossover, the best of parents and children survive.
Asked for many candidates at once, it waits for a generation to be scored. Where the study has limits, which the published
search has not, what exceeds them is repaired.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from nas.contracts import DONE, WAIT, Genome, Problem, Proposal, Signal, Trial, derive_seed
from nas.genomes.genetics import novel, random_genome, repair, uniform_genomes
from nas.recipes import Share, Weight, recipe

MUTATIONS = {"released": 1e-3, "intended": 1.0}
"""Expected mutations of a child. The paper's 0.001 for each of 1,000 genes is one; the released code applies its 0.001 twice,
to the individual and to the gene."""


@recipe
class DDSM:
    """F = first objective + `macs_weight` x share of the full net's MACs. The published weight, 0.001 per MMAC of a net of 6,070 MMACs
    whose FID is 3.7, makes all MACs together 1.6 times the full net's distance; the default is that for a distance of 1.

    `population`: candidates of a generation; the paper has ten generations of 50. `mutation`: as released or as intended.
    """

    macs_weight: Weight = 1.6
    population: Annotated[int, Field(ge=2, le=10**5)] = 50
    crossover_rate: Share = 0.9
    mutation: Literal["released", "intended"] = "released"

    def start(self, problem: Problem, seed: int) -> DDSMSearch:
        return DDSMSearch(self, problem, seed)


class DDSMSearch:
    def __init__(self, settings: DDSM, problem: Problem, seed: int) -> None:
        self._settings = settings
        self._problem = problem
        self._seed = seed
        self._told: set[Genome] = set()
        self._survivors: list[tuple[float, Genome]] = []
        self._scored: list[tuple[float, Genome]] = []
        self._number = 0
        self._generation = self._first()

    def ask(self, pending: Sequence[Genome]) -> Proposal | Signal:
        for genome in self._generation:
            if genome not in self._told and genome not in pending:
                return Proposal(genome, {"generation": self._number})
        if any(genome not in self._told for genome in self._generation):
            return WAIT
        return DONE

    def tell(self, trial: Trial) -> None:
        self._told.add(trial.genome)
        quality = self._problem.quality(trial)
        if quality is not None:
            share = self._problem.space.cost(trial.genome)["macs_share"]
            self._scored.append((quality + self._settings.macs_weight * share, trial.genome))
        while self._generation and self._told.issuperset(self._generation):
            self._survivors = sorted(self._survivors + self._scored)[: self._settings.population]
            self._scored = []
            self._number += 1
            self._generation = self._next()

    def _first(self) -> list[Genome]:
        rng = np.random.default_rng(derive_seed(self._seed, 0, "ddsm"))
        seeds = [g for g in uniform_genomes(self._problem.space) if self._problem.feasible(g)]
        found = dict.fromkeys(seeds[: self._settings.population])
        return self._filled(found, lambda: random_genome(self._problem, rng))

    def _next(self) -> list[Genome]:
        rng = np.random.default_rng(derive_seed(self._seed, self._number, "ddsm"))
        if len(self._survivors) < 2:
            return self._filled({}, lambda: random_genome(self._problem, rng))
        waiting: list[Genome] = []

        def child() -> Genome:
            if not waiting:
                waiting.extend(self._children(rng))
            return waiting.pop()

        return self._filled({}, child)

    def _children(self, rng: np.random.Generator) -> tuple[Genome, Genome]:
        first, second = (self._survivors[min(rng.integers(len(self._survivors), size=2))][1] for _ in range(2))
        if rng.random() < self._settings.crossover_rate:
            cut = int(rng.integers(1, max(2, len(first))))
            first, second = first[:cut] + second[cut:], second[:cut] + first[cut:]
        rate = MUTATIONS[self._settings.mutation] / len(first)
        sizes = [len(choice.options) for choice in self._problem.space.choices]

        def mutated(genome: Genome) -> Genome:
            drawn = tuple(
                int(rng.integers(size)) if rng.random() < rate else gene
                for gene, size in zip(genome, sizes, strict=True)
            )
            return repair(self._problem, drawn, rng)

        return mutated(first), mutated(second)

    def _filled(self, found: dict[Genome, None], draw: Callable[[], Genome]) -> list[Genome]:
        """A whole generation without duplicates; what cannot be drawn anew comes in exhaustive order."""
        while len(found) < self._settings.population:
            genome = novel(self._problem, draw, lambda g: g in found or g in self._told)
            if genome is None:
                break
            found[genome] = None
        return list(found)
