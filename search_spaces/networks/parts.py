"""What a stock diffusers UNet is made of: for each axis of each tensor, the stretches of channels it consists of.

A walk in the order of the forward pass names the channels of every axis; where additions and products join channels, the names are the
same. After a skip concatenation an axis has two stretches, trunk and skip.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from nas.base.files import first_line
from nas.contracts import UserError


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
    """A residual block or an attention that a subnet may lack, or one of its transformer layers. `level` None is the middle."""

    side: Literal["down", "up", "middle"]
    level: int | None
    module: str
    index: int
    attention: bool = False
    layer: int | None = None

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
    """One attention of `queries` to `keys` tokens; its two products cost 2 * queries * keys * channels MACs."""

    axis: Axis
    queries: int
    keys: int
    unit: Unit


class Parts(ABC):
    """Every tensor of a UNet's config, taken apart.

    `cells[name]` are the first channels of the stretches that no GroupNorm splits, `head_sizes[name]` the channels of one head, for
    those inside an attention whose heads are kept or dropped as wholes; `divided[name]` the first ones of each head where each is made thinner. `identities`: shortcuts that stand nowhere, between levels of equal width, but would where a subnet makes
    them different. Raises UserError, naming the value, for a config that this elastic network does not cover.
    """

    stock: ClassVar[type[Any]]
    blocks: ClassVar[tuple[str, ...]]
    """Types of blocks that it covers."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        name = self.stock.__name__
        with torch.device("meta"):
            try:
                self._full: Any = self.stock(**config)
            except (
                Exception
            ) as error:  # the stock class checks little itself: whatever its parts raise is about the config
                reason = first_line(error).replace(f"{name}.__init__() ", "")
                raise UserError(f"diffusers cannot make a {name} of this config ({reason}); mend the config") from error
        self.config: dict[str, Any] = {k: v for k, v in self._full.config.items() if not k.startswith("_")}
        self._check_config()
        self.channels: tuple[int, ...] = tuple(self.config["block_out_channels"])
        self.levels = len(self.channels)
        depths = self.config["layers_per_block"]
        self.full_depths: tuple[int, ...] = (depths,) * self.levels if isinstance(depths, int) else tuple(depths)
        self.depth = max(self.full_depths)
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
        self.divided: dict[str, tuple[int, ...]] = {}
        self._bounds: dict[str, set[int]] = {}
        self._partitions: dict[str, set[tuple[int, ...]]] = {}
        self._take_apart()
        self.cells = {name: tuple(sorted(bounds)) for name, bounds in self._bounds.items()}

    @abstractmethod
    def _attend(self, unit: Unit, block: str, trunk: Axis, positions: int) -> None:
        """Whatever attention a block of this type has behind a residual block."""

    @abstractmethod
    def _middle(self, trunk: Axis) -> Axis:
        """The middle block; returns its output's axis."""

    def _embeddings(self, half: Stretch) -> None:
        """What is added to the timestep's embedding, of every UNet that of a class. `half`: of what sines and cosines come to."""
        if self.config["class_embed_type"] == "timestep":
            self._time_mlp("class_embedding", (half, half))
        elif self.config["num_class_embeds"] is not None:
            self.tensors["class_embedding.weight"] = TensorAnatomy((fixed(self.config["num_class_embeds"]), self._time))

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
            if block not in self.blocks:
                raise UserError(f"block type {block!r} is not elastic; use {', '.join(self.blocks)}")
        for key, values in self._supported().items():
            if config[key] not in values:
                raise UserError(f"{key}={config[key]!r} is not elastic; use {' or '.join(map(repr, values))}")
        if config["sample_size"] is None:
            raise UserError("the UNet config needs sample_size: costs depend on it")
        depths = config["layers_per_block"]
        each = (depths,) if isinstance(depths, int) else tuple(depths)
        if not each or not all(isinstance(depth, int) and depth >= 1 for depth in each):
            raise UserError(f"layers_per_block={depths!r} must be whole numbers of at least 1")

    def _supported(self) -> dict[str, tuple[Any, ...]]:
        """Values of settings that the walk knows."""
        return {
            "time_embedding_type": ("positional",),
            "resnet_time_scale_shift": ("default", "scale_shift"),
            "class_embed_type": (None, "timestep"),
        }

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
                f"this version of diffusers lays out {self.stock.__name__} differently: {odd[:3]}; use a version that constraints.txt names"
            )

    def _take_apart(self) -> None:
        """A walk in the order of the forward pass; `skips` is its stack."""
        config, last = self.config, self.levels - 1
        self._time = (Stretch(self.time_embedding_dim, 0, "time"),)
        kernel = config.get("conv_in_kernel", 3)
        self._conv(
            "conv_in", fixed(config["in_channels"]), self._level(0, "conv_in"), self._positions(0), kernel=kernel
        )
        half = Stretch(self.channels[0] // 2, 0, frequencies=True)
        self._time_mlp("time_embedding", (half, half))
        self._embeddings(half)

        trunk = self._level(0, "conv_in")
        skips = [trunk]
        for i, block in enumerate(config["down_block_types"]):
            name = f"down_blocks.{i}"
            for j in range(self.full_depths[i]):
                unit = Unit("down", i, f"{name}.resnets", j)
                trunk = self._resnet(unit.name(j)[:-1], trunk, self._level(i, name), self._positions(i), unit)
                self._attend(Unit("down", i, f"{name}.attentions", j, True), block, trunk, self._positions(i))
                skips.append(trunk)
            if i < last:
                trunk = self._sampler(
                    f"{name}.downsamplers.0",
                    block,
                    config.get("downsample_type", "conv"),
                    trunk,
                    self._positions(i + 1),
                )
                skips.append(trunk)

        if config["mid_block_type"] is not None:
            trunk = self._middle(trunk)

        for i, block in enumerate(config["up_block_types"]):
            level, name = last - i, f"up_blocks.{i}"
            for j in range(self.full_depths[level] + 1):
                unit = Unit("up", level, f"{name}.resnets", j)
                before = trunk + skips.pop()
                trunk = self._resnet(unit.name(j)[:-1], before, self._level(level, name), self._positions(level), unit)
                self._attend(Unit("up", level, f"{name}.attentions", j, True), block, trunk, self._positions(level))
            if level > 0:
                positions = self._positions(level - 1)
                trunk = self._sampler(
                    f"{name}.upsamplers.0", block, config.get("upsample_type", "conv"), trunk, positions
                )

        self._norm("conv_norm_out", trunk)
        kernel = config.get("conv_out_kernel", 3)
        self._conv("conv_out", trunk, fixed(config["out_channels"]), self._positions(0), kernel=kernel)

    def _level(self, level: int, channels: str) -> Axis:
        return (Stretch(self.channels[level], level, channels),)

    def _positions(self, level: int) -> int:
        return math.prod(side // 2**level for side in self.sample_size)

    def _weight(self, name: str, axes: tuple[Axis, ...], positions: int, unit: Unit | None, bias: bool = True) -> None:
        self.tensors[f"{name}.weight"] = TensorAnatomy(axes, positions, unit)
        if bias:
            self.tensors[f"{name}.bias"] = TensorAnatomy(axes[:1], 0, unit)

    def _conv(
        self, name: str, before: Axis, after: Axis, positions: int, unit: Unit | None = None, kernel: int = 3
    ) -> None:
        self._weight(name, (after, before, fixed(kernel), fixed(kernel)), positions, unit)

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
            one = fixed(1)
            self.identities[f"{name}.conv_shortcut.weight"] = TensorAnatomy((after, before, one, one), positions)
            self.identities[f"{name}.conv_shortcut.bias"] = TensorAnatomy((after,), 0)
        return after

    def _sampler(self, name: str, block: str, kind: str, axis: Axis, positions: int) -> Axis:
        """Down- or upsampling, by a residual block in blocks of that name, and in those with attention of that kind."""
        if block.startswith("Resnet") or (kind == "resnet" and block.startswith("Attn")):
            return self._resnet(name, axis, axis, positions)
        after = (Stretch(axis[0].size, axis[0].level, name),)
        self._conv(f"{name}.conv", axis, after, positions)
        return after


def fixed(size: int) -> Axis:
    """An axis that no subnet shrinks."""
    return (Stretch(size),)
