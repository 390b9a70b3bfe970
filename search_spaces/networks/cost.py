"""Exact MACs and parameters of any subnet, in microseconds and without a tensor.

Each weight joins two axes whose lengths are sums of channel counts, so both costs are quadratic forms in the vector of
those counts: cost(arch) = v(arch)^T Q v(arch), with v = (1, channels of each stretch). The coefficients are collected
once for each depth and choice of attention, for each layer of the subnet's branches; counts are integers throughout.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from cachetools import LRUCache

from search_spaces.networks.anatomy import Anatomy
from search_spaces.networks.parts import Stretch, TensorAnatomy
from search_spaces.networks.slices import Arch
from search_spaces.shipped.graph import Graph

Matrix = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Cost:
    """Per sample and network call. `macs` includes `attention_macs`, the two products of every attention."""

    macs: int
    attention_macs: int
    params: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.macs + other.macs, self.attention_macs + other.attention_macs, self.params + other.params)


class CostModel:
    """Costs of the subnets of one supernet. fvcore counts the same, less its entries for norms and upsampling."""

    def __init__(self, anatomy: Anatomy) -> None:
        self._anatomy = anatomy
        self._known: dict[tuple[Any, ...], tuple[tuple[str, ...], Matrix]] = {}
        self._counts: LRUCache[Arch, dict[str, Cost]] = LRUCache(2**12)
        self._graphs: dict[Arch, Graph] = {}
        self._summed = lru_cache(maxsize=2**16)(self._sum)

    def __reduce__(self) -> tuple[type[CostModel], tuple[Anatomy]]:
        """A worker gets none of the counts: a cache of `functools` cannot be pickled, and counting is quick."""
        return type(self), (self._anatomy,)

    def __call__(self, arch: Arch) -> Cost:
        """`arch` is one that `Anatomy.subconfig` and `Anatomy.segments` accept."""
        return self._running(arch, ())

    def distinct_params(self, arch: Arch) -> int:
        """Parameters as papers count them: one of each where the stock class keeps copies, and tables that nobody trains."""
        lengths = self._vector(arch)
        copies = int((self._weights(self._anatomy.copies(arch))[2] @ lengths) @ lengths)
        return self(arch).params - copies + self._anatomy.computed_numbers(arch)

    def graph(self, arch: Arch) -> Graph:
        """Of the subnet's blocks, branches and layers."""
        if arch not in self._graphs:
            self._graphs[arch] = self._anatomy.graph(arch)
        return self._graphs[arch]

    def branches(self, arch: Arch) -> dict[str, Cost]:
        """What each branch of the subnet costs; under "" what always runs, the input and output convolutions and the time
        embedding."""
        owner = {layer.name: layer.branch for layer in self.graph(arch).layers}
        found: dict[str, Cost] = {}
        for name, cost in self.layers(arch).items():
            branch = owner.get(name, name)
            found[branch] = found.get(branch, Cost(0, 0, 0)) + cost
        return found

    def layers(self, arch: Arch) -> dict[str, Cost]:
        """What each layer of its branches costs; under "" what always runs."""
        arch = arch.replace(expert="")
        if arch not in self._counts:
            lengths, (names, forms) = self._vector(arch), self._forms(arch)
            counts = ((forms @ lengths) @ lengths).tolist()
            self._counts[arch] = {
                name: Cost(linear + products, products, params)
                for name, (linear, products, params) in zip(names, counts, strict=True)
            }
        return self._counts[arch]

    def macs(self, arch: Arch, reuse: Collection[str] = ()) -> int:
        """Of one call in which the outputs of these blocks or branches are those of the step before: none where no block of a UNet runs."""
        return self._running(arch, reuse).macs

    def attention_macs(self, arch: Arch, reuse: Collection[str] = ()) -> int:
        """Those among them of the products of attention."""
        return self._running(arch, reuse).attention_macs

    def _running(self, arch: Arch, reuse: Collection[str]) -> Cost:
        """Of the layers that run, all together."""
        return self._summed(arch.replace(expert="") if arch.expert else arch, frozenset(reuse))

    def _sum(self, arch: Arch, reuse: frozenset[str]) -> Cost:
        graph = self.graph(arch)
        reused = graph.expand(reuse)
        runs = graph.predicts_anew or len(reused) < len(graph.layers)
        each = self.layers(arch).items() if runs else ()
        return sum((cost for name, cost in each if name not in reused), Cost(0, 0, 0))

    def _vector(self, arch: Arch) -> npt.NDArray[np.int64]:
        shares = [1.0 if level is None else arch.widths[level] for _, level in self._lengths]
        counts = [round(size * share) for (size, _), share in zip(self._lengths, shares, strict=True)]
        return np.array(counts, dtype=np.int64)

    @cached_property
    def _lengths(self) -> list[tuple[int, int | None]]:
        """Distinct (size, level) of elastic stretches, after the constant 1."""
        tensors = self._anatomy.tensors.values()
        elastic = ((s.size, s.level) for t in tensors for axis in t.axes for s in axis if s.level is not None)
        return [(1, None), *dict.fromkeys(elastic)]

    def _forms(self, arch: Arch) -> tuple[tuple[str, ...], Matrix]:
        """Names of the layers, and of each: MACs of weights, MACs of attention products, parameters, (layers, 3, lengths, lengths)."""
        anatomy = self._anatomy
        synthetic = [name for name in anatomy.identities if anatomy.widened(name, arch)]
        key = arch.replace(widths=()), *synthetic
        if key not in self._known:
            graph = anatomy.graph(arch)
            members: dict[str, list[TensorAnatomy]] = {"": []}
            for name, tensor in anatomy.tensors.items():
                placed = anatomy.placed(name, tensor.unit, arch)
                if placed is not None:
                    members.setdefault(anatomy.layer_of(placed, graph), []).append(tensor)
            for name in synthetic:
                members.setdefault(anatomy.layer_of(name, graph), []).append(anatomy.identities[name])
            forms = {name: self._weights(tensors) for name, tensors in members.items()}
            forms[""][0] += self._weights(anatomy.multiplied_again)[0]
            for block in anatomy.attentions:
                placed = anatomy.placed(f"{block.module}.", block.unit, arch)
                if placed is not None:
                    for stretch in block.axis:
                        forms[anatomy.layer_of(placed, graph)][1, 0, self._index(stretch)] += (
                            2 * block.queries * block.keys
                        )
            self._known[key] = tuple(forms), np.stack([*forms.values()])
        return self._known[key]

    def _weights(self, tensors: Iterable[TensorAnatomy]) -> Matrix:
        forms = np.zeros((3, len(self._lengths), len(self._lengths)), dtype=np.int64)
        linear, _, params = forms
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
        return forms

    def _index(self, stretch: Stretch) -> int:
        return 0 if stretch.level is None else self._lengths.index((stretch.size, stretch.level))
