"""How a stock diffusion transformer shrinks (DiT, Peebles & Xie 2023; PixArt-alpha, Chen et al. 2024): narrower by whole heads, shallower by
whole blocks.

Hidden channels carry a table of positions, sines and cosines in height and in width, which the stock class reckons from its own number of
channels: a subnet takes those channels of the full net whose frequencies are nearest to its own. Its blocks are the first of `order`, in
their own order. Each block adds to the hidden state, so that none feeds another alone.

FLUX, SD3 and Wan would need in addition: two streams that attend together, positions that rotate queries and keys, and several text encoders.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel

from nas.contracts import UserError
from search_spaces.networks.anatomy import Anatomy, StockNet, shrunk
from search_spaces.networks.parts import AttentionAnatomy, Axis, Stretch, TensorAnatomy, Unit, fixed
from search_spaces.networks.slices import Arch
from search_spaces.shipped.graph import Graph, TransformerGraph

BLOCKS = "transformer_blocks"
SINES = 256
"""Of a timestep: as many sines and cosines as both stock classes make of it."""

PARTS = {"attn1": "attn", "attn2": "text", "ff": "mlp"}
"""What the graph calls a block's modules."""


class Transformer(Anatomy):
    """Of either stock class. `order`: the full network's blocks, the one to keep longest first; spread evenly where empty."""

    def __init__(self, config: Mapping[str, Any], order: tuple[int, ...] = ()) -> None:
        self._order = order
        self.frequency_shift = 0.0
        # The stock class would stumble over these without a word for them.
        numbers = (
            "num_attention_heads",
            "attention_head_dim",
            "num_layers",
            "patch_size",
            "sample_size",
            "in_channels",
        )
        for key in (*numbers, "num_embeds_ada_norm"):
            value = config.get(key, 1)
            if type(value) is not int or value < 1:
                raise UserError(f"{key}={value!r} must be a whole number of at least 1; mend the config")
        super().__init__(config, "count")

    def _supported(self) -> dict[str, tuple[Any, ...]]:
        return {
            "activation_fn": ("gelu", "gelu-approximate"),
            "norm_elementwise_affine": (False,),
        }

    def _measure(self) -> None:
        config = self.config
        side, patch = config["sample_size"], config["patch_size"]
        if side % patch:
            raise UserError(f"sample_size={side!r} must be a multiple of patch_size={patch}; change one of them")
        self.sample_size = (side, side)
        self.positions = (side // patch) ** 2
        self.head = config["attention_head_dim"]
        self.channels = (config["num_attention_heads"] * self.head,)
        self.full_depths = (config["num_layers"],)
        if self.channels[0] % 4:
            raise UserError(f"{self.channels[0]} channels cannot carry positions; use a multiple of 4")
        blocks = range(self.full_depths[0])
        if self._order and sorted(self._order) != [*blocks]:
            raise UserError(f"block_order {self._order} must name each of the {len(blocks)} blocks once, from 0")
        self.order = self._order or spread(len(blocks))

    # -------------------------------------------------------------------------------------------------------- walk

    @property
    def _stream(self) -> Axis:
        return (Stretch(self.channels[0] // 4, 0, frequencies=True),) * 4

    def _free(self, name: str, times: int = 1) -> Axis:
        """Channels that nothing else is joined with."""
        return (Stretch(times * self.channels[0], 0, name),)

    def _take_apart(self) -> None:
        config = self.config
        stream, patch = self._stream, config["patch_size"]
        size = fixed(patch)
        self._weight("pos_embed.proj", (stream, fixed(config["in_channels"]), size, size), self.positions, None)
        self._before()
        for index in range(self.full_depths[0]):
            self._block(Unit("down", 0, BLOCKS, index))
        self._behind(fixed(patch * patch * self.out_channels))

    def _before(self) -> None:
        """What stands before the blocks, besides the patches."""

    def _block(self, unit: Unit) -> None:
        raise NotImplementedError

    def _behind(self, patch: Axis) -> None:
        raise NotImplementedError

    def _attention(self, name: str, source: Axis, keys: int, unit: Unit) -> None:
        """From the hidden state to the `source`: itself, or a text."""
        inner = self._free(f"{name}.inner")
        self.head_sizes[inner[0].channels] = self.head
        bias = bool(self.config["attention_bias"])
        self._weight(f"{name}.to_q", (inner, self._stream), self.positions, unit, bias=bias)
        for projection in ("to_k", "to_v"):
            self._weight(f"{name}.{projection}", (inner, source), keys, unit, bias=bias)
        self._weight(f"{name}.to_out.0", (self._stream, inner), self.positions, unit)
        self.attentions.append(AttentionAnatomy(inner, self.positions, keys, unit, name))

    def _feed_forward(self, name: str, unit: Unit) -> None:
        hidden = self._free(f"{name}.hidden", 4)
        self._weight(f"{name}.net.0.proj", (hidden, self._stream), self.positions, unit)
        self._weight(f"{name}.net.2", (self._stream, hidden), self.positions, unit)

    def _timestep(self, name: str, after: Axis, unit: Unit | None = None) -> None:
        hidden = self._free("timestep.hidden")
        self._weight(f"{name}.linear_1", (hidden, fixed(SINES)), 1, unit)
        self._weight(f"{name}.linear_2", (after, hidden), 1, unit)

    # ------------------------------------------------------------------------------------------------------- archs

    def blocks(self, arch: Arch) -> tuple[int, ...]:
        """The full network's blocks that a subnet keeps, in their order."""
        return tuple(sorted(self.order[: self.depths(arch)[0]]))

    def place(self, unit: Unit, arch: Arch) -> int | None:
        kept = self.blocks(arch)
        return kept.index(unit.index) if unit.index in kept else None

    def canonical(self, arch: Arch) -> Arch:
        depths = tuple(min(d, most) for d, most in zip(self.depths(arch), self.full_depths, strict=True))
        return arch.replace(depths=() if depths == self.full_depths else depths, attention=())

    def graph(self, arch: Arch) -> TransformerGraph:
        return TransformerGraph(self.depths(arch)[0], self.stock is PixArtTransformer2DModel)

    def layer_of(self, parameter: str, graph: Graph) -> str:
        found = re.match(rf"{BLOCKS}\.(\d+)\.({'|'.join(PARTS)})\.", parameter)
        return f"b{found.group(1)}.{PARTS[found.group(2)]}" if found else ""

    def in_full(self, block: str, arch: Arch) -> str:
        return f"b{self.blocks(arch)[int(block[1:])]}"

    def stock_class(self, arch: Arch) -> type[StockNet]:
        return self.stock

    def subconfig(self, arch: Arch) -> dict[str, Any]:
        self._check_form(arch)
        if arch.attention or arch.layers or not arch.middle:
            raise UserError(f"{arch}: a transformer's subnets differ in width and depth alone")
        [share], [channels] = arch.widths, self.channels
        heads = self.config["num_attention_heads"]
        kept = shrunk(heads, share, f"{heads} heads")
        if channels % 4 or kept * self.head % 4:
            raise UserError(
                f"width {share} leaves {kept * self.head} channels, which cannot carry positions; use a multiple of 4"
            )
        return {**self.config, "num_attention_heads": kept, "num_layers": self.depths(arch)[0]}

    def computed_numbers(self, arch: Arch) -> int:
        return int(self.positions) * shrunk(self.channels[0], arch.widths[0], "channels")

    @property
    def attention_places(self) -> tuple[int | None, ...]:
        return ()

    def check_attention(self) -> None:
        raise UserError(
            "attention=True: no stock transformer lacks the attention, or the feed-forward layers, of one block for good; leave it out, and let "
            "steps reuse them: Branches, or Stepwise(patterns=(Only(('b0.mlp', ...)), ...), finer=True)"
        )

    def check_depths(self) -> None:
        """There is one level alone."""

    def layers(self, arch: Arch) -> tuple[int, ...]:
        return (0,)

    def check_layers(self, layers: tuple[int, ...], middle: bool) -> None:
        if layers or middle:
            raise UserError(
                f"layers {layers}, middle={middle}: a transformer is made of blocks alone; leave them out, and give depths= instead"
            )

    @property
    def out_channels(self) -> int:
        return int(self.config["out_channels"] or self.config["in_channels"])

    def initialise(self, full: StockNet) -> None:
        """As DiT begins (Peebles & Xie 2023, section 3.2): the prediction is zero, and by adaLN-Zero every block of a DiT adds nothing at first."""
        with torch.no_grad():
            for module in full.modules():
                if isinstance(module, torch.nn.Linear):
                    torch.nn.init.xavier_uniform_(module.weight)
                    if module.bias is not None:
                        module.bias.zero_()
            patches = full.pos_embed.proj
            torch.nn.init.xavier_uniform_(patches.weight.view(len(patches.weight), -1))
            patches.bias.zero_()
            for weight in self._normal(full):
                torch.nn.init.normal_(weight, std=0.02)
            for weight in self._zero(full):
                weight.zero_()

    def _normal(self, full: StockNet) -> list[torch.Tensor]:
        raise NotImplementedError

    def _zero(self, full: StockNet) -> list[torch.Tensor]:
        raise NotImplementedError


class DiT(Transformer):
    """Of a `DiTTransformer2DModel`, which takes class labels. Its stock class keeps the embeddings of timestep and label once for each block; here
    they are one, the first block's, whichever blocks a subnet keeps: the output reads it too."""

    stock = DiTTransformer2DModel

    @property
    def null_label(self) -> int:
        return int(self.config["num_embeds_ada_norm"])

    def _block(self, unit: Unit) -> None:
        name = unit.name(unit.index)[:-1]
        told = self._free("condition")
        before = set(self.tensors)
        self._timestep(f"{name}.norm1.emb.timestep_embedder", told, unit)
        table = f"{name}.norm1.emb.class_embedder.embedding_table.weight"
        self.tensors[table] = TensorAnatomy((fixed(self.null_label + 1), told), 0, unit)
        for copy in self.tensors.keys() - before if unit.index else ():
            tensor = self.tensors[copy]
            held = copy.replace(unit.name(unit.index), unit.name(0), 1)
            self.tensors[copy] = TensorAnatomy(tensor.axes, tensor.positions, unit, held)
        self._weight(f"{name}.norm1.linear", (self._stream * 6, told), 1, unit)
        self._attention(f"{name}.attn1", self._stream, self.positions, unit)
        self._feed_forward(f"{name}.ff", unit)

    def _behind(self, patch: Axis) -> None:
        first = Unit("down", 0, BLOCKS, 0).name(0)
        # The output asks the first block's embedder anew.
        self.multiplied_again = [
            t for name, t in self.tensors.items() if name.startswith(f"{first}norm1.emb.") and t.positions
        ]
        self._weight("proj_out_1", (self._stream * 2, self._free("condition")), 1, None)
        self._weight("proj_out_2", (patch, self._stream), self.positions, None)

    def copies(self, arch: Arch) -> list[TensorAnatomy]:
        first = Unit("down", 0, BLOCKS, 0).name(0)
        one = [tensor for name, tensor in self.tensors.items() if name.startswith(f"{first}norm1.emb.")]
        return one * (self.depths(arch)[0] - 1)

    def tie(self, full: StockNet) -> StockNet:
        for block in full.transformer_blocks[1:]:
            block.norm1.emb = full.transformer_blocks[0].norm1.emb
        return full

    def check_copies(self, full: StockNet) -> None:
        first, *others = full.transformer_blocks
        for number, block in enumerate(others, 1):
            for (name, held), copy in zip(
                first.norm1.emb.named_parameters(), block.norm1.emb.parameters(), strict=True
            ):
                if not torch.equal(copy, held):
                    raise UserError(
                        f"{BLOCKS}.{number}.norm1.emb.{name} is not that of block 0: a DiT whose blocks read the timestep or the label each in "
                        "its own way is not elastic; train its copies as one"
                    )

    def _normal(self, full: StockNet) -> list[torch.Tensor]:
        return [
            tensor
            for block in full.transformer_blocks
            for name, tensor in block.norm1.emb.named_parameters()
            if name.endswith("weight")
        ]

    def _zero(self, full: StockNet) -> list[torch.Tensor]:
        modules = [*(block.norm1.linear for block in full.transformer_blocks), full.proj_out_1, full.proj_out_2]
        return [tensor for module in modules for tensor in module.parameters()]


class PixArt(Transformer):
    """Of a `PixArtTransformer2DModel`, which reads a text of `tokens`. Where that is projected, its projection is as wide as the hidden state."""

    stock = PixArtTransformer2DModel

    def __init__(self, config: Mapping[str, Any], order: tuple[int, ...] = (), tokens: int = 120) -> None:
        self.tokens = tokens
        super().__init__(config, order)

    def _supported(self) -> dict[str, tuple[Any, ...]]:
        return {**super()._supported(), "attention_type": ("default",)}

    def _check_config(self) -> None:
        super()._check_config()
        config = self.config
        if config["cross_attention_dim"] is None:
            raise UserError(
                "cross_attention_dim=None: a PixArt that reads no text is not elastic; give it a DiT's config"
            )
        width = config["num_attention_heads"] * config["attention_head_dim"]
        if config["caption_channels"] is not None and config["cross_attention_dim"] != width:
            raise UserError(
                f"cross_attention_dim={config['cross_attention_dim']} must be {width}, heads times channels of a head: so wide is the projected text"
            )

    @property
    def sized(self) -> bool:
        """Whether the size of the image is a condition."""
        return bool(self._full.use_additional_conditions)

    @property
    def null_label(self) -> None:
        return None

    @property
    def text_channels(self) -> tuple[int, ...]:
        return (int(self.config["caption_channels"] or self.config["cross_attention_dim"]),)

    def some_condition(self, count: int, device: str = "cpu") -> dict[str, torch.Tensor]:
        shape = (count, self.tokens, self.text_channels[0])
        if device == "meta":
            text = torch.empty(shape, device=device)
        else:
            text = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
        found = {"encoder_hidden_states": text, "encoder_attention_mask": torch.ones(shape[:2], device=device)}
        if self.sized:
            found |= {
                "resolution": torch.ones(count, 2, device=device),
                "aspect_ratio": torch.ones(count, 1, device=device),
            }
        return found

    def _before(self) -> None:
        # The timestep's embedding is added to tables of the hidden state's channels, so these are its channels too.
        self._timestep("adaln_single.emb.timestep_embedder", self._stream)
        if self.sized:
            third = fixed(self.channels[0] // 3)
            for name, times in (("resolution_embedder", 2), ("aspect_ratio_embedder", 1)):
                self._weight(f"adaln_single.emb.{name}.linear_1", (third, fixed(SINES)), times, None)
                self._weight(f"adaln_single.emb.{name}.linear_2", (third, third), times, None)
        self._weight("adaln_single.linear", (self._stream * 6, self._stream), 1, None)
        if self.config["caption_channels"] is not None:
            inner = self._free("caption.inner")
            text = fixed(self.config["caption_channels"])
            self._weight("caption_projection.linear_1", (inner, text), self.tokens, None)
            self._weight("caption_projection.linear_2", (self._free("caption"), inner), self.tokens, None)

    def _block(self, unit: Unit) -> None:
        name = unit.name(unit.index)[:-1]
        projected = self.config["caption_channels"] is not None
        text = self._free("caption") if projected else fixed(self.config["cross_attention_dim"])
        self.tensors[f"{name}.scale_shift_table"] = TensorAnatomy((fixed(6), self._stream), 0, unit)
        self._attention(f"{name}.attn1", self._stream, self.positions, unit)
        self._attention(f"{name}.attn2", text, self.tokens, unit)
        self._feed_forward(f"{name}.ff", unit)

    def _behind(self, patch: Axis) -> None:
        self.tensors["scale_shift_table"] = TensorAnatomy((fixed(2), self._stream))
        self._weight("proj_out", (patch, self._stream), self.positions, None)

    def subconfig(self, arch: Arch) -> dict[str, Any]:
        config = super().subconfig(arch)
        if self.sized and arch.widths != (1.0,):
            raise UserError(
                f"width {arch.widths[0]} of a PixArt that is told the image's size: the embeddings of height, width and aspect are thirds of its "
                "channels, which no narrower one shares with it; let its depth alone differ, widths=(1.0,)"
            )
        if config["caption_channels"] is not None:
            config["cross_attention_dim"] = config["num_attention_heads"] * self.head
        return {**config, "use_additional_conditions": self.sized}

    def _normal(self, full: StockNet) -> list[torch.Tensor]:
        modules = [full.adaln_single.emb.timestep_embedder, full.caption_projection]
        made = [module.linear_1.weight for module in modules if module is not None]
        made += [module.linear_2.weight for module in modules if module is not None]
        return [*made, full.adaln_single.linear.weight]

    def _zero(self, full: StockNet) -> list[torch.Tensor]:
        modules = [*(block.attn2.to_out[0] for block in full.transformer_blocks), full.proj_out]
        return [tensor for module in modules for tensor in module.parameters()]


def spread(count: int) -> tuple[int, ...]:
    """Blocks in an order whose beginnings are spread evenly: first and last, and then always one in the middle of the longest run left out."""
    order = list(dict.fromkeys([0, count - 1]))
    while len(order) < count:
        kept = sorted(order)
        first, last = max(pairwise(kept), key=lambda pair: pair[1] - pair[0])
        order.append(math.ceil((first + last) / 2))
    return tuple(order)
