"""Exact MACs and parameters of any subnet, in microseconds and without a tensor.

Each weight joins two axes whose lengths are sums of channel counts, so both costs are quadratic forms in the vector of
those counts: cost(arch) = v(arch)^T Q v(arch), with v = (1, channels of each stretch). The coefficients are collected
once for each depth and choice of attention; counts are integers throughout.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from search_spaces.parts import Stretch, TensorAnatomy
from search_spaces.unet import Anatomy, Arch

Matrix = npt.NDArray[np.int64]
Forms = tuple[Matrix, Matrix, Matrix]
"""Of the MACs of weights, the MACs of attention products, and parameters."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Per sample and network call. `macs` includes `attention_macs`, the two products of every attention."""

    macs: int
    attention_macs: int
    params: int


class CostModel:
    """Costs of the subnets of one supernet. fvcore counts the same, less its entries for norms and upsampling."""

    def __init__(self, anatomy: Anatomy) -> None:
        self._anatomy = anatomy
        self._known: dict[Arch, Forms] = {}

    def __call__(self, arch: Arch) -> Cost:
        """`arch` is one that `Anatomy.subconfig` and `Anatomy.segments` accept."""
        shares = [1.0 if level is None else arch.widths[level] for _, level in self._lengths]
        lengths = np.array(
            [round(size * share) for (size, _), share in zip(self._lengths, shares, strict=True)], dtype=np.int64
        )
        linear, attention, params = self._forms(arch)
        products = int(lengths @ attention @ lengths)
        return Cost(int(lengths @ linear @ lengths) + products, products, int(lengths @ params @ lengths))

    @cached_property
    def _lengths(self) -> list[tuple[int, int | None]]:
        """Distinct (size, level) of elastic stretches, after the constant 1."""
        tensors = self._anatomy.tensors.values()
        elastic = ((s.size, s.level) for t in tensors for axis in t.axes for s in axis if s.level is not None)
        return [(1, None), *dict.fromkeys(elastic)]

    def _forms(self, arch: Arch) -> Forms:
        synthetic = self._anatomy.synthetic(arch)
        key = Arch(arch.widths if synthetic else (), arch.depths, arch.attention)
        if key not in self._known:
            place = self._anatomy.place
            tensors = [t for t in self._anatomy.tensors.values() if t.unit is None or place(t.unit, arch) is not None]
            linear, params = self._weights([*tensors, *synthetic])
            attention = np.zeros_like(linear)
            for block in self._anatomy.attentions:
                if place(block.unit, arch) is not None:
                    for stretch in block.axis:
                        attention[0, self._index(stretch)] += 2 * block.positions**2
            self._known[key] = linear, attention, params
        return self._known[key]

    def _weights(self, tensors: Iterable[TensorAnatomy]) -> tuple[Matrix, Matrix]:
        shape = (len(self._lengths), len(self._lengths))
        linear, params = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        one = (Stretch(1),)
        for tensor in tensors:
            kernel = math.prod(axis[0].size for axis in tensor.axes[2:])
            rows, columns = tensor.axes[0], tensor.axes[1] if len(tensor.axes) > 1 else one
            for row in rows:
                for column in columns:
                    fixed = math.prod(s.size for s in (row, column) if s.level is None)
                    at = self._index(row), self._index(column)
                    params[at] += kernel * fixed
                    linear[at] += kernel * fixed * tensor.positions
        return linear, params

    def _index(self, stretch: Stretch) -> int:
        return 0 if stretch.level is None else self._lengths.index((stretch.size, stretch.level))
