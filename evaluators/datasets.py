"""Images that a data set hands out one by one: a Hugging Face data set in a local folder, or any torch Dataset. Read once, and kept in the run folder as one
array that is mapped into memory, so that there may be more of them than memory holds."""

from __future__ import annotations

import hashlib
import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from evaluators.kept import Holdout, KeptImages, Source, counted, train_first
from nas.base.failures import SHORT
from nas.base.files import first_line
from nas.base.pictures import WHITE, PictureError, array_of, read_picture
from nas.contracts import UserError, digest_of
from nas.recipes import Few, recipe

FIRST, READINGS = 8, 3
"""Images that stand for all in the key under which they are kept, and how often they are read to see whether they come out the same."""


@dataclass(frozen=True, eq=False)
class Items:
    """Images that are read by number, with what is known of each; the last `held_out` of `order` are held out."""

    order: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64] | None
    held_out: int
    captions: tuple[str, ...] | None = None
    classes: Sequence[str] = ()


@recipe(kw_only=True)
class OneByOne(KeptImages):
    """What both sources share. `size`: the side, or (height, width), that every image must have. `channels`: 1 (grey) or 3 (RGB). `resize`: a resampling rule,
    for who wants images of other sizes cropped and resized. `holdout`: the share of each class that nothing is trained on."""

    size: Few | tuple[Few, Few]
    channels: Literal[1, 3] = 3
    resize: Literal["box", "bilinear", "bicubic", "lanczos"] | None = None
    holdout: Holdout = 0.0

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        return self.channels, height, width

    @abstractmethod
    def items(self) -> Items: ...

    @abstractmethod
    def read(self, place: int) -> npt.NDArray[np.float32]:
        """The image of a number, (channels, height, width) in [-1, 1]."""

    @property
    @abstractmethod
    def named(self) -> str: ...

    @abstractmethod
    def facts(self, items: Items) -> list[Any]:
        """What tells it from others, without reading all of it."""

    def source(self) -> Source:
        found = self.items()
        counts = counted(found.classes, found.labels) if found.classes and found.labels is not None else ""
        said = f"; {found.held_out:,} are held out" if found.held_out else ""
        return Source(
            digest_of([self.facts(found), len(found.order), found.held_out, self.shape, self.resize]),
            (len(found.order), *self.shape),
            found.labels,
            found.held_out,
            lambda places: (self.read(int(found.order[place]))[None] for place in places),
            self.named,
            f"{self.named}: {len(found.order):,} images{f'; {counts}' if counts else ''}{said}",
            found.captions,
        )


@recipe(kw_only=True)
class DatasetFolder(OneByOne):
    """A Hugging Face data set in a local folder, of `save_to_disk`, or of files that `load_dataset` reads (parquet, pictures in folders). Needs the package
    `datasets`; nothing is downloaded.

    `image`, `label`, `caption`: its columns. `split`: what is trained on. `held_out`: another split, that samples are compared with, in place of a `holdout`.
    `background`: RGB of what is transparent. A relative path is one in the study file's folder. Raises UserError where a folder, split or column is missing.
    """

    path: str
    image: str = "image"
    label: str | None = None
    caption: str | None = None
    split: str = "train"
    held_out: str | None = None
    background: tuple[int, int, int] = WHITE
    base: str = field(default_factory=os.getcwd, repr=False)

    def __post_init__(self) -> None:
        if self.held_out is not None and self.holdout:
            raise UserError(
                f"held_out={self.held_out!r} and holdout={self.holdout:g} both hold images out; give one of them"
            )

    @property
    def root(self) -> Path:
        return Path(self.base) / Path(self.path).expanduser()

    @property
    def named(self) -> str:
        return f"{self.root}, {self.split}"

    def facts(self, items: Items) -> list[Any]:
        files = sorted(file for file in self.root.rglob("*") if file.is_file())
        told = [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
        return [told, self.image, self.label, self.caption, self.split, self.held_out, self.background]

    def items(self) -> Items:
        tables = self._tables()
        lengths = [len(table) for table in tables]
        labels = self._labels(tables, self.label) if self.label else None
        captions = self._captions(tables, self.caption) if self.caption else None
        names = getattr(tables[0].features.get(self.label or ""), "names", None)
        classes = names or ([] if labels is None else [str(n) for n in range(int(labels.max(initial=0)) + 1)])
        if self.held_out is not None:
            return Items(np.arange(sum(lengths)), labels, lengths[1], captions, classes)
        order, train = train_first(lengths[0], labels, self.holdout)
        told = None if captions is None else tuple(captions[place] for place in order)
        return Items(order, None if labels is None else labels[order], lengths[0] - train, told, classes)

    def _labels(self, tables: Sequence[Any], name: str) -> npt.NDArray[np.int64]:
        found = np.concatenate([np.asarray(table[name]) for table in tables])
        if not np.issubdtype(found.dtype, np.integer) or found.min(initial=0) < 0:
            raise UserError(f"column {name!r} of {self.root} is {found.dtype}; labels must be whole numbers from 0")
        return found.astype(np.int64)

    def _captions(self, tables: Sequence[Any], name: str) -> tuple[str, ...]:
        found = [one for table in tables for one in table[name]]
        for row, one in enumerate(found):
            if not isinstance(one, str) or not one.strip():
                raise UserError(
                    f"row {row} of column {name!r} of {self.root} holds {one!r}; a caption is a text, one for each image"
                )
        return tuple(found)

    def _tables(self) -> tuple[Any, ...]:
        found = _TABLES.get(self)
        if found is None:
            splits = (self.split, *([self.held_out] if self.held_out else []))
            found = tuple(self._table(split) for split in splits)
            _TABLES.clear()
            _TABLES[self] = found
        return found

    def _table(self, split: str) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise UserError("DatasetFolder needs the package `datasets`; pip install datasets") from error
        if not self.root.is_dir():
            raise UserError(f"data set folder {self.root} does not exist")
        try:
            datasets.disable_progress_bars()
            saved = any(
                (self.root / name).is_file() for name in ("dataset_dict.json", "dataset_info.json", "state.json")
            )
            found = datasets.load_from_disk(str(self.root)) if saved else datasets.load_dataset(str(self.root))
        except Exception as error:  # whatever its many readers make of what lies there
            raise UserError(f"{self.root} cannot be read as a data set ({first_line(error)})") from error
        if isinstance(found, Mapping):
            if split not in found:
                raise UserError(f"{self.root} has the splits {', '.join(found)}, not {split!r}; give one of them")
            found = found[split]
        elif self.held_out is not None or split not in ("train", str(found.split)):
            asked = f"split {split!r}" if self.held_out is None else f"held_out={self.held_out!r}"
            raise UserError(f"{self.root} is one table without splits, and has no {asked}; use holdout=, a share of it")
        missing = [name for name in (self.image, self.label, self.caption) if name and name not in found.features]
        if missing:
            raise UserError(
                f"{self.root} has the columns {', '.join(found.features)}, not {missing[0]!r}; name the right one"
            )
        if not isinstance(found.features[self.image], datasets.Image):
            raise UserError(
                f"column {self.image!r} of {self.root} holds no images but {found.features[self.image]}; name the right one"
            )
        return found.cast_column(self.image, datasets.Image(decode=False))

    def read(self, place: int) -> npt.NDArray[np.float32]:
        table, row = self._tables()[0], place
        if place >= len(table):
            table, row = self._tables()[1], place - len(table)
        told = table[row][self.image]
        name = Path(told["path"] or f"{self.root}, image {row}")
        try:
            return read_picture(name, self.shape[1:], self.channels, self.resize, self.background, told["bytes"])
        except PictureError as error:
            raise UserError(str(error)) from error


_TABLES: dict[DatasetFolder, tuple[Any, ...]] = {}
"""Of the folder opened last."""


@recipe(kw_only=True)
class TorchDataset(OneByOne):
    """Any torch Dataset of a known length whose items are an image, or an image with its label: a PIL picture, an array or tensor of bytes, (height, width[,
    channels]) or (channels, height, width), or of floats within `span`, channels first.

    `name` tells it from others: what is kept of a data set of the same name, length, labels, span and first images is taken for it. Images that are read another way
    each time, as augmentation does, are kept as they come first, and told by name, length, labels and span alone. Raises UserError naming the item that is something else.
    """

    dataset: Any = field(compare=False)
    name: str
    labels: bool = False
    span: tuple[float, float] = (0.0, 1.0)
    which: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "which", id(self.dataset))  # two data sets of one name are two

    def _count(self) -> int:
        """How many there are."""
        try:
            return len(self.dataset)
        except TypeError as error:
            raise UserError(f"the data set {self.name} has no length; give one that has, not a stream") from error

    @property
    def named(self) -> str:
        return self.name

    def facts(self, items: Items) -> list[Any]:
        readings = [b"".join(self.read(int(n)).tobytes() for n in items.order[:FIRST]) for _ in range(READINGS)]
        told = hashlib.sha256(readings[0]).hexdigest() if len(set(readings)) == 1 else "read another way each time"
        # Classes are held out in equal shares, so that other labels put the images into another order.
        labels = [] if items.labels is None else [digest_of(items.labels.tolist())]
        return [self.name, told, self.labels, *labels, *([] if self.span == (0.0, 1.0) else [self.span])]

    def items(self) -> Items:
        count = self._count()
        labels = None
        if self.labels:
            labels = np.array([self._label(place) for place in range(count)], np.int64)
        order, train = train_first(count, labels, self.holdout)
        classes = [] if labels is None else [str(n) for n in range(int(labels.max(initial=0)) + 1)]
        return Items(order, None if labels is None else labels[order], count - train, None, classes)

    def _label(self, place: int) -> int:
        # torchvision's have all of them at hand, as they are before anything is made of them.
        both = getattr(self.dataset, "transforms", None)
        made = getattr(both, "target_transform", both) or getattr(self.dataset, "target_transform", None)
        targets = None if made else getattr(self.dataset, "targets", None)
        item = self._item(place) if targets is None else None
        try:
            label: Any = item[1] if targets is None else targets[place]  # type: ignore[index]
            found = int(label)
        except Exception as error:  # such as of a tensor of several numbers
            raise UserError(
                f"item {place} of {self.name} has no label ({type(error).__name__}: {first_line(error)}); it must be an image and the number of its class, or leave labels=True out"
            ) from error
        if found < 0:
            raise UserError(f"item {place} of {self.name} has the label {found}; classes are numbered from 0")
        return found

    def _item(self, place: int) -> Any:
        try:
            return self.dataset[place]
        except Exception as error:  # whatever a data set of somebody's makes of what it reads
            if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in SHORT):
                raise
            raise UserError(
                f"item {place} of {self.name} cannot be read ({type(error).__name__}: {first_line(error)}); mend it, or leave it out"
            ) from error

    def read(self, place: int) -> npt.NDArray[np.float32]:
        item = self._item(place)
        image = item[0] if isinstance(item, tuple | list) else item
        where = Path(f"{self.name}, item {place}")
        try:
            if not isinstance(image, Image.Image):
                image = _array(image, where)
                if np.issubdtype(image.dtype, np.floating):
                    return self._floats(image, where)
                image = Image.fromarray(self._bytes(image, where))
            return array_of(image, where, self.shape[1:], self.channels, self.resize)
        except PictureError as error:
            raise UserError(str(error)) from error

    def _bytes(self, image: npt.NDArray[Any], where: Path) -> npt.NDArray[np.uint8]:
        """(height, width) or (height, width, 3)."""
        if image.dtype != np.uint8 or image.ndim not in (2, 3):
            raise UserError(
                f"{where} is {image.dtype} of shape {image.shape}; images are bytes or floats of two or three axes"
            )
        if image.ndim == 3 and image.shape[-1] not in (1, 3):
            image = image.transpose(1, 2, 0)
        if image.ndim == 3 and image.shape[-1] not in (1, 3):
            raise UserError(f"{where} has the shape {image.shape}; one axis must be of 1 or 3 channels")
        return np.ascontiguousarray(image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image)

    def _floats(self, image: npt.NDArray[Any], where: Path) -> npt.NDArray[np.float32]:
        low, high = self.span
        found = image[None] if image.ndim == 2 else image
        if found.shape != self.shape:
            raise UserError(
                f"{where} has the shape {image.shape}, wanted is {self.shape}; change size or channels, or transform it in the data set"
            )
        if not np.isfinite(found).all() or found.min() < low - 1e-6 or found.max() > high + 1e-6:
            raise UserError(
                f"{where} goes from {found.min():g} to {found.max():g}, not within span={self.span}; give the right one"
            )
        return ((found - low) / (high - low) * 2 - 1).astype(np.float32)


def _array(image: Any, where: Path) -> npt.NDArray[Any]:
    """Of an array or a tensor, wherever it lies and whatever its precision."""
    try:
        if hasattr(image, "detach"):
            image = image.detach().cpu()
            image = image.float() if image.is_floating_point() else image
        return np.asarray(image)
    except Exception as error:  # of somebody's own kind
        raise UserError(
            f"{where} is a {type(image).__name__} ({first_line(error)}); images are pictures, arrays or tensors"
        ) from error
