"""What a stock `diffusers.UNet2DModel` is made of: for each axis of each tensor, the stretches of channels it consists of.

A walk in the order of the forward pass names the channels of every axis; where additions and products join channels, the names are the
same. After a skip concatenation an axis has two stretches, trunk and skip.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import UNet2DModel

from nas.base.files import first_line
from nas.contracts import UserError

_BLOCKS = (
    "DownBlock2D",
    "AttnDownBlock2D",
    "ResnetDownsampleBlock2D",
    "UpBlock2D",
    "AttnUpBlock2D",
    "ResnetUpsampleBlock2D",
)


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


class Parts:
    """Every tensor of a UNet2DModel config, taken apart.

    `cells[name]` are the first channels of the stretches that no GroupNorm splits, `head_sizes[name]` the channels of one head, for
    those inside an attention. `identities`: shortcuts that stand nowhere, between levels of equal width, but would where a subnet makes
    them different. Raises UserError, naming the value, for a config that this elastic network does not cover.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        with torch.device("meta"):
            try:
                self._full = UNet2DModel(**config)
            except (
                Exception
            ) as error:  # the stock class checks little itself: whatever its parts raise is about the config
                reason = first_line(error).replace("UNet2DModel.__init__() ", "")
                raise UserError(
                    f"diffusers cannot make a UNet2DModel of this config ({reason}); mend the config"
                ) from error
        self.config: dict[str, Any] = {k: v for k, v in self._full.config.items() if not k.startswith("_")}
        self._check_config()
        self.channels: tuple[int, ...] = tuple(self.config["block_out_channels"])
        self.levels = len(self.channels)
        self.depth: int = self.config["layers_per_block"]
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

    @property
    def attention_places(self) -> tuple[int | None, ...]:
        """Levels that have attention in the full net, and None where its middle has."""
        return tuple(dict.fromkeys(attention.unit.level for attention in self.attentions))

    def group_size(self, channels: str, total: int) -> int | None:
        """Channels of a norm group, where all norms that these `total` channels meet divide them alike; else None."""
        bounds = self.cells[channels]
        size = total // len(bounds)
        alike = bounds == tuple(range(0, total, size)) and len(self._partitions[channels]) == 1
        return size if alike else None

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

    def check_shapes(self) -> None:
        """Raises UserError where the stock model's parameters are not these."""
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
        """Down- or upsampling, by a residual block in blocks of that name, and in those with attention of that kind."""
        if block.startswith("Resnet") or (kind == "resnet" and block.startswith("Attn")):
            return self._resnet(name, axis, axis, positions)
        after = (Stretch(axis[0].size, axis[0].level, name),)
        self._conv(f"{name}.conv", axis, after, positions)
        return after


def _fixed(size: int) -> Axis:
    return (Stretch(size),)
