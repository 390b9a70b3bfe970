"""What an exported folder's networks are trained on: pictures, or their latents, and what they are conditioned on. Needs what `train_diffusers`
needs; an exported folder holds a copy of this file.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from nas.base.exported import (
    AUTOENCODER,
    AUTOENCODERS,
    CLASS_EMBEDDING,
    INDEX,
    REMEDY,
    WEIGHTS,
    ExportError,
    read_network,
)
from nas.base.pictures import PictureError, find_pictures, read_caption, read_picture
from search_spaces.shipped.latents import drawn, moments
from search_spaces.shipped.texts import encoded, nothing_said


class Told:
    """What images are conditioned on: rows by the names of the networks' arguments, which one each image has, and which say nothing."""

    def __init__(self) -> None:
        self._rows: list[tuple[dict[str, torch.Tensor], torch.Tensor, int]] = []

    def add(self, rows: dict[str, torch.Tensor], places: torch.Tensor, null: int) -> None:
        self._rows.append((rows, places, null))

    def __len__(self) -> int:
        return len(self._rows)

    def of(self, chosen: torch.Tensor, dropped: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of the chosen images, on the CPU, nothing of those that are dropped; rows on the device of `dropped`. They are kept on the CPU, there may be many."""
        found: dict[str, torch.Tensor] = {}
        for rows, places, null in self._rows:
            mine = places[chosen]
            mine = torch.where(dropped.cpu(), torch.full_like(mine, null), mine)
            found |= {name: values[mine].to(dropped.device) for name, values in rows.items()}
        return found


def conditions(export: Any, labels: Any, captions: Sequence[str] | None, count: int, device: Any) -> Told:
    """Raises ExportError for what the networks need and is not given, or is given and not taken."""
    told, plan = Told(), export.training
    null = plan.get("null_label")
    if (labels is None) != (null is None) or (labels is not None and not 0 <= labels.min() <= labels.max() < null):
        raise ExportError(
            "the networks take no labels; leave them out"
            if null is None
            else f"the networks need a label from 0 to {null - 1} for each image: give --labels folders, or images that have them"
        )
    if labels is not None:
        channels = plan.get("class_channels")
        rows = {"class_labels": torch.arange(null + 1)} if channels is None else _vectors(export.folder, null, channels)
        told.add(rows, torch.from_numpy(labels), null)
    if (captions is None) != (plan.get("text") is None):
        raise ExportError(
            "the networks read no text; leave the captions out"
            if captions is not None
            else "the networks need a caption for each image: give --captions txt, or images that have them"
        )
    if captions is not None:
        if len(captions) != count:
            raise ExportError(f"{len(captions)} captions for {count} images; give one for each")
        if not export.texts:
            raise ExportError(f"{export.folder} has no text encoder to read captions with; export it with one")
        parts = _text_parts(export.folder, export.texts, device)
        distinct, size, length = sorted({*captions, ""}), plan["text"]["size"], plan["text"]["tokens"]

        def read(texts: Sequence[str]) -> dict[str, torch.Tensor]:
            return encoded(parts, texts, size, device, length)

        null = read([""])
        null = nothing_said(null) if plan["text"].get("zeros") else null
        # On the CPU, and once: there may be many.
        rows = {
            name: torch.empty((len(distinct) + 1, *one.shape[1:]), dtype=one.dtype, device="cpu")
            for name, one in null.items()
        }
        for start in range(0, len(distinct), 64):
            for name, made in read(distinct[start : start + 64]).items():
                rows[name][start : start + len(made)] = made.cpu()
        for name, one in null.items():
            rows[name][-1] = one[0].cpu()
        place = {text: number for number, text in enumerate(distinct)}
        told.add(rows, torch.tensor([place[text] for text in captions]), len(distinct))
    return told


def _vectors(folder: Path, null: int, channels: int) -> dict[str, torch.Tensor]:
    """Those that networks read in a text's place, of each class and of none."""
    path = folder / CLASS_EMBEDDING / WEIGHTS
    try:
        found = load_file(path)["weight"]
    except (OSError, SafetensorError, KeyError) as error:
        raise ExportError(f"{path} cannot be read ({error}); {REMEDY}") from error
    if found.shape != (null + 1, channels):
        raise ExportError(
            f"{path} holds {tuple(found.shape)}, no vector of {channels} channels for each of {null} classes and none; {REMEDY}"
        )
    return {"encoder_hidden_states": found[:, None]}


def _text_parts(folder: Path, names: Sequence[str], device: Any) -> dict[str, Any]:
    try:
        import transformers
    except ImportError as error:
        raise ExportError("the networks read a text, which needs transformers; pip install transformers") from error
    index = json.loads((folder / INDEX).read_text())
    found: dict[str, Any] = {}
    for name in names:
        kind = getattr(transformers, index[name][1])
        if name.startswith("tokenizer"):
            found[name] = kind.from_pretrained(folder / name, local_files_only=True)
        else:
            model = kind.from_pretrained(folder / name, local_files_only=True, use_safetensors=True)
            found[name] = model.to(device).eval().requires_grad_(False)
    return found


class Data(NamedTuple):
    """Images (n, channels, height, width), and what they are conditioned on. Of latents mean and log-variance of the posteriors instead, (n, 2,
    channels, height, width), `mirrored` those of the mirrored images, and the autoencoder. They stay on the CPU, for there may be more than the
    `device` holds, to which a batch is moved."""

    pixels: torch.Tensor
    told: Told
    device: torch.device
    mirrored: torch.Tensor | None = None
    autoencoder: Any = None
    posterior: str = ""

    def draw(self, chosen: torch.Tensor, mirrored: torch.Tensor | None, generator: torch.Generator) -> torch.Tensor:
        """What networks are trained on, (n, channels, height, width), of the mirrored images where `mirrored` says so."""
        x = self.pixels[chosen].to(self.device)
        if mirrored is not None:
            other = x.flip(-1) if self.mirrored is None else self.mirrored[chosen].to(self.device)
            x = torch.where(mirrored.reshape(-1, *(1,) * (x.dim() - 1)), other, x)
        return x if self.autoencoder is None else drawn(self.autoencoder, x, self.posterior, generator)


def prepared(folder: Path, plan: Any, pixels: npt.NDArray[np.float32], told: Told, flip: bool, device: Any) -> Data:
    if "image_shape" not in plan:
        return Data(torch.from_numpy(pixels), told, device)
    autoencoder = read_network(folder / AUTOENCODER, AUTOENCODERS).to(device).requires_grad_(False)
    of = hashlib.sha256((folder / AUTOENCODER / WEIGHTS).read_bytes())
    of.update(np.ascontiguousarray(pixels).data)
    plain = _encoded(autoencoder, pixels, False, of.hexdigest())
    other = _encoded(autoencoder, pixels, True, of.hexdigest()) if flip else None
    return Data(plain, told, device, other, autoencoder, plan["posterior"])


_ENCODED: dict[tuple[Any, ...], torch.Tensor] = {}
"""Of the images that were encoded last, for the next training of the same, as long as somebody has them."""


@torch.no_grad()
def _encoded(autoencoder: Any, pixels: npt.NDArray[np.float32], mirrored: bool, of: str) -> torch.Tensor:
    """Mean and log-variance of all posteriors. `of`: identifies the autoencoder and the images."""
    device = autoencoder.device
    mine = (of, str(device))
    if (*mine, mirrored) not in _ENCODED:
        if any(known[:2] != mine for known in _ENCODED):
            _ENCODED.clear()
        weakref.finalize(pixels, _ENCODED.clear)
        made = []
        for start in range(0, len(pixels), 256):
            part = torch.from_numpy(pixels[start : start + 256]).to(device)
            made.append(moments(autoencoder, part.flip(-1) if mirrored else part).cpu())
        _ENCODED[*mine, mirrored] = torch.cat(made)
    return _ENCODED[*mine, mirrored]


def read_images(
    path: Path, channels: int, size: Sequence[int], resize: str | None = None
) -> Iterator[tuple[int, int, npt.NDArray[np.float32]]]:
    """Every picture below a folder, or the array of an .npy file in [-1, 1]; yields how many are read, of how many, and the array, which is
    whole at the end. Raises PictureError naming what does not fit."""
    if path.suffix == ".npy":
        try:
            found: npt.NDArray[np.float32] = np.load(path, allow_pickle=False).astype(np.float32)
        except (OSError, ValueError, TypeError) as error:
            raise PictureError(f"{path} cannot be read as an array ({error})") from error
        if found.shape[1:] != (channels, *size) or not len(found):
            raise PictureError(
                f"{path} holds an array {found.shape}; the networks take (n, {channels}, {', '.join(map(str, size))})"
            )
        if not np.abs(found).max() <= 1:
            raise PictureError(f"{path} must hold images in [-1, 1]; divide bytes by 127.5 and take 1 off")
        yield len(found), len(found), found
        return
    if channels not in (1, 3):
        raise PictureError(
            f"the networks take {channels} channels, and pictures have 1 or 3; give an .npy file in [-1, 1]"
        )
    listed = find_pictures(path)
    pixels = np.empty((len(listed.files), channels, *size), dtype=np.float32)
    for number, file in enumerate(listed.files):
        pixels[number] = read_picture(file, size, channels, resize)
        yield number + 1, len(listed.files), pixels


def folder_labels(path: Path, classes: int | None = None) -> npt.NDArray[np.int64]:
    """The classes of all pictures below a folder, in the order in which they are read: the folders right below it, by name. Raises
    PictureError where a picture lies in none, and where there are not so many `classes`: then a folder's place would be another class's."""
    _check_folder(path, "folders that name their classes")
    names = []
    for file in find_pictures(path).files:
        inside = Path(file).relative_to(path).parts
        if len(inside) < 2:
            raise PictureError(f"{file} lies in no class's folder; put each picture into one below {path}")
        names.append(inside[0])
    found, places = np.unique(names, return_inverse=True)
    if classes is not None and len(found) != classes:
        raise PictureError(
            f"{path} has pictures in {len(found)} folders, and the networks take {classes} classes, the folders in the order of their names; put some into each"
        )
    return places.astype(np.int64)


def folder_captions(path: Path) -> list[str]:
    """Of all pictures below a folder, in the order in which they are read: each the text beside it. Raises PictureError where one has none."""
    _check_folder(path, "texts beside them")
    return [read_caption(file) for file in find_pictures(path).files]


def _check_folder(path: Path, what: str) -> None:
    if path.is_file():
        raise PictureError(f"{path} is one file, whose images have no {what}; give a folder of pictures")
