"""How a stock `UNet2DConditionModel` shrinks: the UNet whose attention reads a text (Rombach et al. 2022), as Stable Diffusion has it.

Each attention is a stack of transformer layers between two projections. Within it the channels are a stream of their own, the heads and
the hidden channels of the feed-forward layers further ones; the text's channels never shrink. What its `attention_head_dim` says is a number of
heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel

from nas.contracts import UserError
from search_spaces.networks.anatomy import StockNet
from search_spaces.networks.parts import AttentionAnatomy, Axis, Stretch, Unit, fixed
from search_spaces.networks.slices import Arch, Groups
from search_spaces.networks.unet import UNet

Heads = Literal["whole", "slim"]
"""What a narrower attention has: fewer heads, each as it was, or as many, each thinner (which scales its products anew)."""

MIDDLE, PLAIN_MIDDLE = "UNetMidBlock2DCrossAttn", "UNetMidBlock2D"


class TextUNet(UNet):
    """Of a `UNet2DConditionModel`. `tokens`: length of the text that it reads, which costs depend on."""

    stock = UNet2DConditionModel
    blocks = ("DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D")

    def __init__(self, config: Mapping[str, Any], groups: Groups, heads: Heads = "whole", tokens: int = 77) -> None:
        self.heads = heads
        self.tokens = tokens
        super().__init__(config, groups)

    def _supported(self) -> dict[str, tuple[Any, ...]]:
        return {
            **super()._supported(),
            "mid_block_type": (MIDDLE, PLAIN_MIDDLE, None),
            "attention_type": ("default",),
            "addition_embed_type": (None, "text_time"),
            **dict.fromkeys(("only_cross_attention", "mid_block_only_cross_attention"), (False, None)),
            **dict.fromkeys(("dual_cross_attention", "class_embeddings_concat", "resnet_skip_time_act"), (False,)),
            **dict.fromkeys(
                (
                    "encoder_hid_dim",
                    "encoder_hid_dim_type",
                    "time_cond_proj_dim",
                    "cross_attention_norm",
                    "timestep_post_act",
                    "time_embedding_act_fn",
                    "reverse_transformer_layers_per_block",
                ),
                (None,),
            ),
        }

    def _check_config(self) -> None:
        if self.config.get("reverse_transformer_layers_per_block") is not None:
            raise UserError(
                "the network's attention has other depths on the way up than on the way down (reverse_transformer_layers_per_block), as SSD-1B's has, which is not "
                "covered; give one whose levels are alike both ways"
            )
        super()._check_config()
        config, levels = self.config, len(self.config["block_out_channels"])
        self.head_counts = self._each("attention_head_dim", levels)
        self.full_layers = self._each("transformer_layers_per_block", levels)
        self._text_channels = self._each("cross_attention_dim", levels)
        for level, channels in enumerate(config["block_out_channels"]):
            if self._level_attends(level) and channels % self.head_counts[level]:
                raise UserError(
                    f"attention_head_dim={config['attention_head_dim']!r} is a number of heads: {channels} channels of level {level} are "
                    f"not a multiple of {self.head_counts[level]}"
                )

    def _each(self, key: str, levels: int) -> tuple[int, ...]:
        """A setting of each level. Raises UserError where it is not one whole number for each."""
        given = self.config[key]
        each = (given,) * levels if isinstance(given, int) else tuple(given)
        if not all(isinstance(value, int) and value >= 1 for value in each):
            raise UserError(f"{key}={given!r} is not elastic; give whole numbers of at least 1, one for each level")
        return each

    def _level_attends(self, level: int) -> bool:
        levels = len(self.config["block_out_channels"])
        blocks = self.config["down_block_types"][level], self.config["up_block_types"][levels - 1 - level]
        middle = level == levels - 1 and self.config["mid_block_type"] == MIDDLE
        return middle or any(map(self.has_attention, blocks))

    # -------------------------------------------------------------------------------------------------------- walk

    def _embeddings(self) -> None:
        super()._embeddings()
        if self.config["addition_embed_type"] is not None:
            self._time_mlp("add_embedding", fixed(self.config["projection_class_embeddings_input_dim"]))

    def _middle(self, trunk: Axis) -> Axis:
        positions = self._positions(self.levels - 1)
        attends = self.config["mid_block_type"] == MIDDLE
        for j in range(2 if attends else 1):
            unit = Unit("middle", None, "mid_block.resnets", j)
            trunk = self._resnet(unit.name(j)[:-1], trunk, trunk, positions, unit)
        if attends:
            self._transformer(Unit("middle", None, "mid_block.attentions", 0, True), trunk, positions)
        return trunk

    def _attend(self, unit: Unit, block: str, trunk: Axis, positions: int) -> None:
        if self.has_attention(block):
            self._transformer(unit, trunk, positions)

    def _transformer(self, unit: Unit, trunk: Axis, positions: int) -> None:
        name, level = unit.name(unit.index)[:-1], self.levels - 1 if unit.level is None else unit.level
        [outer] = trunk
        stream = (Stretch(outer.size, outer.level, f"{name}.stream"),)
        kernel = () if self.config["use_linear_projection"] else (fixed(1), fixed(1))
        self._norm(f"{name}.norm", trunk, unit)
        self._weight(f"{name}.proj_in", (stream, trunk, *kernel), positions, unit)
        for number in range(self.full_layers[level]):
            layer = Unit(unit.side, unit.level, unit.module, unit.index, True, number)
            inside = f"{name}.transformer_blocks.{number}"
            self._weight(f"{inside}.norm1", (stream,), 0, layer)
            self._attention(f"{inside}.attn1", stream, stream, positions, positions, layer, level)
            self._weight(f"{inside}.norm2", (stream,), 0, layer)
            text = fixed(self.text_channels[level])
            self._attention(f"{inside}.attn2", stream, text, positions, self.tokens, layer, level)
            self._weight(f"{inside}.norm3", (stream,), 0, layer)
            hidden = (Stretch(4 * outer.size, outer.level, f"{inside}.ff"),)
            # The values and what gates them are halves of one projection.
            self._weight(f"{inside}.ff.net.0.proj", (hidden * 2, stream), positions, layer)
            self._weight(f"{inside}.ff.net.2", (stream, hidden), positions, layer)
        self._weight(f"{name}.proj_out", (trunk, stream, *kernel), positions, unit)

    def _attention(
        self, name: str, stream: Axis, source: Axis, queries: int, keys: int, unit: Unit, level: int
    ) -> None:
        """Of the stream to the `source`: itself, or the text."""
        size = stream[0].size
        inner = (Stretch(size, stream[0].level, f"{name}.inner"),)
        head = size // self.head_counts[level]
        if self.heads == "whole":
            self.head_sizes[inner[0].channels] = head
        else:
            self.divided[inner[0].channels] = tuple(range(0, size, head))
        self._weight(f"{name}.to_q", (inner, stream), queries, unit, bias=False)
        for projection in ("to_k", "to_v"):
            self._weight(f"{name}.{projection}", (inner, source), keys, unit, bias=False)
        self._weight(f"{name}.to_out.0", (stream, inner), queries, unit)
        self.attentions.append(AttentionAnatomy(inner, queries, keys, unit, name))

    # ------------------------------------------------------------------------------------------------------- archs

    @property
    def text_channels(self) -> tuple[int, ...]:
        """Of each level; of none where no block attends: such a network is given no text."""
        reads = any(map(self._level_attends, range(len(self.config["block_out_channels"]))))
        return self._text_channels if reads else ()

    def some_condition(self, count: int, device: str = "cpu") -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)

        def rows(*shape: int) -> torch.Tensor:
            if device == "meta":
                return torch.empty((count, *shape), device=device)
            return torch.randn((count, *shape), generator=generator).to(device)

        found = super().some_condition(count, device)
        if self.text_channels:
            found["encoder_hidden_states"] = rows(self.tokens, self.text_channels[0])
        if self.config["addition_embed_type"] is not None:
            sizes = 6 * self.config["addition_time_embed_dim"]
            pooled = self.config["projection_class_embeddings_input_dim"] - sizes
            found |= {
                "text_embeds": rows(pooled),
                "time_ids": rows(6),
            }
        return found

    def attends(self, arch: Arch, level: int | None) -> bool:
        if level is None and (not arch.middle or self.config["mid_block_type"] != MIDDLE):
            return False
        return not arch.attention or arch.attention[self.levels if level is None else level]

    def middle_blocks(self, arch: Arch) -> int:
        if self.config["mid_block_type"] is None or not arch.middle:
            return 0
        return 2 if self.attends(arch, None) else 1

    def layers(self, arch: Arch) -> tuple[int, ...]:
        return arch.layers or self.full_layers

    def place(self, unit: Unit, arch: Arch) -> int | None:
        if unit.layer is not None:
            level = self.levels - 1 if unit.level is None else unit.level
            if unit.layer >= self.layers(arch)[level]:
                return None
        return super().place(unit, arch)

    def canonical(self, arch: Arch) -> Arch:
        if not arch.middle and arch.attention:
            arch = arch.replace(attention=(*arch.attention[:-1], True))
        arch = super().canonical(arch)
        layers = list(self.layers(arch))
        for level, most in enumerate(self.full_layers):
            middle = level == self.levels - 1 and self.attends(arch, None)
            here = self.attends(arch, level) and level in self.attention_places
            layers[level] = min(layers[level], most) if here or middle else most
        middle = arch.middle or self.config["mid_block_type"] is None
        return arch.replace(layers=() if tuple(layers) == self.full_layers else tuple(layers), middle=middle)

    def subconfig(self, arch: Arch) -> dict[str, Any]:
        config = self._narrowed(arch)
        heads = [self._heads(arch, level, width) for level, width in enumerate(config["block_out_channels"])]
        for key in ("down_block_types", "up_block_types"):
            levels = range(self.levels) if key.startswith("down") else range(self.levels - 1, -1, -1)
            config[key] = tuple(
                block if self.attends(arch, level) else block.replace("CrossAttn", "")
                for block, level in zip(config[key], levels, strict=True)
            )
        middle = config["mid_block_type"] if arch.middle else None
        if middle == MIDDLE and not self.attends(arch, None):
            middle = PLAIN_MIDDLE
        return {
            **config,
            "attention_head_dim": tuple(heads),
            "layers_per_block": self.depths(arch),
            "transformer_layers_per_block": self.layers(arch),
            "mid_block_type": middle,
        }

    def stock_class(self, arch: Arch) -> type[StockNet]:
        stock: type[StockNet] = UNet2DConditionModel
        return stock

    def check_depths(self) -> None:
        pass

    def check_layers(self, layers: tuple[int, ...], middle: bool) -> None:
        most = max(self.full_layers)
        if any(not 1 <= count <= most for count in layers):
            raise UserError(f"layers {layers} must be from 1 to the full network's {most}")
        if layers and not self.attention_places:
            raise UserError(f"layers {layers}: the network has no attention")
        if middle and self.config["mid_block_type"] is None:
            raise UserError("middle=True, but the network has no middle to leave out")

    def _check_form(self, arch: Arch) -> None:
        super()._check_form(arch)
        most = zip(arch.layers, self.full_layers, strict=False)
        if arch.layers and (len(arch.layers) != self.levels or not all(1 <= n <= full for n, full in most)):
            raise UserError(
                f"layers {arch.layers} must be {self.levels} numbers from 1 to the full network's {self.full_layers}, one per level"
            )

    def _heads(self, arch: Arch, level: int, width: int) -> int:
        """How many a subnet has at a level. Raises UserError where it cannot be so many whole ones."""
        full = self.head_counts[level]
        used = (self.attends(arch, level) and level in self.attention_places) or (
            level == self.levels - 1 and self.attends(arch, None)
        )
        if not used:
            return full
        size = self.channels[level] // full
        if self.heads == "slim":
            if width % full:
                raise UserError(
                    f"width {arch.widths[level]} leaves {width} channels in level {level}, not a multiple of its {full} heads"
                )
            return full
        if width % size:
            raise UserError(
                f"width {arch.widths[level]} leaves {width} channels in level {level}, not a multiple of its heads' {size}; "
                "heads='slim' keeps their number instead"
            )
        return width // size
