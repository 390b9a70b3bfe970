"""What the steps of an interval compute: options of a gene that says which steps run at all, and which blocks they reuse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

from nas.contracts import UserError
from nas.recipes import Count, Natural, recipe
from search_spaces.shipped.graph import Graph, UNetGraph

ALL = ("all",)
"""A step that computes everything."""

FEW = 12
"""Branches of a transformer of which all sets are still listed."""

Computed = tuple[str, ...] | None
"""What one step computes: `ALL`, blocks or branches by name while the others are reused, () for nothing, so that the prediction before
is held, and None for a step that is left out of the sampler."""


class Pattern(Protocol):
    """One option. `label` names it for people."""

    @property
    def label(self) -> str: ...

    def steps(self, count: int) -> tuple[Computed, ...]:
        """What each of `count` steps computes, noisy to clean."""


@recipe
class Every:
    """Whole steps `period` apart, the interval's first among them; `computed` is what runs at those between. `Every(1)` is the whole
    network at each step."""

    period: Count
    computed: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        between = f", between {_words(self.computed)}" if self.computed else ""
        return "whole" if self.period == 1 else f"every {self.period}{between}"

    def steps(self, count: int) -> tuple[Computed, ...]:
        return tuple(self.computed if place % self.period else ALL for place in range(count))


@recipe
class Only:
    """The same blocks at every step; the others are reused from the step before."""

    computed: tuple[str, ...]

    @property
    def label(self) -> str:
        return _words(self.computed)

    def steps(self, count: int) -> tuple[Computed, ...]:
        return (self.computed,) * count


@recipe
class Subset:
    """`kept` of the interval's steps run, whole; the others are left out. "uniform": evenly spaced, "quadratic": the denser the cleaner,
    as in Song et al. 2021 (appendix D.3). The first step stays."""

    kept: Count
    spacing: Literal["uniform", "quadratic"] = "uniform"

    @property
    def label(self) -> str:
        return f"{self.kept} steps, {self.spacing}"

    def steps(self, count: int) -> tuple[Computed, ...]:
        if self.kept > count:
            raise UserError(f"a subset of {self.kept} steps asks for more than the interval's {count}")
        ends = np.linspace(0, 1, self.kept + 1)[1:] if self.kept > 1 else np.ones(1)
        shares = ends**2 if self.spacing == "quadratic" else ends
        # Counted from the clean end, the last kept step is the noisiest.
        places = _distinct([round(count * float(share)) - 1 for share in shares])
        return tuple(ALL if count - 1 - place in places else None for place in range(count))


@recipe
class LeftOut:
    """No step runs: the sampler goes from the step before to the one behind, whatever it remembers. The trajectory's first step stays, whole."""

    label = "left out"

    def steps(self, count: int) -> tuple[Computed, ...]:
        return (None,) * count


@recipe
class Listed:
    """What each step computes by itself, noisy to clean, as a schedule says that was made elsewhere; of an interval of as many steps. `name`
    labels it. `branches`: how many the network has that it was made for, 0 where that is not known."""

    name: str
    computed: tuple[tuple[str, ...], ...]
    branches: Natural = 0

    @property
    def label(self) -> str:
        return self.name

    def steps(self, count: int) -> tuple[Computed, ...]:
        if count != len(self.computed):
            raise UserError(
                f"{self.name} is a schedule of {len(self.computed)} steps, and here are {count}; give as many timesteps"
            )
        return self.computed


def check_listed(listed: Pattern, graph: Graph) -> None:
    """Raises UserError for a schedule that was made for a network of other branches."""
    wanted, count = getattr(listed, "branches", 0), len(graph.names(True))
    if wanted and wanted != count:
        raise UserError(
            f"{listed.label} is a schedule for {wanted} branches, the network has {count}; give the one of this very network"
        )


def legal(levels: int, finer: Graph | None = None) -> tuple[Only, ...]:
    """A pattern for each legal set of blocks of a UNet of so many levels; of branches of the graph, where one is given. Raises UserError for a
    transformer of more branches than can be listed."""
    if finer is not None and finer.predicts_anew and len(finer.names(True)) > FEW:
        raise UserError(
            f"{len(finer.names(True))} branches have 2^{len(finer.names(True))} legal sets, too many to list; use Branches, a bit for each"
        )
    sets = UNetGraph((1,) * levels).legal_sets() if finer is None else finer.legal_sets(finer=True)
    return tuple(Only(tuple(computed)) for computed in sets)


def _distinct(places: Sequence[int]) -> set[int]:
    """Increasing places, each moved up to the next that is free."""
    found: list[int] = []
    for place in places:
        found.append(max(place, found[-1] + 1 if found else 0))
    return set(found)


def _words(computed: tuple[str, ...]) -> str:
    return "whole" if computed == ALL else " ".join(computed) or "nothing"
