"""Grids of samples as pictures. Without matplotlib, whose import commands that draw nothing else do without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image


def to_uint8(images: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """[-1, 1] to 0..255, (n, channels, height, width) to (n, height, width, channels)."""
    return np.rint((images.clip(-1, 1) + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)


def shrunk(images: npt.NDArray[np.float32], most: int) -> npt.NDArray[np.float32]:
    """(n, channels, height, width) in [-1, 1], by whole pixels averaged, until neither side is longer; a rest at the edges is left out."""
    by = -(-max(images.shape[2:]) // most)
    count, channels, height, width = images.shape
    cut = images[:, :, : height // by * by, : width // by * by]
    shape = (count, channels, height // by, by, width // by, by)
    return images if by == 1 else cut.reshape(shape).mean((3, 5), dtype=np.float32)


def class_by_class(images: npt.NDArray[np.float32], evaluator: Any, seed: int) -> npt.NDArray[np.float32]:
    """Samples 0, 1, ... of this seed in order of the classes they were asked to be, where the evaluator conditions them on any."""
    conditions = getattr(evaluator, "conditions", None)
    labels = None if conditions is None else conditions.load().classes(seed, 0, len(images))
    return images if labels is None else images[np.argsort(labels.numpy(), kind="stable")]


def draw_samples(images: npt.NDArray[np.float32], path: Path, columns: int = 8, scale: int = 1) -> None:
    """Writes a grid of (n, channels, height, width) images in [-1, 1] as PNG, each pixel `scale` pixels wide."""
    count, channels, height, width = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    canvas = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, channels), 255, dtype=np.uint8)
    for i, image in enumerate(to_uint8(images)):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        canvas[top : top + height, left : left + width] = image
    picture = canvas.repeat(scale, 0).repeat(scale, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture[..., 0] if channels == 1 else picture).save(path)
