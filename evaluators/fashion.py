"""Fashion-MNIST (Xiao et al. 2017): 70,000 real grey images of garments in ten classes, the field's small standard benchmark."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from evaluators.kept import KeptImages, Source, counted
from nas.contracts import UserError, digest_of
from nas.recipes import Count, recipe

CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)

PLACES = (
    "/usr/share/datasets/fashion-mnist",  # Debian's package
    "~/.cache/fashion-mnist",
    "data/FashionMNIST/raw",  # torchvision, with root="data"
    "~/data/FashionMNIST/raw",
)
SIDE = 28


@recipe
class FashionMNIST(KeptImages):
    """60,000 images to train on, 10,000 held out, 28x28 pixels, surrounded with black to `size` where that is larger.

    `folder`: where the four IDX files lie, packed or not; by default where Debian's package dataset-fashion-mnist or torchvision put them. A
    relative path is one in the study file's folder. `count`: so many images of each of the two sets alone. Raises UserError where a file
    is missing or is not what it should be.
    """

    size: Literal[28, 32] = 32
    folder: str | None = None
    count: Count | None = None
    base: str = field(default_factory=os.getcwd, repr=False, kw_only=True)

    def source(self) -> Source:
        folder = self._found()
        files = [
            _file(folder, f"{part}-{kind}") for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
        ]
        images = [_idx(file, 3)[: self.count] for file in files[::2]]
        labels = [_idx(file, 1)[: self.count].astype(np.int64) for file in files[1::2]]
        for mine, theirs, file in zip(images, labels, files[1::2], strict=True):
            if len(mine) != len(theirs) or mine.shape[1:] != (SIDE, SIDE) or theirs.max(initial=0) >= len(CLASSES):
                raise UserError(
                    f"{file} has {len(theirs)} labels up to {theirs.max(initial=0)} for {len(mine)} images of {mine.shape[1:]}; "
                    f"Fashion-MNIST has a label below {len(CLASSES)} for each image of {SIDE}x{SIDE}; get the files anew"
                )
        margin = (self.size - SIDE) // 2

        def parts(places: Sequence[int]) -> Iterator[npt.NDArray[np.float32]]:
            whole, chosen = np.concatenate(images), np.asarray(places)
            for start in range(0, len(chosen), 1000):
                pixels = whole[chosen[start : start + 1000], None].astype(np.float32) / np.float32(127.5) - 1
                yield np.pad(pixels, ((0, 0), (0, 0), (margin, margin), (margin, margin)), constant_values=-1)

        facts = [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
        train, held_out = map(len, images)
        return Source(
            digest_of([facts, self.size, self.count]),
            (train + held_out, 1, self.size, self.size),
            np.concatenate(labels),
            held_out,
            parts,
            "Fashion-MNIST",
            f"{folder}: {train:,} images to train on and {held_out:,} held out; {counted(CLASSES, np.concatenate(labels))}",
        )

    def _found(self) -> Path:
        places = [self.folder] if self.folder is not None else PLACES
        found = next(
            (path for path in (Path(self.base) / Path(place).expanduser() for place in places) if path.is_dir()), None
        )
        if found is None:
            where = f"{places[0]} is no folder" if self.folder is not None else f"it is not in {', '.join(places)}"
            raise UserError(
                f"Fashion-MNIST: {where}; `apt-get install dataset-fashion-mnist` gets it on Debian and Ubuntu, elsewhere give folder= with its four IDX files"
            )
        return found


def _file(folder: Path, name: str) -> Path:
    """Packed or not, with the dot of the original names or the dash of their copies."""
    for ending in ("ubyte", "ubyte.gz"):
        for path in (folder / f"{name}-{ending}", folder / f"{name.replace('-idx', '.idx')}-{ending}"):
            if path.is_file():
                return path
    raise UserError(f"{folder} lacks {name}-ubyte[.gz]; Fashion-MNIST is four IDX files, get them anew")


def _idx(path: Path, dimensions: int) -> npt.NDArray[np.uint8]:
    """The array in an IDX file: two zero bytes, the type (8: bytes), the number of dimensions, their big-endian lengths, the bytes."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}); get it anew") from error
    head = 4 + 4 * dimensions
    shape = tuple(int(n) for n in np.frombuffer(content[4:head], ">u4")) if len(content) >= head else ()
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) != head + int(np.prod(shape)):
        raise UserError(f"{path} is no IDX file of bytes in {dimensions} dimensions, or not all of it; get it anew")
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)
