"""How a stock `diffusers.UNet2DModel` shrinks: which slice of which tensor a smaller stock model takes.

An *arch* is one width share per level, for example `(0.5, 0.5)`. `Anatomy` knows for each axis of each tensor the
stretches it is made of; after a skip concatenation there are two, trunk and skip, and each is sliced on its own, so that
a channel always meets the weight it met in the full net. From the same table follow the slices (`segments`), the shapes
and, in `cost`, MACs and parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import torch
from diffusers import UNet2DModel

from nas.contracts import UserError

Arch = tuple[float, ...]
"""One width share per level, outermost level first."""

Run = tuple[int, int]
"""Channels start..stop-1 of one axis."""

Groups = Literal["count", "size"]

_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D")


@dataclass(frozen=True, slots=True)
class Stretch:
    """Neighbouring channels of one axis that shrink together: with the share of `level`, or never (`level` None)."""

    size: int
    level: int | None = None
    frequencies: bool = False
    """The sine or the cosine half of the time embedding's input, where a subnet has other frequencies, not fewer."""


Axis = tuple[Stretch, ...]


@dataclass(frozen=True, slots=True)
class TensorAnatomy:
    """Axes of one parameter, and at how many output positions of one sample each of its weights is multiplied."""

    axes: tuple[Axis, ...]
    positions: int = 0


@dataclass(frozen=True, slots=True)
class AttentionAnatomy:
    """One self-attention over `positions` tokens; its two products cost 2 * positions^2 * channels MACs."""

    axis: Axis
    positions: int


class Anatomy:
    """Every tensor of a stock UNet2DModel config, taken apart.

    Raises UserError, naming the value, for a config that this elastic network does not cover.
    """

    def __init__(self, config: Mapping[str, Any], groups: Groups) -> None:
        with torch.device("meta"):
            self._full = UNet2DModel(**config)
        self.config: dict[str, Any] = {k: v for k, v in self._full.config.items() if not k.startswith("_")}
        self.groups = groups
        self._check_config()
        self.channels: tuple[int, ...] = tuple(self.config["block_out_channels"])
        self.levels = len(self.channels)
        self.full: Arch = (1.0,) * self.levels
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
        self._take_apart()
        self.subconfig(self.full)
        self._check_shapes()

    # ------------------------------------------------------------------------------------------------------- archs

    def subconfig(self, arch: Arch) -> dict[str, Any]:
        """The stock config of the subnet. Raises UserError where a stock model cannot be of these widths."""
        if len(arch) != self.levels or not all(0 < share <= 1 for share in arch):
            raise UserError(f"widths {arch} must be {self.levels} shares in (0, 1], one per level of the network")
        channels = tuple(
            _shrink(c, share, f"{c} channels of level {i}")
            for i, (c, share) in enumerate(zip(self.channels, arch, strict=True))
        )
        if channels[0] % 2:
            raise UserError(
                f"width {arch[0]} leaves {channels[0]} channels in level 0; the time embedding needs an even number"
            )
        config = {
            **self.config,
            "block_out_channels": channels,
            "time_embedding_dim": _shrink(self.time_embedding_dim, arch[0], "the time embedding"),
        }
        if self.groups == "size" and arch != self.full:
            if len(set(arch)) > 1:
                raise UserError(
                    f"widths {arch} differ between levels, which needs groups='count': stock models have one group count"
                )
            for key in ("norm_num_groups", "attn_norm_num_groups"):
                if config[key] is not None:
                    config[key] = _shrink(config[key], arch[0], f"{key}={config[key]}")
        self._check_channels(arch, channels, config)
        return config

    def segments(self, arch: Arch) -> dict[str, tuple[tuple[Run, ...], ...]]:
        """For each parameter, for each of its axes, the runs of the full net's channels that the subnet takes.

        Raises UserError where the subnet would have other tensors than the full net (a shortcut convolution stands
        only between levels of different width).
        """
        for i in range(1, self.levels):
            equal_in_full = self.channels[i - 1] == self.channels[i]
            equal_in_sub = self.channels[i - 1] * arch[i - 1] == self.channels[i] * arch[i]
            if equal_in_full != equal_in_sub:
                raise UserError(
                    f"widths {arch} make levels {i - 1} and {i} {'equal' if equal_in_sub else 'different'} in channels, unlike "
                    "the full net, so that a shortcut convolution would appear or vanish; choose other widths"
                )
        return {
            name: tuple(tuple(self._axis_runs(axis, arch)) for axis in tensor.axes)
            for name, tensor in self.tensors.items()
        }

    def _axis_runs(self, axis: Axis, arch: Arch) -> Iterator[Run]:
        start = 0
        for stretch in axis:
            kept = stretch_size(stretch, arch)
            if stretch.frequencies:
                yield from self._frequency_runs(start, stretch.size, kept)
            else:
                yield start, start + kept
            start += stretch.size

    def _frequency_runs(self, start: int, full: int, kept: int) -> Iterator[Run]:
        """Channel k of n has frequency 10000^(-k / (n - shift)): take the full net's nearest one in log frequency."""
        shift = self.config["freq_shift"]
        for k in range(kept):
            nearest = min(full - 1, round(k * (full - shift) / max(kept - shift, 1)))
            yield start + nearest, start + nearest + 1

    # ------------------------------------------------------------------------------------------------------ checks

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

    def _check_channels(self, arch: Arch, channels: tuple[int, ...], config: Mapping[str, Any]) -> None:
        for i, width in enumerate(channels):
            if width % config["norm_num_groups"]:
                raise UserError(
                    f"width {arch[i]} leaves {width} channels in level {i}, not a multiple of norm_num_groups={config['norm_num_groups']}"
                )
        head = config["attention_head_dim"]
        for level in sorted({_level_of(stretch) for attention in self.attentions for stretch in attention.axis}):
            if head is not None and channels[level] % head:
                raise UserError(
                    f"width {arch[level]} leaves {channels[level]} channels in level {level}, not a multiple of attention_head_dim={head}"
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
        config, last = self.config, self.levels - 1
        self._time = (Stretch(self.time_embedding_dim, 0),)
        self._conv("conv_in", _fixed(config["in_channels"]), self._level(0), self._positions(0))
        half = Stretch(self.channels[0] // 2, 0, frequencies=True)
        self._time_mlp("time_embedding", (half, half))
        if config["class_embed_type"] == "timestep":
            self._time_mlp("class_embedding", (half, half))
        elif config["num_class_embeds"] is not None:
            self.tensors["class_embedding.weight"] = TensorAnatomy((_fixed(config["num_class_embeds"]), self._time))

        for i, block in enumerate(config["down_block_types"]):
            for j in range(config["layers_per_block"]):
                before = self._level(max(i - 1, 0)) if j == 0 else self._level(i)
                self._resnet(f"down_blocks.{i}.resnets.{j}", before, self._level(i), self._positions(i))
                if block == "AttnDownBlock2D":
                    self._attention(f"down_blocks.{i}.attentions.{j}", self._level(i), self._positions(i))
            if i < last:
                self._sampler(
                    f"down_blocks.{i}.downsamplers.0",
                    block,
                    config["downsample_type"],
                    self._level(i),
                    self._positions(i + 1),
                )

        if config["mid_block_type"] is not None:
            for j in range(2):
                self._resnet(f"mid_block.resnets.{j}", self._level(last), self._level(last), self._positions(last))
            if config["add_attention"]:
                # The stock middle block leaves this norm out unless one of the two asks for it.
                norm = config["attn_norm_num_groups"] is not None or config["resnet_time_scale_shift"] == "default"
                self._attention("mid_block.attentions.0", self._level(last), self._positions(last), norm)

        trunk = self._level(last)
        for i, block in enumerate(config["up_block_types"]):
            level = last - i
            for j in range(config["layers_per_block"] + 1):
                skip = self._level(level) if j < config["layers_per_block"] else self._level(max(level - 1, 0))
                self._resnet(f"up_blocks.{i}.resnets.{j}", trunk + skip, self._level(level), self._positions(level))
                trunk = self._level(level)
                if block == "AttnUpBlock2D":
                    self._attention(f"up_blocks.{i}.attentions.{j}", trunk, self._positions(level))
            if level > 0:
                self._sampler(
                    f"up_blocks.{i}.upsamplers.0", block, config["upsample_type"], trunk, self._positions(level - 1)
                )

        self._norm("conv_norm_out", self._level(0))
        self._conv("conv_out", self._level(0), _fixed(config["out_channels"]), self._positions(0))

    def _level(self, level: int) -> Axis:
        return (Stretch(self.channels[level], level),)

    def _positions(self, level: int) -> int:
        return math.prod(side // 2**level for side in self.sample_size)

    def _weight(self, name: str, axes: tuple[Axis, ...], positions: int) -> None:
        self.tensors[f"{name}.weight"] = TensorAnatomy(axes, positions)
        self.tensors[f"{name}.bias"] = TensorAnatomy(axes[:1])

    def _conv(self, name: str, before: Axis, after: Axis, positions: int, kernel: int = 3) -> None:
        self._weight(name, (after, before, _fixed(kernel), _fixed(kernel)), positions)

    def _linear(self, name: str, before: Axis, after: Axis, positions: int = 1) -> None:
        self._weight(name, (after, before), positions)

    def _norm(self, name: str, axis: Axis) -> None:
        self._weight(name, (axis,), 0)

    def _time_mlp(self, name: str, before: Axis) -> None:
        self._linear(f"{name}.linear_1", before, self._time)
        self._linear(f"{name}.linear_2", self._time, self._time)

    def _resnet(self, name: str, before: Axis, after: Axis, positions: int) -> None:
        doubled = after * 2 if self.config["resnet_time_scale_shift"] == "scale_shift" else after
        self._norm(f"{name}.norm1", before)
        self._conv(f"{name}.conv1", before, after, positions)
        self._linear(f"{name}.time_emb_proj", self._time, doubled)
        self._norm(f"{name}.norm2", after)
        self._conv(f"{name}.conv2", after, after, positions)
        if sum(s.size for s in before) != sum(s.size for s in after):
            self._conv(f"{name}.conv_shortcut", before, after, positions, kernel=1)

    def _attention(self, name: str, axis: Axis, positions: int, norm: bool = True) -> None:
        if norm:
            self._norm(f"{name}.group_norm", axis)
        for projection in ("to_q", "to_k", "to_v", "to_out.0"):
            self._linear(f"{name}.{projection}", axis, axis, positions)
        self.attentions.append(AttentionAnatomy(axis, positions))

    def _sampler(self, name: str, block: str, kind: str, axis: Axis, positions: int) -> None:
        """Down- or upsampling; only the blocks with attention know the kind "resnet"."""
        if kind == "resnet" and block.startswith("Attn"):
            self._resnet(name, axis, axis, positions)
        else:
            self._conv(f"{name}.conv", axis, axis, positions)


def stretch_size(stretch: Stretch, arch: Arch) -> int:
    """Channels of the stretch that a subnet keeps."""
    return stretch.size if stretch.level is None else round(stretch.size * arch[stretch.level])


def skeleton(anatomy: Anatomy, arch: Arch) -> UNet2DModel:
    """The stock model of this size, on the meta device: shapes without weights."""
    with torch.device("meta"):
        return UNet2DModel(**anatomy.subconfig(arch)).eval()


def take(tensor: torch.Tensor, axes: tuple[tuple[Run, ...], ...]) -> torch.Tensor:
    """The slice of a full tensor that `segments` names: a view where each axis is one run, else a copy; differentiable."""
    for dim, runs in enumerate(axes):
        if len(runs) == 1:
            start, stop = runs[0]
            tensor = tensor.narrow(dim, start, stop - start)
        else:
            tensor = torch.cat([tensor.narrow(dim, start, stop - start) for start, stop in runs], dim)
    return tensor


def _fixed(size: int) -> Axis:
    return (Stretch(size),)


def _level_of(stretch: Stretch) -> int:
    assert stretch.level is not None
    return stretch.level


def _shrink(size: int, share: float, what: str) -> int:
    kept = size * Fraction(share).limit_denominator(4096)
    if kept.denominator != 1 or kept < 1:
        raise UserError(f"width {share} of {what} is {float(kept):g}, not a whole number; choose another share")
    return int(kept)
