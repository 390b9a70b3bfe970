"""What samples are conditioned on. A sample is a noise and a condition; both are the same for all schedules, so that scores are paired."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from evaluators.images import load_once
from nas.contracts import Condition, Images, Progress, UserError, digest_of
from nas.recipes import recipe


class ConditionSet(Protocol):
    """Conditions with their tensors."""

    @property
    def digest(self) -> str:
        """Identifies which sample has which."""

    def of(self, seed: int, start: int, stop: int) -> Condition:
        """Of samples start..stop-1, on the CPU. Depends on (seed, i) alone."""

    def classes(self, seed: int, start: int, stop: int) -> torch.Tensor | None:
        """The class that each of these samples is asked to be, (stop - start,); None where nothing is known of it."""

    def texts(self, seed: int, start: int, stop: int) -> list[str] | None:
        """What each of these samples is told; None where it is no text."""


class Conditions(Protocol):
    """Recipe of what samples are conditioned on."""

    def describe(self) -> dict[str, Any]: ...

    def prepare(self, folder: Path, device: str) -> Iterator[Progress]:
        """Makes what `load` needs and keeps it in the folder."""

    def load(self, folder: Path | None = None, device: str = "cpu") -> ConditionSet: ...


class LoadedEncoder(Protocol):
    def keep(self, texts: Sequence[str]) -> Iterator[Progress]: ...
    def rows(self, texts: Sequence[str], negative: str = "") -> Callable[[torch.Tensor], Condition]: ...


class Encoder(Protocol):
    """Recipe of what makes conditions of texts, such as `TextEncoder("sd15/")`."""

    def describe(self) -> dict[str, Any]: ...
    def load(self, folder: Path | None, device: str) -> LoadedEncoder: ...


class InTurn(ABC):
    """Who comes when: sample i is what stands at place i of an endless sequence of permutations derived from the seed. In each of them every
    class is spread evenly, so that every block of neighbours holds the same mixture. `labels`: the classes, (n,)."""

    def __init__(self, labels: npt.NDArray[np.int64], digest: str) -> None:
        self.labels = labels
        self.digest = digest
        self._round = lru_cache(maxsize=64)(self._spread)

    @abstractmethod
    def of(self, seed: int, start: int, stop: int) -> Condition: ...

    def places(self, seed: int, start: int, stop: int) -> npt.NDArray[np.int64]:
        count = len(self.labels)
        rounds = range(start // count, -(-stop // count))
        order = [self._round(seed, number) for number in rounds] or [np.empty(0, np.int64)]
        first = start - start // count * count
        return np.concatenate(order)[first : first + stop - start]

    def _spread(self, seed: int, number: int) -> npt.NDArray[np.int64]:
        """A permutation: the j-th of n members of a class, in an order of its own, stands at (j + u) / n of the way, u uniform."""
        rng = np.random.default_rng([seed, number, 0x1ABE15])
        place = np.empty(len(self.labels))
        for label in np.unique(self.labels):
            mine = np.flatnonzero(self.labels == label)
            place[rng.permutation(mine)] = (np.arange(len(mine)) + rng.random()) / len(mine)
        return np.argsort(place, kind="stable")


@recipe
class Labels:
    """Class labels, as often as the images have them. Raises UserError where the images have no labels."""

    images: Images
    condition_kind = "labels"

    def describe(self) -> dict[str, Any]:
        return {"class": "Labels", "images": load_once(self.images).digest}

    def prepare(self, folder: Path, device: str) -> Iterator[Progress]:
        yield from ()

    def load(self, folder: Path | None = None, device: str = "cpu") -> LabelSet:
        data = load_once(self.images)
        if data.labels is None:
            raise UserError(f"{self.images} have no labels to condition samples on; use images with labels")
        return LabelSet(data.labels, digest_of(self.describe()))


class LabelSet(InTurn):
    def of(self, seed: int, start: int, stop: int) -> dict[str, torch.Tensor]:
        return {"class_labels": self.classes(seed, start, stop)}

    def classes(self, seed: int, start: int, stop: int) -> torch.Tensor:
        return torch.from_numpy(self.labels[self.places(seed, start, stop)])

    def texts(self, seed: int, start: int, stop: int) -> None:
        return None


class Told(ABC):
    """A recipe of texts. `encoder`: what makes conditions of them; `negative`: the text in their place where a guided step predicts without."""

    encoder: Encoder
    negative: str
    condition_kind = "texts"

    @abstractmethod
    def texts(self) -> tuple[Sequence[str], npt.NDArray[np.int64] | None]:
        """The texts, and the class that each asks for, where that is known."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What the texts are."""

    def describe(self) -> dict[str, Any]:
        return {
            "class": type(self).__name__,
            "encoder": self.encoder.describe(),
            "negative": self.negative,
            **self.identity(),
        }

    def prepare(self, folder: Path, device: str) -> Iterator[Progress]:
        yield from self.encoder.load(folder, device).keep([*self.texts()[0], self.negative])

    def load(self, folder: Path | None = None, device: str = "cpu") -> TextSet:
        texts, classes = self.texts()
        make = lambda: self.encoder.load(folder, device).rows(texts, self.negative)  # noqa: E731
        return TextSet(texts, classes, make, digest_of(self.describe()))


class TextSet(InTurn):
    """`make` gives what draws the conditions of the texts at chosen places; it is asked when the first are wanted."""

    def __init__(
        self,
        texts: Sequence[str],
        classes: npt.NDArray[np.int64] | None,
        make: Callable[[], Callable[[torch.Tensor], Condition]],
        digest: str,
    ) -> None:
        self._texts, self._classes, self._make = texts, classes, make
        super().__init__(np.zeros(len(texts), np.int64) if classes is None else classes, digest)

    @cached_property
    def _draw(self) -> Callable[[torch.Tensor], Condition]:
        return self._make()

    def of(self, seed: int, start: int, stop: int) -> Condition:
        return self._draw(torch.from_numpy(self.places(seed, start, stop)))

    def classes(self, seed: int, start: int, stop: int) -> torch.Tensor | None:
        return None if self._classes is None else torch.from_numpy(self._classes[self.places(seed, start, stop)])

    def texts(self, seed: int, start: int, stop: int) -> list[str]:
        return [self._texts[place] for place in self.places(seed, start, stop)]


@recipe
class Captions(Told):
    """The images' captions, as often as they have them; of images that have labels alone, the labels' numbers. Raises UserError where the
    images have neither."""

    images: Images
    encoder: Encoder
    negative: str = ""

    def identity(self) -> dict[str, Any]:
        return {"images": load_once(self.images).digest}

    def texts(self) -> tuple[Sequence[str], npt.NDArray[np.int64] | None]:
        data = load_once(self.images)
        if data.texts is None:
            raise UserError(f"{self.images} have no captions to condition samples on; use images with captions")
        return data.texts, data.labels


@recipe
class Prompts(Told):
    """The lines of a text file; behind a tab, a line may have the number of the class that it asks for. A relative path is one in the study file's
    folder. Raises UserError where the file has no lines, or only some have classes."""

    path: str
    encoder: Encoder
    negative: str = ""
    base: str = field(default_factory=os.getcwd, repr=False, compare=False, kw_only=True)

    def identity(self) -> dict[str, Any]:
        texts, classes = self.texts()
        return {"texts": digest_of([texts, None if classes is None else classes.tolist()])}

    def texts(self) -> tuple[Sequence[str], npt.NDArray[np.int64] | None]:
        path = (Path(self.base) / Path(self.path).expanduser()).resolve()
        lines = lines_of(path)
        split = [line.rpartition("\t") if "\t" in line else (line, "", "") for line in lines]
        texts = [text.strip() for text, _, _ in split]
        numbers = [number.strip() for _, _, number in split if number.strip()]
        if not numbers:
            return texts, None
        wrong = next((number for number in numbers if not number.isdecimal()), None)
        if wrong is not None or len(numbers) != len(texts):
            said = (
                f"{wrong!r} is no number of a class"
                if wrong is not None
                else f"{len(numbers)} of {len(texts)} have one"
            )
            raise UserError(
                f"{path}: behind the tab stands the number of a class, for every prompt or for none; {said}"
            )
        return texts, np.array([int(number) for number in numbers], dtype=np.int64)


def lines_of(path: Path) -> list[str]:
    """Of a text file, those that are not empty. Raises UserError where there are none."""
    try:
        # Without the mark that some editors begin a file with; a text may hold other characters that are said to end a line.
        lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); give a text file with a prompt in each line") from error
    if not lines:
        raise UserError(f"{path} has no prompts; write one in each line")
    return lines
