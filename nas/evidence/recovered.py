"""What a schedule is worth once it is trained a little: a rung above the counts of samples.

A frozen supernet tells only in part which of its schedules are good after a fine-tune. `Recovered` fine-tunes shortly what leads: each subnet, in each
of a few intervals of timesteps, by itself, so that one training serves every schedule that has this subnet there.

RUN/recovered/NAME/    the stock network of one subnet and interval, trained
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import filelock
import torch

from evaluators.images import load_once
from evaluators.scoring import AroundAnother, LoadedAroundAnother
from nas.base.exported import CLASSES, read_export, read_network
from nas.base.interrupts import whole
from nas.contracts import (
    Arch,
    Evaluator,
    Images,
    LoadedEvaluator,
    LoadedSupernet,
    Schedule,
    Score,
    Step,
    UserError,
    derive_seed,
    digest_of,
)
from nas.evidence.confirm import gradient_macs
from nas.handover.export import export
from nas.handover.training import train_on
from nas.recipes import Batch, Count, Few, Natural, Positive, Share, recipe
from search_spaces.shipped.train_diffusers import TRAINED, LossError, Settings, settings_of, train

FOLDER = "recovered"


@recipe
class Recovered(AroundAnother):
    """An evaluator that scores a schedule on more than `above` samples with subnets that are fine-tuned first, and on fewer as they are:
    `Recovered(Frechet(images, rungs=(512, 2048)), images, above=512)`.

    Training timesteps are cut into `intervals` equal ones. A subnet that runs in one of them is trained on its timesteps alone, on the study's `images`, from the
    supernet's weights, for so long that a schedule's subnets take, all intervals together, as many multiply-adds as `steps` gradient steps of the full network. What is
    trained is kept in the run folder and counts, in `spent`, for the score that first needs it. All of it stays in a worker's memory. Subnets that
    were trained otherwise, as an exported schedule's by `nas train`, are scored as they are.

    With `above=0` all scores are of trained subnets: of n in each of k intervals k x n trainings are all that the schedules need, of which `Knapsack`, which adds up what each interval
    loses by itself, asks for few more than it probes.
    """

    base: Evaluator
    images: Images
    above: Natural
    steps: Count = 100
    intervals: Few = 5
    batch: Batch = 64
    learning_rate: Positive = 2e-4
    distillation: Share = 0.0
    seed: Natural = 0

    @property
    def not_reckoned(self) -> tuple[str, ...]:
        words = f"subnets of schedules that are scored on more than {self.above} samples are fine-tuned first, for up to {self.steps} gradient steps of the full network each, which is not reckoned"
        return (*super().not_reckoned, words)

    def describe(self) -> dict[str, Any]:
        own = {name: value for name, value in self.__dict__.items() if name not in ("base", "images")}
        return {
            "class": "Recovered",
            "base": self.base.describe(),
            "images": load_once(self.images).digest,
            **own,
        }

    def digest(self, folder: Path) -> str:
        return digest_of({**self.describe(), "base": self.base.digest(folder)})

    def check(self) -> None:
        """As the base's. Raises UserError where no rung is above `above`."""
        if self.above >= self.rungs[-1]:
            raise UserError(
                f"Recovered: above={self.above} must be less than the last of the rungs {self.rungs}, or nothing is trained"
            )
        super().check()

    def load(self, supernet: LoadedSupernet, folder: Path) -> LoadedRecovered:
        """Raises UserError for a supernet whose subnets cannot be trained so."""
        if not hasattr(supernet, "apart"):
            raise UserError(
                f"Recovered needs a supernet with `apart`, as `Elastic` has; {type(supernet).__name__} has none"
            )
        smallest = supernet.extract(supernet.smallest_arch)
        if (kind := type(smallest).__name__) not in CLASSES:
            raise UserError(f"Recovered trains networks of diffusers, and a {kind} is none; leave Recovered out")
        return LoadedRecovered(self, self.base.load(supernet, folder), folder / FOLDER, _weights_of(smallest))


class _Kept:
    """Of one loaded supernet: the subnets that were adopted by any `Recovered`, by the name under which they are kept, and the version that it then had."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.archs: dict[str, Arch] = {}


_KEPT: WeakKeyDictionary[LoadedSupernet, _Kept] = WeakKeyDictionary()


class LoadedRecovered(LoadedAroundAnother):
    """`folder`: where trained subnets are kept. `weights`: identifies those that they are trained from."""

    def __init__(self, recipe: Recovered, base: LoadedEvaluator, folder: Path, weights: str) -> None:
        super().__init__(base)
        self.recipe = recipe
        self._folder = folder
        training = {name: value for name, value in recipe.describe().items() if name not in ("base", "above")}
        self._own = {**training, "weights": weights}
        self._kept = _KEPT.setdefault(self.supernet, _Kept(self.supernet.version))

    def __call__(self, schedule: Schedule, rung: int, seed: int) -> Score:
        if rung <= self.recipe.above or self.supernet.version != self._kept.version:
            return self.base(schedule, rung, seed)
        started = time.perf_counter()
        charged = {"macs": 0.0, "cached_macs": 0.0}

        def recovered(arch: Arch, interval: int) -> Arch:
            found, macs, new = self._recovered(arch, interval)
            charged["macs" if new else "cached_macs"] += macs
            return found

        trained = self._with(schedule, recovered)
        charged["seconds"] = time.perf_counter() - started
        score = self.base(trained, rung, seed)
        spent = {
            name: value + charged.get(name, 0.0)
            for name, value in {**dict.fromkeys(charged, 0.0), **score.spent}.items()
        }
        labels = {name: f"{label} after {self.recipe.steps} steps of fine-tune" for name, label in score.labels.items()}
        return replace(score, spent=spent, labels=labels)

    def sample_as_scored(self, schedule: Schedule, count: int, seed: int) -> torch.Tensor:
        """Of the trained subnets, where all of the schedule's are; `sample` is of the supernet's own, which are what is handed out."""
        return self.sample(self._kept_of(schedule), count, seed)

    def grounds(self, schedule: Schedule, count: int, seed: int) -> Mapping[str, Any] | None:
        return super().grounds(self._kept_of(schedule), count, seed)

    def _kept_of(self, schedule: Schedule) -> Schedule:
        run = [step for step in schedule.steps if not self._held(step)]
        pairs = {(arch, self._interval(step.timestep)) for step in run for arch in step.archs}
        if self.supernet.version != self._kept.version or not all(
            (self._folder / self._name(*pair)).exists() for pair in pairs
        ):
            return schedule
        return self._with(schedule, lambda *pair: self._recovered(*pair)[0])

    def _with(self, schedule: Schedule, recovered: Callable[[Arch, int], Arch]) -> Schedule:
        """The schedule of other subnets, each asked for once."""
        known: dict[tuple[Arch, int], Arch] = {}

        def of(arch: Arch, timestep: int) -> Arch:
            pair = (arch, self._interval(timestep))
            if pair not in known:
                known[pair] = recovered(*pair)
            return known[pair]

        steps: list[Step] = []
        for step in schedule.steps:
            guidance = step.guidance
            if self._held(step):
                before = steps[-1]
                steps.append(replace(step, arch=before.arch, guidance=guidance and before.guidance))
                continue
            if guidance is not None and guidance.arch:
                guidance = guidance._replace(arch=of(guidance.arch, step.timestep))
            steps.append(replace(step, arch=of(step.arch, step.timestep), guidance=guidance))
        return replace(schedule, steps=tuple(steps))

    def _held(self, step: Step) -> bool:
        """Whether it takes the whole prediction of the step before, and no subnet runs."""
        return self.supernet.macs(step) == 0

    def _interval(self, timestep: int) -> int:
        return timestep * self.recipe.intervals // len(self.supernet.alphas_cumprod)

    def _name(self, arch: Arch, interval: int) -> str:
        # Where the teacher says where the variance lies, steps were once reckoned without it.
        varies = [self._settings(arch, interval)[1]] if getattr(self.supernet, "learned_variance", False) else []
        return digest_of([self._own, arch, interval, *varies])

    def _recovered(self, arch: Arch, interval: int) -> tuple[Arch, float, bool]:
        """The subnet as it is trained in this interval, under a name of its own; the multiply-adds of that; and whether it was done now."""
        settings, steps = self._settings(arch, interval)
        name, new = self._name(arch, interval), False
        if name not in self._kept.archs:
            new = self._train(arch, interval, name)
            own = self.supernet.apart(arch, name)
            self.supernet.adopt(own, read_network(self._folder / name))
            self._kept.archs[name], self._kept.version = own, self.supernet.version
        return (
            self._kept.archs[name],
            steps * settings.batch * gradient_macs(self.supernet, arch, settings),
            new,
        )

    def _range(self, interval: int) -> tuple[int, int]:
        """Of training timesteps, from, up to."""
        count, intervals = len(self.supernet.alphas_cumprod), self.recipe.intervals
        return -(-interval * count // intervals), -(-(interval + 1) * count // intervals)

    def _settings(self, arch: Arch, interval: int) -> tuple[Settings, int]:
        """Of the training, whose steps are of all timesteps together; and how many of them this interval has."""
        net, mine = self.supernet, self.recipe
        given = {name: getattr(mine, name) for name in ("batch", "learning_rate", "distillation", "seed")}
        whole = settings_of({**dict(net.training_settings), **given})
        equal = gradient_macs(net, net.full_arch, whole) / gradient_macs(net, arch, whole)
        settings = replace(whole, steps=max(1, round(mine.steps * equal)))
        start, stop = self._range(interval)
        steps = max(1, round(settings.steps * (stop - start) / len(net.alphas_cumprod)))
        seed = derive_seed(mine.seed, interval, digest_of(arch), "recovery") % 2**31
        return replace(settings, warmup=max(1, steps // 20), seed=seed), steps

    def _train(self, arch: Arch, interval: int, name: str) -> bool:
        """Trains the subnet where the run folder lacks it; whether it did."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(self._folder / f"{name}.lock"):
            if (self._folder / name).exists():
                return False
            work, alone = self._folder / f".{name}", Schedule((Step(0, arch),))
            if not (work / "provenance.json").exists():
                export(self.supernet, alone, self.base.sampler_of(alone), {}, work)
            exported, data = read_export(work), load_once(self.recipe.images)
            [network] = exported.networks
            train_on(self.supernet.device)
            ticks = train(
                work,
                data.pixels,
                self._settings(arch, interval)[0],
                self.supernet.device.type == "cpu",
                whole=whole,
                labels=data.labels if "null_label" in exported.training else None,
                captions=data.texts if "text" in exported.training else None,
                timesteps={network: [self._range(interval)]},
            )
            with closing(ticks):  # stopped in its midst, it keeps its state now
                try:
                    for _ in ticks:
                        pass
                except LossError as error:
                    raise UserError(
                        f"Recovered: {error.told}; lower learning_rate={self.recipe.learning_rate:g}"
                    ) from error
            os.replace(work / TRAINED / network, self._folder / name)
            shutil.rmtree(work)
            return True


def _weights_of(network: Any) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]
