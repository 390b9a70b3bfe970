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
from evaluators.scoring import LoadedScore, Sampled
from nas.contracts import LoadedSupernet, Progress, UserError, derive_seed
from nas.study import Study


@dataclass(frozen=True)
class Judge:
    """A distance to real images. `decides`: whether no loss has to be shown under it; the others are reported."""

    name: str
    evaluator: OfFeatures
    decides: bool = False

    @property
    def metric(self) -> str:
        return self.evaluator.metrics[0]  # type: ignore[attr-defined, no-any-return]

    @property
    def samples(self) -> int:
        return self.evaluator.rungs[-1]

    def prepare(self, folder: Path, seed: int, device: str) -> Iterator[Progress]:
        """What is made of the train images alone. The study's own features are there."""
        if isinstance(self.evaluator.features, PixelComponents | RandomFeatures):
            yield from self.evaluator.prepare(folder, seed, device)

    def load(self, net: LoadedSupernet, folder: Path) -> LoadedScore:
        loaded: LoadedScore = self.evaluator.load(net, folder)  # type: ignore[attr-defined]
        return loaded

    def floor(self, net: LoadedSupernet, folder: Path, seed: int) -> float:
        """The distance of equally many real images, drawn from those to train on, to the ones that samples are compared with."""
        data = load_once(self.evaluator.images)
        rng = np.random.default_rng(derive_seed(seed, "images of the floor"))
        chosen = np.sort(rng.permutation(len(data))[: self.samples])
        features = self.evaluator.load_features(net, folder)
        rows = [rows_of(features, part, net.device) for part in in_batches(data.pixels[chosen])]
        return float(self.load(net, folder).statistic(np.concatenate(rows))[0])


def judges_of(study: Study) -> tuple[tuple[Judge, ...], bool]:
    """The judges, the first two of which decide; and whether the search was scored against the same real images. Raises UserError for a study that holds
    no images out."""
    own = _distance(study.evaluator) or Frechet(study.images, SmallClassifier(), **_sampling(study.evaluator))
    images, seen = own.images, True
    if isinstance(images, HeldOutHalf) and images.half == "first":
        images, seen = replace(images, half="second"), False
    if own.reference is None and load_once(images).held_out is None:
        raise UserError(
            f"study {study.name} holds no images out, so that nothing can be judged by images that the networks have not seen; give its images a holdout, such as holdout=0.2"
        )
    given = {one.name: getattr(own, one.name) for one in fields(Sampled)}
    of_components = Frechet(images, PixelComponents(), **given)
    of_random = Frechet(images, RandomFeatures(), **given)
    kernel = KernelDistance(images, own.features, **given)
    return (
        Judge("the study's FD", replace(own, images=images), decides=True),
        Judge("FD of pixel components", of_components, decides=True),
        Judge("FD of random features", of_random),
        Judge("the kernel distance", kernel),
    ), seen


def _distance(evaluator: Any) -> Frechet | None:
    """The study's Frechet distance, alone, among others, or timed."""
    if isinstance(evaluator, Frechet):
        return evaluator
    inner = [*getattr(evaluator, "parts", ()), *([evaluator.base] if hasattr(evaluator, "base") else [])]
    found = (_distance(one) for one in inner if not isinstance(one, str))
    return next((one for one in found if one is not None), None)


def _sampling(evaluator: Any) -> dict[str, Any]:
    """How a score of another kind samples."""
    told = {name: getattr(evaluator, name, None) for name in ("sampler", "conditions")}
    return {"rungs": tuple(evaluator.rungs), **{name: value for name, value in told.items() if value is not None}}
