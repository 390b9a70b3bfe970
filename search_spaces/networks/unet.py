"""How a stock diffusers UNet shrinks: which slice of which tensor a smaller stock model takes.

An `Arch` says how wide and how deep each level is and where attention runs. Each stretch of an axis is sliced on its own, trunk and skip
apart after a concatenation, so that a channel always meets the weight it met in the full net. From the same table follow the slices
(`segments`), the shapes and, in `cost`, MACs and parameters.

Every subnet is a stock class. `UNet2DModel` has one depth for all levels; where levels differ, `UNet2DConditionModel` runs
unconditionally, and its middle is a single residual block.
"""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from diffusers import UNet2DConditionModel, UNet2DModel

from nas.contracts import UserError
from search_spaces.networks.anatomy import Anatomy, StockNet, shrunk
from search_spaces.networks.parts import AttentionAnatomy, Axis, Stretch, Unit
from search_spaces.networks.slices import Arch, Groups
from search_spaces.networks.unet_parts import UNetParts
from search_spaces.shipped.graph import Graph, UNetGraph


class UNet(UNetParts, Anatomy):
    """Which of a full UNet's parts a subnet takes."""

    def __init__(self, config: Mapping[str, Any], groups: Groups) -> None:
        super().__init__(config, groups)
        self.frequency_shift = self.config["freq_shift"]

    @abstractmethod
    def attends(self, arch: Arch, level: int | None) -> bool:
        """Whether the subnet keeps the attention of the level, or of the middle, if there is any."""

    @abstractmethod
    def middle_blocks(self, arch: Arch) -> int:
        """Residual blocks of the subnet's middle."""

    @property
    def null_label(self) -> int | None:
        classes = self.config["num_class_embeds"]
        return classes - 1 if classes else None

    @property
    def out_channels(self) -> int:
        return int(self.config["out_channels"])

    # ------------------------------------------------------------------------------------------------------- archs

    def canonical(self, arch: Arch) -> Arch:
        depths = tuple(min(d, most) for d, most in zip(self.depths(arch), self.full_depths, strict=True))
        kept = list(arch.attention or (True,) * (self.levels + 1))
        for place in (*range(self.levels), None):
            if place not in self.attention_places:
                kept[self.levels if place is None else place] = True
        return arch.replace(
            depths=() if depths == self.full_depths else depths, attention=() if all(kept) else tuple(kept)
        )

    def graph(self, arch: Arch) -> UNetGraph:
        levels = range(self.levels)
        down = tuple(self.has_attention(self.config["down_block_types"][i]) and self.attends(arch, i) for i in levels)
        up = tuple(
            self.has_attention(block) and self.attends(arch, self.levels - 1 - i)
            for i, block in enumerate(self.config["up_block_types"])
        )
        return UNetGraph(self.depths(arch), self.middle_blocks(arch) > 0, (down, up))

    def layer_of(self, parameter: str, graph: Graph) -> str:
        assert isinstance(graph, UNetGraph)
        if parameter.startswith("mid_block."):
            return "mid"
        found = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.", parameter)
        if found is None:
            return ""
        side, level, kind, index = found.group(1)[0], int(found.group(2)), found.group(3), found.group(4)
        if kind == "downsamplers":
            return f"d{level}.down"
        if kind == "upsamplers":
            return f"u{level}.{graph.depths[len(graph.depths) - 1 - level]}.up"
        branch = f"{side}{level}.{index}"
        part = {"resnets": "resnet", "attentions": "attention"}[kind]
        return next(layer.name for layer in graph.layers if layer.name in (f"{branch}.{part}", branch))

    @staticmethod
    def has_attention(block: str) -> bool:
        """Whether blocks of this type have attention."""
        return "Attn" in block

    def place(self, unit: Unit, arch: Arch) -> int | None:
        """Where the full net's unit stands in the subnet, None where it lacks it. A level going down keeps its first residual
        blocks, going up its first one, which takes the deeper level in, and its last ones, whose skips are those that are kept."""
        if unit.attention and not self.attends(arch, unit.level):
            return None
        if unit.level is None:
            return unit.index if unit.index < self.middle_blocks(arch) else None
        dropped = self.full_depths[unit.level] - self.depths(arch)[unit.level]
        if unit.side == "down":
            return unit.index if unit.index < self.full_depths[unit.level] - dropped else None
        index = unit.index - dropped if unit.index else 0
        return index if index > 0 or unit.index == 0 else None

    def _narrowed(self, arch: Arch) -> dict[str, Any]:
        """The full net's arguments, with the subnet's channels and norm groups."""
        self._check_form(arch)
        channels = tuple(
            shrunk(c, share, f"{c} channels of level {i}")
            for i, (c, share) in enumerate(zip(self.channels, arch.widths, strict=True))
        )
        if channels[0] % 2:
            raise UserError(
                f"width {arch.widths[0]} leaves {channels[0]} channels in level 0; the time embedding needs an even number"
            )
        config = {
            **self.config,
            "block_out_channels": channels,
            "time_embedding_dim": shrunk(self.time_embedding_dim, arch.widths[0], "the time embedding"),
        }
        if self.groups == "size" and arch.widths != self.full.widths:
            if len(set(arch.widths)) > 1:
                raise UserError(
                    f"widths {arch.widths} differ between levels, which needs groups='count': stock models have one group count"
                )
            for key in ("norm_num_groups", "attn_norm_num_groups"):
                if config.get(key) is not None:
                    config[key] = shrunk(config[key], arch.widths[0], f"{key}={config[key]}")
        for i, width in enumerate(channels):
            if width % config["norm_num_groups"]:
                raise UserError(
                    f"width {arch.widths[i]} leaves {width} channels in level {i}, not a multiple of norm_num_groups={config['norm_num_groups']}"
                )
        groups = config.get("attn_norm_num_groups")  # of the middle's attention
        if groups is not None and channels[-1] % groups:
            raise UserError(
                f"width {arch.widths[-1]} leaves {channels[-1]} channels in the middle, not a multiple of attn_norm_num_groups={groups}"
            )
        return config

    def check_shortcuts(self, arch: Arch) -> None:
        for i in range(1, self.levels):
            if self.shortcut_vanishes(arch.widths, i):
                raise UserError(
                    f"widths {arch.widths} make levels {i - 1} and {i} equal in channels, unlike the full net, so that a shortcut "
                    "convolution would vanish; choose other widths"
                )

    def shortcut_vanishes(self, widths: tuple[float, ...], level: int) -> bool:
        before, here = self.channels[level - 1], self.channels[level]
        return before != here and math.isclose(before * widths[level - 1], here * widths[level])

    def widened(self, name: str, arch: Arch) -> bool:
        level = int(name.split(".")[1])
        return arch.widths[level] != arch.widths[level - 1]

    def _check_form(self, arch: Arch) -> None:
        super()._check_form(arch)
        if arch.attention and len(arch.attention) != self.levels + 1:
            raise UserError(f"attention {arch.attention} must say yes or no for {self.levels} levels and the middle")


class ImageUNet(UNet):
    """Of a `UNet2DModel`, whose attention is a single layer over the image's own positions."""

    stock = UNet2DModel
    blocks = (
        "DownBlock2D",
        "AttnDownBlock2D",
        "ResnetDownsampleBlock2D",
        "UpBlock2D",
        "AttnUpBlock2D",
        "ResnetUpsampleBlock2D",
    )

    def _supported(self) -> dict[str, tuple[Any, ...]]:
        return {
            **super()._supported(),
            "mid_block_type": ("UNetMidBlock2D", None),
            "downsample_type": ("conv", "resnet"),
            "upsample_type": ("conv", "resnet"),
        }

    def _middle(self, trunk: Axis) -> Axis:
        config, positions = self.config, self._positions(self.levels - 1)
        for j in range(2):
            unit = Unit("middle", None, "mid_block.resnets", j)
            trunk = self._resnet(unit.name(j)[:-1], trunk, trunk, positions, unit)
        if config["add_attention"]:
            # The stock middle block leaves this norm out unless one of the two asks for it.
            groups = config["attn_norm_num_groups"]
            if groups is None and config["resnet_time_scale_shift"] == "default":
                groups = config["norm_num_groups"]
            self._attention(Unit("middle", None, "mid_block.attentions", 0, True), trunk, positions, groups)
        return trunk

    def _attend(self, unit: Unit, block: str, trunk: Axis, positions: int) -> None:
        if self.has_attention(block):
            self._attention(unit, trunk, positions)

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
        self.attentions.append(AttentionAnatomy(inner, positions, positions, unit, name))

    # ------------------------------------------------------------------------------------------------------- archs

    def attends(self, arch: Arch, level: int | None) -> bool:
        if level is None and self._single_middle(arch):
            return False
        return not arch.attention or arch.attention[self.levels if level is None else level]

    def _single_middle(self, arch: Arch) -> bool:
        """Whether the subnet is of the class whose middle is one residual block."""
        return len(set(self.depths(arch))) > 1

    def middle_blocks(self, arch: Arch) -> int:
        if self.config["mid_block_type"] is None:
            return 0
        return 1 if self._single_middle(arch) else 2

    def canonical(self, arch: Arch) -> Arch:
        if self._single_middle(arch) and arch.attention:
            # That class has no attention in the middle, so there is nothing to choose.
            arch = arch.replace(attention=(*arch.attention[:-1], True))
        return super().canonical(arch)

    def subconfig(self, arch: Arch) -> dict[str, Any]:
        config = self._narrowed(arch)
        self._check_heads(arch, config)
        for key in ("down_block_types", "up_block_types"):
            levels = range(self.levels) if key.startswith("down") else range(self.levels - 1, -1, -1)
            config[key] = tuple(
                block if self.attends(arch, level) else self._without_attention(block, key)
                for block, level in zip(config[key], levels, strict=True)
            )
        if not self._single_middle(arch):
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

    def _without_attention(self, block: str, key: str) -> str:
        """The block type that is this one without attention: it samples up or down as that did."""
        if not block.startswith("Attn"):
            return block
        side = "Down" if key.startswith("down") else "Up"
        by_resnet = self.config[f"{side.lower()}sample_type"] == "resnet"
        return f"Resnet{side}sampleBlock2D" if by_resnet else f"{side}Block2D"

    def stock_class(self, arch: Arch) -> type[StockNet]:
        kinds: dict[bool, type[StockNet]] = {False: UNet2DModel, True: UNet2DConditionModel}
        return kinds[self._single_middle(arch)]

    # ------------------------------------------------------------------------------------------------------ checks

    def check_depths(self) -> None:
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

    def layers(self, arch: Arch) -> tuple[int, ...]:
        return (0,) * self.levels

    def check_layers(self, layers: tuple[int, ...], middle: bool) -> None:
        if layers or middle:
            raise UserError(
                f"layers {layers}, middle={middle}: a UNet2DModel has no transformer layers, and always its middle; leave them out"
            )

    def _check_form(self, arch: Arch) -> None:
        super()._check_form(arch)
        self.check_layers(arch.layers, not arch.middle)

    def _check_heads(self, arch: Arch, config: Mapping[str, Any]) -> None:
        head, channels = config["attention_head_dim"], config["block_out_channels"]
        for place in self.attention_places:
            level = self.levels - 1 if place is None else place
            if head is not None and self.attends(arch, place) and channels[level] % head:
                raise UserError(
                    f"width {arch.widths[level]} leaves {channels[level]} channels in level {level}, not a multiple of attention_head_dim={head}"
                )
