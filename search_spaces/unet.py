"""How a stock diffusers UNet shrinks: which slice of which tensor a smaller stock model takes.

An `Arch` says how wide and how deep each level is and where attention runs. `Anatomy` knows for each axis of each tensor the
stretches it is made of; after a skip concatenation there are two, trunk and skip, and each is sliced on its own, so that a channel
always meets the weight it met in the full net. From the same table follow the slices (`segments`), the shapes and, in `cost`, MACs
and parameters.

Every subnet is a stock class. `UNet2DModel` has one depth for all levels; where levels differ, `UNet2DConditionModel` runs
unconditionally, and its middle is a single residual block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from nas.contracts import UserError


class Arch(NamedTuple):
    """A subnet. What is left empty is as in the full net; JSON is the plain nested list.

    `widths`: one share of the channels per level, outermost level first. `depths`: residual blocks per level on the way down, one
    more on the way up. `attention`: whether it runs, per level and then in the middle. `expert`: which copy of the weights.
    """

    widths: tuple[float, ...]
    depths: tuple[int, ...] = ()
    attention: tuple[bool, ...] = ()
    expert: str = ""


Run = tuple[int, int]
"""Channels start..stop-1 of one axis."""

Groups = Literal["count", "size"]

StockUNet: TypeAlias = UNet2DModel | UNet2DConditionModel

_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D")


@dataclass(frozen=True, slots=True)
class Stretch:
    """Neighbouring channels of one axis that shrink together: with the share of `level`, or never (`level` None).

    `channels` names what they are: stretches of one name hold the same channels in the same order, because additions and
    products join them.
    """

    size: int
    level: int | None = None
    channels: str = ""
    frequencies: bool = False
    """The sine or the cosine half of the time embedding's input, where a subnet has other frequencies, not fewer."""


Axis = tuple[Stretch, ...]


@dataclass(frozen=True, slots=True)
class Unit:
    """A residual block or an attention that a subnet may lack. `level` None is the middle."""

    side: Literal["down", "up", "middle"]
    level: int | None
    module: str
    index: int
    attention: bool = False

    def name(self, index: int) -> str:
        """As the module is called where it stands at this index."""
        return f"{self.module}.{index}."


@dataclass(frozen=True, slots=True)
class TensorAnatomy:
    """Axes of one parameter, at how many output positions of one sample each of its weights is multiplied, and whose it is."""

    axes: tuple[Axis, ...]
    positions: int = 0
    unit: Unit | None = None


@dataclass(frozen=True, slots=True)
class AttentionAnatomy:
    """One self-attention over `positions` tokens; its two products cost 2 * positions^2 * channels MACs."""

    axis: Axis
    positions: int
    unit: Unit


@dataclass(frozen=True, slots=True)
class Source:
    """Where a subnet's tensor comes from: the full net's tensor and the runs of channels of each of its axes. No name: an
    identity between two equally wide levels that a subnet makes different; its axes are of the same channels."""

    name: str | None
    axes: tuple[tuple[Run, ...], ...]


class Anatomy:
    """Every tensor of a stock UNet2DModel config, taken apart.

    `cells[name]` are the first channels of the stretches that no GroupNorm of the full net splits, `head_sizes[name]` the channels
    of one head, for those inside an attention. Raises UserError, naming
    the value, for a config that this elastic network does not cover.
    """

    def __init__(self, config: Mapping[str, Any], groups: Groups) -> None:
        with torch.device("meta"):
            self._full = UNet2DModel(**config)
        self.config: dict[str, Any] = {k: v for k, v in self._full.config.items() if not k.startswith("_")}
        self.groups = groups
        self._check_config()
        self.channels: tuple[int, ...] = tuple(self.config["block_out_channels"])
        self.levels = len(self.channels)
        self.depth: int = self.config["layers_per_block"]
        self.full = Arch((1.0,) * self.levels)
        size = self.config["sample_size"]
        self.sample_size: tuple[int, int] = (size, size) if isinstance(size, int) else (size[0], size[1])
        if any(side % 2 ** (self.levels - 1) for side in self.sample_size):
            raise UserError(
                f"sample_size {self.sample_size} cannot be halved {self.levels - 1} times without remainder; "
                "use a multiple of the deepest level's factor"
            )
        self.time_embedding_dim: int = self.config["time_embedding_dim"] or 4 * self.channels[0]
        self.tensors: dict[str, TensorAnatomy] = {}
        self.attentions: list[AttentionAnatomy] = []
        self.identities: dict[str, TensorAnatomy] = {}
        self.head_sizes: dict[str, int] = {}
        self._bounds: dict[str, set[int]] = {}
        self._partitions: dict[str, set[tuple[int, ...]]] = {}
        self._take_apart()
        self.cells = {name: tuple(sorted(bounds)) for name, bounds in self._bounds.items()}
        self._runs: dict[tuple[Axis, tuple[float, ...]], tuple[Run, ...]] = {}
        self.subconfig(self.full)
        self._check_shapes()

    # ------------------------------------------------------------------------------------------------------- archs

    @property
    def attention_places(self) -> tuple[int | None, ...]:
        """Levels that have attention in the full net, and None where its middle has."""
        return tuple(dict.fromkeys(attention.unit.level for attention in self.attentions))

    def depths(self, arch: Arch) -> tuple[int, ...]:
        return arch.depths or (self.depth,) * self.levels

    def attends(self, arch: Arch, level: int | None) -> bool:
        """Whether the subnet keeps the attention of the level, or of the middle."""
        if level is None and self.single_middle(arch):
            return False
        return not arch.attention or arch.attention[self.levels if level is None else level]

    def single_middle(self, arch: Arch) -> bool:
        """Whether the subnet is of the class whose middle is one residual block."""
        return len(set(self.depths(arch))) > 1

    def place(self, unit: Unit, arch: Arch) -> int | None:
        """Where the full net's unit stands in the subnet, None where it lacks it. A level going down keeps its first residual
        blocks, going up its first one, which takes the deeper level in, and its last ones, whose skips are those that are kept."""
        if unit.attention and not self.attends(arch, unit.level):
            return None
        if unit.level is None:
            return None if unit.index and self.single_middle(arch) else unit.index
        dropped = self.depth - self.depths(arch)[unit.level]
        if unit.side == "down":
            return unit.index if unit.index < self.depth - dropped else None
        index = unit.index - dropped if unit.index else 0
        return index if index > 0 or unit.index == 0 else None

    def subconfig(self, arch: Arch) -> dict[str, Any]:
        """Arguments of the subnet's stock class, `stock_class(arch)`. Raises UserError where a stock model cannot be so."""
        self._check_form(arch)
        channels = tuple(
            _shrink(c, share, f"{c} channels of level {i}")
            for i, (c, share) in enumerate(zip(self.channels, arch.widths, strict=True))
        )
        if channels[0] % 2:
            raise UserError(
                f"width {arch.widths[0]} leaves {channels[0]} channels in level 0; the time embedding needs an even number"
            )
        config = {
            **self.config,
            "block_out_channels": channels,
            "time_embedding_dim": _shrink(self.time_embedding_dim, arch.widths[0], "the time embedding"),
        }
        if self.groups == "size" and arch.widths != self.full.widths:
            if len(set(arch.widths)) > 1:
                raise UserError(
                    f"widths {arch.widths} differ between levels, which needs groups='count': stock models have one group count"
                )
            for key in ("norm_num_groups", "attn_norm_num_groups"):
                if config[key] is not None:
                    config[key] = _shrink(config[key], arch.widths[0], f"{key}={config[key]}")
        self._check_channels(arch, channels, config)
        for key in ("down_block_types", "up_block_types"):
            levels = range(self.levels) if key.startswith("down") else range(self.levels - 1, -1, -1)
            config[key] = tuple(
                block if self.attends(arch, level) else block.removeprefix("Attn")
                for block, level in zip(config[key], levels, strict=True)
            )
        if not self.single_middle(arch):
            return {
                **config,
                "layers_per_block": self.depths(arch)[0],
                "add_attention": config["add_attention"] and self.attends(arch, None),
            }
        self._check_single_middle(config)
        for key in (
            "add_attention",
            "attn_norm_num_groups",
            "downsample_type",
            "upsample_type",
            "num_train_timesteps",
        ):
            del config[key]  # that class has no such argument
        heads = config["attention_head_dim"]
        return {
            **config,
            "layers_per_block": self.depths(arch),
            "attention_head_dim": 8 if heads is None else heads,
        }

    def stock_class(self, arch: Arch) -> type[StockUNet]:
        kinds: dict[bool, type[StockUNet]] = {False: UNet2DModel, True: UNet2DConditionModel}
        return kinds[self.single_middle(arch)]

    def segments(self, arch: Arch) -> dict[str, Source]:
        """For each parameter of the subnet, where it comes from.

        Raises UserError where a shortcut convolution of the full net would vanish (one stands only between levels of different
        width).
        """
        self.check_shortcuts(arch)
        found = {}
        for name, tensor in self.tensors.items():
            placed = name if tensor.unit is None else self._placed(name, tensor.unit, arch)
            if placed is not None:
                found[placed] = Source(name, tuple(self._axis_runs(axis, arch) for axis in tensor.axes))
        for name, tensor in self.identities.items():
            if self._widened(name, arch):
                found[name] = Source(None, tuple(self._axis_runs(axis, arch) for axis in tensor.axes))
        return found

    def check_shortcuts(self, arch: Arch) -> None:
        """Raises UserError where the subnet's levels i - 1 and i are equally wide and the full net's are not."""
        for i in range(1, self.levels):
            if self.shortcut_vanishes(arch.widths, i):
                raise UserError(
                    f"widths {arch.widths} make levels {i - 1} and {i} equal in channels, unlike the full net, so that a shortcut "
                    "convolution would vanish; choose other widths"
                )

    def shortcut_vanishes(self, widths: tuple[float, ...], level: int) -> bool:
        """Whether the level is as wide as the one before it, in the subnet alone."""
        before, here = self.channels[level - 1], self.channels[level]
        return before != here and before * widths[level - 1] == here * widths[level]

    def synthetic(self, arch: Arch) -> list[TensorAnatomy]:
        """Shortcuts that the subnet has and the full net lacks."""
        return [tensor for name, tensor in self.identities.items() if self._widened(name, arch)]

    def _widened(self, name: str, arch: Arch) -> bool:
        """Whether the levels on both sides of a synthetic shortcut, of its weight or bias, differ in the subnet."""
        level = int(name.split(".")[1])
        return arch.widths[level] != arch.widths[level - 1]

    def _placed(self, name: str, unit: Unit, arch: Arch) -> str | None:
        index = self.place(unit, arch)
        return None if index is None else unit.name(index) + name.removeprefix(unit.name(unit.index))

    def _axis_runs(self, axis: Axis, arch: Arch) -> tuple[Run, ...]:
        key = axis, tuple(1.0 if s.level is None else arch.widths[s.level] for s in axis)
        if key not in self._runs:
            self._runs[key] = tuple(_merged(self._stretch_runs(*key)))
        return self._runs[key]

    def _stretch_runs(self, axis: Axis, shares: tuple[float, ...]) -> Iterator[Run]:
        start = 0
        for stretch, share in zip(axis, shares, strict=True):
            if stretch.frequencies:
                yield from self._frequency_runs(start, stretch.size, round(stretch.size * share))
            else:
                for first, stop in self.kept(stretch, share):
                    yield start + first, start + stop
            start += stretch.size

    def group_size(self, channels: str, total: int) -> int | None:
        """Channels of a norm group, where all norms that these `total` channels meet divide them alike; else None."""
        bounds = self.cells[channels]
        size = total // len(bounds)
        alike = bounds == tuple(range(0, total, size)) and len(self._partitions[channels]) == 1
        return size if alike else None

    def kept(self, stretch: Stretch, share: float) -> Iterator[Run]:
        """Channels of a stretch that a subnet of this width takes. With a constant group count, the leading share of each
        cell, so that every channel stays in its norm group; with a constant group size, the leading groups."""
        exact = Fraction(share).limit_denominator(4096)
        bounds = self.cells.get(stretch.channels, ()) if self.groups == "count" else ()
        for start, stop in pairwise(sorted({0, *bounds, stretch.size})):
            count = math.floor(exact * stop) - math.floor(exact * start)
            if count:
                yield start, start + count

    def _frequency_runs(self, start: int, full: int, kept: int) -> Iterator[Run]:
        """Channel k of n has frequency 10000^(-k / (n - shift)): take the full net's nearest one in log frequency."""
        shift = self.config["freq_shift"]
        for k in range(kept):
            nearest = min(full - 1, round(k * (full - shift) / max(kept - shift, 1)))
            yield start + nearest, start + nearest + 1

    # ------------------------------------------------------------------------------------------------------ checks

    def check_depths(self) -> None:
        """Raises UserError where the levels of a subnet cannot differ in depth, whichever attention it leaves out."""
        self._check_single_middle(self.config)

    def _check_single_middle(self, config: Mapping[str, Any]) -> None:
        attends = any(block.startswith("Attn") for block in (*config["down_block_types"], *config["up_block_types"]))
        wanted: dict[str, tuple[Any, ...]] = {"act_fn": ("silu", "swish")}
        if attends:
            wanted |= {"downsample_type": ("conv",), "upsample_type": ("conv",)}
        for key, values in wanted.items():
            if config[key] not in values:
                raise UserError(
                    f"levels of different depth need {key}={' or '.join(map(repr, values))}, not {config[key]!r}"
                )
        if attends and config["attention_head_dim"] is None:
            raise UserError("levels of different depth need attention_head_dim as a number, not None")

    def _check_form(self, arch: Arch) -> None:
        if len(arch.widths) != self.levels or not all(0 < share <= 1 for share in arch.widths):
            raise UserError(
                f"widths {arch.widths} must be {self.levels} shares in (0, 1], one per level of the network"
            )
        if arch.depths and (len(arch.depths) != self.levels or not all(1 <= d <= self.depth for d in arch.depths)):
            raise UserError(f"depths {arch.depths} must be {self.levels} numbers from 1 to {self.depth}, one per level")
        if arch.attention and len(arch.attention) != self.levels + 1:
            raise UserError(f"attention {arch.attention} must say yes or no for {self.levels} levels and the middle")

    def _check_config(self) -> None:
        config = self.config
        for block in (*config["down_block_types"], *config["up_block_types"]):
            if block not in _BLOCKS:
                raise UserError(f"block type {block!r} is not elastic; use {', '.join(_BLOCKS)}")
        supported: dict[str, tuple[Any, ...]] = {
            "time_embedding_type": ("positional",),
            "mid_block_type": ("UNetMidBlock2D", None),
            "resnet_time_scale_shift": ("default", "scale_shift"),
            "downsample_type": ("conv", "resnet"),
            "upsample_type": ("conv", "resnet"),
            "class_embed_type": (None, "timestep"),
        }
        for key, values in supported.items():
            if config[key] not in values:
                raise UserError(f"{key}={config[key]!r} is not elastic; use {' or '.join(map(repr, values))}")
        if config["sample_size"] is None:
            raise UserError("the UNet config needs sample_size: costs depend on it")
        if not isinstance(config["layers_per_block"], int) or config["layers_per_block"] < 1:
            raise UserError(f"layers_per_block={config['layers_per_block']!r} must be a whole number of at least 1")

    def _check_channels(self, arch: Arch, channels: tuple[int, ...], config: Mapping[str, Any]) -> None:
        for i, width in enumerate(channels):
            if width % config["norm_num_groups"]:
                raise UserError(
                    f"width {arch.widths[i]} leaves {width} channels in level {i}, not a multiple of norm_num_groups={config['norm_num_groups']}"
                )
        head = config["attention_head_dim"]
        for place in self.attention_places:
            level = self.levels - 1 if place is None else place
            if head is not None and self.attends(arch, place) and channels[level] % head:
                raise UserError(
                    f"width {arch.widths[level]} leaves {channels[level]} channels in level {level}, not a multiple of attention_head_dim={head}"
                )

    def _check_shapes(self) -> None:
        ours = {
            name: tuple(sum(stretch.size for stretch in axis) for axis in tensor.axes)
            for name, tensor in self.tensors.items()
        }
        stock = {name: tuple(tensor.shape) for name, tensor in self._full.named_parameters()}
        if ours != stock:
            odd = sorted(name for name in ours.keys() | stock.keys() if ours.get(name) != stock.get(name))
            raise UserError(
                f"this version of diffusers lays out UNet2DModel differently: {odd[:3]}; use a version that constraints.txt names"
            )

    # ---------------------------------------------------------------------------------------------------- taking apart

    def _take_apart(self) -> None:
        """A walk in the order of the forward pass; `skips` is its stack."""
        config, last = self.config, self.levels - 1
        self._time = (Stretch(self.time_embedding_dim, 0, "time"),)
        self._conv("conv_in", _fixed(config["in_channels"]), self._level(0, "conv_in"), self._positions(0))
        half = Stretch(self.channels[0] // 2, 0, frequencies=True)
        self._time_mlp("time_embedding", (half, half))
        if config["class_embed_type"] == "timestep":
            self._time_mlp("class_embedding", (half, half))
        elif config["num_class_embeds"] is not None:
            self.tensors["class_embedding.weight"] = TensorAnatomy((_fixed(config["num_class_embeds"]), self._time))

        trunk = self._level(0, "conv_in")
        skips = [trunk]
        for i, block in enumerate(config["down_block_types"]):
            name = f"down_blocks.{i}"
            for j in range(self.depth):
                unit = Unit("down", i, f"{name}.resnets", j)
                trunk = self._resnet(unit.name(j)[:-1], trunk, self._level(i, name), self._positions(i), unit)
                if block == "AttnDownBlock2D":
                    self._attention(Unit("down", i, f"{name}.attentions", j, True), trunk, self._positions(i))
                skips.append(trunk)
            if i < last:
                trunk = self._sampler(
                    f"{name}.downsamplers.0", block, config["downsample_type"], trunk, self._positions(i + 1)
                )
                skips.append(trunk)

        if config["mid_block_type"] is not None:
            for j in range(2):
                unit = Unit("middle", None, "mid_block.resnets", j)
                trunk = self._resnet(unit.name(j)[:-1], trunk, trunk, self._positions(last), unit)
            if config["add_attention"]:
                # The stock middle block leaves this norm out unless one of the two asks for it.
                groups = config["attn_norm_num_groups"]
                if groups is None and config["resnet_time_scale_shift"] == "default":
                    groups = config["norm_num_groups"]
                unit = Unit("middle", None, "mid_block.attentions", 0, True)
                self._attention(unit, trunk, self._positions(last), groups)

        for i, block in enumerate(config["up_block_types"]):
            level, name = last - i, f"up_blocks.{i}"
            for j in range(self.depth + 1):
                unit = Unit("up", level, f"{name}.resnets", j)
                before = trunk + skips.pop()
                trunk = self._resnet(unit.name(j)[:-1], before, self._level(level, name), self._positions(level), unit)
                if block == "AttnUpBlock2D":
                    self._attention(Unit("up", level, f"{name}.attentions", j, True), trunk, self._positions(level))
            if level > 0:
                positions = self._positions(level - 1)
                trunk = self._sampler(f"{name}.upsamplers.0", block, config["upsample_type"], trunk, positions)

        self._norm("conv_norm_out", trunk)
        self._conv("conv_out", trunk, _fixed(config["out_channels"]), self._positions(0))

    def _level(self, level: int, channels: str) -> Axis:
        return (Stretch(self.channels[level], level, channels),)

    def _positions(self, level: int) -> int:
        return math.prod(side // 2**level for side in self.sample_size)

    def _weight(self, name: str, axes: tuple[Axis, ...], positions: int, unit: Unit | None) -> None:
        self.tensors[f"{name}.weight"] = TensorAnatomy(axes, positions, unit)
        self.tensors[f"{name}.bias"] = TensorAnatomy(axes[:1], 0, unit)

    def _conv(
        self, name: str, before: Axis, after: Axis, positions: int, unit: Unit | None = None, kernel: int = 3
    ) -> None:
        self._weight(name, (after, before, _fixed(kernel), _fixed(kernel)), positions, unit)

    def _norm(self, name: str, axis: Axis, unit: Unit | None = None, groups: int | None = None) -> None:
        """`groups`: norm_num_groups where None."""
        self._weight(name, (axis,), 0, unit)
        size = sum(stretch.size for stretch in axis) // (groups or self.config["norm_num_groups"])
        start = 0
        for stretch in axis:
            first = -start % size
            bounds = tuple(range(first, stretch.size, size))
            self._bounds.setdefault(stretch.channels, set()).update(bounds)
            self._partitions.setdefault(stretch.channels, set()).add(bounds)
            start += stretch.size

    def _time_mlp(self, name: str, before: Axis) -> None:
        hidden = (Stretch(self.time_embedding_dim, 0, f"{name}.inner"),)
        self._weight(f"{name}.linear_1", (hidden, before), 1, None)
        self._weight(f"{name}.linear_2", (self._time, hidden), 1, None)

    def _resnet(self, name: str, before: Axis, after: Axis, positions: int, unit: Unit | None = None) -> Axis:
        """Returns the output's axis: the input's own where no shortcut convolution stands between them."""
        [outer] = after
        inner = (Stretch(outer.size, outer.level, f"{name}.inner"),)
        shortcut = sum(s.size for s in before) != outer.size
        if not shortcut:
            after = (Stretch(outer.size, outer.level, before[0].channels),)
        scale_shift = self.config["resnet_time_scale_shift"] == "scale_shift"
        self._norm(f"{name}.norm1", before, unit)
        self._conv(f"{name}.conv1", before, inner, positions, unit)
        self._weight(f"{name}.time_emb_proj", (inner * 2 if scale_shift else inner, self._time), 1, unit)
        self._norm(f"{name}.norm2", inner, unit)
        self._conv(f"{name}.conv2", inner, after, positions, unit)
        if shortcut:
            self._conv(f"{name}.conv_shortcut", before, after, positions, unit, kernel=1)
        elif before != after:
            one = _fixed(1)
            self.identities[f"{name}.conv_shortcut.weight"] = TensorAnatomy((after, before, one, one), positions)
            self.identities[f"{name}.conv_shortcut.bias"] = TensorAnatomy((after,), 0)
        return after

    def _attention(self, unit: Unit, axis: Axis, positions: int, groups: int | None = 0) -> None:
        """`groups`: of its norm; 0 as everywhere, None without a norm."""
        name = unit.name(unit.index)[:-1]
        [outer] = axis
        inner = (Stretch(outer.size, outer.level, f"{name}.inner"),)
        if self.config["attention_head_dim"] is not None:
            self.head_sizes[inner[0].channels] = self.config["attention_head_dim"]
        if groups is not None:
            self._norm(f"{name}.group_norm", axis, unit, groups)
        for projection in ("to_q", "to_k", "to_v"):
            self._weight(f"{name}.{projection}", (inner, axis), positions, unit)
        self._weight(f"{name}.to_out.0", (axis, inner), positions, unit)
        self.attentions.append(AttentionAnatomy(inner, positions, unit))

    def _sampler(self, name: str, block: str, kind: str, axis: Axis, positions: int) -> Axis:
        """Down- or upsampling; only the blocks with attention know the kind "resnet"."""
        if kind == "resnet" and block.startswith("Attn"):
            return self._resnet(name, axis, axis, positions)
        after = (Stretch(axis[0].size, axis[0].level, name),)
        self._conv(f"{name}.conv", axis, after, positions)
        return after


def stretch_size(stretch: Stretch, arch: Arch) -> int:
    """Channels of the stretch that a subnet keeps."""
    return stretch.size if stretch.level is None else round(stretch.size * arch.widths[stretch.level])


def skeleton(anatomy: Anatomy, arch: Arch) -> StockUNet:
    """The stock model of this size, on the meta device: shapes without weights."""
    with torch.device("meta"):
        net: StockUNet = anatomy.stock_class(arch)(**anatomy.subconfig(arch)).eval()
    return net


def predict(net: Any, x: torch.Tensor, t: torch.Tensor | int, condition: torch.Tensor | None = None) -> torch.Tensor:
    """A stock subnet's prediction, whichever class it is of (or a compiled form of it)."""
    return net(*arguments(net, x, t, condition), return_dict=False)[0]  # type: ignore[no-any-return]


def arguments(net: Any, x: torch.Tensor, t: torch.Tensor | int, condition: torch.Tensor | None) -> tuple[Any, ...]:
    """Positional arguments of a call; the class with text conditions is given none."""
    return (x, t, None, condition) if "encoder_hid_dim" in net.config else (x, t, condition)


def take(full: Mapping[str, torch.Tensor], source: Source) -> torch.Tensor:
    """The slice of the full net's tensors that `segments` names: a view where each axis is one run, else a copy; differentiable."""
    if source.name is None:
        like = next(iter(full.values()))
        return _identity(source.axes).to(like)
    tensor = full[source.name]
    for dim, runs in enumerate(source.axes):
        if len(runs) == 1:
            start, stop = runs[0]
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


def _fixed(size: int) -> Axis:
    return (Stretch(size),)


def _shrink(size: int, share: float, what: str) -> int:
    kept = size * Fraction(share).limit_denominator(4096)
    if kept.denominator != 1 or kept < 1:
        raise UserError(f"width {share} of {what} is {float(kept):g}, not a whole number; choose another share")
    return int(kept)
