"""Whether samples show what they were asked to: the share that a judge puts into another class than their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from evaluators.features import SmallClassifier
from evaluators.images import check_shape, load_once
from evaluators.scoring import LoadedScore, Rows, Sampled, mean_with_replicates
from nas.contracts import Images, ImageSet, LoadedSupernet, Progress, Schedule, UserError, digest_of
from nas.recipes import recipe

ASKED = 1024
"""Of so many samples the classes are looked at beforehand."""


@recipe
class Agreement(Sampled):
    """Share of a schedule's samples that the judge does not put into their class. Value: "disagreement", which falls as accuracy rises.

    It sees whether a sample can be recognised, and nothing else: strong guidance raises it while samples become alike, which a Frechet
    distance notices. `judge`: a classifier of the images, by default the one whose features the Frechet distance is taken of.
    """

    images: Images
    judge: SmallClassifier = field(default_factory=SmallClassifier)
    metrics = ("disagreement",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.conditions is None:
            raise UserError(
                "Agreement compares samples with the classes they were asked to be; give it conditions=Labels(images), or captions or "
                "prompts with classes"
            )

    def check(self) -> None:
        """Raises UserError where samples are asked for no classes, or the judge's images have none; before anything is trained."""
        self._check_classes()
        self._check_labels(getattr(self.images, "peek", lambda: load_once(self.images))())

    def _check_classes(self) -> None:
        assert self.conditions is not None
        if self.conditions.load().classes(0, 0, 1) is None:
            raise UserError(f"{self.conditions} asks for no classes; Agreement needs them, so give each its class")

    def _check_labels(self, images: ImageSet) -> None:
        if images.labels is None:
            raise UserError(
                f"{self.images} have no labels, by which a judge learns to tell classes; give them labels, or leave Agreement out"
            )

    def describe(self) -> Mapping[str, object]:
        return {
            "class": "Agreement",
            **self.describe_sampling(),
            "judge": self.judge.describe(),
            "images": load_once(self.images).digest,
        }

    def digest(self, folder: Path) -> str:
        return digest_of({**self.describe(), "judge": self.judge.digest(folder)})

    def prepare(self, folder: Path, seed: int, device: str) -> Iterator[Progress]:
        yield from self.prepare_conditions(folder, device)
        images = load_once(self.images)
        self._check_labels(images)
        assert images.labels is not None
        if len(np.unique(images.labels)) < 2:
            raise UserError(f"{self.images} are all of one class, which nobody tells from another; leave Agreement out")
        assert self.conditions is not None
        asked = self.conditions.load().classes(0, 0, ASKED)
        if asked is not None and int(asked.max()) > images.labels.max():
            raise UserError(
                f"{self.conditions} asks for class {int(asked.max())}, and the judge's images have the classes 0 to {images.labels.max()}; number both alike"
            )
        yield from self.judge.prepare(images, folder, seed, device)

    def load(self, supernet: LoadedSupernet, folder: Path) -> LoadedScore:
        self._check_classes()
        self._check_labels(images := load_once(self.images))
        check_shape(images, supernet.image_shape)
        trajectories, classify = self.trajectories(supernet, folder), self.judge.classifier(folder, supernet.device)
        conditions = trajectories.conditions
        assert conditions is not None

        def make(schedule: Schedule, seed: int, start: int, stop: int) -> npt.NDArray[np.float64]:
            asked = conditions.classes(seed, start, stop)
            assert asked is not None
            with torch.inference_mode():
                seen = classify(trajectories.images(schedule, seed, start, stop)).argmax(1).cpu()
            return (seen != asked).double().numpy()

        accuracy = self.judge.held_out_accuracy(folder)
        words = "" if accuracy is None else f", right about {accuracy:.1%} of held-out images"
        judge = digest_of({"recipe": self.judge.describe(), "prepared": self.judge.digest(folder)})
        return LoadedScore(
            self,
            trajectories,
            "disagreement",
            Rows(f"classes by {judge} other than asked for", make),
            mean_with_replicates,
            lambda count: f"samples in another class@{count} (small classifier {self.judge.digest(folder)}{words})",
        )
