"""Frechet distance between feature distributions, at a stated sample count and with a standard error."""

from __future__ import annotations

import hashlib
import time
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from evaluators.features import Features, LoadedFeatures, SmallClassifier
from evaluators.images import check_shape, load_once
from evaluators.sampling import DDIM, Sampler, sample
from nas.contracts import Images, LoadedSupernet, Progress, Schedule, Score, UserError, digest_of

Array = npt.NDArray[np.float64]

BLOCKS = 20
"""Blocks of samples that the jackknife leaves out in turn."""


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean (d,) and covariance (d, d) of features."""

    mean: Array
    covariance: Array

    def distance(self, other: Gaussian) -> float:
        """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), squared 2-Wasserstein distance of the two Gaussians.

        The trace of the root is the sum of the roots of the eigenvalues of S1^(1/2) S2 S1^(1/2), which is symmetric: real,
        stable where a covariance is singular, and several times faster than a general matrix root.
        """
        root = self._root()
        eigenvalues = np.linalg.eigvalsh(root @ other.covariance @ root)
        product = np.sqrt(eigenvalues.clip(min=0)).sum()
        shift = self.mean - other.mean
        return float(shift @ shift + np.trace(self.covariance) + np.trace(other.covariance) - 2 * product)

    def _root(self) -> Array:
        if "root" not in self.__dict__:
            values, vectors = np.linalg.eigh(self.covariance)
            self.__dict__["root"] = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
        root: Array = self.__dict__["root"]
        return root


@dataclass(frozen=True, eq=False)
class Moments:
    """Sufficient statistics of features, additive over samples: count, sum (d,), sum of outer products (d, d)."""

    count: int
    total: Array
    products: Array

    @classmethod
    def of(cls, features: npt.NDArray[Any]) -> Moments:
        rows = features.astype(np.float64)
        return cls(len(rows), rows.sum(0), rows.T @ rows)

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.total + other.total, self.products + other.products)

    def __sub__(self, other: Moments) -> Moments:
        return Moments(self.count - other.count, self.total - other.total, self.products - other.products)

    def gaussian(self) -> Gaussian:
        """Unbiased covariance. Raises UserError for fewer than two samples."""
        if self.count < 2:
            raise UserError(f"a Frechet distance needs at least 2 samples, got {self.count}")
        mean = self.total / self.count
        return Gaussian(mean, (self.products - self.count * np.outer(mean, mean)) / (self.count - 1))


def frechet_with_replicates(features: npt.NDArray[Any], reference: Gaussian) -> tuple[float, tuple[float, ...]]:
    """Distance of features (n, d) to the reference, and its delete-a-block jackknife replicates.

    Blocks are of neighbouring samples, so two schedules scored on the same seed share them.
    """
    blocks = [Moments.of(part) for part in np.array_split(features, min(BLOCKS, len(features)))]
    total = sum(blocks[1:], start=blocks[0])
    replicates = tuple(reference.distance((total - block).gaussian()) for block in blocks) if len(features) >= 4 else ()
    return reference.distance(total.gaussian()), replicates


@dataclass(frozen=True)
class Frechet:
    """Frechet distance of a schedule's samples to the reference images. Value: "fd".

    It estimates how far the two feature distributions are apart, and is biased upwards by about 1 / samples: compare
    scores of the same rung only. It sees means and covariances alone: memorised images and fine detail below the
    features' notice go unpunished.

    `rungs`: sample counts, increasing; the last verifies. `reference`: an `.npz` with `mu` and `sigma` (the standard
    FID statistics) instead of the images' own features. `batch`: samples per network call, a matter of speed alone.
    """

    images: Images
    rungs: tuple[int, ...] = (512, 2048)
    features: Features = field(default_factory=SmallClassifier)
    sampler: Sampler = field(default_factory=DDIM)
    reference: str | None = None
    batch: int = 256
    metrics = ("fd",)

    def __post_init__(self) -> None:
        if not self.rungs or min(self.rungs) < 2 or list(self.rungs) != sorted(set(self.rungs)):
            raise UserError(f"rungs {self.rungs} must be increasing sample counts of at least 2")

    def describe(self) -> Mapping[str, Any]:
        return {
            "class": "Frechet",
            "rungs": self.rungs,
            "features": self.features.describe(),
            "sampler": self.sampler.describe(),
            "reference": self.reference,
            "images": load_once(self.images).digest,
        }

    def digest(self, folder: Path) -> str:
        reference = None if self.reference is None else hashlib.sha256(Path(self.reference).read_bytes()).hexdigest()
        return digest_of({**self.describe(), "features": self.features.digest(folder), "reference": reference})

    def prepare(self, folder: Path, seed: int, device: str) -> Iterator[Progress]:
        if self.reference is not None:
            read_statistics(Path(self.reference))
        yield from self.features.prepare(load_once(self.images), folder, seed, device)

    def load(self, supernet: LoadedSupernet, folder: Path) -> LoadedFrechet:
        images = load_once(self.images)
        check_shape(images, supernet.image_shape)
        features = self.features.load(folder, supernet.device)
        if self.reference is None:
            rows = [
                features(torch.from_numpy(part).to(supernet.device)).cpu().numpy()
                for part in _batches(images.pixels, self.batch)
            ]
            reference = sum((Moments.of(r) for r in rows[1:]), start=Moments.of(rows[0])).gaussian()
        else:
            reference = read_statistics(Path(self.reference))
        return LoadedFrechet(self, supernet, features, reference)


class LoadedFrechet:
    def __init__(
        self, recipe: Frechet, supernet: LoadedSupernet, features: LoadedFeatures, reference: Gaussian
    ) -> None:
        self.recipe = recipe
        self.supernet = supernet
        self.sampler = recipe.sampler.describe()
        self.features = features
        self.reference = reference

    def __call__(self, schedule: Schedule, rung: int, seed: int) -> Score:
        started = time.perf_counter()
        rows = np.concatenate([self.features(images).cpu().numpy() for images in self._batches(schedule, rung, seed)])
        if not np.isfinite(rows).all():
            raise FloatingPointError(f"schedule {schedule.digest} gives samples that are not finite")
        value, replicates = frechet_with_replicates(rows, self.reference)
        spent = {
            "calls": float(rung * len(schedule.steps)),
            "macs": float(rung * sum(self.supernet.macs(step.arch) for step in schedule.steps)),
            "seconds": time.perf_counter() - started,
        }
        label = f"{self.features.distance}@{rung} ({self.features.label})"
        return Score({"fd": value}, {"fd": replicates}, spent, {"fd": label})

    def sample(self, schedule: Schedule, count: int, seed: int) -> torch.Tensor:
        return torch.cat(list(self._batches(schedule, count, seed)))

    def _batches(self, schedule: Schedule, count: int, seed: int) -> Iterator[torch.Tensor]:
        for start in range(0, count, self.recipe.batch):
            stop = min(start + self.recipe.batch, count)
            yield sample(self.supernet, schedule, self.recipe.sampler, seed, start, stop)


def read_statistics(path: Path) -> Gaussian:
    """The `mu` and `sigma` of a standard FID statistics file. Raises UserError where it holds anything else."""
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, covariance = file["mu"].astype(np.float64), file["sigma"].astype(np.float64)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as FID statistics with 'mu' and 'sigma' ({error})") from error
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(f"{path}: mu of shape {mean.shape} and sigma of shape {covariance.shape} do not fit together")
    return Gaussian(mean, covariance)


def _batches(pixels: npt.NDArray[np.float32], size: int) -> Iterator[npt.NDArray[np.float32]]:
    for start in range(0, len(pixels), size):
        yield pixels[start : start + size]
