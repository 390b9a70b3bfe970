"""Training of the supernet in stages, resumable with the same call and bit-identical at one thread count."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nas.base.interrupts import whole
from nas.contracts import Images, ImageSet, Progress, UserError, derive_seed, digest_of
from nas.recipes import Count, recipe
from search_spaces.loaded import LoadedElastic
from search_spaces.supernet import WEIGHTS, Elastic
from search_spaces.training.optimiser import Optimiser, check_recipe, gather, metadata_of, write_tensors
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

    def __post_init__(self) -> None:
        late = next((stage for stage in self.stages[1:] if getattr(stage, "begins", False)), None)
        if late is not None:
            raise UserError(
                f"{type(late).__name__} would undo what the stages before it have trained; let it be the first"
            )

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
        # A run that was killed between a stage's weights and the end of its checkpoint leaves both.
        done = {digest_of([digest, number]) for number in range(len(spent))}
        if mates.first and (folder / CHECKPOINT).exists() and metadata_of(folder / CHECKPOINT).get("recipe") in done:
            (folder / CHECKPOINT).unlink()
        mates.wait()
        for number, part in enumerate(parts[len(spent) :], len(spent)):
            net.trained_macs = 0
            # A stage's own, where one is given, and else that of all.
            own = getattr(part, "checkpoint_every", OneStage.checkpoint_every)
            every = self.checkpoint_every if own == OneStage.checkpoint_every else own
            files = Checkpoints(folder / CHECKPOINT, digest_of([digest, number]), every, mates)
            yield from part.fit(net, data, _stage_seed(seed, number), files)
            mates.agree(gather(net).values())
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
        for stage in self.parts(supernet):
            getattr(stage, "check_supernet", lambda _: None)(supernet)
            stock = supernet.anatomy.stock
            if getattr(stage, "checkpointing", False) and not getattr(stock, "_supports_gradient_checkpointing", False):
                raise UserError(
                    f"{stock.__name__} cannot run its blocks again in the backward pass; leave checkpointing out"
                )
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

    def check_supernet(self, supernet: Elastic) -> None:
        """Raises UserError where it cannot be a stage of a training of this network, before the stages before it are trained."""
        expert = getattr(self, "expert", "")
        if expert and expert not in supernet.expert_names:
            known = ", ".join(supernet.expert_names) or "none; give it experts="
            raise UserError(f"the supernet has no expert {expert!r}; it has {known}")

    def parts(self, supernet: Elastic) -> Sequence[Any]:
        return (self,)

    def run(self, supernet: Elastic, images: Images, folder: Path, seed: int, device: str) -> Iterator[Progress]:
        """As `Stages.run`, this stage alone."""
        return Stages((self,), self.checkpoint_every).run(supernet, images, folder, seed, device)  # type: ignore[arg-type]

    def check(self, supernet: Elastic, data: ImageSet) -> None:
        """As `Stages.check`."""
        Stages((self,)).check(supernet, data)  # type: ignore[arg-type]


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
