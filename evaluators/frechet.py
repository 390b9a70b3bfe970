"""Distances between feature distributions, Frechet's and the kernel distance, at a stated sample count with an error."""

from __future__ import annotations

import os
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import pairwise
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from cachetools import LRUCache

from evaluators.device import wait
from evaluators.features import AT_ONCE, Features, LoadedFeatures, SmallClassifier
from evaluators.grounds import nearer_than_held_out
from evaluators.images import check_shape, load_once, read_into
from evaluators.scoring import BLOCKS, Array, LoadedScore, Rows, Sampled
from evaluators.trajectories import Trajectories, batches
from nas.base.files import file_digest
from nas.contracts import Images, LoadedSupernet, Progress, Schedule, UserError, derive_seed, digest_of
from nas.recipes import recipe

EXACT_DIMENSIONS = 256
"""Up to here each jackknife replicate is a distance of its own; above, its first-order expansion about the value."""


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean (d,) and covariance (d, d) of features, float64. `device`: where eigenproblems are solved."""

    mean: Array
    covariance: Array
    device: str = "cpu"

    def distance(self, other: Gaussian) -> float:
        """`|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`, squared 2-Wasserstein distance of the two Gaussians.

        The trace of the root is the sum of the roots of the eigenvalues of S1^(1/2) S2 S1^(1/2), which is symmetric: real,
        stable where a covariance is singular, and several times faster than a general matrix root. S1^(1/2) is kept.
        """
        root = self._root
        eigenvalues = torch.linalg.eigvalsh(root @ self._here(other.covariance) @ root)
        return self._distance(other, float(eigenvalues.clamp(min=0).sqrt().sum()))

    def distance_and_slope(self, other: Gaussian) -> tuple[float, Array]:
        """The distance, and the derivative (d, d) of tr (S1 S2)^(1/2) after S2: R V diag(1 / 2 sqrt(l)) V^T R, where
        R = S1^(1/2) and V diag(l) V^T = R S2 R."""
        root = self._root
        values, vectors = torch.linalg.eigh(root @ self._here(other.covariance) @ root)
        roots = values.clamp(min=0).sqrt()
        # Directions without variance keep none when samples are left out, so they contribute no slope.
        inverse = torch.where(values > values[-1] * len(values) * 1e-15, 0.5 / roots, 0.0)
        turned = root @ vectors
        slope: Array = ((turned * inverse) @ turned.T).cpu().numpy()
        return self._distance(other, float(roots.sum())), slope

    def _distance(self, other: Gaussian, trace_of_root: float) -> float:
        shift = self.mean - other.mean
        return float(shift @ shift + np.trace(self.covariance) + np.trace(other.covariance) - 2 * trace_of_root)

    @property
    def _root(self) -> torch.Tensor:
        if "root" not in self.__dict__:
            values, vectors = torch.linalg.eigh(self._here(self.covariance))
            self.__dict__["root"] = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        root: torch.Tensor = self.__dict__["root"]
        return root

    def _here(self, matrix: Array) -> torch.Tensor:
        return torch.from_numpy(matrix).to(self.device)


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

    def gaussian(self, device: str = "cpu") -> Gaussian:
        """Unbiased covariance. Raises UserError for fewer than two samples."""
        if self.count < 2:
            raise UserError(f"a Frechet distance needs at least 2 samples, got {self.count}")
        mean = self.total / self.count
        return Gaussian(mean, (self.products - self.count * np.outer(mean, mean)) / (self.count - 1), device)


def frechet_with_replicates(features: npt.NDArray[Any], reference: Gaussian) -> tuple[float, tuple[float, ...]]:
    """Distance of features (n, d) to the reference, and its delete-a-block jackknife replicates."""
    blocks = [Moments.of(part) for part in np.array_split(features, min(BLOCKS, len(features)))]
    total = sum(blocks[1:], start=blocks[0])
    whole = total.gaussian()
    parts = [(total - block).gaussian() for block in blocks] if len(features) >= 4 else []
    if len(reference.mean) <= EXACT_DIMENSIONS:
        return reference.distance(whole), tuple(reference.distance(part) for part in parts)
    value, slope = reference.distance_and_slope(whole)
    return value, tuple(value + _change(whole, part, reference, slope) for part in parts)


def paired_frechet_with_replicates(
    features: npt.NDArray[Any], reference: npt.NDArray[Any]
) -> tuple[float, tuple[float, ...]]:
    """Distance between two sets of features (n, d) of the same noises; each replicate leaves out a block of both, so that the
    error is that of the paired comparison. Above 256 dimensions to first order in both covariances, and exactly in the means."""
    count = min(BLOCKS, len(features))
    mine, theirs = ([Moments.of(part) for part in np.array_split(rows, count)] for rows in (features, reference))
    whole, other = (sum(blocks[1:], start=blocks[0]) for blocks in (mine, theirs))
    pairs = zip(mine, theirs, strict=True) if len(features) >= 4 else ()
    parts = (((whole - a).gaussian(), (other - b).gaussian()) for a, b in pairs)
    first, second = whole.gaussian(), other.gaussian()
    if features.shape[1] <= EXACT_DIMENSIONS:
        return second.distance(first), tuple(b.distance(a) for a, b in parts)
    value, slope = second.distance_and_slope(first)
    _, back = first.distance_and_slope(second)
    changes = (
        _shift(a, b) - _shift(first, second) + _spread(first, a, slope) + _spread(second, b, back) for a, b in parts
    )
    return value, tuple(value + change for change in changes)


def _change(whole: Gaussian, part: Gaussian, reference: Gaussian, slope: Array) -> float:
    """Of the distance to the reference, to first order in the covariance and exactly in the mean."""
    return _shift(part, reference) - _shift(whole, reference) + _spread(whole, part, slope)


def _shift(one: Gaussian, other: Gaussian) -> float:
    between = one.mean - other.mean
    return float(between @ between)


def _spread(whole: Gaussian, part: Gaussian, slope: Array) -> float:
    """What the distance changes by with this covariance, to first order."""
    change = part.covariance - whole.covariance
    return float(np.trace(change) - 2 * (slope * change).sum())


def mean_kernel(features: npt.NDArray[Any]) -> float:
    """Mean of the kernel (x.y / d + 1)^3 over all pairs of different rows (n, d)."""
    x = torch.from_numpy(features).double()
    total = sum(float(_kernel(x[i : i + 1024], x).sum()) for i in range(0, len(x), 1024))
    return (total - float(((x * x).sum(1) / x.shape[1] + 1).pow(3).sum())) / (len(x) * (len(x) - 1))


def kernel_with_replicates(
    features: npt.NDArray[Any], reference: npt.NDArray[Any], among_reference: float
) -> tuple[float, tuple[float, ...]]:
    """Kernel distance (Binkowski et al. 2018): the unbiased squared MMD between features (n, d) and the reference's
    (m, d) under the kernel (x.y / d + 1)^3, over all pairs; and its jackknife replicates over blocks of the features.
    `among_reference`: the reference's `mean_kernel`, which is the same for every schedule."""
    x, y = torch.from_numpy(features).double(), torch.from_numpy(reference).double()
    n, m = len(x), len(y)
    sizes = np.array([len(part) for part in np.array_split(features, min(BLOCKS, n))])
    blocks = list(pairwise(np.cumsum([0, *sizes])))
    within, across = np.zeros((len(sizes), len(sizes))), np.zeros(len(sizes))
    for i, (start, stop) in enumerate(blocks):
        rows = _kernel(x[start:stop], x)
        rows[:, start:stop].fill_diagonal_(0.0)
        within[i] = [float(rows[:, a:b].sum()) for a, b in blocks]
        across[i] = float(_kernel(x[start:stop], y).sum())

    def distance(total: float, cross: float, count: int) -> float:
        return total / (count * (count - 1)) + among_reference - 2 * cross / (count * m)

    value = distance(within.sum(), across.sum(), n)
    if n < 4:
        return value, ()
    left = within.sum() - 2 * within.sum(1) + np.diag(within)
    return value, tuple(
        distance(total, across.sum() - cross, n - size) for total, cross, size in zip(left, across, sizes, strict=True)
    )


def _kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def in_batches(pixels: npt.NDArray[np.float32]) -> Iterator[torch.Tensor]:
    yield from (torch.from_numpy(pixels[start:stop]) for start, stop in batches(len(pixels), AT_ONCE))


def rows_of(features: LoadedFeatures, images: torch.Tensor, device: torch.device) -> npt.NDArray[np.float32]:
    """Features of images, (n, d); images as decoded are first clipped to [-1, 1], as samples are."""
    rows: npt.NDArray[np.float32] = features(images.to(device).clamp(-1, 1)).cpu().numpy()
    return rows


def feature_rows(trajectories: Trajectories, features: LoadedFeatures, identity: str) -> Rows:
    """Features of a schedule's samples. `identity`: of the extractor and its settings."""

    def make(schedule: Schedule, seed: int, start: int, stop: int) -> npt.NDArray[np.float32]:
        rows: npt.NDArray[np.float32] = features(trajectories.images(schedule, seed, start, stop)).cpu().numpy()
        return rows

    return Rows(f"features {identity}", make)


_OF_REAL_IMAGES: LRUCache[tuple[str, ...], Any] = LRUCache(4)
"""For each of a confirmation's judges."""


@recipe
class OfFeatures(Sampled):
    """Fields of the scores that compare features of samples with those of real images."""

    images: Images
    features: Features = field(default_factory=SmallClassifier)

    def describe(self) -> Mapping[str, Any]:
        return {
            "class": type(self).__name__,
            **self.describe_sampling(),
            "features": self.features.describe(),
            "images": load_once(self.images).digest,
        }

    def digest(self, folder: Path) -> str:
        return self._digest(self.features.digest(folder))

    def former_digest(self, folder: Path) -> str:
        """As ledgers were written when features were known by the bytes of their file."""
        former = getattr(self.features, "former_digest", self.features.digest)
        return self._digest(former(folder))

    def _digest(self, features: str) -> str:
        return digest_of({**self.describe(), "features": features})

    def prepare(self, folder: Path, seed: int, device: str) -> Iterator[Progress]:
        yield from read_into(self.images, folder)
        yield from self.prepare_conditions(folder, device)
        yield from self.features.prepare(load_once(self.images), folder, seed, device)

    def check(self) -> None:
        """Raises UserError where a file that it needs is missing or of another kind; before anything is trained."""
        getattr(self.images, "peek", lambda: None)()
        self.features.width()

    def features_identity(self, folder: Path) -> str:
        return digest_of({"recipe": self.features.describe(), "prepared": self.features.digest(folder)})

    def load_features(self, supernet: LoadedSupernet, folder: Path) -> LoadedFeatures:
        """Raises UserError where the images do not have the supernet's shape."""
        for _ in read_into(self.images, folder):  # in a worker they are found where they were kept
            pass
        check_shape(load_once(self.images), supernet.image_shape)
        return self.features.load(folder, supernet.device)

    def label(self, name: str, count: int, features: LoadedFeatures) -> str:
        """What a score of so many samples is called."""
        held_out = load_once(self.images).held_out
        against = f" to {len(held_out):,} held-out images" if held_out else ""
        return f"{name}@{count}{against} ({features.label})"

    def once(self, make: Callable[[], Any], folder: Path, device: torch.device) -> Any:
        """What is made of the real images' features, which are the same for each search of a run, and of many images take long."""
        key = (type(self).__name__, load_once(self.images).digest, self.features_identity(folder), str(device))
        if key not in _OF_REAL_IMAGES:
            _OF_REAL_IMAGES[key] = make()
        return _OF_REAL_IMAGES[key]

    def real_rows(self, features: LoadedFeatures, device: torch.device) -> Iterator[npt.NDArray[np.float32]]:
        """Features of the real images that samples are compared with, in batches."""
        yield from (rows_of(features, part, device) for part in in_batches(load_once(self.images).reference.pixels))


@recipe
class Frechet(OfFeatures):
    """Frechet distance of a schedule's samples to the reference images. Value: "fd".

    It estimates how far the two feature distributions are apart, and is biased upwards by about 1 / samples: compare
    scores of the same rung only. It sees means and covariances alone: memorised images and fine detail below the
    features' notice go unpunished.

    `reference`: an `.npz` with `mu` and `sigma` (the standard FID statistics) instead of the images' own features.
    Above 256 feature dimensions the standard error is of first order, and too small where samples are fewer than
    dimensions.
    """

    reference: str | None = None
    base: str = field(default_factory=os.getcwd, repr=False, compare=False, kw_only=True)
    metrics = ("fd",)

    def describe(self) -> Mapping[str, Any]:
        return {**super().describe(), "reference": self.reference}

    def _digest(self, features: str) -> str:
        reference = None if self.reference is None else file_digest(self._reference())
        return digest_of({**self.describe(), "features": features, "reference": reference})

    def _reference(self) -> Path:
        path = Path(self.base) / Path(self.reference or "").expanduser()
        if not path.is_file():
            raise UserError(f"statistics {path} do not exist; give the path of an .npz file with mu and sigma")
        return path

    def check(self) -> None:
        super().check()
        if self.reference is not None:
            read_statistics(self._reference(), self.features.width())

    def load(self, supernet: LoadedSupernet, folder: Path) -> LoadedScore:
        features = self.load_features(supernet, folder)
        device = str(supernet.device) if supernet.device.type == "cuda" else "cpu"  # others may lack float64
        if self.reference is None:
            # One at a time: of Inception's features each batch has 34 MB of moments.
            rows = self.real_rows(features, supernet.device)
            reference: Gaussian = self.once(
                lambda: reduce(add, map(Moments.of, rows)).gaussian(device), folder, supernet.device
            )
        else:
            reference = replace(read_statistics(self._reference()), device=device)
        return LoadedFrechet(
            reference,
            self,
            trajectories := self.trajectories(supernet, folder),
            "fd",
            feature_rows(trajectories, features, self.features_identity(folder)),
            lambda rows: frechet_with_replicates(rows, reference),
            lambda count: (
                self.label(features.distance, count, features)
                if self.reference is None
                else f"{features.distance}@{count} ({features.label})"
            ),
            features,
        )


class LoadedFrechet(LoadedScore):
    """A Frechet distance that also says what it stands on."""

    def __init__(self, reference: Gaussian, recipe: Frechet, *given: Any) -> None:
        *shared, self.features = given
        self._reference = reference
        super().__init__(recipe, *shared)
        self._images = recipe.images
        self._file = recipe.reference

    def grounds(self, schedule: Schedule, count: int, seed: int) -> dict[str, Any] | None:
        """Distances to what samples are compared with, below which no schedule gets: of as many train images as a schedule has samples (of all, where there are
        fewer), and where states are latents of the held-out images' reconstructions; and `nearer_than_held_out` of `count` samples. None where no image is held
        out."""
        data, device = load_once(self._images), self.supernet.device
        if data.held_out is None:
            return None
        train, held_out = (
            np.concatenate([rows_of(self.features, part, device) for part in in_batches(images.pixels)])
            for images in (data, data.held_out)
        )
        most = min(len(train), self.recipe.rungs[-1])
        few = train[np.random.default_rng(derive_seed(seed, "floor")).choice(len(train), most, replace=False)]
        found: dict[str, Any] = {
            "train": most,
            "held_out": len(held_out),
            "fd_of_train_images": frechet_with_replicates(few, self._reference)[0],
            **({} if self._file is None else {"reference": self._file}),
            "samples": count,
            "nearer": nearer_than_held_out(self.rows_of(schedule, count, seed), train, held_out),
        }
        if not getattr(self.supernet, "in_pixels", True):
            again = [
                rows_of(self.features, self.supernet.to_images(self.supernet.to_states(part.to(device))), device)
                for part in in_batches(data.held_out.pixels)
            ]
            found["fd_of_reconstructions"] = frechet_with_replicates(np.concatenate(again), self._reference)[0]
        return found

    def seconds_of_images(self, count: int) -> float:
        """What it takes `grounds` of so many samples to look at images, and where states are latents to decode them, measured on a few."""
        data, few = load_once(self._images), 4
        if data.held_out is None:
            return 0.0
        pixels, net = torch.from_numpy(data.pixels[:few]), self.supernet
        each = _seconds(lambda: rows_of(self.features, pixels, net.device), net.device)
        total = each * (len(data) + len(data.held_out) + count)
        if not getattr(net, "in_pixels", True):
            decoding = _seconds(lambda: net.to_images(net.to_states(pixels.to(net.device))), net.device)
            total += decoding * (len(data.held_out) + count)
        return total / len(pixels)


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    wait(device)
    started = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - started


@recipe
class KernelDistance(OfFeatures):
    """Kernel distance of a schedule's samples to the images (KID where the features are Inception's). Value: "kid".

    It estimates the squared maximum mean discrepancy without bias, so that small sample counts are right on average, and
    may be negative. Its cubic kernel weighs outliers more than the Frechet distance does; on few samples its error is
    larger in proportion.
    """

    metrics = ("kid",)

    def load(self, supernet: LoadedSupernet, folder: Path) -> LoadedScore:
        features = self.load_features(supernet, folder)

        def made() -> tuple[npt.NDArray[np.float32], float]:
            rows = np.concatenate([*self.real_rows(features, supernet.device)])
            return rows, mean_kernel(rows)

        reference, among_reference = self.once(made, folder, supernet.device)
        return LoadedScore(
            self,
            trajectories := self.trajectories(supernet, folder),
            "kid",
            feature_rows(trajectories, features, self.features_identity(folder)),
            lambda rows: kernel_with_replicates(rows, reference, among_reference),
            lambda count: self.label("KID" if features.distance == "FID" else "KD", count, features),
        )


def read_statistics(path: Path, dimensions: int | None = None) -> Gaussian:
    """The `mu` and `sigma` of a standard FID statistics file. Raises UserError where it holds anything else, such as what is no
    covariance: finite, symmetric, without negative variance, all but for rounding. `dimensions`: of the features, where known."""
    if not path.is_file():
        raise UserError(f"statistics {path} cannot be read: there is no such file; give an .npz file with mu and sigma")
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, covariance = file["mu"].astype(np.float64), file["sigma"].astype(np.float64)
    except (EOFError, ValueError, TypeError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as FID statistics with 'mu' and 'sigma' ({error})") from error
    if mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
        raise UserError(f"{path}: mu of shape {mean.shape} and sigma of shape {covariance.shape} do not fit together")
    if dimensions is not None and len(mean) != dimensions:
        raise UserError(
            f"{path}: mu and sigma are of {len(mean)} dimensions, the features of {dimensions}; use the extractor's own statistics"
        )
    for name, values in (("mu", mean), ("sigma", covariance)):
        if not np.isfinite(values).all():
            place = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
            raise UserError(f"{path}: {name}{list(place)} is {values[place]}; make the statistics anew")
    scale = float(np.abs(covariance).max())
    # Statistics are often kept in float32: symmetric sums differ by its rounding, and zero variances may come out below zero.
    odd = np.abs(covariance - covariance.T)
    if odd.max() > 1e-4 * scale:
        i, j = (int(k) for k in np.unravel_index(int(odd.argmax()), odd.shape))
        raise UserError(
            f"{path}: sigma is not symmetric, sigma[{i}, {j}] is {covariance[i, j]:.6g} and sigma[{j}, {i}] {covariance[j, i]:.6g}; make it anew"
        )
    covariance = (covariance + covariance.T) / 2
    least = float(np.linalg.eigvalsh(covariance)[0])
    if least < -1e-3 * scale:
        raise UserError(f"{path}: sigma has the negative eigenvalue {least:.4g}, so it is no covariance; make it anew")
    return Gaussian(mean, covariance)
