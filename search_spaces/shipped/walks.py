"""How each family of stock diffusers networks goes through its layers, so that `reuse` can run some of them. Needs torch alone: an exported
folder holds a copy of this file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from .graph import Layer

Condition = Mapping[str, torch.Tensor]
"""The network's own keyword arguments, one row for each sample. Those whose names begin with "negative_" are what takes their place where a
guided step predicts without them."""

ADDED = ("text_embeds", "time_ids")
"""Conditions that Stable Diffusion XL adds to the timestep's embedding."""

SIZES = ("resolution", "aspect_ratio")
"""Conditions that PixArt at 1024 pixels adds to it."""

LEFT_OUT = re.compile(r"(down|up)_blocks\.\d+|transformer_blocks\.\d+(\.norm1)?")
"""Modules of a network whose parts are called, and not they."""

Read = Callable[[str], torch.Tensor]
"""The output of a layer by its name, run now or kept."""


class Walk(Protocol):
    """One call of a network, layer by layer."""

    def run(self, layer: Layer, read: Read) -> torch.Tensor:
        """The output of a layer, given those that it reads."""

    def take(self, layer: Layer, read: Read) -> None:
        """Goes past a layer, whether it has run or not."""

    def predict(self, layer: Layer, read: Read) -> torch.Tensor:
        """The network's output, behind the last layer."""


def arguments(net: Any, x: torch.Tensor, t: torch.Tensor | int, condition: Condition | None) -> tuple[Any, ...]:
    """Positional arguments of a call of a stock UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel or PixArtTransformer2DModel, or of one that is called as the
    first of these."""
    told = condition or {}
    if "num_embeds_ada_norm" in net.config:
        t = _each(x, t)
        if "caption_channels" not in net.config:
            return x, t, _needed(told, "class_labels")
        mask = told.get("encoder_attention_mask")
        return x, _needed(told, "encoder_hidden_states"), t, _sizes(told), None, None, mask
    if "encoder_hid_dim" not in net.config:
        return x, _each(x, t), told.get("class_labels")
    added = {name: told[name] for name in ADDED if name in told} or None
    return x, t, told.get("encoder_hidden_states"), told.get("class_labels"), None, None, None, added


def offloaded(net: torch.nn.Module) -> str | None:
    """A module of the network whose weights come with its own call, which a walk does not make."""
    for name, module in net.named_modules():
        if not LEFT_OUT.fullmatch(name) or next(module.children(), None) is None:
            continue
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        away = any(weight.is_meta for weight in module._parameters.values() if weight is not None)
        if away or any(hook.startswith("group_offloading") for hook in hooks):
            return str(name)
    return None


def walk_of(net: Any, x: torch.Tensor, t: torch.Tensor | int, condition: Condition | None, whole: bool = False) -> Walk:
    """x: (batch, channels, height, width). `whole`: the network is one layer, whatever it consists of."""
    if whole:
        return _Whole(net, x, t, condition)
    if not hasattr(net, "transformer_blocks"):
        return _UNet(net, x, t, condition)
    return (_PixArt if hasattr(net, "adaln_single") else _DiT)(net, x, t, condition or {})


class _Whole:
    """A network that is one layer."""

    def __init__(self, net: Any, x: torch.Tensor, t: torch.Tensor | int, condition: Condition | None) -> None:
        self._net = net
        self._inputs = arguments(net, x, t, condition)

    def run(self, layer: Layer, read: Read) -> torch.Tensor:
        prediction: torch.Tensor = self._net(*self._inputs, return_dict=False)[0]
        return prediction

    def take(self, layer: Layer, read: Read) -> None:
        """There is nothing behind it."""

    def predict(self, layer: Layer, read: Read) -> torch.Tensor:
        return read(layer.output)


class _UNet:
    def __init__(self, net: Any, x: torch.Tensor, t: torch.Tensor | int, condition: Condition | None) -> None:
        self._net = net
        self._condition = condition
        self._embedding = _embedding(net, x, t, condition)
        self._start = net.conv_in(2 * x - 1.0 if net.config.center_input_sample else x)
        self._sizes = _sizes_of(net, x.shape[-2:])

    def run(self, layer: Layer, read: Read) -> torch.Tensor:
        inputs = [self._start if name == "in" else read(name) for name in layer.reads]
        net, embedding, condition = self._net, self._embedding, self._condition
        hidden = inputs[0]
        if layer.name == "mid":
            told = _text(net.mid_block, condition) if getattr(net.mid_block, "has_cross_attention", False) else {}
            return net.mid_block(hidden, embedding, **told)  # type: ignore[no-any-return]
        level, place, *part = layer.name[1:].split(".")
        up = layer.name.startswith("u")
        block = (net.up_blocks if up else net.down_blocks)[int(level)]
        if place == "down":
            return _resample(block.downsamplers, hidden, embedding)
        if part == ["up"]:
            return _resample(block.upsamplers, hidden, embedding, self._sizes[-2 - int(level)])
        if part == ["attention"]:
            attention = block.attentions[int(place)]
            if getattr(block, "has_cross_attention", False):
                return attention(hidden, **_text(attention, condition), return_dict=False)[0]  # type: ignore[no-any-return]
            return attention(hidden)  # type: ignore[no-any-return]
        if up:
            hidden = torch.cat([hidden, inputs[1]], dim=1)
        return block.resnets[int(place)](hidden, embedding)  # type: ignore[no-any-return]

    def take(self, layer: Layer, read: Read) -> None:
        """Whoever reads its output asks for it."""

    def predict(self, layer: Layer, read: Read) -> torch.Tensor:
        net = self._net
        prediction: torch.Tensor = net.conv_out(net.conv_act(net.conv_norm_out(read(layer.output))))
        return prediction


class _Transformer:
    """Each branch adds its output to the hidden state, times a gate that the timestep says: outputs are kept as they are before it."""

    def __init__(self, net: Any, x: torch.Tensor, t: torch.Tensor | int, condition: Condition) -> None:
        self.net = net
        self.t = _each(x, t)
        self.shape = x.shape
        self.hidden = net.pos_embed(x)
        self.condition = condition
        self._modulated: dict[str, tuple[torch.Tensor, ...]] = {}

    def modulation(self, block: str) -> tuple[torch.Tensor, ...]:
        """Shift, scale and gate of the block's attention, and then those of its feed-forward layers."""
        if block not in self._modulated:
            self._modulated = {block: self._modulation(self._block(block))}
        return self._modulated[block]

    def run(self, layer: Layer, read: Read) -> torch.Tensor:
        block, part = self._block(layer.block), layer.name.partition(".")[2]
        if part == "text":
            return self._read(block)
        first = 0 if part == "attn" else 3
        shift, scale = self.modulation(layer.block)[first : first + 2]
        if part == "attn":
            return block.attn1(self._norm(block, part) * (1 + scale) + shift)  # type: ignore[no-any-return]
        return block.ff(self._norm(block, part) * (1 + scale) + shift)  # type: ignore[no-any-return]

    def take(self, layer: Layer, read: Read) -> None:
        output, part = read(layer.output), layer.name.partition(".")[2]
        if part != "text":
            output = self.modulation(layer.block)[2 if part == "attn" else 5] * output
        self.hidden = output + self.hidden

    def _block(self, name: str) -> Any:
        return self.net.transformer_blocks[int(name[1:])]

    def _modulation(self, block: Any) -> tuple[torch.Tensor, ...]:
        raise NotImplementedError

    def _norm(self, block: Any, part: str) -> torch.Tensor:
        raise NotImplementedError

    def _read(self, block: Any) -> torch.Tensor:
        raise NotImplementedError

    def _image(self, patches: torch.Tensor) -> torch.Tensor:
        """(batch, positions, patch x patch x channels) as (batch, channels, height, width)."""
        side, (height, width) = self.net.config.patch_size, self.shape[-2:]
        rows, columns = height // side, width // side
        found = patches.reshape(len(patches), rows, columns, side, side, -1)
        return torch.einsum("nhwpqc->nchpwq", found).reshape(len(patches), -1, rows * side, columns * side)


class _DiT(_Transformer):
    def _modulation(self, block: Any) -> tuple[torch.Tensor, ...]:
        norm = block.norm1
        made: torch.Tensor = norm.linear(norm.silu(self._conditioning(block)))
        return tuple(chunk[:, None] for chunk in made.chunk(6, dim=1))

    def _conditioning(self, block: Any) -> torch.Tensor:
        labels = _needed(self.condition, "class_labels")
        return block.norm1.emb(self.t, labels, hidden_dtype=self.hidden.dtype)  # type: ignore[no-any-return]

    def _norm(self, block: Any, part: str) -> torch.Tensor:
        norm = block.norm1.norm if part == "attn" else block.norm3
        return norm(self.hidden)  # type: ignore[no-any-return]

    def predict(self, layer: Layer, read: Read) -> torch.Tensor:
        net = self.net
        told = net.proj_out_1(torch.nn.functional.silu(self._conditioning(net.transformer_blocks[0])))
        shift, scale = told.chunk(2, dim=1)
        return self._image(net.proj_out_2(net.norm_out(self.hidden) * (1 + scale[:, None]) + shift[:, None]))


class _PixArt(_Transformer):
    def __init__(self, net: Any, x: torch.Tensor, t: torch.Tensor | int, condition: Condition) -> None:
        super().__init__(net, x, t, condition)
        text = _needed(condition, "encoder_hidden_states").to(self.hidden.dtype)
        if net.caption_projection is not None:
            text = net.caption_projection(text).view(len(x), -1, self.hidden.shape[-1])
        self._text = text
        mask = condition.get("encoder_attention_mask")
        self._mask = None if mask is None else ((1 - mask.to(x.dtype)) * -10000.0).unsqueeze(1)
        self._shared, self._embedded = net.adaln_single(
            self.t, _sizes(condition), batch_size=len(x), hidden_dtype=self.hidden.dtype
        )

    def _modulation(self, block: Any) -> tuple[torch.Tensor, ...]:
        made: torch.Tensor = block.scale_shift_table[None] + self._shared.reshape(len(self.hidden), 6, -1)
        return made.chunk(6, dim=1)

    def _norm(self, block: Any, part: str) -> torch.Tensor:
        norm = block.norm1 if part == "attn" else block.norm2
        return norm(self.hidden)  # type: ignore[no-any-return]

    def _read(self, block: Any) -> torch.Tensor:
        return block.attn2(self.hidden, encoder_hidden_states=self._text, attention_mask=self._mask)  # type: ignore[no-any-return]

    def predict(self, layer: Layer, read: Read) -> torch.Tensor:
        net = self.net
        shift, scale = (net.scale_shift_table[None] + self._embedded[:, None]).chunk(2, dim=1)
        return self._image(net.proj_out(net.norm_out(self.hidden) * (1 + scale) + shift))


def _each(x: torch.Tensor, t: torch.Tensor | int) -> torch.Tensor:
    """A timestep for each sample."""
    if not isinstance(t, torch.Tensor):
        return torch.full((len(x),), t, device=x.device)  # which a GPU is not waited for
    rows = t.to(x.device).reshape(-1)
    return rows * torch.ones(len(x), dtype=rows.dtype, device=rows.device)


def _needed(condition: Condition, name: str) -> torch.Tensor:
    if name not in condition:
        raise ValueError(f"the network needs {name} as its condition")
    return condition[name]


def _sizes(condition: Condition) -> dict[str, torch.Tensor | None]:
    return {name: condition.get(name) for name in SIZES}


def _text(module: Any, condition: Condition | None) -> dict[str, Any]:
    text = _needed(condition or {}, "encoder_hidden_states")
    return {"encoder_hidden_states": text.to(next(module.parameters()).dtype)}


def _resample(
    modules: Any, hidden: torch.Tensor, embedding: torch.Tensor, size: tuple[int, int] | None = None
) -> torch.Tensor:
    """`size`: of what comes out, where that is not twice what goes in."""
    for module in modules:
        # A residual block that samples takes the timestep in, a convolution does not.
        if hasattr(module, "time_emb_proj"):
            hidden = module(hidden, temb=embedding)
        elif size is None or size == (2 * hidden.shape[-2], 2 * hidden.shape[-1]):
            hidden = module(hidden)
        else:
            hidden = module(hidden, output_size=size)
    return hidden


def _sizes_of(net: Any, size: Sequence[int]) -> list[tuple[int, int]]:
    """(height, width) at each level, outermost first: a convolution padded on both sides makes of an odd side the larger half, all else the smaller."""
    found = [(size[0], size[1])]
    for block in net.down_blocks:
        for module in block.downsamplers or ():
            more = int(getattr(module, "use_conv", False) and module.padding == 1)
            height, width = found[-1]
            found.append(((height + more) // 2, (width + more) // 2))
    return found


def _embedding(net: Any, x: torch.Tensor, t: torch.Tensor | int, condition: Condition | None) -> torch.Tensor:
    """Of the timestep, and of whatever else is added to it."""
    embedding: torch.Tensor = net.time_embedding(net.time_proj(_each(x, t)).to(dtype=net.dtype))
    if net.class_embedding is not None:
        labels = _needed(condition or {}, "class_labels")
        labels = net.time_proj(labels).to(dtype=net.dtype) if net.config.class_embed_type == "timestep" else labels
        embedding = embedding + net.class_embedding(labels).to(dtype=net.dtype)
    if getattr(net.config, "addition_embed_type", None) == "text_time":
        if condition is None or not {"text_embeds", "time_ids"} <= condition.keys():
            raise ValueError("the network needs text_embeds and time_ids as its condition")
        sizes = net.add_time_proj(condition["time_ids"].flatten()).reshape(len(x), -1)
        added = torch.cat([condition["text_embeds"], sizes.to(condition["text_embeds"])], dim=-1)
        embedding = embedding + net.add_embedding(added.to(embedding.dtype))
    return embedding
