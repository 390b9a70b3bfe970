"""A network that diffusers does not have: any module of yours, made elastic by what its shapes say.

The class is built at two sizes, and the axes of its parameters that differ are those that shrink: a subnet takes the leading channels of each. Where an
axis holds several parts one behind the other, as queries, keys and values do, `parts` says so, and a subnet takes the leading channels of each part.
Costs are counted on the meta device, by what torch's own counter sees of a call.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import field
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from torch.utils.flop_counter import FlopCounterMode

from nas.base.files import first_line
from nas.contracts import UserError, digest_of
from nas.recipes import Count, recipe
from search_spaces.networks.anatomy import Anatomy, StockNet, shrunk, skeleton
from search_spaces.networks.cost import Cost, CostModel
from search_spaces.networks.parts import Axis, Stretch, TensorAnatomy, Unit, fixed
from search_spaces.networks.slices import Arch
from search_spaces.shipped.graph import STOCK, Graph, WholeGraph

PROBES = (0.5, 0.75, 0.25, 2 / 3, 1 / 3)
"""Widths at which the class is built to see what shrinks, until one can be."""


@recipe
class Own:
    """A class of yours, a diffusers `ModelMixin` and `ConfigMixin`, whose `forward(sample, timestep, class_labels=None, return_dict=True)` returns a tuple with
    the prediction. Its config has `sample_size`, `in_channels`, maybe `out_channels`, and `num_class_embeds` where it takes labels, the last that of no class.

    `shrinks`: the settings of its config, numbers or lists of them, of which a subnet of width 0.5 has half. `parts`: of a module of this name (or the end of
    it), how many equal parts its outputs and its inputs consist of. `blocks`: a list of blocks whose last ones a shallower subnet lacks, as each adds
    to what comes before; `depth`: the setting that says how many there are.
    Raises UserError for a class of another kind.
    """

    network: type[Any]
    shrinks: tuple[str, ...]
    parts: Mapping[str, tuple[Count, Count]] = field(default_factory=dict)
    blocks: str = ""
    depth: str = ""
    code: str = field(init=False, default="")
    """Of the class, as it was read where the recipe was made: elsewhere its source need not be."""

    def __post_init__(self) -> None:
        if not issubclass(self.network, ModelMixin) or not issubclass(self.network, ConfigMixin):
            raise UserError(
                f"{self.network.__name__} must be a ModelMixin and a ConfigMixin of diffusers, its __init__ decorated with register_to_config"
            )
        if stock := [one.__name__ for one in self.network.__mro__ if one.__name__ in STOCK]:
            raise UserError(
                f"{self.network.__name__} inherits from {stock[0]}, whose layers are walked one by one, past a forward of its own; write it as a ModelMixin and ConfigMixin "
                f"that holds what it needs of one, or give Elastic the config of a {stock[0]}"
            )
        if bool(self.blocks) != bool(self.depth):
            raise UserError(f"blocks={self.blocks!r} and depth={self.depth!r} belong together; give both, or neither")
        object.__setattr__(self, "code", _code(self.network))

    def describe(self) -> dict[str, Any]:
        return {
            "network": self.network.__qualname__,
            "code": self.code,
            "shrinks": self.shrinks,
            "parts": {name: list(counts) for name, counts in self.parts.items()},
            **({"blocks": self.blocks, "depth": self.depth} if self.blocks else {}),
        }


class OwnAnatomy(Anatomy):
    """Of a network of one level: all that shrinks shrinks alike."""

    def __init__(self, own: Own, config: Mapping[str, Any]) -> None:
        self._own = own
        self.stock = own.network
        self.frequency_shift = 0.0
        super().__init__({name: value for name, value in config.items() if not name.startswith("_")}, "count")

    def _supported(self) -> dict[str, tuple[Any, ...]]:
        return {}

    def _check_config(self) -> None:
        wanted = ["sample_size", "in_channels", *self._own.shrinks, *([self._own.depth] if self._own.depth else [])]
        for name in wanted:
            if name not in self.config:
                raise UserError(f"the config of {self.stock.__name__} has no {name}; it has {', '.join(self.config)}")
        super()._check_config()

    def _measure(self) -> None:
        size = self.config["sample_size"]
        self.sample_size = (size, size) if isinstance(size, int) else (size[0], size[1])
        self.channels = (max(_numbers(self.config[name])[0] for name in self._own.shrinks) if self._own.shrinks else 1,)
        self.full_depths = (int(self.config[self._own.depth]) if self._own.depth else 1,)
        held = len(self._full.get_submodule(self._own.blocks)) if self._own.blocks else 1
        if held != self.full_depths[0]:
            raise UserError(
                f"{self._own.blocks} holds {held} blocks, {self._own.depth}={self.full_depths[0]}; name the list and the setting of its length"
            )

    # -------------------------------------------------------------------------------------------------------- walk

    def _take_apart(self) -> None:
        share, probe = self._probe()
        sizes = {name: tuple(parameter.shape) for name, parameter in probe.named_parameters()}
        whole = {name: tuple(parameter.shape) for name, parameter in self._full.named_parameters()}
        if sizes.keys() != whole.keys() or any(len(sizes[name]) != len(whole[name]) for name in whole):
            odd = sorted(sizes.keys() ^ whole.keys()) or [n for n in whole if len(sizes[n]) != len(whole[n])]
            raise UserError(
                f"at width {share:.3g} {self.stock.__name__} has other parameters ({odd[0]}); let its width change sizes alone"
            )
        self._check_own_state()
        for module in self._full.modules():
            if isinstance(module, torch.nn.modules.conv._ConvNd) and 1 < module.groups < module.out_channels:
                raise UserError(
                    f"{self.stock.__name__} has a convolution of {module.groups} groups, which no narrower one shares; use one, or one for each channel"
                )
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
                raise UserError(
                    f"{self.stock.__name__} keeps running statistics in a {type(module).__name__}, which subnets of other widths cannot share; use a GroupNorm"
                )
        for name, shape in whole.items():
            axes = tuple(self._axis(name, dim, full, sizes[name][dim], share) for dim, full in enumerate(shape))
            self.tensors[name] = TensorAnatomy(axes, 0, self._unit(name))

    def _check_own_state(self) -> None:
        """Raises UserError for what slices of parameters do not carry."""
        name, named = self.stock.__name__, dict(self._full.named_parameters())
        tied = [n for n, _ in self._full.named_parameters(remove_duplicate=False) if n not in named]
        if tied:
            raise UserError(f"{name} has one parameter in two places ({tied[0]} is one of them); give each its own")
        if any(torch.nn.utils.parametrize.is_parametrized(module) for module in self._full.modules()):
            raise UserError(
                f"{name} computes parameters from others (torch's parametrizations), of which no slice is taken; leave them out"
            )
        if dict(self._full.named_buffers()):
            drawn = []
            for seed in (0, 1):
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    drawn.append(dict(self.stock(**self.config).named_buffers()))
            odd = [n for n, value in drawn[0].items() if not torch.equal(value, drawn[1][n])]
            if odd:
                raise UserError(f"{name} draws its buffer {odd[0]} at random, each subnet another; make it a parameter")

    def _probe(self) -> tuple[float, Any]:
        """The class at a smaller size, on the meta device."""
        reason = ""
        for share in PROBES if self._own.shrinks else (1.0,):
            try:
                config = self._shrunk(share)
                with torch.device("meta"):
                    return share, self.stock(**config)
            except Exception as error:  # whatever the class raises is about the size
                reason = first_line(error)
        raise UserError(
            f"{self.stock.__name__} can be made at none of the widths {', '.join(f'{p:.3g}' for p in PROBES)} ({reason}); choose other sizes"
        )

    def _axis(self, name: str, dim: int, full: int, probed: int, share: float) -> Axis:
        count = self._parts(name, dim)
        if probed == full:
            return fixed(full)
        if full % count or abs(probed - full * share) > 1e-6:
            raise UserError(
                f"axis {dim} of {name} has {full} channels, at width {share:.3g} {probed}, and {count} parts: not all of it shrinks with "
                f"{', '.join(self._own.shrinks)}; part what shrinks from what does not"
            )
        return (Stretch(full // count, 0),) * count

    def _parts(self, name: str, dim: int) -> int:
        module, _, kind = name.rpartition(".")
        said = [n for key, n in self._own.parts.items() if module == key or module.endswith(f".{key}")]
        if not said or dim > 1:
            return 1
        # Of these the weight's first axis is not its outputs'.
        turned = isinstance(
            self._full.get_submodule(module), torch.nn.modules.conv._ConvTransposeNd | torch.nn.Embedding
        )
        return said[0][1 - dim if turned and kind == "weight" else dim]

    def _unit(self, name: str) -> Unit | None:
        place = name.removeprefix(f"{self._own.blocks}.") if self._own.blocks else name
        index = place.partition(".")[0]
        return Unit("down", 0, self._own.blocks, int(index)) if place != name and index.isdigit() else None

    def _shrunk(self, share: float) -> dict[str, Any]:
        def each(name: str) -> Any:
            value = self.config[name]
            made = [shrunk(size, share, f"{name}={value!r}") for size in _numbers(value)]
            return made[0] if isinstance(value, int) else type(value)(made)

        return {**self.config, **{name: each(name) for name in self._own.shrinks}}

    # ------------------------------------------------------------------------------------------------------- archs

    def place(self, unit: Unit, arch: Arch) -> int | None:
        return unit.index if unit.index < self.depths(arch)[0] else None

    def canonical(self, arch: Arch) -> Arch:
        depths = tuple(min(d, most) for d, most in zip(self.depths(arch), self.full_depths, strict=True))
        return arch.replace(depths=() if depths == self.full_depths else depths, attention=())

    def graph(self, arch: Arch) -> WholeGraph:
        return WholeGraph()

    def layer_of(self, parameter: str, graph: Graph) -> str:
        return graph.layers[0].name

    def stock_class(self, arch: Arch) -> type[StockNet]:
        return self.stock

    def subconfig(self, arch: Arch) -> dict[str, Any]:
        self._check_form(arch)
        if arch.attention or arch.layers or not arch.middle:
            raise UserError(f"{arch}: subnets of a network of your own differ in width and depth alone")
        config = self._shrunk(arch.widths[0])
        return {**config, self._own.depth: self.depths(arch)[0]} if self._own.depth else config

    @property
    def attention_places(self) -> tuple[int | None, ...]:
        return ()

    def check_depths(self) -> None:
        if not self._own.depth:
            raise UserError("depths: nothing is said of this network's blocks; give Own(..., blocks=, depth=)")

    def layers(self, arch: Arch) -> tuple[int, ...]:
        return (0,)

    def check_layers(self, layers: tuple[int, ...], middle: bool) -> None:
        if layers or middle:
            raise UserError(f"layers {layers}, middle={middle}: a network of your own has neither; leave them out")

    @property
    def null_label(self) -> int | None:
        count = self.config.get("num_class_embeds")
        return None if count is None else int(count) - 1

    @property
    def out_channels(self) -> int:
        return int(self.config.get("out_channels") or self.config["in_channels"])


class MeasuredCost(CostModel):
    """Costs by calls on the meta device, a few milliseconds for each subnet once. Products of attention are among the MACs, and not told apart."""

    def __init__(self, anatomy: OwnAnatomy) -> None:
        super().__init__(anatomy)
        self._measured: dict[Arch, dict[str, Cost]] = {}

    def layers(self, arch: Arch) -> dict[str, Cost]:
        arch = arch.replace(expert="")
        if arch not in self._measured:
            self._measured[arch] = {self.graph(arch).layers[0].name: self._counted(arch)}
        return self._measured[arch]

    def _counted(self, arch: Arch) -> Cost:
        """Raises UserError where the class makes another network of this size than the slices are, or cannot be called."""
        anatomy = self._anatomy
        sources = anatomy.segments(arch)
        wanted = {name: tuple(sum(b - a for a, b in runs) for runs in source.axes) for name, source in sources.items()}
        x = torch.empty((1, int(anatomy.config["in_channels"]), *anatomy.sample_size), device="meta")
        labels = anatomy.some_condition(1, "meta").get("class_labels")
        words = f"{anatomy.stock.__name__} at width {arch.widths[0]:g}, {anatomy.depths(arch)[0]} blocks"
        try:
            net = skeleton(anatomy, arch).to("meta")
            with torch.inference_mode(), FlopCounterMode(display=False) as counter:
                net(x, torch.zeros(1, dtype=torch.long, device="meta"), labels, return_dict=False)
        except UserError:
            raise
        except Exception as error:  # whatever a module of the user's raises
            raise UserError(f"{words}: it cannot be called on the meta device ({first_line(error)})") from error
        made = {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}
        odd = sorted(made.keys() ^ wanted.keys()) or [name for name in made if made[name] != wanted[name]]
        if odd:
            raise UserError(
                f"{words}: {odd[0]} is {made.get(odd[0], 'missing')}, and the slice of the full network's {wanted.get(odd[0], 'missing')}; let sizes follow the "
                "width in proportion, and what follows the depth stand in the blocks"
            )
        return Cost(counter.get_total_flops() // 2, 0, sum(parameter.numel() for parameter in net.parameters()))


def _numbers(value: Any) -> list[int]:
    return [value] if isinstance(value, int) else [*value]


def _code(network: type[Any]) -> str:
    """A digest of the torch modules in the file where the class stands, comments and layout aside; empty where they cannot be read."""
    beside = vars(sys.modules[network.__module__]).values() if network.__module__ in sys.modules else ()
    mine = [one for one in beside if isinstance(one, type) and one.__module__ == network.__module__]
    modules = [one for one in {network, *mine} if issubclass(one, torch.nn.Module)]
    try:
        said = [ast.unparse(ast.parse(textwrap.dedent(inspect.getsource(one)))) for one in modules]
    except (OSError, TypeError, SyntaxError):
        return ""
    return digest_of(sorted(said))[:16]
