"""A model that ranks genomes, made from those that have been scored: for screening candidates before any of them is run.

Additive in the genes, each gene's options in their order: a ridge regression of the scores' normal ranks, so that a few very
bad schedules do not decide it. Its worth is Kendall's tau of predictions for genomes that it was not fitted to, which leaving one out
gives in closed form.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri
from threadpoolctl import threadpool_limits

from nas.contracts import Genome

Array = npt.NDArray[np.float64]

MOST = 256
"""Scores that a search fits its model to, the latest: enough for an order, and quick with a thousand genes."""

PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0)
"""Ridge penalties, relative to the mean squared length of a genome's code; the one that predicts best is kept."""


class Ranking:
    """`genomes` and their scores, lower is better. `options`: how many each gene has. `tau`: held out."""

    def __init__(self, genomes: Sequence[Genome], scores: Sequence[float], options: Sequence[int]) -> None:
        from scipy.stats import kendalltau, rankdata  # most of a second, which commands that search nothing do without

        self._steps = np.array([step for size in options for step in range(1, size)], dtype=np.int64)
        self._count = len(options)
        self._genes = np.repeat(np.arange(len(options)), [size - 1 for size in options])
        ranks = ndtri((rankdata(scores) - 0.5) / len(scores))
        codes = self._coded(genomes)
        self._mean = codes.mean(0)
        centred = codes - self._mean
        with threadpool_limits(1, "blas"):  # small matrices: threads would only wait for each other
            values, vectors = np.linalg.eigh(centred @ centred.T)
        values = np.maximum(values, 0.0)
        projected = vectors.T @ ranks
        scale = max(float(values.mean()), 1e-12)
        best = np.inf
        for penalty in PENALTIES:
            inverse = 1.0 / (values + penalty * scale)
            dual = vectors @ (inverse * projected)
            left_out = dual / ((vectors**2) @ inverse)
            if (error := float(left_out @ left_out)) < best:
                best, predicted, self._weights = error, ranks - left_out, centred.T @ dual
        found = kendalltau(predicted, ranks).statistic
        self.tau = float(found) if np.isfinite(found) else 0.0
        self.ranks = ranks

    def predict(self, genomes: Sequence[Genome]) -> Array:
        """Expected normal rank of each, lower is better: (n,)."""
        predicted: Array = (self._coded(genomes) - self._mean) @ self._weights
        return predicted

    def effects(self) -> list[Array]:
        """For each gene, what each of its options adds to the expected normal rank, against the first option."""
        starts = np.searchsorted(self._genes, np.arange(1, self._count))
        return [np.append(0.0, steps.cumsum()) for steps in np.split(self._weights, starts)]

    def _coded(self, genomes: Sequence[Genome]) -> Array:
        """For each gene and each of its options but the first: has the gene this option or a later one? (n, sum of sizes - 1)"""
        genes = np.asarray(genomes, dtype=np.int64)[:, self._genes]
        return (genes >= self._steps).astype(np.float64)
