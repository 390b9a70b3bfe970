"""What all scores share: one row for each sample, a statistic over the rows, and its delete-a-block jackknife."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from evaluators.conditions import Conditions
from evaluators.device import settle
from evaluators.sampling import DDIM, Precision, Sampler
from evaluators.trajectories import Reuse, ReusePrecision, Trajectories
from nas.contracts import (
    Evaluator,
    Grounded,
    LoadedEvaluator,
    LoadedSupernet,
    Progress,
    Schedule,
    Score,
    Step,
    UserError,
    digest_of,
)
from nas.recipes import Batch, recipe

Array = npt.NDArray[np.float64]

BLOCKS = 20
"""Blocks of neighbouring samples that the jackknife leaves out in turn."""


@recipe(kw_only=True)
class Sampled:
    """Fields of every score that looks at a schedule's samples.

    `rungs`: sample counts, increasing; the last verifies. `batch`: samples per network call, a matter of speed alone (up
    to the rounding of floats); None leaves it to the device. `precision`: of the network's calls; "bfloat16" is faster on
    some devices and gives other scores. `cache_bytes`: memory of each worker for states that schedules share. `reuse_precision`: of what steps keep to be
    reused, "bfloat16" and "float16" take half the memory and give other scores; `reuse_bytes`: how much of it one batch may have, which is smaller where it would be more. `conditions`: what
    samples are conditioned on, such as `Labels(images)` or `Captions(images, encoder)`, where the network takes conditions. `sampler`: several, where the space chooses
    among them.
    """

    rungs: Annotated[tuple[Annotated[int, Field(ge=2, le=10**7)], ...], Field(min_length=1)] = (512, 2048)
    sampler: Sampler | Annotated[tuple[Sampler, ...], Field(min_length=1)] = field(default_factory=DDIM)
    batch: Batch | None = None
    precision: Precision = "float32"
    cache_bytes: Annotated[int, Field(ge=0, le=2**50)] = 2**29
    conditions: Conditions | None = None
    reuse_precision: ReusePrecision = "float32"
    reuse_bytes: Annotated[int, Field(ge=1, le=2**50)] = 2**32

    def __post_init__(self) -> None:
        if list(self.rungs) != sorted(set(self.rungs)):
            raise UserError(f"rungs {self.rungs} must be increasing sample counts")

    def describe_sampling(self) -> dict[str, Any]:
        """What decides how samples look."""
        given = {} if self.conditions is None else {"conditions": self.conditions.describe()}
        sampler = (
            [one.describe() for one in self.sampler] if isinstance(self.sampler, tuple) else self.sampler.describe()
        )
        half = {} if self.reuse_precision == "float32" else {"reuse_precision": self.reuse_precision}
        return {"rungs": self.rungs, "sampler": sampler, "precision": self.precision, **given, **half}

    def prepare_conditions(self, folder: Path, device: str) -> Iterator[Progress]:
        """What samples are told."""
        if self.conditions is not None:
            yield from self.conditions.prepare(folder, device)

    def trajectories(self, net: LoadedSupernet, folder: Path) -> Trajectories:
        """Shared by all scores of this supernet with the same settings."""
        execution = settle(net, folder, self.precision)
        net.run_as(execution.channels_last, execution.compiled)
        batch = execution.batch if self.batch is None else self.batch
        conditions = None if self.conditions is None else self.conditions.load(folder, str(net.device))
        reuse = Reuse(self.reuse_precision, self.reuse_bytes)
        return Trajectories.shared(net, self.sampler, self.precision, batch, self.cache_bytes, conditions, reuse)


@dataclass(frozen=True)
class Rows:
    """One row per sample of a schedule: `make(schedule, seed, start, stop)` gives (stop - start, d).

    `name` identifies what the rows are, so that scores of the same rows share them. `steps`: those that `make` runs for a
    schedule, where nothing is kept.
    """

    name: str
    make: Callable[[Schedule, int, int, int], npt.NDArray[Any]]
    steps: Callable[[Schedule], Sequence[Step]] = lambda schedule: schedule.steps


class LoadedScore:
    """A score that is a statistic of rows. A larger count extends a smaller one of the rungs: its rows are kept.

    `statistic(rows)` gives the value and its jackknife replicates, which leave out blocks of neighbouring rows, so two
    schedules scored on the same seed share their blocks.
    """

    def __init__(
        self,
        recipe: Sampled,
        trajectories: Trajectories,
        name: str,
        rows: Rows,
        statistic: Callable[[npt.NDArray[Any]], tuple[float, tuple[float, ...]]],
        label: Callable[[int], str],
    ) -> None:
        self.recipe = recipe
        self.trajectories = trajectories
        self.name = name
        self.rows = rows
        self.statistic = statistic
        self.label = label
        self.supernet = trajectories.net

    def __call__(self, schedule: Schedule, rung: int, seed: int) -> Score:
        started, before = time.perf_counter(), replace(self.trajectories.meter)
        rows = self.rows_of(schedule, rung, seed)
        if not np.isfinite(rows).all():
            raise FloatingPointError(f"schedule {schedule.digest} gives samples that are not finite")
        value, replicates = self.statistic(rows)
        spent = self.trajectories.meter.spent_since(before) | {"seconds": time.perf_counter() - started}
        return Score({self.name: value}, {self.name: replicates}, spent, {self.name: self.label(rung)})

    def sampler_of(self, schedule: Schedule) -> Mapping[str, Any]:
        kept = self.trajectories.reuse.precision
        half = {} if kept == "float32" else {"reuse_precision": kept}
        return {**self.trajectories.sampler_of(schedule).describe(), **half}

    def rows_of(self, schedule: Schedule, count: int, seed: int) -> npt.NDArray[Any]:
        """Rows of samples 0..count-1, (count, d)."""
        steps = self.rows.steps(schedule)
        macs = sum(self.supernet.macs(step) for step in steps)
        parts = []
        for start, stop in self.trajectories.batches(count, self.recipe.rungs, schedule):
            key = (self.rows.name, schedule.digest, seed, start, stop)
            made = lambda start=start, stop=stop: self.rows.make(schedule, seed, start, stop)  # noqa: E731
            parts.append(self.trajectories.kept(key, made, (stop - start) * len(steps), (stop - start) * macs))
        return np.concatenate(parts)

    def sample(self, schedule: Schedule, count: int, seed: int) -> torch.Tensor:
        return torch.cat(
            [
                self.trajectories.images(schedule, seed, start, stop).cpu()
                for start, stop in self.trajectories.batches(count, self.recipe.rungs, schedule)
            ]
        )


def mean_with_replicates(rows: npt.NDArray[Any]) -> tuple[float, tuple[float, ...]]:
    """Mean of one number per sample, (n,) or (n, 1), and its delete-a-block jackknife replicates."""
    values = rows.reshape(len(rows)).astype(np.float64)
    total = values.sum()
    parts = np.array_split(values, min(BLOCKS, len(values))) if len(values) >= 2 else []
    return float(values.mean()), tuple(float((total - part.sum()) / (len(values) - len(part))) for part in parts)


class SampledAs(ABC):
    """What an evaluator has of another one, `like`, whose samples it looks at."""

    @property
    @abstractmethod
    def like(self) -> Evaluator: ...

    @property
    def rungs(self) -> tuple[int, ...]:
        return tuple(self.like.rungs)

    @property
    def sampler(self) -> Any:
        return getattr(self.like, "sampler", None)

    @property
    def conditions(self) -> Any:
        return self.like.conditions  # type: ignore[attr-defined]  # there is none where the other asks for no samples

    @property
    def precision(self) -> Any:
        return getattr(self.like, "precision", None)

    @property
    def reuse_precision(self) -> Any:
        return getattr(self.like, "reuse_precision", None)

    @property
    def reuse_bytes(self) -> Any:
        return getattr(self.like, "reuse_bytes", None)


class AroundAnother(SampledAs):
    """What an evaluator that stands around another one, its `base`, has of that one."""

    base: Evaluator

    @property
    def like(self) -> Evaluator:
        return self.base

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(self.base.metrics)

    @property
    def not_reckoned(self) -> tuple[str, ...]:
        """In words, what scores take that a dry run does not reckon with."""
        return tuple(getattr(self.base, "not_reckoned", ()))

    def check(self) -> None:
        """As the base's."""
        getattr(self.base, "check", lambda: None)()

    def prepare(self, folder: Path, seed: int, device: str) -> Iterator[Progress]:
        yield from self.base.prepare(folder, seed, device)


def as_scored(evaluator: LoadedEvaluator, schedule: Schedule, count: int, seed: int) -> torch.Tensor:
    """Samples of the subnets that its score looks at, which may be trained first; `sample` draws what is handed out."""
    found: torch.Tensor = getattr(evaluator, "sample_as_scored", evaluator.sample)(schedule, count, seed)
    return found


class LoadedAroundAnother:
    """The same, loaded."""

    def __init__(self, base: LoadedEvaluator) -> None:
        self.base = base
        self.supernet = base.supernet
        self.sampler_of = base.sampler_of

    def sample(self, schedule: Schedule, count: int, seed: int) -> torch.Tensor:
        return self.base.sample(schedule, count, seed)

    def sample_as_scored(self, schedule: Schedule, count: int, seed: int) -> torch.Tensor:
        return as_scored(self.base, schedule, count, seed)

    def grounds(self, schedule: Schedule, count: int, seed: int) -> Mapping[str, Any] | None:
        return self.base.grounds(schedule, count, seed) if isinstance(self.base, Grounded) else None

    def seconds_of_images(self, count: int) -> float:
        return self.base.seconds_of_images(count) if isinstance(self.base, Grounded) else math.inf


@recipe
class Scores(SampledAs):
    """Several scores of the same samples, each an objective of its own: `Scores((Frechet(...), Agreement(...)))`. What one of them has
    sampled the others find kept. Raises UserError where they do not look at the same samples."""

    parts: Annotated[tuple[Evaluator, ...], Field(min_length=1)]

    def __post_init__(self) -> None:
        first, *others = self.parts
        for other in others:
            for name in ("rungs", "sampler", "precision", "conditions", "reuse_precision", "reuse_bytes"):
                mine, theirs = (getattr(part, name, None) for part in (first, other))
                if mine != theirs:
                    raise UserError(f"parts of Scores have the {name} {mine} and {theirs}; give them the same")
        if len(set(self.metrics)) != len(self.metrics):
            raise UserError(f"parts of Scores measure {', '.join(self.metrics)}; each may stand there once")

    @property
    def like(self) -> Evaluator:
        return self.parts[0]

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(metric for part in self.parts for metric in part.metrics)

    def describe(self) -> dict[str, Any]:
        return {"class": "Scores", "parts": [part.describe() for part in self.parts]}

    def digest(self, folder: Path) -> str:
        return digest_of([part.digest(folder) for part in self.parts])

    def check(self) -> None:
        """As each of them."""
        for part in self.parts:
            getattr(part, "check", lambda: None)()

    def prepare(self, folder: Path, seed: int, device: str) -> Iterator[Progress]:
        for part in self.parts:
            yield from part.prepare(folder, seed, device)

    def load(self, supernet: LoadedSupernet, folder: Path) -> LoadedScores:
        return LoadedScores([part.load(supernet, folder) for part in self.parts])


class LoadedScores:
    def __init__(self, parts: Sequence[LoadedEvaluator]) -> None:
        self.parts = parts
        self.supernet = parts[0].supernet

    def __call__(self, schedule: Schedule, rung: int, seed: int) -> Score:
        first, *others = (part(schedule, rung, seed) for part in self.parts)
        spent = dict(first.spent)
        for score in others:
            # What the first has sampled is kept for the others, and was paid for by it.
            for name in ("calls", "macs", "seconds"):
                spent[name] = spent.get(name, 0.0) + score.spent.get(name, 0.0)
        return Score(
            {name: value for score in (first, *others) for name, value in score.values.items()},
            {name: values for score in (first, *others) for name, values in score.replicates.items()},
            spent,
            {name: label for score in (first, *others) for name, label in score.labels.items()},
        )

    def sample(self, schedule: Schedule, count: int, seed: int) -> torch.Tensor:
        return self.parts[0].sample(schedule, count, seed)

    def sample_as_scored(self, schedule: Schedule, count: int, seed: int) -> torch.Tensor:
        return as_scored(self.parts[0], schedule, count, seed)

    def sampler_of(self, schedule: Schedule) -> Mapping[str, Any]:
        return self.parts[0].sampler_of(schedule)

    def grounds(self, schedule: Schedule, count: int, seed: int) -> Mapping[str, Any] | None:
        """Of the first part that has any."""
        told = (part.grounds(schedule, count, seed) for part in self.parts if isinstance(part, Grounded))
        return next(told, None)

    def seconds_of_images(self, count: int) -> float:
        """As the first part that can say it; endless where none can."""
        told = (part.seconds_of_images(count) for part in self.parts if isinstance(part, Grounded))
        return next(told, math.inf)
