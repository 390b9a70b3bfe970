"""What a search would be told of any schedule of a space that is too large to be sampled whole: a fit to what live searches were told.

The logarithm of the distance at the most images is a ridge regression on the genes and their products; at fewer images a straight line in that. What the
fit misses is noise of its own for each schedule, and each search's seed. `digits_table.Replay` charges what sampling would have taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import kendalltau

from nas.contracts import Genome, Schedule, derive_seed
from nas.genomes.pareto import hypervolume
from search_spaces.stepwise import Stepwise

BLOCKS = 20
"""Of replicates, as a score has."""

Told = Sequence[tuple[Sequence[int], int, float]]
"""Genome, images, distance."""


@dataclass(frozen=True)
class Size:
    """`half`: the most images of a candidate."""

    space: Stepwise
    half: int


@dataclass(frozen=True)
class Line:
    """log distance at some number of images = start + slope x that at the most, ± `noise`."""

    start: float
    slope: float
    noise: float


@dataclass(frozen=True, eq=False)
class Fitted:
    """`told`: by live searches of one seed, some of it at the most images."""

    size: Size
    told: Told

    def genome_of(self, schedule: Schedule) -> Genome:
        return self.size.space.genome(schedule)

    def distance(
        self, genome: Genome, start: int, stop: int, seed: int | None = None
    ) -> tuple[float, tuple[float, ...]]:
        """On the images from start up to stop; the same at every call with this seed."""
        return self._drawn(
            genome, stop - start, np.random.default_rng(derive_seed(seed or 0, start, stop, str(genome)))
        )

    def fresh(self, genome: Genome, rng: np.random.Generator) -> tuple[float, tuple[float, ...]]:
        return self._drawn(genome, self.size.half, rng)

    def true(self, genome: Genome) -> float:
        """Without noise, at the most images."""
        return math.exp(float(self._most.predict(_features([genome]))[0]))

    def volume(self, genomes: Sequence[Genome]) -> float:
        """Hypervolume of what is true, against the narrowest schedule's distance and all multiply-adds."""
        space = self.size.space
        worst = self.true((0,) * len(space.choices))
        return hypervolume([(self.true(g), space.cost(g)["macs_share"]) for g in genomes], (worst, 1.0001))

    def checked(self, others: Told) -> Mapping[str, Mapping[str, float]]:
        """By numbers of images, against what another seed's searches were told: rank correlation, share of the variance of the logarithm, and what is missed
        beside what the fit itself misses."""
        found = {}
        for images in sorted({images for _, images, _ in others} & self._lines.keys()):
            mine = [(genome, fd) for genome, count, fd in others if count == images]
            line, truth = self._lines[images], np.log([fd for _, fd in mine])
            guess = line.start + line.slope * self._most.predict(_features([genome for genome, _ in mine]))
            found[str(images)] = {
                "schedules": len(mine),
                "tau": float(kendalltau(guess, truth).statistic),
                "r2": float(1 - np.var(truth - guess) / np.var(truth)),
                "missed": float(np.sqrt(np.mean((truth - guess) ** 2))),
                "missed_by_the_fit": line.noise,
            }
        return found

    @cached_property
    def _most(self) -> Any:
        genomes, logs = self._at(self.size.half)
        return _regression().fit(_features(genomes), logs)

    @cached_property
    def _lines(self) -> Mapping[int, Line]:
        """What is missed at the most images is cross-validated; of a line there are too few parameters to need it."""
        from sklearn.model_selection import KFold, cross_val_predict

        genomes, logs = self._at(self.size.half)
        folds = KFold(5, shuffle=True, random_state=0)
        missed = logs - cross_val_predict(_regression(), _features(genomes), logs, cv=folds)
        found = {self.size.half: Line(0.0, 1.0, float(np.sqrt(np.mean(missed**2))))}
        for images in sorted({images for _, images, _ in self.told} - {self.size.half}):
            genomes, logs = self._at(images)
            slope, start = np.polyfit(at_most := self._most.predict(_features(genomes)), logs, 1)
            missed = logs - start - slope * at_most
            found[images] = Line(float(start), float(slope), float(np.sqrt(np.mean(missed**2))))
        return found

    def _at(self, images: int) -> tuple[list[Sequence[int]], npt.NDArray[np.float64]]:
        mine = [(genome, fd) for genome, count, fd in self.told if count == images]
        return [genome for genome, _ in mine], np.log([fd for _, fd in mine])

    def _drawn(self, genome: Genome, images: int, rng: np.random.Generator) -> tuple[float, tuple[float, ...]]:
        line = self._lines[images]
        value = line.start + line.slope * math.log(self.true(genome)) + line.noise * rng.standard_normal()
        # Such that their jackknife's error is the noise.
        each = rng.standard_normal(BLOCKS)
        each = (each - each.mean()) / each.std() / math.sqrt(BLOCKS - 1)
        return math.exp(value), tuple((math.exp(value) * (1 + line.noise * each)).tolist())


def _regression() -> Any:
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PolynomialFeatures, StandardScaler

    return make_pipeline(
        PolynomialFeatures(2, include_bias=False), StandardScaler(), RidgeCV(alphas=np.logspace(-3, 4, 15))
    )


def _features(genomes: Sequence[Sequence[int]]) -> npt.NDArray[np.float64]:
    return np.asarray(genomes, dtype=np.float64) - 1
