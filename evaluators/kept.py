"""Sets of real images: checked, hashed, some of them held out; and sets that are long to read, kept in the run folder as one array."""

from __future__ import annotations

import hashlib
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from nas.base.files import partial_of, read_json, room, write_json
from nas.contracts import ImageSet, Progress, UserError, digest_of, spread

log = logging.getLogger("nas")

PEEKED = 8
"""Images that are read to see whether a source holds what it should."""

MINIMUM = 16
"""Fewer images give neither a training batch nor a covariance."""

Holdout = Annotated[float, Field(ge=0, le=0.9)]
"""Share of the images of each class that nothing is trained on: samples are compared with them. 0: with all images, which all train."""


def checked(pixels: npt.NDArray[Any], labels: npt.NDArray[Any] | None, what: str) -> ImageSet:
    """An image set of this array. Raises UserError where there are too few."""
    if len(pixels) < MINIMUM:
        raise UserError(f"{what} has {len(pixels)} images; at least {MINIMUM} are needed")
    pixels = np.ascontiguousarray(pixels, dtype=np.float32)
    labels = None if labels is None else labels.astype(np.int64)
    content = hashlib.sha256(pixels.data)
    content.update(b"" if labels is None else labels.tobytes())
    content.update(str(pixels.shape).encode())
    return ImageSet(pixels, labels, content.hexdigest()[:16])


def with_held_out(train: ImageSet, held_out: ImageSet) -> ImageSet:
    """The images to train on, with those that nothing is trained on."""
    return replace(train, digest=digest_of([train.digest, held_out.digest]), held_out=held_out)


def split(pixels: npt.NDArray[Any], labels: npt.NDArray[Any] | None, what: str, holdout: float) -> ImageSet:
    """An image set of this array, with a share of each class held out."""
    if not holdout:
        return checked(pixels, labels, what)
    order, count = train_first(len(pixels), labels, holdout)
    parts = (np.sort(order[:count]), np.sort(order[count:]))
    train, held_out = (
        checked(pixels[part], None if labels is None else labels[part], f"the {name} part of {what}")
        for part, name in zip(parts, ("train", "held-out"), strict=True)
    )
    return with_held_out(train, held_out)


def train_first(count: int, labels: npt.NDArray[Any] | None, holdout: float) -> tuple[npt.NDArray[np.int64], int]:
    """An order of the images, those to train on first, and how many these are. Of each class the same share is held out, which images is
    the same at every call."""
    classes = np.zeros(count, np.int64) if labels is None else labels
    held_out = np.zeros(count, bool)
    for label in np.unique(classes):
        members = np.flatnonzero(classes == label)
        chosen = np.random.default_rng([int(label), 0x5EED]).permutation(members)
        held_out[chosen[: round(holdout * len(members))]] = True
    if holdout and not held_out.any():
        raise UserError(
            f"holdout={holdout:g} rounds to no image of any class, of {count} images in all; give more images of a class, or a larger share"
        )
    return np.concatenate([np.flatnonzero(~held_out), np.flatnonzero(held_out)]), int((~held_out).sum())


@dataclass(frozen=True)
class Source:
    """What is to be read: `shape` (n, channels, height, width), its last `held_out` images held out; `parts` yields the images of these places, which rise, in
    arrays of any number of them. `key` identifies files and the way of reading them, `words` say what was found."""

    key: str
    shape: tuple[int, int, int, int]
    labels: npt.NDArray[np.int64] | None
    held_out: int
    parts: Callable[[Sequence[int]], Iterator[npt.NDArray[np.float32]]]
    name: str
    words: str
    captions: tuple[str, ...] | None = None


class KeptImages(ABC):
    """A recipe of images that take long to read. `prepare` reads them, or what an earlier call kept of the same files in `folder`/images;
    later loads take it from there, mapped into memory, so that workers share it."""

    @abstractmethod
    def source(self) -> Source:
        """What is to be read. Raises UserError where it is not there."""

    def peek(self) -> ImageSet:
        """The first few images alone, with all labels; to see whether they are what they should be, before all are read."""
        source = self.source()
        first = np.concatenate([*source.parts(range(min(PEEKED, source.shape[0])))])
        captions = None if source.captions is None else source.captions[:PEEKED]
        return ImageSet(first, source.labels, "", captions=captions)

    def some(self, count: int) -> ImageSet:
        """At most so many from all over, and of those that are held out: they alone are read."""
        source = self.source()
        train = source.shape[0] - source.held_out

        def of(start: int, stop: int, held_out: ImageSet | None) -> ImageSet:
            labels = None if source.labels is None else source.labels[start:stop]
            places = [start + place for place in spread(stop - start, count, labels)]
            return ImageSet(
                np.concatenate([*source.parts(places)]),
                None if source.labels is None else source.labels[places],
                f"{source.key}, {count} of {start} to {stop}",
                held_out,
                None if source.captions is None else tuple(source.captions[place] for place in places),
            )

        return of(0, train, of(train, source.shape[0], None) if source.held_out else None)

    def load(self) -> ImageSet:
        for _ in self.prepare(_KEPT.get(self)):
            pass
        return _LOADED[self]

    def prepare(self, folder: Path | None) -> Iterator[Progress]:
        known = folder is None or _KEPT.get(self) == folder
        if folder is not None:
            _KEPT[self] = folder
        if self in _LOADED and known:
            return
        source = self.source()
        train = source.shape[0] - source.held_out
        kept = None if folder is None else folder / "images" / f"{source.key}.npy"
        if kept is None:
            pixels = np.empty(source.shape, dtype=np.float32)
            yield from _read(source, pixels)
            made = _in_two(pixels, source, train, None)
        else:
            if not (kept.exists() and kept.with_suffix(".json").exists()):
                yield from _keep(source, kept, train)
            pixels = np.load(kept, mmap_mode="c", allow_pickle=False)
            made = _in_two(pixels, source, train, read_json(kept.with_suffix(".json"), "delete it"))
        log.info("%s", source.words)
        _LOADED.clear()
        _LOADED[self] = made if source.captions is None else captioned(made, source.captions)
        _READ[self] = _LOADED[self].digest


def _keep(source: Source, kept: Path, train: int) -> Iterator[Progress]:
    """On disk from the first image on: there may be more than memory holds."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    with partial_of(kept) as partial:
        mapped = room(partial, source.shape)
        yield from _read(source, mapped)
        made = _in_two(mapped, source, train, None)
        assert isinstance(mapped, np.memmap)
        mapped.flush()
        os.replace(partial, kept)
    held_out = {} if made.held_out is None else {"held_out": made.held_out.digest}
    write_json(kept.with_suffix(".json"), {"digest": made.digest, **held_out})


def _read(source: Source, pixels: npt.NDArray[np.float32]) -> Iterator[Progress]:
    done, total = 0, len(pixels)
    for part in source.parts(range(total)):
        pixels[done : done + len(part)] = part
        before, done = done, done + len(part)
        if done // 100 > before // 100 or done == total:
            yield Progress("reading images", done, total)


def captioned(made: ImageSet, captions: Sequence[str]) -> ImageSet:
    """With a caption for each image, the held-out ones' last."""
    mine = tuple(captions[: len(made)])
    held_out = made.held_out and captioned(made.held_out, captions[len(made) :])
    return replace(made, captions=mine, digest=digest_of([made.digest, list(captions)]), held_out=held_out)


def _in_two(pixels: npt.NDArray[np.float32], source: Source, train: int, digests: Any) -> ImageSet:
    """Both parts are views of one array. `digests`: where they are known."""
    labels = source.labels
    both = [
        (pixels[part], None if labels is None else labels[part], name)
        for part, name in ((slice(0, train), "train"), (slice(train, None), "held-out"))
    ]
    if not source.held_out:
        both = [(pixels, labels, "")]
    if digests is None:
        sets = [
            checked(images, mine, f"the {name} part of {source.name}" if name else source.name)
            for images, mine, name in both
        ]
        return with_held_out(*sets) if len(sets) == 2 else sets[0]
    held_out = ImageSet(*both[1][:2], digests["held_out"]) if len(both) == 2 else None
    return ImageSet(*both[0][:2], digests["digest"], held_out)


_KEPT: dict[KeptImages, Path] = {}
_LOADED: dict[KeptImages, ImageSet] = {}
"""The set read last."""
_READ: dict[KeptImages, str] = {}
"""Digest of what each was when it was read last."""


def read_last(images: Any) -> str | None:
    """Digest of what was read last of these images, or of those that they are a part of; None where nothing was, or nobody keeps it."""
    inner = getattr(images, "images", None)
    return read_last(inner) if hasattr(inner, "load") else _READ.get(images)


def counted(classes: Sequence[str], labels: npt.NDArray[np.int64]) -> str:
    """Classes with their counts, in words."""
    counts = np.bincount(labels, minlength=len(classes))
    said = ", ".join(f"{name} ({count})" for name, count in list(zip(classes, counts, strict=True))[:20])
    return f"{len(classes)} classes: {said}" + (", ..." if len(classes) > 20 else "")
