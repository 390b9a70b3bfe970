"""What everything else knows of a family of networks: which of a full network's parts a subnet takes, and what stock model it then is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, TypeAlias

import torch
from accelerate import init_empty_weights

from nas.contracts import Condition, UserError
from search_spaces.networks.parts import Parts, TensorAnatomy
from search_spaces.networks.slices import Arch, Groups, Slices
from search_spaces.shipped.graph import Graph
from search_spaces.shipped.walks import arguments

StockNet: TypeAlias = Any
"""A model of one of diffusers' classes."""


class Anatomy(Parts, Slices):
    """A full network taken apart, its subnets, and what conditions they take."""

    def __init__(self, config: Mapping[str, Any], groups: Groups) -> None:
        super().__init__(config)
        self.groups = groups
        self.full = Arch((1.0,) * self.levels)
        self.subconfig(self.full)
        self.check_shapes()

    @abstractmethod
    def stock_class(self, arch: Arch) -> type[StockNet]: ...

    @abstractmethod
    def subconfig(self, arch: Arch) -> dict[str, Any]:
        """Arguments of the subnet's stock class, `stock_class(arch)`. Raises UserError where a stock model cannot be so."""

    @abstractmethod
    def canonical(self, arch: Arch) -> Arch:
        """The same subnet, with nothing said of what it does not have, and nothing of what is as in the full net."""

    @abstractmethod
    def graph(self, arch: Arch) -> Graph:
        """Of the subnet's blocks, branches and layers."""

    @abstractmethod
    def layer_of(self, parameter: str, graph: Graph) -> str:
        """The layer whose module a subnet's parameter belongs to, "" for those of none, which always run."""

    @property
    @abstractmethod
    def attention_places(self) -> tuple[int | None, ...]:
        """Levels whose attention subnets may lack, and None for the middle's."""

    @abstractmethod
    def check_depths(self) -> None:
        """Raises UserError where the levels of a subnet cannot differ in depth, whichever attention it leaves out."""

    @abstractmethod
    def layers(self, arch: Arch) -> tuple[int, ...]:
        """Transformer layers of each attention, by level; 0 where attention is no such thing."""

    @abstractmethod
    def check_layers(self, layers: tuple[int, ...], middle: bool) -> None:
        """Raises UserError where subnets cannot have these numbers of transformer layers, or go without a middle."""

    def check_attention(self) -> None:
        """Raises UserError where subnets cannot lack attention."""
        if not self.attention_places:
            raise UserError("attention=True, but the network has no attention to leave out")

    @property
    @abstractmethod
    def null_label(self) -> int | None:
        """The label of no class: there are as many classes before it. None where there are no labels."""

    @property
    @abstractmethod
    def out_channels(self) -> int: ...

    @property
    def conditional(self) -> bool:
        """Whether samples have conditions."""
        return bool(self.some_condition(1, "meta"))

    @property
    def text_channels(self) -> tuple[int, ...]:
        """Of the text that its attention reads, at each level; empty where it reads none."""
        return ()

    tokens: int = 0
    """Length of that text."""

    def some_condition(self, count: int, device: str = "cpu") -> dict[str, torch.Tensor]:
        """Any condition of so many rows, labels and texts all different, by the names of the stock model's arguments; the same ones at every call."""
        if self.null_label is None:
            return {}
        return {"class_labels": torch.arange(count, device=device) % max(self.null_label, 1)}

    def initialise(self, full: StockNet) -> None:
        """Makes fresh weights those that a training begins with, where they are others than the stock class draws."""

    def tie(self, full: StockNet) -> StockNet:
        """The full network with one parameter for all copies of it."""
        return full

    def check_copies(self, full: StockNet) -> None:
        """Raises UserError where copies of one parameter differ."""

    def group_size(self, channels: str, total: int) -> int | None:
        """Channels of a norm group, where all norms that these `total` channels meet divide them alike; else None."""
        return None

    def depths(self, arch: Arch) -> tuple[int, ...]:
        return arch.depths or self.full_depths

    def in_full(self, block: str, arch: Arch) -> str:
        """What a block of the subnet is called in the full net."""
        return block

    def copies(self, arch: Arch) -> list[TensorAnatomy]:
        """Parameters of the subnet that stand there only because its stock class keeps several of one."""
        return []

    def computed_numbers(self, arch: Arch) -> int:
        """Numbers that the subnet reckons by itself, which papers count as parameters."""
        return 0

    def shortcut_vanishes(self, widths: tuple[float, ...], level: int) -> bool:
        """Whether the level is as wide as the one before it, in the subnet alone, so that a shortcut convolution would vanish."""
        return False

    def check_shortcuts(self, arch: Arch) -> None:
        """Raises UserError where the subnet's levels i - 1 and i are equally wide and the full net's are not."""

    def widened(self, name: str, arch: Arch) -> bool:
        return False

    def _check_form(self, arch: Arch) -> None:
        """Raises UserError for an arch of another network."""
        if len(arch.widths) != self.levels or not all(0 < share <= 1 for share in arch.widths):
            raise UserError(
                f"widths {arch.widths} must be {self.levels} shares in (0, 1], one per level of the network"
            )
        most = zip(arch.depths, self.full_depths, strict=False)
        if arch.depths and (len(arch.depths) != self.levels or not all(1 <= d <= full for d, full in most)):
            raise UserError(f"depths {arch.depths} must be {self.levels} numbers from 1 to {self.depth}, one per level")


def skeleton(anatomy: Anatomy, arch: Arch) -> StockNet:
    """The stock model of this size, its parameters on the meta device: shapes without weights. What it reckons by itself, as a table of
    positions, is there: no file of weights holds it."""
    with init_empty_weights(include_buffers=False):
        return anatomy.stock_class(arch)(**anatomy.subconfig(arch)).eval()


def unset(net: StockNet, device: str | torch.device) -> StockNet:
    """A skeleton on a device, in place: its parameters as memory happens to be, to be filled at once."""
    for module in net.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty_like(parameter, device=device)
                module._parameters[name] = torch.nn.Parameter(empty, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    return net


def predict(net: Any, x: torch.Tensor, t: torch.Tensor | int, condition: Condition | None = None) -> torch.Tensor:
    """A stock subnet's prediction, whichever class it is of (or a compiled form of it)."""
    return net(*arguments(net, x, t, condition), return_dict=False)[0]  # type: ignore[no-any-return]


def shrunk(size: int, share: float, what: str) -> int:
    """The share of a size. Raises UserError where that is no whole number."""
    kept = size * Fraction(share).limit_denominator(4096)
    if kept.denominator != 1 or kept < 1:
        raise UserError(f"width {share} of {what} is {float(kept):g}, not a whole number; choose another share")
    return int(kept)
