"""How far samples are from the full model's own of the same noise, seen by features: scores that need no image of a data set.

What the full model runs is said as in `proxies`: `timesteps` and `guidance`, or each schedule's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field
from scipy.spatial.distance import cdist

from evaluators.features import ExternalFeatures
from evaluators.frechet import feature_rows, paired_frechet_with_replicates
from evaluators.images import check_shape, load_once
from evaluators.proxies import OfImages, Scale, Taught, beside_teacher
from evaluators.sampling import predict, step_noise
from evaluators.scoring import BLOCKS, LoadedScore, Rows, mean_with_replicates
from nas.contracts import LoadedSupernet, Schedule, Step, UserError, digest_of
from nas.recipes import recipe

Rows32 = npt.NDArray[np.float32]

SEEN_AT = 0.9
"""abar of the timestep at which the network looks at samples: little noise, so that what it sees is the image."""

NOISE = 2**20
"""Stands where the number of a sampler's step would, so that this noise is that of none."""


@recipe
class TeacherPerceptual(Taught, OfImages):
    """Mean squared distance of an extractor's features of the final samples to those of the full model's with the same noise, relative to how far apart two of
    the full model's own are on average. Value: "teacher_perceptual", 0 for equal samples, about 1 for unrelated ones.

    It estimates how much of what the extractor sees has changed in each sample, and forgives what it does not see.
    """

    features: ExternalFeatures
    timesteps: tuple[int, ...] | None = None
    guidance: Scale | None = None
    metrics: ClassVar[tuple[str, ...]] = ("teacher_perceptual",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_teacher()

    def describe(self) -> Mapping[str, Any]:
        return {**super().describe(), **self.describe_teacher(), "features": self.features.describe()}

    def check(self) -> None:
        """Raises UserError where the extractor's file is missing or of another kind."""
        self.features.width()

    def load(self, supernet: LoadedSupernet, folder: Path) -> LoadedScore:
        check_shape(load_once(self.images), supernet.image_shape)
        trajectories, features = self.trajectories(supernet, folder), self.features.load(folder, supernet.device)
        mine = feature_rows(trajectories, features, digest_of(self.features.describe()))
        return beside_teacher(
            self,
            supernet,
            trajectories,
            mine,
            _relative,
            lambda count: f"distance of features to the full model's samples@{count} ({features.label})",
        )


@recipe
class OfNetwork(Taught, OfImages):
    """Fields of the scores by features that the full network itself has of samples: the output of its middle block at a timestep of little noise, without
    condition, mean over places. `dimensions`: of more channels so many random projections are taken."""

    timesteps: tuple[int, ...] | None = None
    guidance: Scale | None = None
    dimensions: Annotated[int, Field(ge=2, le=4096)] = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_teacher()

    def describe(self) -> Mapping[str, Any]:
        return {**super().describe(), **self.describe_teacher(), "dimensions": self.dimensions}

    def compared(self, net: LoadedSupernet, folder: Path, statistic: Any, words: str) -> LoadedScore:
        """A statistic of the features of a schedule's samples and of the full model's. `words`: what it is, for people."""
        check_shape(load_once(self.images), net.image_shape)
        trajectories = self.trajectories(net, folder)
        abar = net.alphas_cumprod
        seen_at = int(np.abs(abar - SEEN_AT).argmin())
        [block] = _middle(net)
        step = Step(seen_at, net.full_arch)

        def seen(schedule: Schedule, seed: int, start: int, stop: int) -> Rows32:
            x = trajectories.final(schedule, seed, start, stop)
            noise = step_noise(seed, start, stop, net.state_shape, NOISE).to(x)
            told = None if trajectories.conditions is None else trajectories.conditions.of(seed, start, stop)
            null = None if told is None else net.null_condition(told)
            noised = sqrt(abar[seen_at]) * x + sqrt(1 - abar[seen_at]) * noise
            _, kept = predict(net, step, noised, None, trajectories.precision, (block,), null)
            trajectories.meter.calls += len(x)
            trajectories.meter.macs += len(x) * net.macs(step)
            # Channels stand second in a map, last in a sequence.
            output = next(rows for name, rows in kept.items() if name != "prediction").float()
            rows = output.mean((2, 3)) if output.ndim == 4 else output.mean(1)
            return _projected(rows.cpu().numpy(), self.dimensions)

        mine = Rows(f"the network's {block} at {seen_at}, {self.dimensions}", seen)
        return beside_teacher(
            self, net, trajectories, mine, statistic, lambda count: f"{words}@{count} (by the network's own {block})"
        )


@recipe
class NetworkFrechet(OfNetwork):
    """Frechet distance of a schedule's samples to the full model's with the same noise, of features that the full network itself has of them. Value:
    "fd_network".

    It estimates how much of the full model's distribution is lost, for models that nobody has an extractor or images for. It misleads where the network does
    not see what people do, and as `TeacherFrechet` does.
    """

    metrics: ClassVar[tuple[str, ...]] = ("fd_network",)

    def load(self, supernet: LoadedSupernet, folder: Path) -> LoadedScore:
        return self.compared(supernet, folder, paired_frechet_with_replicates, "FD to the full model's samples")


@recipe
class NetworkAgreement(OfNetwork):
    """Share of a schedule's samples that, by features that the full network itself has of them, are nearer to another sample of the full model's than to that
    of the same noise. Value: "teacher_disagreement", 0 where each is recognised.

    It sees which samples have become others, and forgives what changes within each; it grows with the number of samples, among which each is looked for.
    """

    metrics: ClassVar[tuple[str, ...]] = ("teacher_disagreement",)

    def load(self, supernet: LoadedSupernet, folder: Path) -> LoadedScore:
        return self.compared(supernet, folder, _others, "samples nearer to another one of the full model's")


def _middle(net: LoadedSupernet) -> tuple[str]:
    """The block in the middle of the forward pass, by one branch of which its output goes on."""
    blocks = net.blocks(net.full_arch)
    if not blocks:
        raise UserError("the network has no blocks whose outputs could be kept; use another score")
    middle = "mid" if "mid" in blocks else blocks[len(blocks) // 2]
    branches = [name for name in net.blocks(net.full_arch, True) if name.partition(".")[0] == middle]
    return (branches[-1],)


def _projected(rows: npt.NDArray[np.float32], dimensions: int) -> Rows32:
    if rows.shape[1] <= dimensions:
        return rows
    directions = np.random.default_rng(0).standard_normal((rows.shape[1], dimensions)) / sqrt(rows.shape[1])
    return (rows @ directions).astype(np.float32)


def _relative(mine: npt.NDArray[Any], theirs: npt.NDArray[Any]) -> tuple[float, tuple[float, ...]]:
    """Mean squared distance of rows, over that of two different rows of `theirs`, twice their variance."""
    apart = 2 * float(theirs.astype(np.float64).var(0, ddof=1).sum())
    distance = np.square(mine.astype(np.float64) - theirs).sum(1)
    return mean_with_replicates(distance / max(apart, np.finfo(float).tiny))


def _others(mine: npt.NDArray[Any], theirs: npt.NDArray[Any]) -> tuple[float, tuple[float, ...]]:
    """Share of rows to which another row of `theirs` is nearer than that of the same place, and its jackknife replicates."""
    own = np.square(mine.astype(np.float64) - theirs).sum(1)
    nearest = [cdist(part, theirs, "sqeuclidean").min(1) for part in np.array_split(mine.astype(np.float64), BLOCKS)]
    # Equal rows have a distance of rounding alone.
    return mean_with_replicates(np.concatenate(nearest) < own * (1 - 1e-9))
