"""Exact MACs and parameters of any subnet, in microseconds and without a tensor.

Each weight joins two axes whose lengths are sums of channel counts, so both costs are quadratic forms in the vector of
those counts: cost(arch) = v(arch)^T Q v(arch), with v = (1, channels of each stretch). The coefficients are collected
once for a config; counts are integers throughout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from search_spaces.unet import Anatomy, Arch, Stretch, stretch_size

Matrix = npt.NDArray[np.int64]


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

    def __call__(self, arch: Arch) -> Cost:
        """`arch` is one that `Anatomy.subconfig` accepts."""
        lengths = np.array([1, *(stretch_size(stretch, arch) for stretch in self._stretches)], dtype=np.int64)
        linear, attention, params = self._forms
        products = int(lengths @ attention @ lengths)
        return Cost(int(lengths @ linear @ lengths) + products, products, int(lengths @ params @ lengths))

    @cached_property
    def _stretches(self) -> list[Stretch]:
        """Distinct elastic stretches; entry i of this list is entry i + 1 of the vector of lengths."""
        tensors = self._anatomy.tensors.values()
        return list(dict.fromkeys(s for t in tensors for axis in t.axes for s in axis if s.level is not None))

    @cached_property
    def _forms(self) -> tuple[Matrix, Matrix, Matrix]:
        index = {stretch: i + 1 for i, stretch in enumerate(self._stretches)}
        shape = (len(index) + 1, len(index) + 1)
        linear, attention, params = (np.zeros(shape, dtype=np.int64) for _ in range(3))
        constant = Stretch(1)
        for tensor in self._anatomy.tensors.values():
            kernel = math.prod(axis[0].size for axis in tensor.axes[2:])
            rows, columns = (tensor.axes[0], tensor.axes[1] if len(tensor.axes) > 1 else (constant,))
            for row in rows:
                for column in columns:
                    fixed = math.prod(s.size for s in (row, column) if s.level is None)
                    at = index.get(row, 0), index.get(column, 0)
                    params[at] += kernel * fixed
                    linear[at] += kernel * fixed * tensor.positions
        for block in self._anatomy.attentions:
            for stretch in block.axis:
                attention[0, index[stretch]] += 2 * block.positions**2
        return linear, attention, params
