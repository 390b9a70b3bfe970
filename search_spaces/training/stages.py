"""Training of the supernet in stages, resumable with the same call and bit-identical at one thread count."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field

from nas.base.interrupts import whole
from nas.contracts import Condition, Images, ImageSet, Progress, Schedule, UserError, derive_seed, digest_of
from nas.recipes import Batch, Count, Few, Natural, Positive, Share, Weight, recipe
from search_spaces.loaded import LoadedElastic
from search_spaces.networks.slices import Arch
from search_spaces.options import Gradual, Subnets
from search_spaces.supernet import WEIGHTS, Elastic
from search_spaces.training.optimiser import Batches, Optimiser, Teacher, check_recipe, gather, write_tensors
from search_spaces.training.team import Team, team

CHECKPOINT = "checkpoint.safetensors"
STAGE = "stage.safetensors"


class Stage(Protocol):
    """One part of a training. Changes a loaded supernet in place, a tick at a time."""

    def describe(self) -> dict[str, Any]: ...

    def fit(
        self, net: LoadedElastic, data: ImageSet, seed: int, files: Checkpoints | None = None
    ) -> Iterator[Progress]:
        """`files`: where to keep checkpoints and go on from; none for a training that is not interrupted."""

    def parts(self, supernet: Elastic) -> Sequence[Stage]:
        """What it consists of, itself where it is one piece."""

    def macs(self, supernet: Elastic) -> float:
        """What it takes in all, expected: forward and backward count thrice."""


class OfExpert(Stage, Protocol):
    """A stage of one copy of the weights."""

    def of(self, expert: str) -> Stage:
        """The same for that copy."""


@dataclass(frozen=True)
class Checkpoints:
    """Where a stage keeps its state, and what identifies it."""

    path: Path
    digest: str
    every: int
    team: Team = Team()  # noqa: RUF009  frozen

    def restore(self, optimiser: Optimiser) -> None:
        if self.path.exists():
            optimiser.restore(self.path)

    def keep(self, optimiser: Optimiser, last: int) -> None:
        if self.team.first and (optimiser.step % self.every == 0 or optimiser.step == last):
            optimiser.save(self.path)

    def keep_now(self, optimiser: Optimiser) -> None:
        """For a training that is stopped, in between."""
        if self.team.first and optimiser.step % self.every:
            with whole():
                optimiser.save(self.path)


@recipe
class Stages:
    """One stage after another, on one set of weights."""

    stages: tuple[Stage, ...]
    checkpoint_every: Count = 250

    def describe(self) -> dict[str, Any]:
        return {"class": "Stages", "stages": [stage.describe() for stage in self.stages]}

    def parts(self, supernet: Elastic) -> list[Stage]:
        return [part for stage in self.stages for part in stage.parts(supernet)]

    def fit(
        self, net: LoadedElastic, data: ImageSet, seed: int, files: Checkpoints | None = None
    ) -> Iterator[Progress]:
        """Trains a loaded supernet in place, without files; afterwards it holds the averaged weights."""
        for number, part in enumerate(self.parts(net.recipe)):
            yield from part.fit(net, data, _stage_seed(seed, number), files)

    def run(self, supernet: Elastic, images: Images, folder: Path, seed: int, device: str) -> Iterator[Progress]:
        """Trains what is missing in `folder` and leaves `weights.safetensors` there, and in `training.json` what each stage took.
        Yields after every step.

        In processes that a launcher has started, each trains its share; the first writes. Raises UserError where the folder holds a damaged checkpoint or
        weights of another recipe.
        """
        mates = team(device)
        yield from self._run(supernet, images, folder, seed, device, mates)
        mates.leave()

    def _run(
        self, supernet: Elastic, images: Images, folder: Path, seed: int, device: str, mates: Team
    ) -> Iterator[Progress]:
        mates.wait()  # the first has read the images, and kept them in the run folder
        if not mates.first:
            yield from getattr(images, "prepare", lambda _: ())(folder.parent)
        data = images.load()
        parts = self.parts(supernet)
        if parts:
            check_trainable(supernet, data)
        yield from mates.in_turn(lambda: supernet.codec.prepare(images, folder, seed, device))
        digest = digest_of(
            {
                "supernet": supernet.describe(),
                "training": self.describe(),
                "seed": seed,
                "images": data.digest,
                **({"codec": codec} if (codec := supernet.codec.digest(folder)) else {}),
            }
        )
        if (folder / WEIGHTS).exists():
            check_recipe(folder / WEIGHTS, digest)
            return
        folder.mkdir(parents=True, exist_ok=True)
        spent: list[dict[str, Any]] = []
        if (folder / STAGE).exists():
            spent = json.loads(check_recipe(folder / STAGE, digest)["spent"])
            net = supernet.read(folder / STAGE, device)
        else:
            net = supernet.initial(derive_seed(seed, "supernet", "weights"), device, folder)
        if parts:
            if net.text is not None and data.texts is not None:
                text, texts = net.text, [*data.texts, ""]
                yield from mates.in_turn(lambda: text.keep(texts))
            yield from mates.in_turn(lambda: net.codec.keep(data, any(getattr(p, "flip", False) for p in parts)))
        elif mates.first:  # the weights are pretrained, or meant to stay as they are drawn
            write_tensors(gather(net), folder / STAGE, {"recipe": digest, "spent": "[]"})
        for number, part in enumerate(parts[len(spent) :], len(spent)):
            net.trained_macs = 0
            files = Checkpoints(folder / CHECKPOINT, digest_of([digest, number]), self.checkpoint_every, mates)
            yield from part.fit(net, data, _stage_seed(seed, number), files)
            spent.append({**part.describe(), "macs": net.trained_macs})
            if mates.first:
                write_tensors(gather(net), folder / STAGE, {"recipe": digest, "spent": json.dumps(spent)})
                (folder / CHECKPOINT).unlink(missing_ok=True)
            mates.wait()  # or another would go on from the checkpoint of the stage that is done
        if not mates.first:
            return
        (folder / "training.json").write_text(json.dumps(spent, indent=1, default=list) + "\n")
        (folder / STAGE).replace(folder / WEIGHTS)

    def check(self, supernet: Elastic, data: ImageSet) -> None:
        """Raises UserError where it cannot train this network on these images, of which a few will do; before anything is trained."""
        if self.parts(supernet):
            check_trainable(supernet, data)
        for part in (supernet.codec, supernet.text):
            getattr(part, "check", lambda: None)()
        if supernet.text is not None:
            _check_text(supernet)

    def macs(self, supernet: Elastic) -> float:
        """Of all stages."""
        return sum(part.macs(supernet) for stage in self.stages for part in stage.parts(supernet))


class OneStage:
    """What a stage needs in order to be a whole training too."""

    checkpoint_every = 250

    def parts(self, supernet: Elastic) -> Sequence[Any]:
        return (self,)

    def run(self, supernet: Elastic, images: Images, folder: Path, seed: int, device: str) -> Iterator[Progress]:
        """As `Stages.run`, this stage alone."""
        return Stages((self,), self.checkpoint_every).run(supernet, images, folder, seed, device)  # type: ignore[arg-type]

    def check(self, supernet: Elastic, data: ImageSet) -> None:
        """As `Stages.check`."""
        Stages((self,)).check(supernet, data)  # type: ignore[arg-type]


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

    def fit(
        self, net: LoadedElastic, data: ImageSet, seed: int, files: Checkpoints | None = None
    ) -> Iterator[Progress]:
        """Trains a loaded supernet in place; afterwards it holds the averaged weights."""
        own_copy(net, self.expert)
        teacher = Teacher(net, self.distillation)
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
                        losses[_name(arch)] = 0.0
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
                                losses[_name(arch)] += loss.item()
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
        return recipe.subnets(recipe.options.holding(self.held))


def own_copy(net: LoadedElastic, expert: str) -> None:
    """Sees to it that the expert has weights of its own, those of the shared network where it had none."""
    if expert and expert not in net.experts:
        net.experts[expert] = copy.deepcopy(net.full)


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
    all above it. Settings mean what they mean for `Sandwich`.
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
        teacher = Teacher(net, self.distillation)
        optimiser = Optimiser(self, net, experts=list(dict.fromkeys(arch.expert for arch in archs)))
        batches = Batches(net, data, self.batch, self.flip, self.drop)
        served = torch.tensor(schedule.timesteps[1:], dtype=torch.long).flip(0)
        while optimiser.step < self.steps:
            generator = torch.Generator().manual_seed(derive_seed(seed, optimiser.step, "fine-tune"))
            x0, condition = batches.images(generator)
            t, x, truth = batches.noised(x0, generator)
            target = teacher.target(x, t, truth, condition)
            position = len(schedule.steps) - 1 - torch.bucketize(t.cpu(), served)
            total = 0.0
            for arch in archs:
                mine = torch.tensor([schedule.steps[p].arch == arch for p in position.tolist()], device=net.device)
                if mine.any():
                    its = None if condition is None else {name: rows[mine] for name, rows in condition.items()}
                    prediction = net.forward(arch, x[mine], t[mine], its)
                    error = batches.loss(prediction, target[mine], x0[mine], x[mine], t[mine])
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


def _stage_seed(seed: int, number: int) -> int:
    return derive_seed(seed, number, "stage") if number else seed


def _check_text(supernet: Elastic) -> None:
    """Raises UserError where the texts are not what the network reads."""
    assert supernet.text is not None
    anatomy = supernet.anatomy
    if not anatomy.text_channels:
        raise UserError("the network reads no text; leave text= out")
    tokens, width = supernet.text.shape
    if tokens != anatomy.tokens:
        raise UserError(
            f"texts have {tokens} tokens, costs are reckoned with {anatomy.tokens}; give Elastic(..., tokens={tokens})"
        )
    if {width} != set(anatomy.text_channels):
        raise UserError(
            f"texts have {width} channels, the network reads {' or '.join(map(str, sorted(set(anatomy.text_channels))))}; change one of them"
        )


def check_trainable(supernet: Elastic, data: ImageSet) -> None:
    """Raises UserError where this network cannot be trained on these images."""
    config = supernet.anatomy.config
    shape = supernet.image_shape
    if data.pixels.shape[1:] != shape:
        theirs, ours = ("x".join(map(str, s)) for s in (data.pixels.shape[1:], shape))
        raise UserError(
            f"the images are {theirs} (channels x height x width), the network takes {ours}; change one of them"
        )
    if not len(data):
        raise UserError(
            "there are no images to train on; give the study some, or training=Stages(()) where the network is to stay as it is"
        )
    anatomy = supernet.anatomy
    if anatomy.out_channels != config["in_channels"] and not supernet.learned_variance:
        raise UserError(
            f"out_channels={anatomy.out_channels} must equal in_channels={config['in_channels']}: the network predicts noise; or be twice as "
            "many, where it also learns the variance"
        )
    anatomy.check_trainable()
    if anatomy.null_label is not None:
        if data.labels is None:
            raise UserError(
                f"the network takes labels of {anatomy.null_label} classes, and the images have none; use images with labels"
            )
        most = int(data.labels.max())
        if most >= anatomy.null_label:
            raise UserError(
                f"labels go up to {most}, and the network knows {anatomy.null_label} classes and one of none; set num_class_embeds to {most + 2} "
                f"or more, of a transformer num_embeds_ada_norm to {most + 1}"
            )
    if supernet.anatomy.text_channels:
        if supernet.text is None:
            raise UserError(
                'the network reads texts, and nothing makes them of captions; give it text=TextEncoder("folder of a pipeline")'
            )
        if data.texts is None:
            raise UserError("the network reads captions, but the images have none; use images with captions")
    if config.get("dropout"):
        raise UserError(
            f"dropout={config['dropout']} would make training depend on where it was interrupted; set it to 0"
        )


def _name(arch: Arch) -> str:
    """Short label for progress bars: one share where all levels have the same."""
    shares = arch.widths[:1] if len(set(arch.widths)) == 1 else arch.widths
    depths = f" depth {'/'.join(map(str, arch.depths))}" if arch.depths else ""
    layers = f" layers {'/'.join(map(str, arch.layers))}" if arch.layers else ""
    without = sum(not kept for kept in arch.attention)
    less = [*([f"{without} attention"] if without else []), *([] if arch.middle else ["the middle"])]
    return "/".join(f"{share:g}" for share in shares) + depths + layers + (f" less {', '.join(less)}" if less else "")
