"""Feature extractors that learn from no label: second judges, whose taste is not that of a classifier of the same images."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from scipy.linalg import eigh
from torch import nn

from evaluators.features import LoadedFeatures
from nas.base.files import first_line, tensors_digest, written
from nas.contracts import ImageSet, Progress, UserError, digest_of
from nas.recipes import Few, Seed, recipe

SIDE = 32
"""Larger images are averaged down to this many pixels a side first, in two or three channels to 3,072 numbers."""


@recipe
class PixelComponents:
    """The first principal components of the train images' pixels: what a linear eye sees. Where images have fewer pixels than `dimensions`, all.

    A shift of brightness or of coarse shape shows in them, where a classifier has learned not to look; fine detail does not.
    """

    dimensions: Annotated[int, Field(ge=1, le=1024)] = 64

    def describe(self) -> dict[str, Any]:
        return {"class": "PixelComponents", "dimensions": self.dimensions}

    def prepare(self, images: ImageSet, folder: Path, seed: int, device: str) -> Iterator[Progress]:
        path = self._path(folder)
        recipe = digest_of({**self.describe(), "images": images.digest})
        if path.exists():
            kept = self._opened(path)[0]
            if kept.get("recipe") != recipe and kept.get("pixels") != _pixels_digest(images):
                raise UserError(f"{path} was made of other images; use another --out, or delete it")
            return
        yield Progress("pixel components", 0, 1)
        total, products, count = torch.zeros(()).double(), torch.zeros(()).double(), len(images)
        for start in range(0, count, 1000):
            rows = _flat(torch.from_numpy(images.pixels[start : start + 1000])).double()
            total, products = total + rows.sum(0), products + rows.T @ rows
        mean = total / count
        covariance = products / count - torch.outer(mean, mean)
        size = len(mean)
        first = max(0, size - self.dimensions)
        vectors = torch.from_numpy(eigh(covariance.numpy(), subset_by_index=[first, size - 1])[1]).flip(1)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with written(path):
            tensors = {"mean": mean.float(), "components": vectors.float().contiguous()}
            save_file(tensors, partial, {"recipe": recipe, "pixels": _pixels_digest(images)})
        os.replace(partial, path)
        yield Progress("pixel components", 1, 1)

    def load(self, folder: Path, device: torch.device) -> LoadedFeatures:
        tensors = {name: tensor.to(device) for name, tensor in self._opened(self._path(folder))[1].items()}
        return _Features(
            lambda images: (_flat(images) - tensors["mean"]) @ tensors["components"],
            f"{self.dimensions} pixel components {self.digest(folder)}",
        )

    def digest(self, folder: Path) -> str:
        self._opened(self._path(folder))
        return tensors_digest(self._path(folder))[:8]

    def width(self) -> int | None:
        return None

    def _path(self, folder: Path) -> Path:
        return folder / "features" / f"pixel-components-{self.dimensions}.safetensors"

    def _opened(self, path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
        try:
            with safe_open(path, "pt") as file:
                return file.metadata() or {}, {name: file.get_tensor(name) for name in ("mean", "components")}
        except FileNotFoundError:
            raise UserError(f"{path} does not exist; prepare the evaluator first") from None
        except SafetensorError as error:
            raise UserError(f"{path} is damaged ({first_line(error)}); delete it, it is made again") from error


@recipe
class RandomFeatures:
    """A convolutional network that nobody trained: four layers of random weights, whose mean and largest activations are `dimensions` features. It sees
    texture and edges, of whatever images; it is the same in every run folder, so that its distances compare."""

    dimensions: Few = 64
    seed: Seed = 0

    def describe(self) -> dict[str, Any]:
        return {"class": "RandomFeatures", **self.__dict__}

    def prepare(self, images: ImageSet, folder: Path, seed: int, device: str) -> Iterator[Progress]:
        yield from ()

    def load(self, folder: Path, device: torch.device) -> LoadedFeatures:
        generator = torch.Generator().manual_seed(self.seed)
        sizes = [3, 16, 32, 64, -(-self.dimensions // 2)]
        weights = [
            # He et al. 2015: the variance of activations stays the same through rectified layers.
            (torch.randn((o, i, 3, 3), generator=generator) * (2 / (9 * i)) ** 0.5).to(device)
            for i, o in pairwise(sizes)
        ]

        def seen(images: torch.Tensor) -> torch.Tensor:
            x = images if images.shape[1] == 3 else images[:, :1].expand(-1, 3, -1, -1)
            for number, weight in enumerate(weights):
                x = nn.functional.conv2d(x, weight, stride=2 if number in (1, 2) else 1, padding=1).relu()
            return torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)[:, : self.dimensions]

        return _Features(seen, f"{self.dimensions} random features {self.digest(folder)}")

    def digest(self, folder: Path) -> str:
        return digest_of(self.describe())[:8]

    def width(self) -> int | None:
        return self.dimensions


class _Features:
    distance = "FD"

    def __init__(self, seen: Any, label: str) -> None:
        self.label = label
        self._seen = seen

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            features: torch.Tensor = self._seen(images)
            return features.float()


def _pixels_digest(images: ImageSet) -> str:
    """Of those to train on alone: which images are held out makes no difference here."""
    return hashlib.sha256(np.ascontiguousarray(images.pixels).data).hexdigest()[:16]


def _flat(images: torch.Tensor) -> torch.Tensor:
    """Pixels as rows."""
    if max(images.shape[2:]) > SIDE:
        images = nn.functional.adaptive_avg_pool2d(images, SIDE)
    return images.flatten(1)
