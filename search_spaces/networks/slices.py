"""Which channels of a full network's tensors a smaller one takes, for any family whose tensors are taken apart.

Each stretch of an axis is sliced on its own, trunk and skip apart after a concatenation, so that a channel always meets the weight it met in
the full net.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, Literal

import torch

from search_spaces.networks.parts import Axis, Stretch, TensorAnatomy, Unit


class Arch(tuple[Any, ...]):
    """A subnet. What is left empty is as in the full net; JSON is the plain nested list, without what stands last as in the full net.

    `widths`: one share of the channels per level, outermost level first. `depths`: residual blocks per level on the way down, one
    more on the way up. `attention`: whether it runs, per level and then in the middle. `expert`: which copy of the weights. `layers`:
    transformer layers of each attention, per level, the last level's being the middle's too. `middle`: whether there is a middle block.
    """

    __slots__ = ()
    _named = ("widths", "depths", "attention", "expert", "layers", "middle")
    _always = 4
    """So many are written whether they say something or not: digests of archs depend on it."""

    def __new__(
        cls,
        widths: tuple[float, ...],
        depths: tuple[int, ...] = (),
        attention: tuple[bool, ...] = (),
        expert: str = "",
        layers: tuple[int, ...] = (),
        middle: bool = True,
    ) -> Arch:
        values: list[Any] = [widths, depths, attention, expert, layers, middle]
        while len(values) > cls._always and values[-1] in ((), True):
            values.pop()
        return super().__new__(cls, values)

    def __getnewargs__(self) -> tuple[Any, ...]:
        return tuple(self)

    def __repr__(self) -> str:
        said = ", ".join(f"{name}={value!r}" for name, value in zip(self._named, self, strict=False))
        return f"Arch({said})"

    @property
    def widths(self) -> tuple[float, ...]:
        return self[0]  # type: ignore[no-any-return]

    @property
    def depths(self) -> tuple[int, ...]:
        return self[1]  # type: ignore[no-any-return]

    @property
    def attention(self) -> tuple[bool, ...]:
        return self[2]  # type: ignore[no-any-return]

    @property
    def expert(self) -> str:
        return self[3]  # type: ignore[no-any-return]

    @property
    def layers(self) -> tuple[int, ...]:
        return self[4] if len(self) > 4 else ()

    @property
    def middle(self) -> bool:
        return self[5] if len(self) > 5 else True

    def replace(self, **values: Any) -> Arch:
        """This one with other values of these names."""
        return Arch(**{**dict(zip(self._named, self, strict=False)), **values})


Run = tuple[int, int]
"""Channels start..stop-1 of one axis."""

Groups = Literal["count", "size"]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a subnet's tensor comes from: the full net's tensor and the runs of channels of each of its axes. No name: an
    identity between two equally wide levels that a subnet makes different; its axes are of the same channels."""

    name: str | None
    axes: tuple[tuple[Run, ...], ...]


class Slices(ABC):
    """What an anatomy slices by.

    `tensors`: every parameter of the full net, taken apart. `identities`: shortcuts that stand nowhere, but would where a subnet makes two
    levels different. `cells[name]`: first channels of the stretches that no norm group splits, `divided[name]`: of the parts of which a subnet
    keeps a share each, whatever norms do. `groups`: what of the norms stays constant.
    `frequency_shift`: of the time embedding's frequencies.
    """

    tensors: dict[str, TensorAnatomy]
    identities: dict[str, TensorAnatomy]
    cells: dict[str, tuple[int, ...]]
    divided: dict[str, tuple[int, ...]]
    groups: Groups
    frequency_shift: float

    @abstractmethod
    def place(self, unit: Unit, arch: Arch) -> int | None:
        """Where the full net's unit stands in the subnet, None where it lacks it."""

    @abstractmethod
    def check_shortcuts(self, arch: Arch) -> None:
        """Raises UserError where a shortcut convolution of the full net would vanish."""

    @abstractmethod
    def widened(self, name: str, arch: Arch) -> bool:
        """Whether the levels on both sides of a synthetic shortcut, of its weight or bias, differ in the subnet."""

    def segments(self, arch: Arch) -> dict[str, Source]:
        """For each parameter of the subnet, where it comes from.

        Raises UserError where a shortcut convolution of the full net would vanish (one stands only between levels of different
        width).
        """
        self.check_shortcuts(arch)
        found = {}
        for name, tensor in self.tensors.items():
            placed = self.placed(name, tensor.unit, arch)
            if placed is not None:
                found[placed] = Source(
                    tensor.copy_of or name, tuple(self._axis_runs(axis, arch) for axis in tensor.axes)
                )
        for name, tensor in self.identities.items():
            if self.widened(name, arch):
                found[name] = Source(None, tuple(self._axis_runs(axis, arch) for axis in tensor.axes))
        return found

    def placed(self, name: str, unit: Unit | None, arch: Arch) -> str | None:
        """What the subnet calls the full net's parameter, or module, of this unit; None where it lacks it."""
        if unit is None:
            return name
        index = self.place(unit, arch)
        return None if index is None else unit.name(index) + name.removeprefix(unit.name(unit.index))

    def _axis_runs(self, axis: Axis, arch: Arch) -> tuple[Run, ...]:
        key = axis, tuple(1.0 if s.level is None else arch.widths[s.level] for s in axis)
        if key not in self._runs:
            self._runs[key] = tuple(_merged(self._stretch_runs(*key)))
        return self._runs[key]

    @cached_property
    def _runs(self) -> dict[tuple[Axis, tuple[float, ...]], tuple[Run, ...]]:
        return {}

    def _stretch_runs(self, axis: Axis, shares: tuple[float, ...]) -> Iterator[Run]:
        start = 0
        for stretch, share in zip(axis, shares, strict=True):
            if stretch.frequencies:
                yield from self._frequency_runs(start, stretch.size, round(stretch.size * share))
            else:
                for first, stop in self.kept(stretch, share):
                    yield start + first, start + stop
            start += stretch.size

    def kept(self, stretch: Stretch, share: float) -> Iterator[Run]:
        """Channels of a stretch that a subnet of this width takes. With a constant group count, the leading share of each
        cell, so that where all levels have one share every channel stays in its norm group; where shares differ, groups behind a
        concatenation of trunk and skip begin elsewhere. With a constant group size, the leading groups."""
        exact = Fraction(share).limit_denominator(4096)
        cells = self.cells.get(stretch.channels, ()) if self.groups == "count" else ()
        bounds = (*cells, *self.divided.get(stretch.channels, ()))
        for start, stop in pairwise(sorted({0, *bounds, stretch.size})):
            count = math.floor(exact * stop) - math.floor(exact * start)
            if count:
                yield start, start + count

    def _frequency_runs(self, start: int, full: int, kept: int) -> Iterator[Run]:
        """Channel k of n has frequency 10000^(-k / (n - shift)): take the full net's nearest one in log frequency."""
        shift = self.frequency_shift
        for k in range(kept):
            nearest = min(full - 1, round(k * (full - shift) / max(kept - shift, 1)))
            yield start + nearest, start + nearest + 1


def take(full: Mapping[str, torch.Tensor], source: Source) -> torch.Tensor:
    """The slice of the full net's tensors that `segments` names: itself where that is all of it, a view where each axis is one run, else a copy; differentiable."""
    if source.name is None:
        like = next(iter(full.values()))
        return _identity(source.axes).to(like)
    tensor = full[source.name]
    for dim, runs in enumerate(source.axes):
        if len(runs) == 1:
            start, stop = runs[0]
            if (start, stop) == (0, tensor.shape[dim]):  # a slice of all is a copy of all in the backward pass
                continue
            tensor = tensor.narrow(dim, start, stop - start)
        else:
            tensor = tensor.index_select(dim, _index(runs, tensor.device))
    return tensor


@lru_cache(maxsize=4096)
def _index(runs: tuple[Run, ...], device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # kept, so that whoever asks first must not decide what it can be used for
        return torch.cat([torch.arange(start, stop, device=device) for start, stop in runs])


@lru_cache(maxsize=256)
def _identity(axes: tuple[tuple[Run, ...], ...]) -> torch.Tensor:
    """Kernel or bias of a 1x1 convolution that hands on the channels which both axes hold; absent ones become zero."""
    cpu = torch.device("cpu")
    after = _index(axes[0], cpu)
    with torch.inference_mode(False):
        if len(axes) == 1:
            return torch.zeros(len(after))
        before = _index(axes[1], cpu)
        return (after[:, None] == before[None, :]).float()[:, :, None, None]


def _merged(runs: Iterator[Run]) -> Iterator[Run]:
    """Neighbouring runs as one."""
    current: Run | None = None
    for start, stop in runs:
        if current is not None and current[1] == start:
            current = current[0], stop
            continue
        if current is not None:
            yield current
        current = start, stop
    if current is not None:
        yield current
