"""Cheaper scores, to be audited before they are trusted: distances to the full model, denoising loss, additive tables.

The full model is the supernet's whole network on `timesteps`, guided at `guidance` throughout, by the evaluator's first sampler, or on the schedule's own
and guided as that is where `timesteps` is None. With the same noise it gives every sample a counterpart, so these scores are paired by construction and need few samples; none of them
can show that a schedule is better than the full model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from evaluators.features import in_parts
from evaluators.frechet import OfFeatures, feature_rows, paired_frechet_with_replicates
from evaluators.images import check_shape, load_once, read_into
from evaluators.sampling import Sampler, State, predict, step_noise
from evaluators.scoring import AroundAnother, LoadedScore, Rows, Sampled, mean_with_replicates
from evaluators.trajectories import Trajectories
from nas.contracts import (
    Arch,
    Evaluator,
    Guidance,
    Images,
    LoadedEvaluator,
    LoadedSupernet,
    Progress,
    Schedule,
    Score,
    Step,
    UserError,
    conditions_of,
    derive_seed,
    digest_of,
)
from nas.recipes import Count, recipe

Floats = npt.NDArray[np.floating[Any]]


Scale = Annotated[float, Field(gt=0, le=1000)]


def whole(
    arch: Arch, schedule: Schedule, timesteps: tuple[int, ...] | None = None, guidance: float | None = None
) -> Schedule:
    """One arch on the given timesteps, guiding itself by this scale, by the evaluator's first sampler; or on the schedule's, where it guides itself as the
    schedule is guided, by the schedule's sampler."""
    if timesteps is not None:
        by = None if guidance is None else Guidance(guidance)
        return Schedule(tuple(Step(t, arch, (), by) for t in timesteps))
    alone = [step.guidance and Guidance(step.guidance.scale) for step in schedule.steps]
    steps = tuple(Step(step.timestep, arch, (), by) for step, by in zip(schedule.steps, alone, strict=True))
    return Schedule(steps, schedule.sampler)


class Taught:
    """What the scores share that compare with the full model."""

    timesteps: tuple[int, ...] | None
    guidance: float | None
    sampler: Sampler | tuple[Sampler, ...]

    def check_teacher(self) -> None:
        """Raises UserError for a guidance without timesteps."""
        if self.guidance is not None and self.timesteps is None:
            raise UserError(
                f"guidance={self.guidance:g} is the full model's on timesteps of its own; give timesteps=, or leave it out to guide it as each schedule is"
            )

    def describe_teacher(self) -> dict[str, Any]:
        """Guidance is left out where there is none, as before there was any; the sampler where there is one alone."""
        first = {"sampled": "by the first"} if self.timesteps and isinstance(self.sampler, tuple) else {}
        return {"timesteps": self.timesteps, **({} if self.guidance is None else {"guidance": self.guidance}), **first}

    def teacher(self, net: LoadedSupernet, schedule: Schedule) -> Schedule:
        """What the full model runs, beside this schedule."""
        return whole(net.full_arch, schedule, self.timesteps, self.guidance)

    @property
    def teacher_words(self) -> str:
        """Names it, where rows are kept."""
        return f"{self.timesteps}" + ("" if self.guidance is None else f" guided at {self.guidance:g}")


def beside_teacher(
    recipe: Any, net: LoadedSupernet, trajectories: Trajectories, mine: Rows, statistic: Any, label: Any
) -> LoadedScore:
    """A score of the rows of a schedule's samples and of the full model's, both halves given to the statistic."""

    def make(schedule: Schedule, seed: int, start: int, stop: int) -> Floats:
        teacher = recipe.teacher(net, schedule)
        key = (mine.name, teacher.digest, seed, start, stop)
        theirs = trajectories.kept(key, lambda: mine.make(teacher, seed, start, stop), 0, 0)
        return np.concatenate([mine.make(schedule, seed, start, stop), theirs], axis=1)

    return LoadedScore(
        recipe,
        trajectories,
        recipe.metrics[0],
        Rows(f"{mine.name} beside the full model's on {recipe.teacher_words}", make),
        lambda rows: statistic(*np.split(rows, 2, axis=1)),
        label,
    )


@recipe
class TeacherFrechet(Taught, OfFeatures):
    """Frechet distance of a schedule's samples to the full model's with the same noise. Value: "fd_teacher".

    It estimates how much of the full model's distribution is lost, and needs no reference images (they only train the small
    classifier, where that is the extractor). It misleads where a schedule improves on the full model: that counts as loss.
    """

    timesteps: tuple[int, ...] | None = None
    guidance: Scale | None = None
    metrics = ("fd_teacher",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_teacher()

    def describe(self) -> Mapping[str, Any]:
        return {**super().describe(), **self.describe_teacher()}

    def load(self, supernet: LoadedSupernet, folder: Path) -> LoadedScore:
        features = self.load_features(supernet, folder)
        trajectories = self.trajectories(supernet, folder)
        mine = feature_rows(trajectories, features, self.features_identity(folder))

        return beside_teacher(
            self,
            supernet,
            trajectories,
            mine,
            paired_frechet_with_replicates,
            lambda count: f"{features.distance} to the full model's samples@{count} ({features.label})",
        )


@recipe
class OfImages(Sampled):
    """Fields of the scores that need no features. The images say what the study is about."""

    images: Images

    def describe(self) -> Mapping[str, Any]:
        return {
            "class": type(self).__name__,
            **self.describe_sampling(),
            "images": load_once(self.images).digest,
        }

    def digest(self, folder: Path) -> str:
        return digest_of(self.describe())

    def prepare(self, folder: Path, seed: int, device: str) -> Iterator[Progress]:
        yield from read_into(self.images, folder)
        yield from self.prepare_conditions(folder, device)


@recipe
class TeacherDistance(Taught, OfImages):
    """Mean squared distance, per pixel, of the final samples to the full model's with the same noise. Value: "teacher_mse".

    It estimates how far each single sample is moved. It misleads where samples change and stay as good: the distance between
    two fine samples counts as much as that between a fine and a broken one.
    """

    timesteps: tuple[int, ...] | None = None
    guidance: Scale | None = None
    metrics: ClassVar[tuple[str, ...]] = ("teacher_mse",)
    what: ClassVar[str] = "squared distance to the full model's"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_teacher()

    def describe(self) -> Mapping[str, Any]:
        return {**super().describe(), **self.describe_teacher()}

    def between(self, mine: torch.Tensor, theirs: torch.Tensor) -> Floats:
        """One number for each pair of images."""
        return _mean_square(mine - theirs)

    def load(self, supernet: LoadedSupernet, folder: Path) -> LoadedScore:
        check_shape(load_once(self.images), supernet.image_shape)
        trajectories = self.trajectories(supernet, folder)

        def make(schedule: Schedule, seed: int, start: int, stop: int) -> Floats:
            teacher = self.teacher(supernet, schedule)
            key = ("images", teacher.digest, seed, start, stop)
            theirs = trajectories.kept(key, lambda: trajectories.images(teacher, seed, start, stop, again=False), 0, 0)
            return self.between(trajectories.images(schedule, seed, start, stop), theirs)

        return LoadedScore(
            self,
            trajectories,
            self.metrics[0],
            Rows(f"{self.what} images on {self.teacher_words}", make),
            mean_with_replicates,
            lambda count: f"{self.what} samples@{count}",
        )


@recipe
class TeacherSimilarity(TeacherDistance):
    """1 - SSIM (Wang et al. 2004; Gaussian window of 11 pixels, sigma 1.5) of the final samples and the full model's with the same
    noise, mean over samples, as Diff-Pruning and DiP-GO report it. Value: "teacher_dissimilarity", 0 for equal samples.

    It estimates how much of each sample's structure is kept. It misleads as `TeacherDistance` does, and on images of a few pixels,
    where the window sees all of them at once. Intensities are those of pictures, from 0 to 1: of numbers around 0 the means that it compares say nothing.
    """

    metrics: ClassVar[tuple[str, ...]] = ("teacher_dissimilarity",)
    what: ClassVar[str] = "1 - SSIM with the full model's"

    def describe(self) -> Mapping[str, Any]:
        return {**super().describe(), "intensities": [0, 1]}

    def between(self, mine: torch.Tensor, theirs: torch.Tensor) -> Floats:
        from torchmetrics.functional.image import structural_similarity_index_measure as ssim

        def similarity(mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
            found = ssim(mine / 2 + 0.5, theirs / 2 + 0.5, reduction="none", data_range=1.0)
            assert isinstance(found, torch.Tensor)
            return found.reshape(len(mine))

        return 1 - in_parts(similarity)(mine, theirs).cpu().double().numpy()


@recipe
class TrajectoryDistance(OfImages):
    """Squared distance, per pixel, that each step alone adds along the full model's trajectory, summed over steps. Value:
    "trajectory_mse".

    Each step starts from the full model's own state, so steps are measured once for all schedules. It estimates local error; it
    misleads where later steps repair an error, or amplify it.
    """

    metrics = ("trajectory_mse",)

    def load(self, supernet: LoadedSupernet, folder: Path) -> LoadedScore:
        check_shape(load_once(self.images), supernet.image_shape)
        trajectories = self.trajectories(supernet, folder)

        def changed(schedule: Schedule) -> list[int]:
            _refuse_reuse("TrajectoryDistance", schedule)
            teacher = whole(supernet.full_arch, schedule)
            return [number for number, step in enumerate(schedule.steps) if step.archs != teacher.steps[number].archs]

        def make(schedule: Schedule, seed: int, start: int, stop: int) -> Floats:
            teacher = whole(supernet.full_arch, schedule)
            states = trajectories.states(teacher, seed, start, stop)
            total = np.zeros(stop - start)
            for number in changed(schedule):
                step = schedule.steps[number]

                def one_step(number: int = number) -> Floats:
                    after: State = trajectories.advance(schedule, number, states[number], seed, start)
                    return _mean_square(after.x - states[number + 1].x)

                key = ("one step", teacher.digest, number, step.archs, seed, start, stop)
                total += trajectories.kept(key, one_step, stop - start, (stop - start) * supernet.macs(step))
            return total

        return LoadedScore(
            self,
            trajectories,
            "trajectory_mse",
            Rows(
                "squared distance of each step to the full model's",
                make,
                lambda schedule: [schedule.steps[number] for number in changed(schedule)],
            ),
            mean_with_replicates,
            lambda count: f"squared distance along the full model's trajectory@{count}",
        )


@recipe
class DenoisingLoss(OfImages):
    """Noise-prediction loss on real images above the full net's, summed over the schedule's steps. Value: "loss_gap".

    Sample i is a real image, of the held-out ones where there are some, in an order drawn once (around again after the last), with noise of its own at each timestep,
    the same for all archs. It
    estimates what training minimises; it misleads where a timestep's loss and its part in image quality differ, as they do at the
    clean end.
    """

    metrics = ("loss_gap",)

    def describe(self) -> Mapping[str, Any]:
        return {**super().describe(), "order": "drawn"}

    def load(self, supernet: LoadedSupernet, folder: Path) -> LoadedScore:
        images = load_once(self.images).reference
        check_shape(images, supernet.image_shape)
        trajectories = self.trajectories(supernet, folder)
        abar, states = supernet.alphas_cumprod, getattr(supernet, "to_states", lambda images: images)
        conditions = conditions_of(supernet, images) if self.conditions is not None else None
        # Images may lie class by class, as those of folders do.
        order = np.random.default_rng(derive_seed(0, "images of the denoising loss")).permutation(len(images))

        def loss(step: Step, seed: int, start: int, stop: int) -> Floats:
            chosen = order[np.arange(start, stop) % len(images)]
            x0 = states(torch.from_numpy(images.pixels[chosen]).to(supernet.device))
            noise = step_noise(seed, start, stop, supernet.state_shape, step.timestep).to(supernet.device)
            signal = float(abar[step.timestep])
            trajectories.meter.calls += stop - start
            trajectories.meter.macs += (stop - start) * supernet.macs(step)
            x = signal**0.5 * x0 + (1 - signal) ** 0.5 * noise
            condition = None if conditions is None else conditions(torch.from_numpy(chosen))
            prediction, _ = predict(supernet, step, x, None, self.precision, condition=condition)
            return _mean_square(prediction - noise)

        def make(schedule: Schedule, seed: int, start: int, stop: int) -> Floats:
            _refuse_reuse("DenoisingLoss", schedule)
            total = np.zeros(stop - start)
            for step in schedule.steps:
                for arch, sign in ((step.arch, 1), (supernet.full_arch, -1)):
                    single = Step(step.timestep, arch)
                    made = lambda single=single: loss(single, seed, start, stop)  # noqa: E731
                    key = ("loss", images.digest, single, seed, start, stop)
                    charged = stop - start if sign > 0 else 0
                    total += sign * trajectories.kept(key, made, charged, charged * supernet.macs(single))
            return total

        return LoadedScore(
            self,
            trajectories,
            "loss_gap",
            Rows(f"denoising loss above the full net's on {images.digest}", make),
            mean_with_replicates,
            lambda count: f"denoising loss above the full net's@{count}",
        )


@recipe
class Additive(AroundAnother):
    """The sum over intervals of what changing that interval alone does to a base score. Value: `"additive_"` and the base's.

    Around the full net: base(full) + sum over k of (base(full with interval k as in the schedule) - base(full)); around the
    smallest net likewise; "both" is their mean. Table entries are measured when a schedule first needs them, then kept.
    It estimates the base score without its interactions between intervals; it misleads where errors of one interval are
    repaired or amplified in another. `intervals`: how many steps each holds, noisy to clean.
    """

    base: Evaluator
    intervals: tuple[Count, ...]
    around: Literal["full", "smallest", "both"] = "full"

    @property
    def metrics(self) -> tuple[str, ...]:
        return (f"additive_{self.base.metrics[0]}",)

    def describe(self) -> Mapping[str, Any]:
        return {
            "class": "Additive",
            "base": self.base.describe(),
            "intervals": self.intervals,
            "around": self.around,
        }

    def digest(self, folder: Path) -> str:
        return digest_of({**self.describe(), "base": self.base.digest(folder)})

    def load(self, supernet: LoadedSupernet, folder: Path) -> LoadedAdditive:
        return LoadedAdditive(self, self.base.load(supernet, folder))


class LoadedAdditive:
    def __init__(self, recipe: Additive, base: LoadedEvaluator) -> None:
        self.recipe = recipe
        self.base = base
        self.supernet = base.supernet
        self.sampler_of = base.sampler_of
        self._table: dict[tuple[str, int, int, int], Score] = {}

    def __call__(self, schedule: Schedule, rung: int, seed: int) -> Score:
        """Raises UserError where the intervals do not divide the schedule's steps."""
        if sum(self.recipe.intervals) != len(schedule.steps):
            raise UserError(
                f"intervals {self.recipe.intervals} hold {sum(self.recipe.intervals)} steps, the schedule has {len(schedule.steps)}"
            )
        anchors = {"full": self.supernet.full_arch, "smallest": self.supernet.smallest_arch}
        spent: dict[str, float] = {}
        sums = [
            self._sum(schedule, arch, rung, seed, spent)
            for name, arch in anchors.items()
            if self.recipe.around in (name, "both")
        ]
        inner, name = self.recipe.base.metrics[0], self.recipe.metrics[0]
        # Linear in the table's scores, so its jackknife replicates are the same sum of theirs.
        terms = [(sign / len(sums), score) for part in sums for sign, score in part]
        label = f"additive {terms[0][1].labels.get(inner, inner)}, around the {self.recipe.around} net"
        value = sum(weight * score.values[inner] for weight, score in terms)
        columns = zip(
            *(tuple(weight * r for r in score.replicates.get(inner, ())) for weight, score in terms), strict=True
        )
        return Score({name: value}, {name: tuple(sum(column) for column in columns)}, spent, {name: label})

    def sample(self, schedule: Schedule, count: int, seed: int) -> torch.Tensor:
        return self.base.sample(schedule, count, seed)

    def _sum(
        self, schedule: Schedule, arch: Arch, rung: int, seed: int, spent: dict[str, float]
    ) -> list[tuple[int, Score]]:
        """The (sign, score) terms of the prediction around an anchor, its own score first."""
        anchor = whole(arch, schedule)
        origin = self._entry(anchor, rung, seed, spent)
        terms = [(1, origin)]
        for start, stop in pairwise(accumulate(self.recipe.intervals, initial=0)):
            first = schedule.steps[start]
            if start and first.arch != arch:  # of another subnet's step nothing can be reused
                first = replace(first, reuse=())
            steps = (*anchor.steps[:start], first, *schedule.steps[start + 1 : stop], *anchor.steps[stop:])
            changed = Schedule(steps, schedule.sampler)
            if changed != anchor:
                terms += [(1, self._entry(changed, rung, seed, spent)), (-1, origin)]
        return terms

    def _entry(self, schedule: Schedule, rung: int, seed: int, spent: dict[str, float]) -> Score:
        key = (schedule.digest, rung, seed, self.supernet.version)
        if key not in self._table:
            self._table[key] = self.base(schedule, rung, seed)
            for name, amount in self._table[key].spent.items():
                spent[name] = spent.get(name, 0.0) + amount
        return self._table[key]


def _refuse_reuse(name: str, schedule: Schedule) -> None:
    if any(step.reuse for step in schedule.steps):
        raise UserError(
            f"{name} scores each step by itself, so it cannot score blocks reused from the step before; use TeacherDistance"
        )


def _mean_square(difference: torch.Tensor) -> Floats:
    """(n, ...) to one number per sample, (n,)."""
    values: Floats = difference.flatten(1).square().mean(1).cpu().double().numpy()
    return values
