"""What samples are conditioned on. A sample is a noise and a condition; both are the same for all schedules, so that scores are paired."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from evaluators.images import load_once
from nas.contracts import Condition, Images, UserError, digest_of
from nas.recipes import recipe


class ConditionSet(Protocol):
    """Conditions with their tensors."""

    @property
    def digest(self) -> str:
        """Identifies which sample has which."""

    def of(self, seed: int, start: int, stop: int) -> Condition:
        """Of samples start..stop-1, on the CPU. Depends on (seed, i) alone."""


class Conditions(Protocol):
    """Recipe of what samples are conditioned on."""

    def describe(self) -> dict[str, Any]: ...

    def load(self) -> ConditionSet: ...


@recipe
class Labels:
    """Class labels, as often as the images have them: sample i has the label of the image at place i of an endless sequence of permutations
    derived from the seed. In each of them every class is spread evenly, so that every block of neighbours holds the same mixture.

    Raises UserError where the images have no labels.
    """

    images: Images

    def describe(self) -> dict[str, Any]:
        return {"class": "Labels", "images": load_once(self.images).digest}

    def load(self) -> LabelSet:
        data = load_once(self.images)
        if data.labels is None:
            raise UserError(f"{self.images} have no labels to condition samples on; use images with labels")
        return LabelSet(data.labels, digest_of(self.describe()))


class LabelSet:
    def __init__(self, labels: npt.NDArray[np.int64], digest: str) -> None:
        self._labels = labels
        self.digest = digest
        self._round = lru_cache(maxsize=64)(self._spread)

    def of(self, seed: int, start: int, stop: int) -> dict[str, torch.Tensor]:
        count = len(self._labels)
        rounds = range(start // count, -(-stop // count))
        order = [self._round(seed, number) for number in rounds] or [np.empty(0, np.int64)]
        first = start - start // count * count
        chosen = np.concatenate(order)[first : first + stop - start]
        return {"class_labels": torch.from_numpy(self._labels[chosen])}

    def _spread(self, seed: int, number: int) -> npt.NDArray[np.int64]:
        """A permutation of the images: the j-th of n images of a class, in an order of its own, stands at (j + u) / n of the way, u uniform."""
        rng = np.random.default_rng([seed, number, 0x1ABE15])
        place = np.empty(len(self._labels))
        for label in np.unique(self._labels):
            mine = np.flatnonzero(self._labels == label)
            place[rng.permutation(mine)] = (np.arange(len(mine)) + rng.random()) / len(mine)
        return np.argsort(place, kind="stable")
