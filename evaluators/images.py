"""Real images as float32 arrays in [-1, 1]. Every source is a recipe; `load` reads, checks and hashes."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nas.contracts import Images, ImageSet, UserError

MINIMUM = 16
"""Fewer images give neither a training batch nor a covariance."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


@dataclass(frozen=True)
class Digits:
    """scikit-learn's bundled handwritten digits: 1,797 real 8x8 grey images with labels, enlarged bilinearly to `size` pixels."""

    size: int = 8

    def __post_init__(self) -> None:
        if self.size < 8:
            raise UserError(f"digits of size={self.size} cannot be had; they have 8 pixels, or more when enlarged")

    def load(self) -> ImageSet:
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = torch.from_numpy(digits.images[:, None] / 8.0 - 1.0)
        if self.size > 8:
            pixels = torch.nn.functional.interpolate(pixels, (self.size, self.size), mode="bilinear")
        return _checked(pixels.numpy(), digits.target, "digits")


@dataclass(frozen=True)
class PhotoPatches:
    """RGB patches of scikit-learn's two bundled photographs (a temple and a flower), labelled by photograph.

    `count` patches of `size` x `size` pixels at places drawn from `seed`, each photograph first halved `halvings` times.
    """

    count: int = 4096
    size: int = 32
    halvings: int = 1
    seed: int = 0

    def load(self) -> ImageSet:
        from sklearn.datasets import load_sample_images

        photos = [_halved(photo / 127.5 - 1.0, self.halvings) for photo in load_sample_images().images]
        smallest = min(min(photo.shape[:2]) for photo in photos)
        if self.size > smallest:
            raise UserError(
                f"patches of {self.size} pixels do not fit into photographs of {smallest}; use a smaller size or fewer halvings"
            )
        rng = np.random.default_rng(self.seed)
        labels = rng.integers(len(photos), size=self.count)
        patches = []
        for label in labels:
            top, left = (rng.integers(side - self.size + 1) for side in photos[label].shape[:2])
            patches.append(photos[label][top : top + self.size, left : left + self.size].transpose(2, 0, 1))
        return _checked(
            np.stack(patches) if patches else np.empty((0, 3, self.size, self.size)), labels, "photograph patches"
        )


@dataclass(frozen=True)
class ImageFolder:
    """Every image file below `path`, in order of its name. Sub-folders, where there are any, are the labels.

    `size`: (height, width) that every file must have; files are never resized silently. `channels`: 1 (grey) or 3 (RGB).
    Raises UserError naming the file that is corrupt or of another size.
    """

    path: str
    size: tuple[int, int]
    channels: int = 3

    def load(self) -> ImageSet:
        from PIL import Image, UnidentifiedImageError

        root = Path(self.path)
        if not root.is_dir():
            raise UserError(f"image folder {root} does not exist")
        files = sorted(file for file in root.rglob("*") if file.suffix.lower() in SUFFIXES)
        pixels = np.empty((len(files), self.channels, *self.size), dtype=np.float32)
        for i, file in enumerate(files):
            try:
                with Image.open(file) as image:
                    array = np.asarray(image.convert("L" if self.channels == 1 else "RGB"), dtype=np.float32)
            except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
                raise UserError(f"{file} cannot be read as an image ({error}); repair or remove it") from error
            if array.shape[:2] != self.size:
                height, width = array.shape[:2]
                raise UserError(
                    f"{file} is {height}x{width} pixels, not {self.size[0]}x{self.size[1]}; resize it or change size"
                )
            pixels[i] = array[None] / 127.5 - 1.0 if array.ndim == 2 else array.transpose(2, 0, 1) / 127.5 - 1.0
        folders = sorted({file.parent for file in files})
        labels = np.array([folders.index(file.parent) for file in files]) if len(folders) > 1 else None
        return _checked(pixels, labels, str(root))


@dataclass(frozen=True)
class ImageArray:
    """An `.npz` file with uint8 `images` of shape (n, height, width) or (n, height, width, channels), and maybe `labels`.

    Raises UserError where the file or the array is not that.
    """

    path: str

    def load(self) -> ImageSet:
        path = Path(self.path)
        if not path.is_file():
            raise UserError(f"image array {path} does not exist")
        try:
            with np.load(path, allow_pickle=False) as file:
                if "images" not in file:
                    raise UserError(f"{path} holds {sorted(file)}, not an array named 'images'")
                images, labels = file["images"], file.get("labels")
        except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} cannot be read as an .npz file ({error})") from error
        if images.dtype != np.uint8 or images.ndim not in (3, 4):
            raise UserError(
                f"'images' of {path} is {images.dtype} of shape {images.shape}; it must be uint8, (n, height, width[, channels])"
            )
        if labels is not None and labels.shape != images.shape[:1]:
            raise UserError(f"'labels' of {path} has shape {labels.shape}; it must be ({len(images)},), one per image")
        channels_last = images[..., None] if images.ndim == 3 else images
        return _checked(channels_last.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1.0, labels, str(path))


@lru_cache(maxsize=2)
def load_once(images: Images) -> ImageSet:
    """`images.load()`, kept: reading and hashing a large folder takes a while, and several parts ask for it."""
    return images.load()


def check_shape(images: ImageSet, shape: tuple[int, int, int]) -> None:
    """Raises UserError where the images are not what the network takes: (channels, height, width)."""
    if images.pixels.shape[1:] != shape:
        theirs, ours = ("x".join(map(str, s)) for s in (images.pixels.shape[1:], shape))
        raise UserError(
            f"the images are {theirs} (channels x height x width), the network takes {ours}; change one of them"
        )


def _halved(photo: npt.NDArray[np.float64], times: int) -> npt.NDArray[np.float64]:
    for _ in range(times):
        height, width = (side // 2 * 2 for side in photo.shape[:2])
        photo = photo[:height, :width].reshape(height // 2, 2, width // 2, 2, -1).mean((1, 3))
    return photo


def _checked(pixels: npt.NDArray[Any], labels: npt.NDArray[Any] | None, what: str) -> ImageSet:
    if len(pixels) < MINIMUM:
        raise UserError(f"{what} has {len(pixels)} images; at least {MINIMUM} are needed")
    pixels = np.ascontiguousarray(pixels, dtype=np.float32)
    labels = None if labels is None else labels.astype(np.int64)
    content = hashlib.sha256(pixels.tobytes() + (b"" if labels is None else labels.tobytes()))
    content.update(str(pixels.shape).encode())
    return ImageSet(pixels, labels, content.hexdigest()[:16])
