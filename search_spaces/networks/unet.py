"""How a stock diffusers UNet shrinks: which slice of which tensor a smaller stock model takes.

An `Arch` says how wide and how deep each level is and where attention runs. Each stretch of an axis is sliced on its own, trunk and skip
apart after a concatenation, so that a channel always meets the weight it met in the full net. From the same table follow the slices
(`segments`), the shapes and, in `cost`, MACs and parameters.

Every subnet is a stock class. `UNet2DModel` has one depth for all levels; where levels differ, `UNet2DConditionModel` runs
unconditionally, and its middle is a single residual block.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any, TypeAlias

import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from nas.contracts import Condition, UserError
from search_spaces.networks.parts import Parts, Unit
from search_spaces.networks.slices import Arch, Groups, Slices

StockUNet: TypeAlias = UNet2DModel | UNet2DConditionModel


class Anatomy(Parts, Slices):
    """Which of a full net's parts a subnet takes, and what stock model it then is."""

    def __init__(self, config: Mapping[str, Any], groups: Groups) -> None:
        super().__init__(config)
        self.groups = groups
        self.full = Arch((1.0,) * self.levels)
        self.frequency_shift = self.config["freq_shift"]
        self.subconfig(self.full)
        self.check_shapes()

    # ------------------------------------------------------------------------------------------------------- archs

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
                block if self.attends(arch, level) else self._without_attention(block, key)
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

    def _without_attention(self, block: str, key: str) -> str:
        """The block type that is this one without attention: it samples up or down as that did."""
        if not block.startswith("Attn"):
            return block
        side = "Down" if key.startswith("down") else "Up"
        by_resnet = self.config[f"{side.lower()}sample_type"] == "resnet"
        return f"Resnet{side}sampleBlock2D" if by_resnet else f"{side}Block2D"

    def stock_class(self, arch: Arch) -> type[StockUNet]:
        kinds: dict[bool, type[StockUNet]] = {False: UNet2DModel, True: UNet2DConditionModel}
        return kinds[self.single_middle(arch)]

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

    def widened(self, name: str, arch: Arch) -> bool:
        """Whether the levels on both sides of a synthetic shortcut, of its weight or bias, differ in the subnet."""
        level = int(name.split(".")[1])
        return arch.widths[level] != arch.widths[level - 1]

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


def skeleton(anatomy: Anatomy, arch: Arch) -> StockUNet:
    """The stock model of this size, on the meta device: shapes without weights."""
    with torch.device("meta"):
        net: StockUNet = anatomy.stock_class(arch)(**anatomy.subconfig(arch)).eval()
    return net


def predict(net: Any, x: torch.Tensor, t: torch.Tensor | int, condition: Condition | None = None) -> torch.Tensor:
    """A stock subnet's prediction, whichever class it is of (or a compiled form of it)."""
    return net(*arguments(net, x, t, condition), return_dict=False)[0]  # type: ignore[no-any-return]


def arguments(net: Any, x: torch.Tensor, t: torch.Tensor | int, condition: Condition | None) -> tuple[Any, ...]:
    """Positional arguments of a call; the class with text conditions is given none."""
    labels = (condition or {}).get("class_labels")
    return (x, t, None, labels) if "encoder_hid_dim" in net.config else (x, t, labels)


def _shrink(size: int, share: float, what: str) -> int:
    kept = size * Fraction(share).limit_denominator(4096)
    if kept.denominator != 1 or kept < 1:
        raise UserError(f"width {share} of {what} is {float(kept):g}, not a whole number; choose another share")
    return int(kept)
