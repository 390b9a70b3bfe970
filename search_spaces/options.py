"""What subnets may differ in, and the legal ones among them: genes for the space, draws for the training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from nas.contracts import UserError
from nas.recipes import Count, recipe
from search_spaces.networks.anatomy import Anatomy
from search_spaces.networks.cost import Cost, CostModel
from search_spaces.networks.slices import Arch

MOST = 2**16
"""Options of one interval whose costs are still tabulated."""


PerLevel = Literal["width", "depth", "layers"]
Gradual = Literal["width", "depth", "attention", "layers", "middle"]

LATER = ("channels", "layers", "middle")
"""Settings that were added later."""

WIDTHS = (0.25, 0.5, 0.75, 1.0)


@recipe
class Options:
    """`widths`: shares of a level's channels; or `channels`: for each level, outermost first, the numbers of channels that it may have, the
    full network's among them, as shares of 448 channels in heads of 32 are sevenths. `depths`: residual blocks of a level; empty for as many as the full net has.
    `per_level`: what each level chooses on its own, else all alike. `attention`: whether a place that has attention may go
    without it. `layers`: transformer layers of an attention that reads a text, `middle`: whether such a network may go without its middle. A
    level that has fewer residual blocks or layers than an option asks for has all of its own."""

    widths: tuple[Annotated[float, Field(gt=0, le=1)], ...] = WIDTHS
    depths: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = ()
    per_level: tuple[PerLevel, ...] = ()
    attention: bool = False
    channels: tuple[Annotated[tuple[Count, ...], Field(min_length=1)], ...] = ()
    layers: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = ()
    middle: bool = False

    def __post_init__(self) -> None:
        if self.channels:
            if self.widths not in (WIDTHS, (1.0,)):
                raise UserError(
                    f"widths {self.widths} and channels {self.channels} say the same thing; give one of them"
                )
            object.__setattr__(self, "widths", (1.0,))
            object.__setattr__(self, "channels", tuple(tuple(sorted(level)) for level in self.channels))
            for level in self.channels:
                if len(set(level)) != len(level):
                    raise UserError(f"channels {level} of a level must be distinct")
            if "width" not in self.per_level and len({len(level) for level in self.channels}) > 1:
                raise UserError(
                    f"channels {self.channels} are chosen together, so every level needs as many; or give per_level=('width',)"
                )
        object.__setattr__(self, "widths", tuple(sorted(map(float, self.widths))))
        for name in ("depths", "per_level", "layers"):
            object.__setattr__(self, name, tuple(sorted(getattr(self, name))))
        for name in ("widths", "depths", "per_level", "layers"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise UserError(f"{name} {values} must be distinct")
        if not self.widths or not {"width", "depth", "layers"}.issuperset(self.per_level):
            raise UserError(
                f"widths {self.widths} must name a share, and per_level {self.per_level} 'width', 'depth' or 'layers'"
            )

    def holding(self, held: Sequence[Gradual]) -> Options:
        """With these as the full network has them."""
        last = slice(-1, None)
        width, depth, layers = (last if name in held else slice(None) for name in ("width", "depth", "layers"))
        return replace(
            self,
            widths=self.widths[width],
            depths=self.depths[depth],
            channels=tuple(level[width] for level in self.channels),
            layers=self.layers[layers],
            attention=self.attention and "attention" not in held,
            middle=self.middle and "middle" not in held,
        )

    def within(self, other: Options) -> bool:
        """Whether each of these subnets is among the other's."""
        return (
            {*self.widths} <= {*other.widths}
            and {*self.depths} <= {*other.depths}
            and {*self.per_level} <= {*other.per_level}
            and (other.attention or not self.attention)
            and {*self.layers} <= {*other.layers}
            and (other.middle or not self.middle)
            and (not self.channels or self._channels_within(other))
        )

    def _channels_within(self, other: Options) -> bool:
        if len(self.channels) != len(other.channels):
            return False
        if "width" not in self.per_level and "width" not in other.per_level:  # chosen together, so compared together
            return {*zip(*self.channels, strict=True)} <= {*zip(*other.channels, strict=True)}
        return all({*mine} <= {*theirs} for mine, theirs in zip(self.channels, other.channels, strict=True))

    def describe(self) -> dict[str, Any]:
        """JSON; where nothing is said of channels, layers or the middle it is as it was before there were these."""
        return {name: value for name, value in asdict(self).items() if value or name not in LATER}


@dataclass(frozen=True)
class Gene:
    """One decision, its options from the cheapest to the dearest."""

    name: str
    options: tuple[float | int | str, ...]


class Subnets:
    """The subnets of these options, as one index for each gene. Every combination is legal: where a stock model cannot be so,
    or one would cost more than `most` MACs a call, `arch` gives a near one that can.

    Raises UserError, naming the level and its legal values, for an option that no stock model has, and for a `most` that not even
    the smallest keeps.
    """

    def __init__(self, anatomy: Anatomy, cost: CostModel, options: Options, most: float = math.inf) -> None:
        self.options = options
        self._anatomy = anatomy
        self._cost = cost
        self._most = most
        levels = range(anatomy.levels)
        self._own_width = "width" in options.per_level
        self._own_depth = "depth" in options.per_level and len(options.depths) > 1
        self._own_layers = "layers" in options.per_level and len(options.layers) > 1
        anatomy.check_layers(options.layers, options.middle)
        self._shares = self._shares_of_levels()
        self._check()
        labels = options.channels or (options.widths,) * anatomy.levels
        self.genes: list[Gene] = [Gene(f"width{level}", labels[level]) for level in levels]
        if not self._own_width:
            joint = tuple("/".join(map(str, counts)) for counts in zip(*labels, strict=True))
            self.genes = [Gene("width", joint if options.channels else options.widths)]
        if len(options.depths) > 1:
            depths = [Gene(f"depth{level}", options.depths) for level in levels]
            self.genes += depths if self._own_depth else [Gene("depth", options.depths)]
        if options.attention:
            places = anatomy.attention_places
            self.genes += [
                Gene(f"attention_{'middle' if p is None else f'level{p}'}", ("without", "with")) for p in places
            ]
        if len(options.layers) > 1:
            own = [
                Gene(f"layers{level}", tuple(sorted({min(count, most) for count in options.layers})))
                for level, most in enumerate(anatomy.layers(anatomy.full))
            ]
            self.genes += own if self._own_layers else [Gene("layers", options.layers)]
        if options.middle:
            self.genes.append(Gene("middle", ("without", "with")))
        self.shape = tuple(len(gene.options) for gene in self.genes)
        if math.prod(self.shape) > MOST:
            raise UserError(
                f"{math.prod(self.shape)} subnets for one interval are more than {MOST}; give fewer widths or depths, or let "
                "levels share them"
            )
        least = cost(self._arch((0,) * len(self.shape))).macs
        if least > most:
            raise UserError(
                f"a budget of {most:.4g} MACs a call cannot be met: the smallest subnet takes {least}; raise it"
            )

    def arch(self, indices: Sequence[int]) -> Arch:
        """The subnet of one option index for each gene, in canonical form. Over `most`, one gene after another goes to its next
        cheaper option, the one that saves least first."""
        key = tuple(indices)
        if key not in self._known:
            self._known[key] = self._affordable(key)
        return self._known[key]

    @cached_property
    def _known(self) -> dict[tuple[int, ...], Arch]:
        return {}

    def _affordable(self, indices: tuple[int, ...]) -> Arch:
        arch = self._arch(indices)
        while self._cost(arch).macs > self._most:
            lower = [(*indices[:i], gene - 1, *indices[i + 1 :]) for i, gene in enumerate(indices) if gene]
            indices = max(lower, key=lambda one: self._cost(self._arch(one)).macs)
            arch = self._arch(indices)
        return arch

    def _arch(self, indices: Sequence[int]) -> Arch:
        anatomy, options = self._anatomy, self.options
        levels = anatomy.levels
        chosen = indices[:levels] if self._own_width else [indices[0]] * levels
        widths = [shares[index] for shares, index in zip(self._shares, chosen, strict=True)]
        own = levels if self._own_width else 1
        values = iter([gene.options[index] for gene, index in zip(self.genes[own:], indices[own:], strict=True)])

        def each(given: tuple[int, ...], own: bool) -> tuple[int, ...]:
            """Of every level, what is chosen; empty where all is as in the full net."""
            if len(given) < 2:
                return given * levels
            return tuple(int(next(values)) for _ in range(levels)) if own else (int(next(values)),) * levels

        depths = each(options.depths, self._own_depth)
        kept = [True] * (levels + 1)
        if options.attention:
            for place in anatomy.attention_places:
                kept[levels if place is None else place] = next(values) == "with"
        layers = each(options.layers, self._own_layers)
        middle = next(values) == "with" if options.middle else True
        return anatomy.canonical(Arch(self._with_shortcuts(widths), depths, tuple(kept), "", layers, middle))

    def flat(self, index: int) -> Arch:
        """The subnet at this place of all, 0 the smallest, `len(self) - 1` the largest."""
        return self.arch([int(i) for i in np.unravel_index(index, self.shape)])

    def __len__(self) -> int:
        return math.prod(self.shape)

    @cached_property
    def macs(self) -> npt.NDArray[np.int64]:
        """Of one network call, an axis for each gene."""
        table = np.empty(self.shape, dtype=np.int64)
        for indices in np.ndindex(*self.shape):
            table[indices] = self._cost(self.arch(indices)).macs
        return table

    @cached_property
    def spread_over_macs(self) -> npt.NDArray[np.float64]:
        """For each subnet but the smallest and the largest how likely it is drawn, if all numbers of multiply-adds are as likely and the subnet nearest to one
        is taken, any of those that cost the same. Their sum is 1."""
        macs, inverse, counts = np.unique(self.macs.ravel()[1:-1], return_inverse=True, return_counts=True)
        if len(macs) < 2:
            return np.full(len(inverse), 1 / max(len(inverse), 1))
        bounds = np.array([macs[0], *((macs[1:] + macs[:-1]) / 2), macs[-1]])
        chances: npt.NDArray[np.float64] = np.diff(bounds) / (macs[-1] - macs[0]) / counts
        return chances[inverse]

    def cost(self, indices: Sequence[int]) -> Cost:
        return self._cost(self.arch(indices))

    def _with_shortcuts(self, widths: Sequence[float]) -> tuple[float, ...]:
        """The deeper of two levels that a subnet would make equally wide, and the full net does not, takes its next wider option,
        or else the next narrower one: their shortcut convolution must not vanish."""
        legal = [widths[0]]
        for level, share in enumerate(widths[1:], 1):
            wider = [w for w in self._shares[level] if w >= share]
            narrower = [w for w in self._shares[level] if w < share][::-1]
            fits = (w for w in (*wider, *narrower) if not self._anatomy.shortcut_vanishes((*legal, w), level))
            legal.append(next(fits, share))
        return tuple(legal)

    # ------------------------------------------------------------------------------------------------------ checks

    def _shares_of_levels(self) -> tuple[tuple[float, ...], ...]:
        """Of each level's channels, the options of its width."""
        anatomy, options = self._anatomy, self.options
        if not options.channels:
            return (options.widths,) * anatomy.levels
        if len(options.channels) != anatomy.levels:
            raise UserError(f"channels for {len(options.channels)} levels; the network has {anatomy.levels}")
        for level, (counts, full) in enumerate(zip(options.channels, anatomy.channels, strict=True)):
            if counts[-1] > full:
                raise UserError(f"level {level} has {full} channels, so it cannot have {counts[-1]}")
        return tuple(
            tuple(count / full for count in counts)
            for counts, full in zip(options.channels, anatomy.channels, strict=True)
        )

    def _check(self) -> None:
        anatomy, options = self._anatomy, self.options
        if options.channels and not self._own_width:
            for place, shares in enumerate(zip(*self._shares, strict=True)):
                try:
                    anatomy.subconfig(Arch(shares))
                    anatomy.check_shortcuts(Arch(shares))
                except UserError as error:
                    counts = "/".join(str(level[place]) for level in options.channels)
                    raise UserError(f"channels {counts}: {error}; legal: {self._legal_counts()}") from error
        else:
            for level in range(anatomy.levels) if self._own_width else (None,):
                for share in self._shares[level or 0]:
                    try:
                        self._check_width(level, share)
                    except UserError as error:
                        where = "all levels" if level is None else f"level {level}"
                        raise UserError(f"{error}; legal for {where}: {self._legal(level)}") from error
            self._check_shortcuts()
        if any(not 1 <= depth <= anatomy.depth for depth in options.depths):
            raise UserError(
                f"depths {options.depths} of every level must be from 1 to the full network's {anatomy.depth}"
            )
        if self._own_depth:
            anatomy.check_depths()
        if options.attention:
            anatomy.check_attention()

    def _check_shortcuts(self) -> None:
        """Whatever a level chooses, the next one needs a choice that is not as wide."""
        widths = [1.0] * self._anatomy.levels
        for level in range(1, self._anatomy.levels) if self._own_width else ():
            for before in self._shares[level - 1]:
                if all(
                    self._anatomy.shortcut_vanishes((*widths[: level - 1], before, own), level)
                    for own in self._shares[level]
                ):
                    raise UserError(
                        f"where level {level - 1} has {before:g} of its width all options of level {level} are as wide as it, which needs another one"
                    )

    def _check_width(self, level: int | None, share: float) -> None:
        widths = [share if level in (None, i) else 1.0 for i in range(self._anatomy.levels)]
        if level is None:
            self._anatomy.subconfig(Arch(tuple(widths)))
            self._anatomy.check_shortcuts(Arch(tuple(widths)))
            return
        self._anatomy.subconfig(Arch(tuple(widths)))
        alone = all(
            self._anatomy.shortcut_vanishes((*widths[: level - 1], other, share), level)
            for other in self._shares[(level or 1) - 1]
            if level
        )
        if level and alone:
            raise UserError(f"width {share} makes level {level} as wide as level {level - 1} whatever that chooses")

    def _legal_counts(self) -> str:
        return "; ".join(f"level {level}: {self._legal(level)}" for level in range(self._anatomy.levels))

    def _legal(self, level: int | None) -> str:
        """Shares that a stock model can have, as many as its norm groups distinguish."""
        anatomy = self._anatomy
        channels = anatomy.channels[0 if level is None else level]
        found = []
        for count in range(1, channels + 1):
            try:
                self._check_width(level, count / channels)
            except UserError:
                continue
            found.append(f"{count}" if self.options.channels else f"{count / channels:g}")
        return ", ".join(found) if len(found) <= 12 else f"{', '.join(found[:6])} ... {', '.join(found[-3:])}"
