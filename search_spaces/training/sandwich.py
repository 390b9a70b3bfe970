"""Trainings of the elastic network: the sandwich rule, of all weights or of an expert's, and a short one for a schedule."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, replace
from itertools import count
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from nas.base.interrupts import whole
from nas.contracts import Condition, ImageSet, Progress, Schedule, UserError, derive_seed
from nas.recipes import Batch, Count, Few, Natural, Positive, Share, Weight, recipe
from search_spaces.loaded import LoadedElastic
from search_spaces.networks.slices import Arch
from search_spaces.options import Gradual, Subnets
from search_spaces.supernet import Elastic
from search_spaces.training.optimiser import Batches, Optimiser, Teacher
from search_spaces.training.stages import Checkpoints, OfExpert, OneStage, Stage, Stages
from search_spaces.training.team import Team

DROP = 0.1
"""Share of labels that are dropped in training, as Ho & Salimans (2022) and their followers do."""


@recipe
class Sandwich(OneStage):
    """Each step trains the largest, the smallest and `between` random subnets on one batch (Yu & Huang 2019).

    Every subnet draws its own timesteps and noises and minimises the plain noise-prediction error, and where it learns the variance the
    variational bound as well (`Batches.loss`); the gradients are
    added with weight `full_weight` for the full net and 1 for the others, clipped to norm `clip`, and applied by one
    Adam step. Learning rate: linear warm-up, then cosine to zero. The weights that are kept are their exponential
    moving average with decay min(`ema`, (1 + step) / (10 + step)).

    `full_only`: trains the full net alone. `distillation`: share of the target that is the prediction of the full net as it was
    before this stage, instead of the noise. `expert`: trains that copy of the weights, made of the shared ones where no stage before has made it, on the
    timesteps that it serves. `drop`: share of the conditions that say nothing, where the network takes any.

    `drawn`: the random subnets "evenly", all as likely, or "by macs", so that multiply-adds are as likely; where many subnets cost about the same, the first
    seldom draws a small or a large one. `held`: what all of this stage's subnets have as the full network has it, for progressive shrinking (Cai et al. 2020).

    `snr_cap`: min-SNR weighting (Hang et al. 2023, eq. 9), the signal-to-noise ratio from which on timesteps count no more than each other as
    predictions of the image; without it all count alike as they are predicted. For networks that are too large: `accumulate` runs each batch in
    so many parts, `checkpointing` keeps blocks' inputs alone and runs them again in the backward pass, `precision` is that of products.
    """

    steps: Count
    batch: Batch = 64
    learning_rate: Positive = 2e-3
    warmup: Natural = 100
    between: Annotated[int, Field(ge=0, le=4096)] = 1
    full_weight: Weight = 1.0
    ema: Share = 0.999
    clip: Positive = 1.0
    flip: bool = False
    checkpoint_every: Count = 250
    full_only: bool = False
    distillation: Share = 0.0
    expert: str = ""
    drop: Share = DROP
    snr_cap: Positive | None = None
    accumulate: Few = 1
    checkpointing: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"
    drawn: Literal["evenly", "by macs"] = "evenly"
    held: tuple[Gradual, ...] = ()

    def describe(self) -> dict[str, Any]:
        """How a batch is run is no part of it, where that changes rounding alone. What was added later is left out where nothing is said of it."""
        settings = asdict(self)
        for name in ("checkpoint_every", "accumulate", "checkpointing"):
            del settings[name]
        later = {"drop": DROP, "snr_cap": None, "precision": "float32", "drawn": "evenly", "held": ()}
        return {"class": "Sandwich", **{k: v for k, v in settings.items() if k not in later or v != later[k]}}

    def __post_init__(self) -> None:
        if self.accumulate > self.batch:
            raise UserError(
                f"accumulate={self.accumulate} parts of a batch of {self.batch}; at most one for each image"
            )

    def check_supernet(self, supernet: Elastic) -> None:
        super().check_supernet(supernet)
        self._subnets(supernet)

    def fit(
        self, net: LoadedElastic, data: ImageSet, seed: int, files: Checkpoints | None = None
    ) -> Iterator[Progress]:
        """Trains a loaded supernet in place; afterwards it holds the averaged weights."""
        net.begin_expert(self.expert)
        teacher = Teacher(net, self.distillation, self.expert)
        optimiser = Optimiser(self, net, files.digest if files else "", [self.expert])
        if files:
            files.restore(optimiser)
        batches = Batches(net, data, self.batch, self.flip, self.drop, self.snr_cap)
        mates = files.team if files else Team()
        if self.accumulate * mates.size > self.batch:
            raise UserError(
                f"{mates.size} processes, each with accumulate={self.accumulate} parts of a batch of {self.batch}; at most one for each image"
            )
        name = f"expert {self.expert}" if self.expert else "full network" if self.full_only else "supernet"
        served = net.recipe.served_by(self.expert)
        try:
            while optimiser.step < self.steps:
                losses: dict[str, float] = {}
                with whole():
                    generator = torch.Generator().manual_seed(derive_seed(seed, optimiser.step, "sandwich"))
                    x0, condition = batches.images(generator)
                    for arch in self._members(net.recipe, generator):
                        weight = self.full_weight if arch == net.full_arch else 1.0
                        label = _name(arch, losses)
                        losses[label] = 0.0
                        whole_batch = (x0, *batches.noised(x0, generator, served))
                        with net.lent(arch.replace(expert=self.expert), self.checkpointing) as call:
                            for part, (clean, t, x, truth), told in mates.mine(
                                self._parts_of(whole_batch, condition, mates.size)
                            ):
                                with torch.autocast(x.device.type, torch.bfloat16, self.precision == "bfloat16"):
                                    target = teacher.target(x, t, truth, told)
                                    prediction = call(x, t, told)
                                loss = part * batches.loss(prediction.float(), target.float(), clean, x, t)
                                torch.autograd.backward(weight * loss)
                                losses[label] += loss.item()
                    losses = _over_all(losses, mates, net.device)
                    _check_finite(losses, name, optimiser.step + 1, self.learning_rate)
                    optimiser.update(mates)
                    if files:
                        files.keep(optimiser, self.steps)
                yield Progress(name, optimiser.step, self.steps, losses)
        except (GeneratorExit, KeyboardInterrupt):
            if files and optimiser.step:
                files.keep_now(optimiser)
            raise
        optimiser.adopt_average()
        net.trained_macs = mates.sum_of(net.trained_macs, net.device)

    def macs(self, supernet: Elastic) -> float:
        full = supernet.cost(supernet.anatomy.full).macs
        passes = 4.0 if self.checkpointing else 3.0
        each, members = passes * full, 1
        subnets = self._subnets(supernet)
        if not self.full_only and len(subnets) > 1:
            macs = subnets.macs.ravel()
            inner = macs[1:-1]
            count = min(self.between, len(inner))
            one = inner @ subnets.spread_over_macs if self.drawn == "by macs" else inner.mean() if count else 0
            each, members = each + passes * float(macs[0] + count * one), 2 + count
        each += members * full if self.distillation else 0
        return self.steps * self.batch * each

    def _parts_of(
        self, tensors: tuple[torch.Tensor, ...], condition: Condition | None, processes: int
    ) -> Iterator[tuple[float, tuple[torch.Tensor, ...], Condition | None]]:
        """Of a batch, each with its share of it; as many for each process."""
        count = self.accumulate * processes
        if count == 1:
            yield 1.0, tensors, condition
            return
        for places in torch.arange(len(tensors[0]), device=tensors[0].device).tensor_split(count):
            told = None if condition is None else {name: rows[places] for name, rows in condition.items()}
            yield len(places) / len(tensors[0]), tuple(tensor[places] for tensor in tensors), told

    def _members(self, recipe: Elastic, generator: torch.Generator) -> list[Arch]:
        if self.full_only:
            return [recipe.anatomy.full]
        subnets = self._subnets(recipe)
        last = len(subnets) - 1
        inner = max(last - 1, 0)
        if self.drawn == "by macs" and self.between and inner:
            chances = torch.from_numpy(subnets.spread_over_macs)
            drawn = torch.multinomial(chances, min(self.between, inner), generator=generator).tolist()
        else:
            drawn = torch.randperm(inner, generator=generator)[: self.between].tolist()
        return list(dict.fromkeys(subnets.flat(i) for i in (last, 0, *(i + 1 for i in drawn))))

    def of(self, expert: str) -> Sandwich:
        return replace(self, expert=expert)

    def _subnets(self, recipe: Elastic) -> Subnets:
        """Raises UserError where nothing of what is to be held differs anyway."""
        options = recipe.options.holding(self.held)
        if self.held and options == recipe.options:
            raise UserError(f"held={self.held}: all subnets have that as the full network has it; leave it out")
        return recipe.subnets(options)


def _over_all(losses: dict[str, float], mates: Team, device: torch.device) -> dict[str, float]:
    """Each process has the losses of its share."""
    if mates.size == 1:
        return losses
    values = torch.tensor([*losses.values()], device=device)
    mates.sum([values])
    return dict(zip(losses, values.tolist(), strict=True))


@recipe
class Experts(OneStage):
    """Elastic fine-tuning of one copy of the weights for each interval of timesteps (DiffPruning; TDC): the sandwich rule on
    that interval's timesteps alone, distilling from the full net of the stage before. `each`: the settings of every expert. `order`: such as `Order()`, by which each
    copy's channels are ordered first, of its own timesteps."""

    each: Sandwich
    order: OfExpert | None = None

    def describe(self) -> dict[str, Any]:
        own = {} if self.order is None else {"order": self.order.describe()}
        return {"class": "Experts", "each": self.each.describe(), **own}

    def parts(self, supernet: Elastic) -> list[Stage]:
        """One stage for each expert, or two. Raises UserError where the supernet has none."""
        if not supernet.experts:
            raise UserError("a training of experts needs a supernet with experts=(timesteps where another takes over)")
        own = [self.each] if self.order is None else [self.order, self.each]
        return [stage.of(name) for name in supernet.expert_names for stage in own]

    def macs(self, supernet: Elastic) -> float:
        return sum(part.macs(supernet) for part in self.parts(supernet))

    def fit(
        self, net: LoadedElastic, data: ImageSet, seed: int, files: Checkpoints | None = None
    ) -> Iterator[Progress]:
        return Stages((self,)).fit(net, data, seed, files)


@recipe
class FineTune:
    """A short training of a supernet for one schedule: each timestep trains the subnet that serves it.

    A sampler step serves the timesteps from its own down to the next step's, the last one down to 0 and the first one
    all above it. Settings mean what they mean for `Sandwich`; an expert's subnets are taught by that expert.
    """

    steps: Count
    batch: Batch = 64
    learning_rate: Positive = 5e-4
    warmup: Natural = 50
    ema: Share = 0.995
    clip: Positive = 1.0
    flip: bool = False
    distillation: Share = 0.0
    drop: Share = DROP

    def fit(self, net: LoadedElastic, schedule: Schedule, data: ImageSet, seed: int) -> Iterator[Progress]:
        """Trains in place; afterwards the supernet holds the averaged weights, and its materialised subnets are new."""
        archs = [Arch(*arch) for arch in schedule.archs]
        teachers = {arch.expert: Teacher(net, self.distillation, arch.expert) for arch in archs}
        optimiser = Optimiser(self, net, experts=list(teachers))
        batches = Batches(net, data, self.batch, self.flip, self.drop)
        served = torch.tensor(schedule.timesteps[1:], dtype=torch.long).flip(0)
        while optimiser.step < self.steps:
            generator = torch.Generator().manual_seed(derive_seed(seed, optimiser.step, "fine-tune"))
            x0, condition = batches.images(generator)
            t, x, truth = batches.noised(x0, generator)
            position = len(schedule.steps) - 1 - torch.bucketize(t.cpu(), served)
            total = 0.0
            for arch in archs:
                # One that guides serves the timesteps where it does, as in an exported folder.
                mine = torch.tensor([arch in schedule.steps[p].archs for p in position.tolist()], device=net.device)
                if mine.any():
                    its = None if condition is None else {name: rows[mine] for name, rows in condition.items()}
                    target = teachers[arch.expert].target(x[mine], t[mine], truth[mine], its)
                    prediction = net.forward(arch, x[mine], t[mine], its)
                    error = batches.loss(prediction, target, x0[mine], x[mine], t[mine])
                    loss = error * mine.float().mean()
                    torch.autograd.backward(loss)
                    total += loss.item()
            _check_finite({"loss": total}, "fine-tune", optimiser.step + 1, self.learning_rate)
            optimiser.update()
            yield Progress("fine-tune", optimiser.step, self.steps, {"loss": total})
        optimiser.adopt_average()


def _check_finite(losses: Mapping[str, float], name: str, step: int, rate: float) -> None:
    """Raises UserError at the first loss that is no number; what was kept before it is as it was."""
    odd = next((label for label, loss in losses.items() if not math.isfinite(loss)), None)
    if odd is not None:
        raise UserError(
            f"training the {name}: the loss of {odd} is {losses[odd]} at step {step}; lower learning_rate={rate:g}, and use another --out"
        )


def _name(arch: Arch, taken: Collection[str] = ()) -> str:
    """Short label for progress bars: one share where all levels have the same. What it leaves out may be all that tells two subnets apart."""
    shares = arch.widths[:1] if len(set(arch.widths)) == 1 else arch.widths
    depths = f" depth {'/'.join(map(str, arch.depths))}" if arch.depths else ""
    layers = f" layers {'/'.join(map(str, arch.layers))}" if arch.layers else ""
    without = sum(not kept for kept in arch.attention)
    less = [*([f"{without} attention"] if without else []), *([] if arch.middle else ["the middle"])]
    name = "/".join(f"{share:g}" for share in shares) + depths + layers + (f" less {', '.join(less)}" if less else "")
    again = (f"{name} ({number})" for number in count(2))
    return name if name not in taken else next(other for other in again if other not in taken)
