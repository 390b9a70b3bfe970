"""Feature extractors for distribution distances, each with a name and a hash that every score carries."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import field
from pathlib import Path
from typing import Any, Literal, Protocol
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.export.passes import move_to_device_pass

from nas.base.files import file_digest, first_line, tensors_digest, written
from nas.contracts import ImageSet, Progress, UserError, derive_seed, digest_of
from nas.recipes import Batch, Count, Few, Positive, recipe


class LoadedFeatures(Protocol):
    label: str
    """For people: which extractor, with a few digits of its hash."""
    distance: str
    """What the Frechet distance on these features may be called: "FID" for Inception alone, else "FD"."""

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Images (n, channels, height, width) in [-1, 1] to features (n, d), float32, on the images' device."""


class Features(Protocol):
    """Recipe of an extractor."""

    def describe(self) -> dict[str, Any]: ...

    def prepare(self, images: ImageSet, folder: Path, seed: int, device: str) -> Iterator[Progress]: ...

    def digest(self, folder: Path) -> str:
        """Identifies the prepared extractor."""

    def load(self, folder: Path, device: torch.device) -> LoadedFeatures: ...

    def width(self) -> int | None:
        """Numbers for each image; None where only running it tells."""


@recipe
class SmallClassifier:
    """A small CNN trained on the study's own images: on their labels, or where there are none or all are one, on telling by how many
    quarter turns an image was rotated. Features are its last hidden layer, `dimensions` tanh units.

    `cells`: sides of the map that the last layer sees. `decay`: the learning rate falls to zero on a cosine.

    It judges what matters in these images, and its distance is comparable within one run folder only. It is no FID.
    """

    dimensions: Few = 64
    channels: Few = 32
    steps: Count = 400
    batch: Batch = 128
    learning_rate: Positive = 2e-3
    cells: Few = 2
    decay: bool = False

    def describe(self) -> dict[str, Any]:
        """What was added later is left out where nothing is said of it."""
        later = {"cells": 2, "decay": False}
        settings = {k: v for k, v in self.__dict__.items() if k not in later or v != later[k]}
        return {"class": "SmallClassifier", **settings}

    def _made(self, in_channels: int, classes: int) -> _Classifier:
        return _Classifier(in_channels, self.channels, self.dimensions, classes, self.cells)

    def prepare(self, images: ImageSet, folder: Path, seed: int, device: str) -> Iterator[Progress]:
        path = self._path(folder)
        # Whatever is held out of them, the images to train on are the same.
        of = (images.source or images.digest, images.digest)
        known = [digest_of({**self.describe(), "images": one, "seed": seed}) for one in of]
        if path.exists():
            if self._metadata(path).get("recipe") not in known:
                raise UserError(
                    f"{path} was trained on other images or with other settings; use another --out, or delete it; where one run has two classifiers of different images, give one "
                    "of them a setting of its own, such as dimensions=65"
                )
            return
        pixels = torch.from_numpy(images.pixels)  # which stay where they are: there may be more than a device holds
        # Of a single class there is nothing to tell apart.
        told = images.labels is not None and len(np.unique(images.labels)) > 1
        labels = torch.from_numpy(images.labels).to(device) if told else None
        rotations = 4 if pixels.shape[2] == pixels.shape[3] else 2
        classes = rotations if labels is None else int(labels.max()) + 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "features", "weights"))
            net = self._made(pixels.shape[1], classes).to(device)
        adam = torch.optim.Adam(net.parameters(), lr=self.learning_rate)
        for step in range(self.steps):
            generator = torch.Generator().manual_seed(derive_seed(seed, step, "features"))
            chosen = torch.randint(len(pixels), (self.batch,), generator=generator)
            x, chosen = pixels[chosen].to(device), chosen.to(device)
            if labels is None:
                target = torch.randint(rotations, (self.batch,), generator=generator).to(device)
                x = _rotated(x, target * (4 // rotations))
            else:
                target = labels[chosen]
            if self.decay:
                adam.param_groups[0]["lr"] = self.learning_rate * 0.5 * (1 + math.cos(math.pi * step / self.steps))
            logits = net.head(net(x))
            loss = nn.functional.cross_entropy(logits, target)
            adam.zero_grad()
            torch.autograd.backward(loss)
            adam.step()
            if not math.isfinite(loss.item()):
                raise UserError(
                    f"the features' loss is {loss.item()} at step {step + 1}; lower SmallClassifier's learning_rate, {self.learning_rate:g}"
                )
            accuracy = float((logits.argmax(1) == target).float().mean())
            yield Progress("features", step + 1, self.steps, {"loss": loss.item(), "accuracy": accuracy})
        metadata = {
            "in_channels": str(pixels.shape[1]),
            "classes": str(classes),
            "recipe": known[0],
            "settings": self._settings,
        }
        if labels is not None and images.held_out is not None and images.held_out.labels is not None:
            accuracy = _accuracy(net, images.held_out, device)
            metadata["held_out_accuracy"] = f"{accuracy:.4f}"
            yield Progress("features", self.steps, self.steps, {"held_out_accuracy": accuracy})
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with written(path):
            save_file(net.state_dict(), partial, metadata)
        os.replace(partial, path)

    def load(self, folder: Path, device: torch.device) -> LoadedFeatures:
        return _Extractor(self._network(folder, device), f"small classifier {self.digest(folder)}", "FD")

    def classifier(self, folder: Path, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
        """Images (n, channels, height, width) in [-1, 1] to a logit for each class, (n, classes), or where there are not two of them for each turn."""
        net = self._network(folder, device)
        return in_parts(lambda images: net.head(net(images)))

    def _network(self, folder: Path, device: torch.device) -> _Classifier:
        path = self._path(folder)
        metadata = self._metadata(path)
        in_channels, classes = int(metadata["in_channels"]), int(metadata["classes"])
        net = self._made(in_channels, classes).to(device)
        net.load_state_dict(load_file(path, device=str(device)))
        return net.eval()

    def held_out_accuracy(self, folder: Path) -> float | None:
        """Share of the held-out images that it puts into their class; None where none were held out."""
        told = self._metadata(self._path(folder)).get("held_out_accuracy")
        return None if told is None else float(told)

    def digest(self, folder: Path) -> str:
        self._metadata(self._path(folder))
        return tensors_digest(self._path(folder))[:8]

    def former_digest(self, folder: Path) -> str:
        """By the bytes of the file, as ledgers were once written."""
        return _digest(self._path(folder))

    def width(self) -> int | None:
        return self.dimensions

    def _metadata(self, path: Path) -> dict[str, str]:
        try:
            with safe_open(path, "pt") as file:
                metadata: dict[str, str] = file.metadata()
                return metadata
        except FileNotFoundError:
            raise UserError(f"{path} does not exist; `nas run` trains it") from None
        except SafetensorError as error:
            raise UserError(
                f"{path} is damaged ({first_line(error)}); delete it, and `nas run` trains it again"
            ) from error

    def _path(self, folder: Path) -> Path:
        """Of the first classifier of a run folder, or where that has other settings, one of its own beside it."""
        first = folder / "features" / "classifier.safetensors"
        mine = self._settings
        theirs = self._metadata(first).get("settings", mine) if first.exists() else mine
        return first if theirs == mine else first.with_stem(f"classifier-{mine}")

    @property
    def _settings(self) -> str:
        return digest_of(self.describe())[:8]


@recipe
class ExternalFeatures:
    """Any extractor from a local TorchScript (`.pt`) or exported program (`.pt2`) file; the way to bring Inception-v3.

    `name`: what scores call it; the distance on features named "inception-v3" is called FID, any other FD.
    `value_range`: what the file expects, "signed" for [-1, 1], "unit" for [0, 1], "bytes" for uint8 0..255.
    `size`: images are resized to this side first (bilinear, antialiased), where given. Grey images are repeated to RGB
    where `rgb`. The output, or its first entry, is flattened to (n, d).
    """

    path: str
    name: str
    value_range: Literal["signed", "unit", "bytes"] = "signed"
    size: Few | None = None
    rgb: bool = True
    base: str = field(default_factory=os.getcwd, repr=False, compare=False, kw_only=True)

    def describe(self) -> dict[str, Any]:
        return {
            "class": "ExternalFeatures",
            "name": self.name,
            "hash": _digest(self._file()),
            "value_range": self.value_range,
            "size": self.size,
            "rgb": self.rgb,
        }

    def prepare(self, images: ImageSet, folder: Path, seed: int, device: str) -> Iterator[Progress]:
        self._file()
        yield from ()

    def digest(self, folder: Path) -> str:
        return _digest(self._file())

    def width(self) -> int | None:
        """Runs the file on two images of the size that it asks for, of three channels or else of one. Raises UserError where it can take neither."""
        side, extractor = self.size or 64, self.load(Path(), torch.device("cpu"))
        for channels in (3,) if self.rgb else (3, 1):
            try:
                return int(extractor(torch.zeros((2, channels, side, side))).shape[1])
            except (RuntimeError, AssertionError, ValueError) as error:  # an exported program's guards are assertions
                refused = error
        if self.size is None:
            return None  # it may want a size of its own
        raise UserError(
            f"{self._file()} cannot take images of {side} pixels ({first_line(refused)}); give its size=, and export it with a batch of any number"
        ) from refused

    def load(self, folder: Path, device: torch.device) -> LoadedFeatures:
        path = self._file()
        net: Any
        try:
            if path.suffix == ".pt2":
                program = torch.export.load(path)
                if device.type != "cpu":  # where it made tensors of its own as it was exported
                    program = move_to_device_pass(program, str(device))
                net = program.module()
            else:
                net = torch.jit.load(path, map_location=device).eval()  # type: ignore[no-untyped-call]
        except (RuntimeError, ValueError, OSError, BadZipFile) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{path} is neither a TorchScript nor an exported program file ({reason})") from error
        return _Extractor(
            net, f"{self.name} {_digest(path)}", "FID" if self.name == "inception-v3" else "FD", self._preprocessed
        )

    def _preprocessed(self, images: torch.Tensor) -> torch.Tensor:
        if self.rgb and images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        if self.size:
            images = nn.functional.interpolate(images, size=(self.size, self.size), mode="bilinear", antialias=True)
        if self.value_range == "signed":
            return images
        unit = (images.clamp(-1, 1) + 1) / 2
        return unit if self.value_range == "unit" else (unit * 255).round().to(torch.uint8)

    def _file(self) -> Path:
        path = Path(self.base) / Path(self.path).expanduser()
        if not path.is_file():
            raise UserError(f"feature extractor {path} does not exist; give the path of a local .pt or .pt2 file")
        return path


class _Classifier(nn.Module):
    def __init__(self, in_channels: int, channels: int, dimensions: int, classes: int, cells: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(2 * channels, 2 * channels, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(cells),
            nn.Flatten(),
            nn.Linear(2 * cells**2 * channels, dimensions),
            nn.Tanh(),
        )
        self.head = nn.Linear(dimensions, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.body(images)
        return features


AT_ONCE, PIXELS = 256, 2**22
"""The most images in a call of an extractor, and the most pixels."""


def in_parts(call: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The same in calls of so many images at once as of real images, whatever the batch that was chosen for the network that made them."""

    def called(*images: torch.Tensor) -> torch.Tensor:
        count = max(1, min(AT_ONCE, PIXELS // math.prod(images[0].shape[2:])))
        parts = zip(*(torch.split(each, count) for each in images), strict=True)
        return torch.cat([call(*part) for part in parts])

    return called


class _Extractor:
    def __init__(self, net: Any, label: str, distance: str, preprocess: Any = None) -> None:
        self.label = label
        self.distance = distance
        self._net = net
        self._preprocess = preprocess or (lambda images: images)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return in_parts(self._of)(images)

    def _of(self, images: torch.Tensor) -> torch.Tensor:
        output = self._net(self._preprocess(images))
        features: torch.Tensor = output[0] if isinstance(output, tuple | list) else output
        return features.flatten(1).float()


@torch.inference_mode()
def _accuracy(net: _Classifier, images: ImageSet, device: str) -> float:
    assert images.labels is not None
    right = 0
    for start in range(0, len(images), 500):
        part = slice(start, start + 500)
        seen = net.head(net(torch.from_numpy(images.pixels[part]).to(device))).argmax(1).cpu().numpy()
        right += int((seen == images.labels[part]).sum())
    return right / len(images)


def _rotated(images: torch.Tensor, quarter_turns: torch.Tensor) -> torch.Tensor:
    rotated = images.clone()
    for turns in (1, 2, 3):
        chosen = quarter_turns == turns
        if chosen.any():
            rotated[chosen] = torch.rot90(images[chosen], turns, (2, 3))
    return rotated


def _digest(path: Path) -> str:
    return file_digest(path)[:8]
