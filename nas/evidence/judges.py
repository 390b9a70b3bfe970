"""Who judges what was trained: the study's own distance, one that knows no labels, and others that are reported beside these two."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from evaluators.features import SmallClassifier
from evaluators.frechet import Frechet, KernelDistance, OfFeatures, in_batches, rows_of
from evaluators.images import HeldOutHalf, load_once
from evaluators.label_free import PixelComponents, RandomFeatures
from evaluators.proxies import DenoisingLoss
from evaluators.scoring import LoadedScore, Sampled
from nas.contracts import LoadedSupernet, Progress, UserError, derive_seed
from nas.study import Study

LOOKING = (Frechet, KernelDistance, DenoisingLoss)
"""Scores that look at images that are held out; others have images to train on alone."""


@dataclass(frozen=True)
class Judge:
    """A distance to real images. `decides`: whether no loss has to be shown under it; the others are reported. `prepared`: its features are those that the
    study's run has prepared."""

    name: str
    evaluator: OfFeatures
    decides: bool = False
    prepared: bool = False

    @property
    def metric(self) -> str:
        return self.evaluator.metrics[0]  # type: ignore[attr-defined, no-any-return]

    @property
    def samples(self) -> int:
        return self.evaluator.rungs[-1]

    @property
    def reals(self) -> int:
        """As many real images as samples, or all that there are to train on. Fewer lie further away, which makes the margin smaller, not larger."""
        return min(self.samples, len(load_once(self.evaluator.images)))

    def prepare(self, folder: Path, seed: int, device: str) -> Iterator[Progress]:
        """What is made of the train images alone."""
        if not self.prepared:
            yield from self.evaluator.prepare(folder, seed, device)

    def load(self, net: LoadedSupernet, folder: Path) -> LoadedScore:
        loaded: LoadedScore = self.evaluator.load(net, folder)  # type: ignore[attr-defined]
        return loaded

    def floor(self, net: LoadedSupernet, folder: Path, seed: int) -> float:
        """The distance of `reals` real images, drawn from those to train on, to the ones that samples are compared with."""
        data = load_once(self.evaluator.images)
        rng = np.random.default_rng(derive_seed(seed, "images of the floor"))
        chosen = np.sort(rng.permutation(len(data))[: self.reals])
        features = self.evaluator.load_features(net, folder)
        rows = [rows_of(features, part, net.device) for part in in_batches(data.pixels[chosen])]
        return float(self.load(net, folder).statistic(np.concatenate(rows))[0])


def judges_of(study: Study) -> tuple[tuple[Judge, ...], bool]:
    """The judges, the first two of which decide: the study's distance, or where it has none, its features or else a classifier's, and one of another kind.
    And whether the search was scored against the same real images, or may have been, of which a file of statistics says nothing. Raises UserError for a
    study that holds no images out."""
    found = _features(study.evaluator)
    images = study.images if found is None else found.images
    features = SmallClassifier() if found is None else found.features
    own = found if isinstance(found, Frechet) else Frechet(images, features, **_sampling(found or study.evaluator))
    # Every part of the score decided what was chosen, not the distance alone.
    looked = [one.images for one in _inside(study.evaluator) if isinstance(one, LOOKING)]
    first = [isinstance(one, HeldOutHalf) and one.half == "first" for one in looked]
    seen = found is None or not all(first) or own.reference is not None
    if isinstance(images, HeldOutHalf) and images.half == "first":
        images = replace(images, half="second")
    if load_once(images).held_out is None:
        raise UserError(
            f"study {study.name} holds no images out, so that nothing can be judged by images that the networks have not seen; give its images a holdout, such as holdout=0.2"
        )
    given = {one.name: getattr(own, one.name) for one in fields(Sampled)}
    prepared = found is not None
    label_free = [
        (f"FD of {name}", Frechet(images, kind, **given))
        for name, kind in (("pixel components", PixelComponents()), ("random features", RandomFeatures()))
        if not isinstance(features, type(kind))
    ]
    return (
        Judge(
            "the study's FD" if prepared else "FD of a classifier",
            replace(own, images=images, reference=None),
            decides=True,
            prepared=prepared,
        ),
        *(Judge(name, one, decides=number == 0) for number, (name, one) in enumerate(label_free)),
        Judge("the kernel distance", KernelDistance(images, features, **given), prepared=prepared),
    ), seen


def _features(evaluator: Any) -> OfFeatures | None:
    """The study's Frechet distance, alone, among others, or timed; else another score of features of its samples."""
    inside = list(_inside(evaluator))
    distances = [one for one in inside if isinstance(one, Frechet)]
    others = [one for one in inside if isinstance(one, OfFeatures)]
    return next(iter(distances + others), None)


def _inside(evaluator: Any) -> Iterator[Any]:
    yield evaluator
    for one in [*getattr(evaluator, "parts", ()), *([evaluator.base] if hasattr(evaluator, "base") else [])]:
        if not isinstance(one, str):
            yield from _inside(one)


def _sampling(evaluator: Any) -> dict[str, Any]:
    """How a score of another kind samples, as far as it says."""
    told = {one.name: getattr(evaluator, one.name, None) for one in fields(Sampled)}
    return {"rungs": tuple(evaluator.rungs), **{name: value for name, value in told.items() if value is not None}}
