"""Real images as float32 arrays in [-1, 1]. Every source is a recipe; `load` reads, checks and hashes.

`holdout`, of every source: the share of each class on which nothing is trained, and with which samples are compared.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from cachetools import LRUCache
from pydantic import Field

from evaluators.kept import (
    MINIMUM,
    PEEKED,
    Holdout,
    KeptImages,
    Source,
    checked,
    counted,
    read_last,
    split,
    train_first,
    with_held_out,
)
from nas.base.files import first_line
from nas.base.pictures import WHITE, Found, PictureError, find_pictures, read_caption, read_picture
from nas.contracts import Images, ImageSet, Progress, UserError, digest_of
from nas.recipes import Few, Seed, recipe

Byte = Annotated[int, Field(ge=0, le=255)]


@recipe
class Digits:
    """scikit-learn's bundled handwritten digits: 1,797 real 8x8 grey images with labels, enlarged bilinearly to `size` pixels."""

    size: Annotated[int, Field(ge=8, le=1024)] = 8
    holdout: Holdout = 0.0

    def load(self) -> ImageSet:
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = torch.from_numpy(digits.images[:, None] / 8.0 - 1.0)
        if self.size > 8:
            pixels = torch.nn.functional.interpolate(pixels, (self.size, self.size), mode="bilinear")
        return split(pixels.numpy(), digits.target, "digits", self.holdout)


@recipe
class PhotoPatches:
    """RGB patches of scikit-learn's two bundled photographs (a temple and a flower), labelled by photograph.

    `count` patches of `size` x `size` pixels at places drawn from `seed`, each photograph first halved `halvings` times.
    """

    count: Annotated[int, Field(ge=MINIMUM, le=10**6)] = 4096
    size: Few = 32
    halvings: Annotated[int, Field(ge=0, le=8)] = 1
    seed: Seed = 0
    holdout: Holdout = 0.0

    def load(self) -> ImageSet:
        from sklearn.datasets import load_sample_images

        photos = [_halved(photo / 127.5 - 1.0, self.halvings) for photo in load_sample_images().images]
        smallest = min(min(photo.shape[:2]) for photo in photos)
        if self.size > smallest:
            raise UserError(
                f"patches of {self.size} pixels do not fit into photographs of {smallest}; use a smaller size or fewer halvings"
            )
        rng = np.random.default_rng(self.seed)
        if not self.holdout:
            return checked(*self._patches(photos, rng, self.count), "photograph patches")
        # Patches overlap, so it is a strip of each photograph that is held out.
        held_out = round(self.holdout * self.count)
        cuts = [round((1 - self.holdout) * photo.shape[1]) for photo in photos]
        if min(min(cut, photo.shape[1] - cut) for photo, cut in zip(photos, cuts, strict=True)) < self.size:
            raise UserError(
                f"holdout={self.holdout} leaves a strip of a photograph that is narrower than patches of {self.size} pixels; use another share or a smaller size"
            )
        sides = [photo[:, :cut] for photo, cut in zip(photos, cuts, strict=True)]
        others = [photo[:, cut:] for photo, cut in zip(photos, cuts, strict=True)]
        return with_held_out(
            checked(*self._patches(sides, rng, self.count - held_out), "photograph patches to train on"),
            checked(*self._patches(others, rng, held_out), "held-out photograph patches"),
        )

    def _patches(
        self, photos: Sequence[npt.NDArray[np.float64]], rng: np.random.Generator, count: int
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        """So many patches, and which photograph each is of."""
        labels = rng.integers(len(photos), size=count)
        patches = []
        for label in labels:
            top, left = (rng.integers(side - self.size + 1) for side in photos[label].shape[:2])
            patches.append(photos[label][top : top + self.size, left : left + self.size].transpose(2, 0, 1))
        return np.stack(patches), labels


@recipe
class ImageFolder(KeptImages):
    """Every picture below `path`, in order of its name; a relative path is one in the study file's folder.

    `size`: the side, or (height, width), that every file must have. `resize`: a resampling rule, for who wants files of other sizes cropped
    and resized. `channels`: 1 (grey) or 3 (RGB). `labels`: "folders" makes the folders right below `path` the classes. `captions`: "txt" reads
    each picture's from the file beside it that is called so. `background`: RGB of what is transparent. Raises UserError naming the file that is corrupt or of another size.
    """

    path: str
    size: Few | tuple[Few, Few]
    channels: Literal[1, 3] = 3
    labels: Literal["folders"] | None = None
    resize: Literal["box", "bilinear", "bicubic", "lanczos"] | None = None
    background: tuple[Byte, Byte, Byte] = WHITE
    holdout: Holdout = 0.0
    captions: Literal["txt"] | None = None
    base: str = field(default_factory=os.getcwd, repr=False, kw_only=True)

    @property
    def root(self) -> Path:
        return Path(self.base) / Path(self.path).expanduser()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        return self.channels, height, width

    def peek(self) -> ImageSet:
        """The first few files alone, with all labels, without a look at each file's size and date."""
        found = self._find()
        labels, _ = self._labels(found)
        first = found.files[:PEEKED]
        return ImageSet(np.stack([self._read(file) for file in first]), labels, "", captions=self._captions(first))

    def source(self) -> Source:
        found = self._find()
        labels, classes = self._labels(found)
        files, held_out = list(found.files), 0
        if self.holdout:
            order, train = train_first(len(files), labels, self.holdout)
            files, held_out = [files[i] for i in order], len(files) - train
            labels = None if labels is None else labels[order]
        said = f"; {held_out} are held out" if held_out else ""
        return Source(
            self._key(found),
            (len(files), *self.shape),
            labels,
            held_out,
            lambda places: (self._read(files[place])[None] for place in places),
            str(self.root),
            f"{found.words(('.txt',) if self.captions else ())}{classes}{said}",
            self._captions(files),
        )

    def _captions(self, files: Sequence[Path]) -> tuple[str, ...] | None:
        if self.captions is None:
            return None
        try:
            return tuple(read_caption(file) for file in files)
        except PictureError as error:
            raise UserError(str(error)) from error

    def _read(self, file: Path) -> npt.NDArray[np.float32]:
        try:
            return read_picture(file, self.shape[1:], self.channels, self.resize, self.background)
        except PictureError as error:
            raise UserError(str(error)) from error

    def _find(self) -> Found:
        try:
            found = find_pictures(self.root)
        except PictureError as error:
            raise UserError(str(error)) from error
        if len(found.files) < MINIMUM:
            raise UserError(f"{self.root} has {len(found.files)} images; at least {MINIMUM} are needed")
        return found

    def _labels(self, found: Found) -> tuple[npt.NDArray[np.int64] | None, str]:
        """One for each file, and the classes with their counts in words."""
        if self.labels is None:
            return None, ""
        parts = [file.relative_to(self.root).parts for file in found.files]
        bare = next((file for file, names in zip(found.files, parts, strict=True) if len(names) < 2), None)
        if bare is not None:
            raise UserError(f"{bare} lies in no class's folder; with labels='folders' each file does, so move it")
        classes = sorted({names[0] for names in parts})
        numbers = {name: number for number, name in enumerate(classes)}
        labels = np.array([numbers[names[0]] for names in parts])
        return labels, f"; {counted(classes, labels)}"

    def _key(self, found: Found) -> str:
        """Of the files and of how they are read."""
        facts = [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in found.files]
        given = [self.holdout, self.labels] if self.holdout else [self.labels] if self.labels else []
        return digest_of([facts, self.shape, self.resize, self.background, *given])


@recipe
class ImageArray:
    """An `.npz` file with uint8 `images` of shape (n, height, width) or (n, height, width, channels), and maybe integer `labels`; a relative
    path is one in the study file's folder.

    Raises UserError where the file or the array is not that.
    """

    path: str
    holdout: Holdout = 0.0
    base: str = field(default_factory=os.getcwd, repr=False, kw_only=True)

    def load(self) -> ImageSet:
        path = Path(self.base) / Path(self.path).expanduser()
        if not path.is_file():
            raise UserError(f"image array {path} does not exist")
        try:
            with np.load(path, allow_pickle=False) as file:
                if "images" not in file:
                    raise UserError(f"{path} holds {sorted(file)}, not an array named 'images'")
                images, labels = file["images"], file.get("labels")
        except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{path} cannot be read as an .npz file ({first_line(error)})") from error
        if images.dtype != np.uint8 or images.ndim not in (3, 4):
            raise UserError(
                f"'images' of {path} is {images.dtype} of shape {images.shape}; it must be uint8, (n, height, width[, channels])"
            )
        channels_last = images[..., None] if images.ndim == 3 else images
        if channels_last.shape[-1] not in (1, 3):
            raise UserError(
                f"'images' of {path} has {channels_last.shape[-1]} channels, the last axis of {images.shape}; 1 or 3 can be used"
            )
        if labels is not None and (labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer)):
            raise UserError(
                f"'labels' of {path} is {labels.dtype} of shape {labels.shape}; it must be ({len(images)},), an integer, one per image"
            )
        if labels is not None and len(labels) and labels.min() < 0:
            raise UserError(f"'labels' of {path} goes down to {labels.min()}; classes are numbered from 0")
        pixels = channels_last.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1.0
        return split(pixels, labels, str(path), self.holdout)


@recipe
class HeldOutHalf:
    """The images with one half of those that are held out, every second one: the first for a search to be scored against, the second for `nas confirm`, which
    then judges by images on which nothing was chosen. Evaluators of a study take `HeldOutHalf(images, "first")`."""

    images: Images
    half: Literal["first", "second"]

    def prepare(self, folder: Path) -> Iterator[Progress]:
        yield from read_into(self.images, folder)

    def peek(self) -> ImageSet:
        """A few images, where their source has a quick look."""
        found: ImageSet = getattr(self.images, "peek", self.images.load)()
        return found

    def load(self) -> ImageSet:
        whole = self.images.load()
        if whole.held_out is None:
            raise UserError("HeldOutHalf needs images of which some are held out; give them a holdout, such as 0.2")
        theirs = slice(0 if self.half == "first" else 1, None, 2)
        pixels = whole.held_out.pixels[theirs]
        labels = None if whole.held_out.labels is None else whole.held_out.labels[theirs]
        captions = None if whole.held_out.captions is None else whole.held_out.captions[theirs]
        part = replace(checked(pixels, labels, f"the {self.half} half of the held-out images"), captions=captions)
        mine = with_held_out(replace(whole, held_out=None), part)
        return replace(mine, captions=whole.captions, source=whole.source or whole.digest)


_ONCE: LRUCache[Any, tuple[str | None, ImageSet]] = LRUCache(3)


def load_once(images: Images) -> ImageSet:
    """`images.load()`, kept: reading and hashing a large folder takes a while, and several parts ask for it. What was read anew since, for another run folder,
    and came to something else, is loaded anew."""
    known = _ONCE.get(images)
    if known is None or known[0] != read_last(images):
        loaded = images.load()
        _ONCE[images] = known = (read_last(images), loaded)
    return known[1]


def read_into(images: Images, folder: Path) -> Iterator[Progress]:
    """A source that takes long to read keeps what it has read in the run folder."""
    yield from getattr(images, "prepare", lambda _: ())(folder)


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
