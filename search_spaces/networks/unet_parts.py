"""The walk of stock UNets. After a skip concatenation an axis has two stretches, trunk and skip."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar

from nas.contracts import UserError
from search_spaces.networks.parts import Axis, Parts, Stretch, TensorAnatomy, Unit, fixed


class UNetParts(Parts):
    """Every tensor of a UNet's config, taken apart."""

    blocks: ClassVar[tuple[str, ...]]
    """Types of blocks that it covers."""

    def _check_config(self) -> None:
        config = self.config
        for block in (*config["down_block_types"], *config["up_block_types"]):
            if block not in self.blocks:
                raise UserError(f"block type {block!r} is not elastic; use {', '.join(self.blocks)}")
        super()._check_config()
        depths = config["layers_per_block"]
        each = (depths,) if isinstance(depths, int) else tuple(depths)
        if not each or not all(isinstance(depth, int) and depth >= 1 for depth in each):
            raise UserError(f"layers_per_block={depths!r} must be whole numbers of at least 1")

    def _supported(self) -> dict[str, tuple[Any, ...]]:
        return {
            "time_embedding_type": ("positional",),
            "resnet_time_scale_shift": ("default", "scale_shift"),
            "class_embed_type": (None,),
        }

    def _measure(self) -> None:
        self._bounds: dict[str, set[int]] = {}
        self._partitions: dict[str, set[tuple[int, ...]]] = {}
        self.channels = tuple(self.config["block_out_channels"])
        depths = self.config["layers_per_block"]
        self.full_depths = (depths,) * self.levels if isinstance(depths, int) else tuple(depths)
        size = self.config["sample_size"]
        self.sample_size = (size, size) if isinstance(size, int) else (size[0], size[1])
        if any(side % 2 ** (self.levels - 1) for side in self.sample_size):
            raise UserError(
                f"sample_size {self.sample_size} cannot be halved {self.levels - 1} times without remainder; "
                "use a multiple of the deepest level's factor"
            )
        self.time_embedding_dim: int = self.config["time_embedding_dim"] or 4 * self.channels[0]

    @abstractmethod
    def _attend(self, unit: Unit, block: str, trunk: Axis, positions: int) -> None:
        """Whatever attention a block of this type has behind a residual block."""

    @abstractmethod
    def _middle(self, trunk: Axis) -> Axis:
        """The middle block; returns its output's axis."""

    def _embeddings(self) -> None:
        """What is added to the timestep's embedding, of every UNet that of a class."""
        if self.config["num_class_embeds"] is not None:
            self.tensors["class_embedding.weight"] = TensorAnatomy((fixed(self.config["num_class_embeds"]), self._time))

    def group_size(self, channels: str, total: int) -> int | None:
        bounds = self.cells[channels]
        size = total // len(bounds)
        alike = bounds == tuple(range(0, total, size)) and len(self._partitions[channels]) == 1
        return size if alike else None

    @property
    def attention_places(self) -> tuple[int | None, ...]:
        """Levels that have attention in the full net, and None where its middle has."""
        return tuple(dict.fromkeys(attention.unit.level for attention in self.attentions))

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
        self._embeddings()

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
        self.cells = {name: tuple(sorted(bounds)) for name, bounds in self._bounds.items()}
        kernel = config.get("conv_out_kernel", 3)
        self._conv("conv_out", trunk, fixed(config["out_channels"]), self._positions(0), kernel=kernel)

    def _level(self, level: int, channels: str) -> Axis:
        return (Stretch(self.channels[level], level, channels),)

    def _positions(self, level: int) -> int:
        return math.prod(side // 2**level for side in self.sample_size)

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
