"""Captions for images that have classes alone, and captions without images, for networks that are not trained any more."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from evaluators.conditions import lines_of
from evaluators.images import load_once
from evaluators.kept import captioned
from nas.contracts import Images, ImageSet, Progress, UserError, digest_of
from nas.recipes import Few, Natural, Seed, recipe

Templates = Annotated[tuple[str, ...], Field(min_length=1)]


@recipe
class Captioned:
    """The images, each with one of the `templates` as its caption, "{}" standing for the name of its class; which one is drawn from the seed.

    `inverted`: templates of inverted images, dark where the original is bright; then every image is inverted with a probability of one half, so
    that a caption says more than the class. Labels say both: those of inverted images follow those of the others. Raises UserError for images
    without labels, or with more classes than names.
    """

    images: Images
    names: Annotated[tuple[str, ...], Field(min_length=1)]
    templates: Templates = ("a photo of a {}",)
    inverted: tuple[str, ...] = ()
    seed: Seed = 0

    def __post_init__(self) -> None:
        for template in (*self.templates, *self.inverted):
            if template.count("{}") != 1:
                raise UserError(f"template {template!r} must have one {{}}, where the class's name is to stand")

    def prepare(self, folder: Path | None) -> Iterator[Progress]:
        """What the images need to be read once."""
        yield from getattr(self.images, "prepare", lambda folder: ())(folder)

    def load(self) -> ImageSet:
        data = load_once(self.images)
        made = self._told(data, 0)
        if data.held_out is not None:
            made = replace(made, held_out=self._told(data.held_out, 1))
        return made

    def _told(self, data: ImageSet, part: int) -> ImageSet:
        if data.labels is None or data.labels.max() >= len(self.names):
            found = "no labels" if data.labels is None else f"labels up to {data.labels.max()}"
            raise UserError(
                f"{self.images} have {found}; a name is needed for each class, and there are {len(self.names)}"
            )
        rng = np.random.default_rng([self.seed, part, 0xCA97])
        turned = rng.random(len(data)) < (0.5 if self.inverted else 0.0)
        chosen = rng.integers(2**31, size=len(data))
        captions = []
        for label, dark, number in zip(data.labels, turned, chosen, strict=True):
            templates = self.inverted if dark else self.templates
            captions.append(templates[number % len(templates)].replace("{}", self.names[label]))
        pixels = data.pixels
        if turned.any():
            pixels = np.where(turned[:, None, None, None], -pixels, pixels)
        labels = data.labels + len(self.names) * turned
        given = [data.digest, self.names, self.templates, self.inverted, self.seed, part]
        return captioned(ImageSet(pixels, labels, digest_of(given)), captions)


@recipe
class NoImages:
    """No images, but what they would be of: for studies whose network is frozen (`training=Stages(())`) and whose scores need none. `size`: the side, or
    (height, width), of what the network makes. `classes`: what it is asked for in turn, where it takes labels."""

    size: Few | tuple[Few, Few]
    channels: Literal[1, 3] = 3
    classes: tuple[Natural, ...] = ()

    def load(self) -> ImageSet:
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        nothing = np.empty((0, self.channels, height, width), np.float32)
        labels = np.array(self.classes, np.int64) if self.classes else None
        return ImageSet(nothing, labels, digest_of(["no images", list(nothing.shape), self.classes]))


@recipe
class TextsAlone:
    """No images, but what they would show: the lines of a text file, for studies whose network is frozen (`training=Stages(())`) and whose scores
    bring their own images, or need none. Gates are learned of these texts. `size`: the side, or (height, width), of what the network makes.

    A relative path is one in the study file's folder. Raises UserError where the file cannot be read or has no lines.
    """

    path: str
    size: Few | tuple[Few, Few]
    channels: Literal[1, 3] = 3
    base: str = field(default_factory=os.getcwd, repr=False, kw_only=True)

    def load(self) -> ImageSet:
        lines = [line.partition("\t")[0].strip() for line in lines_of(Path(self.base) / Path(self.path).expanduser())]
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        nothing = np.empty((0, self.channels, height, width), np.float32)
        return ImageSet(nothing, None, digest_of([lines, list(nothing.shape)]), captions=tuple(lines))
