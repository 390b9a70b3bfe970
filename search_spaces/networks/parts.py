"""What a stock diffusers network is made of: for each axis of each tensor, the stretches of channels it consists of.

A walk in the order of the forward pass names the channels of every axis; where additions and products join channels, the names are the
same. Each family of networks has a walk of its own: `unet_parts`, `transformer`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

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
    """The sines or the cosines of an embedding's input or of a table of positions, where a subnet has other frequencies, not fewer."""


Axis = tuple[Stretch, ...]


@dataclass(frozen=True, slots=True)
class Unit:
    """A residual block or an attention that a subnet may lack, or one of its transformer layers. `level` None is the middle. In a transformer
    the only level going down consists of its blocks."""

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
    """Axes of one parameter, at how many output positions of one sample each of its weights is multiplied, and whose it is. `copy_of`: the
    parameter of which it is a copy, where the stock model keeps several of one."""

    axes: tuple[Axis, ...]
    positions: int = 0
    unit: Unit | None = None
    copy_of: str | None = None


@dataclass(frozen=True, slots=True)
class AttentionAnatomy:
    """One attention of `queries` to `keys` tokens; its two products cost 2 * queries * keys * channels MACs. `module`: what the full net calls it."""

    axis: Axis
    queries: int
    keys: int
    unit: Unit
    module: str


class Parts(ABC):
    """Every tensor of a stock network's config, taken apart.

    `cells[name]` are the first channels of the stretches that no GroupNorm splits, where there are any, `head_sizes[name]` the channels of one head, for
    those inside an attention whose heads are kept or dropped as wholes; `divided[name]` the first ones of each head where each is made thinner. `identities`: shortcuts that stand nowhere, between levels of equal width, but would where a subnet makes
    them different. `multiplied_again`: weights that a call multiplies once more than there are of them.
    Raises UserError, naming the value, for a config that this elastic network does not cover.
    """

    stock: type[Any]

    def __init__(self, config: Mapping[str, Any]) -> None:
        name = self.stock.__name__
        with torch.device("meta"):
            try:
                self._full: Any = self.stock(**config)
            except (
                Exception
            ) as error:  # the stock class checks little itself: whatever its parts raise is about the config
                reason = first_line(error).replace(f"{name}.__init__() ", "")
                raise UserError(f"no {name} can be made of this config ({reason}); mend the config") from error
        self.config: dict[str, Any] = {k: v for k, v in self._full.config.items() if not k.startswith("_")}
        self.frozen = tuple(name for name, parameter in self._full.named_parameters() if not parameter.requires_grad)
        """What the class means to stay as it is made."""
        self._check_config()
        self.tensors: dict[str, TensorAnatomy] = {}
        self.attentions: list[AttentionAnatomy] = []
        self.identities: dict[str, TensorAnatomy] = {}
        self.multiplied_again: list[TensorAnatomy] = []
        self.head_sizes: dict[str, int] = {}
        self.divided: dict[str, tuple[int, ...]] = {}
        self.cells: dict[str, tuple[int, ...]] = {}
        self._measure()
        self._take_apart()

    channels: tuple[int, ...]
    """Of each level, outermost first."""
    full_depths: tuple[int, ...]
    """Residual blocks of each level."""
    sample_size: tuple[int, int]

    @property
    def levels(self) -> int:
        return len(self.channels)

    @property
    def depth(self) -> int:
        return max(self.full_depths)

    def _check_config(self) -> None:
        """Raises UserError for settings that the walk does not know."""
        for key, values in self._supported().items():
            if self.config[key] not in values:
                raise UserError(f"{key}={self.config[key]!r} is not elastic; use {' or '.join(map(repr, values))}")
        if self.config["sample_size"] is None:
            raise UserError("the network's config needs sample_size: costs depend on it")

    @abstractmethod
    def _supported(self) -> dict[str, tuple[Any, ...]]:
        """Values of settings that the walk knows."""

    @abstractmethod
    def _measure(self) -> None:
        """Channels, depths and sizes by the config."""

    @abstractmethod
    def _take_apart(self) -> None:
        """A walk in the order of the forward pass."""

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

    def _weight(self, name: str, axes: tuple[Axis, ...], positions: int, unit: Unit | None, bias: bool = True) -> None:
        self.tensors[f"{name}.weight"] = TensorAnatomy(axes, positions, unit)
        if bias:
            self.tensors[f"{name}.bias"] = TensorAnatomy(axes[:1], 0, unit)


def fixed(size: int) -> Axis:
    """An axis that no subnet shrinks."""
    return (Stretch(size),)
