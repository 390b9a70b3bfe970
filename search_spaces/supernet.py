"""The elastic network: one set of weights whose slices are ordinary diffusers models, narrower, shallower, with less attention. Here is its
recipe; `loaded` has it with its weights.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping
from dataclasses import field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file

from nas.base.files import file_digest, first_line, tensors_digest
from nas.contracts import Guidance, Step, UserError, digest_of
from nas.recipes import Count, Natural, recipe
from search_spaces.codec import Codec, Pixels, autoencoder_in
from search_spaces.loaded import LoadedElastic
from search_spaces.lora import fused, lora_digest
from search_spaces.networks.anatomy import Anatomy, StockNet, predict, skeleton, unset
from search_spaces.networks.cost import Cost, CostModel
from search_spaces.networks.families import anatomy_of
from search_spaces.networks.own import MeasuredCost, Own, OwnAnatomy
from search_spaces.networks.slices import Arch, Groups
from search_spaces.networks.text_unet import Heads, TextUNet
from search_spaces.networks.transformer import Transformer
from search_spaces.noise import NoiseSchedule
from search_spaces.options import Options, PerLevel, Subnets
from search_spaces.pretrained import AUTOENCODERS, find, read_weights, weights_digest
from search_spaces.shipped.reuse import run
from search_spaces.text import ClassTable, LoadedText, Text, TextEncoder

WEIGHTS = "weights.safetensors"


@recipe
class Elastic:
    """Recipe of the supernet.

    `config`: arguments of `diffusers.UNet2DModel`, block types Down/Up/AttnDown/AttnUpBlock2D; or, where there is a `cross_attention_dim` among
    them, of `UNet2DConditionModel`, which reads a text of `tokens`, block types Down/Up/CrossAttnDown/CrossAttnUpBlock2D; or of a
    `DiTTransformer2DModel` or `PixArtTransformer2DModel`, whose `depths` are numbers of blocks; or of a class of your own, `network=Own(...)`.
    `widths` or `channels`, `depths`, `per_level`, `attention`, `layers`, `middle`: what its subnets may differ in, see `Options`; the full network is among them.
    `groups`: GroupNorm keeps its group *count* at every width (any widths), or its group *size* (one share for the
    whole net; trains a little better). `heads`: of a narrower attention that reads a text, fewer "whole" ones or as many "slim" ones. `experts`: training timesteps at which another copy of the weights takes over.
    `pretrained`: a diffusers UNet2DModel or UNet2DConditionModel folder whose weights it starts from; `loras`: safetensors files of low-rank changes
    that are added to them first.
    `block_order`: of a transformer, the block to keep longest first; evenly spread without it. `guided_channels`: how many of a state's channels a
    guided step guides, all by default; DiT's own sampler guides three of four.
    `codec`: what its states are of an image, `Pixels()` or the latents of an `Autoencoder("vae/")`. `text`: what makes of a caption what the
    network reads, such as `TextEncoder("sd15/")`; training needs it, and who exports a pipeline that is to take prompts.
    Raises UserError where an option does not give a stock model.
    """

    config: Mapping[str, Any]
    widths: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    groups: Groups = "count"
    noise: NoiseSchedule = field(default_factory=NoiseSchedule)
    depths: tuple[int, ...] = ()
    per_level: tuple[PerLevel, ...] = ()
    attention: bool = False
    experts: tuple[int, ...] = ()
    pretrained: str | None = None
    channels: tuple[tuple[Count, ...], ...] = ()
    codec: Codec = field(default_factory=Pixels)
    text: Text | None = None
    layers: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = ()
    middle: bool = False
    heads: Heads = "whole"
    tokens: Count | None = None
    loras: tuple[str, ...] = ()
    block_order: tuple[Natural, ...] = ()
    guided_channels: Count | None = None
    network: Own | None = None

    def __post_init__(self) -> None:
        options = self.options
        for name in ("widths", "depths", "per_level", "channels", "layers"):
            object.__setattr__(self, name, getattr(options, name))
        for level, (counts, full) in enumerate(zip(options.channels, self.anatomy.channels, strict=False)):
            if counts[-1] != full:
                raise UserError(f"channels {counts} of level {level} must include {full}, the full network's")
        if options.widths[-1] != 1.0:
            raise UserError(f"widths {options.widths} must include 1.0, the full network")
        if options.depths and options.depths[-1] != self.anatomy.depth:
            raise UserError(f"depths {options.depths} must include {self.anatomy.depth}, the full network")
        self.anatomy.check_layers(options.layers, options.middle)
        if options.layers and options.layers[-1] != max(self.anatomy.layers(self.anatomy.full)):
            most = max(self.anatomy.layers(self.anatomy.full))
            raise UserError(f"layers {options.layers} must include {most}, the full network")
        if list(self.experts) != sorted({t for t in self.experts if 0 < t < self.noise.timesteps}):
            raise UserError(
                f"experts {self.experts} must be increasing timesteps between 1 and {self.noise.timesteps - 1}"
            )
        if self.pretrained is not None:  # relative paths are those of where the recipe is written down
            object.__setattr__(self, "pretrained", str(Path(self.pretrained).expanduser().absolute()))
        object.__setattr__(self, "loras", tuple(str(Path(lora).expanduser().absolute()) for lora in self.loras))
        if self.loras and self.pretrained is None:
            raise UserError(f"loras {self.loras} change trained weights; give pretrained=, or leave them out")
        channels = int(self.anatomy.config["in_channels"])
        if self.guided_channels is not None and not (self.conditional and self.guided_channels <= channels):
            raise UserError(
                f"guided_channels={self.guided_channels} must be at most the {channels} of a state, of a network that takes conditions; leave it out "
                "to guide all"
            )
        self.subnets(options)
        self.codec.image_shape(self.state_shape)

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the sampler's state."""
        return (int(self.anatomy.config["in_channels"]), *self.anatomy.sample_size)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.codec.image_shape(self.state_shape)

    @classmethod
    def from_pretrained(cls, path: str | Path, **settings: Any) -> Elastic:
        """The elastic network of a trained diffusers model: the folder of a UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel or
        PixArtTransformer2DModel, or of a pipeline with one (DDPM, DDIM, LDM, DiT, Stable Diffusion and XL, PixArt), whose scheduler says which noise process it was trained on, and whose autoencoder and text encoders
        are taken as they stand there. `settings` as for the class. Reads the folder alone, no hub.

        Raises UserError where the folder holds no such model, its weights are not that network's, or its process cannot be kept.
        """
        found = find(path, settings.pop("noise", None))
        if found.autoencoder is not None and "codec" not in settings:
            settings["codec"] = autoencoder_in(found.autoencoder)
        if found.undecoded and "codec" not in settings:
            raise UserError(
                f"{path} decodes by an autoencoder of the class {found.undecoded}, and known are {', '.join(AUTOENCODERS)}; give the folder with one of these, or codec="
            )
        if found.text is not None and "text" not in settings:
            side = found.config.get("sample_size")
            if side is None:
                raise UserError(
                    f"{found.folder / 'config.json'} has no sample_size, which costs depend on; write it there"
                )
            shape = (found.config["in_channels"], *((side, side) if isinstance(side, int) else side))
            height, width = settings.get("codec", Pixels()).image_shape(shape)[1:]
            settings["text"] = TextEncoder(str(found.text), size=(height, width), length=found.length)
        if found.classes is not None and "text" not in settings:
            settings["text"] = ClassTable(str(found.classes))
        if settings.get("text") is not None and "tokens" not in settings:
            settings["tokens"] = settings["text"].shape[0]
        return cls(found.config, pretrained=str(found.folder), noise=found.noise or NoiseSchedule(), **settings)

    @cached_property
    def anatomy(self) -> Anatomy:
        if self.network is not None:
            given = {
                "groups": self.groups != "count",
                "heads": self.heads != "whole",
                "tokens": self.tokens is not None,
            }
            for name in (name for name, said in {**given, "block_order": bool(self.block_order)}.items() if said):
                raise UserError(
                    f"{name}={getattr(self, name)!r}: a network of your own has no such choice; leave it out"
                )
            return OwnAnatomy(self.network, self.config)
        return anatomy_of(self.config, self.groups, self.heads, self.tokens, self.block_order)

    @cached_property
    def cost(self) -> CostModel:
        """MACs and parameters of an arch: `net.cost(arch).macs`."""
        return MeasuredCost(self.anatomy) if isinstance(self.anatomy, OwnAnatomy) else CostModel(self.anatomy)

    def macs(self, step: Step) -> int:
        """Exact multiply-adds of a step on one sample. One of a UNet that reuses everything holds a prediction and calls nothing, whoever guided it; a
        transformer then runs what stands around its blocks."""
        return self._of_step(step, self.cost.macs)

    def attention_macs(self, step: Step) -> int:
        """Those among them of the products of attention, which some papers leave out."""
        return self._of_step(step, self.cost.attention_macs)

    def check_guidance(self, guide: Guidance | None) -> None:
        """Raises UserError where the subnet that is to guide is none of this network."""
        if guide is not None and guide.arch:
            self.anatomy.subconfig(Arch(*guide.arch))
            self.anatomy.segments(Arch(*guide.arch))

    def guided_by(self, guide: Guidance | None, arch: Arch) -> Guidance | None:
        """By the subnet's own weights where they are an expert's, and by itself where it is the subnet that guides."""
        if guide is None or not guide.arch:
            return guide
        other = Arch(*guide.arch).replace(expert=arch.expert)
        return Guidance(guide.scale) if other == arch else Guidance(guide.scale, other)

    def _of_step(self, step: Step, each: Callable[[Arch, Collection[str]], int]) -> int:
        arch = Arch(*step.arch)
        own = each(arch, step.reuse)
        if step.guidance is None or not self.cost.macs(arch, step.reuse):
            return own
        other = Arch(*step.guidance.arch) if step.guidance.arch else arch
        return own + (own if other == arch else each(other, ()))

    def uniform(self, width: float) -> Arch:
        """The same share at every level, as deep as the full network."""
        return Arch((float(width),) * self.anatomy.levels)

    @property
    def conditional(self) -> bool:
        """Whether the network takes conditions: class labels, the last of `num_class_embeds` being that of no class, or a text."""
        return self.anatomy.conditional

    @property
    def condition_kind(self) -> str:
        """What these are: "labels", "texts", or "labels and texts"; empty where it takes none."""
        kinds = ["labels"] if self.anatomy.null_label is not None else []
        return " and ".join([*kinds, "texts"] if self.anatomy.text_channels else kinds)

    @property
    def in_pixels(self) -> bool:
        """Whether a state is an image."""
        return isinstance(self.codec, Pixels)

    @property
    def learned_variance(self) -> bool:
        """Whether it has twice as many output as input channels, and so says where a step's variance lies (Nichol & Dhariwal 2021)."""
        return self.anatomy.out_channels == 2 * int(self.anatomy.config["in_channels"])

    @property
    def options(self) -> Options:
        """What its subnets may differ in."""
        return Options(
            self.widths, self.depths, self.per_level, self.attention, self.channels, self.layers, self.middle
        )

    def subnets(self, options: Options, share: float = 1.0) -> Subnets:
        """The subnets of these options that cost no more than a share of the full network's MACs."""
        key = options, share
        if key not in self._subnets:
            most = math.inf if share >= 1 else share * self.cost(self.anatomy.full).macs
            self._subnets[key] = Subnets(self.anatomy, self.cost, options, most)
        return self._subnets[key]

    @cached_property
    def _subnets(self) -> dict[tuple[Options, float], Subnets]:
        return {}

    @property
    def expert_names(self) -> tuple[str, ...]:
        """Of the copies of the weights, by the timesteps that they serve, clean to noisy; none without experts."""
        bounds = [0, *self.experts, self.noise.timesteps]
        return tuple(f"{start}-{stop - 1}" for start, stop in pairwise(bounds)) if self.experts else ()

    def served_by(self, expert: str) -> tuple[int, int]:
        """Timesteps start..stop-1 that the expert serves; all of them for the shared weights."""
        bounds = [0, *self.experts, self.noise.timesteps]
        served: dict[str, tuple[int, int]] = dict(zip(self.expert_names, pairwise(bounds), strict=False))
        return served.get(expert, (0, self.noise.timesteps))

    def expert_at(self, timestep: int) -> str:
        """Name of the weights that serve the timestep."""
        return self.expert_names[bisect_right(self.experts, timestep)] if self.experts else ""

    def describe(self) -> dict[str, Any]:
        return {
            "class": "ElasticUNet",  # its first name, which kept runs were written under
            **self._kind(),
            "config": self.anatomy.config,
            "widths": self.widths,
            "groups": self.groups,
            "noise": self.noise.scheduler,
            "depths": self.depths,
            "per_level": self.per_level,
            "attention": self.attention,
            "experts": self.experts,
            "pretrained": None if self.pretrained is None else weights_digest(Path(self.pretrained)),
            **({"channels": self.channels} if self.channels else {}),
            **({"loras": [lora_digest(Path(lora)) for lora in self.loras]} if self.loras else {}),
            **({"block_order": self.block_order} if self.block_order else {}),
            **({"guided_channels": self.guided_channels} if self.guided_channels else {}),
            **self._of_text(),
            **({} if self.in_pixels else {"codec": self.codec.describe()}),
        }

    @property
    def exportable(self) -> bool:
        """Whether a folder of stock diffusers models can hold what is found."""
        return self.network is None

    def _kind(self) -> dict[str, Any]:
        """Of transformers their stock class, which their settings do not always tell apart, and of your own what it is."""
        if self.network is not None:
            return {"own": self.network.describe()}
        return {"stock": self._stock.__name__} if isinstance(self.anatomy, Transformer) else {}

    def _of_text(self) -> dict[str, Any]:
        if not self.anatomy.text_channels:
            return {}
        text = None if self.text is None else self.text.describe()
        told: dict[str, Any] = {}
        if isinstance(self.anatomy, TextUNet):
            told = {"layers": self.layers, "middle": self.middle, "heads": self.heads}
        return {**told, "tokens": self.anatomy.tokens, **({"text": text} if text else {})}

    def profile(self, step: Step) -> dict[str, float]:
        arch = Arch(*step.arch)
        graph = self.cost.graph(arch)
        reused = graph.expand(step.reuse)
        whole = _by_block(self.cost.layers(self.anatomy.full))
        mine = _by_block({name: cost for name, cost in self.cost.layers(arch).items() if name not in reused})
        placed = {self.anatomy.in_full(block, arch): block for block in graph.blocks}

        def share(block: str) -> float:
            own = placed.get(block, "")
            layers = graph.expand([own])
            return -1.0 if layers and layers <= reused else mine.get(own, 0) / whole[block] if own else 0.0

        return {block: share(block) for block in self.cost.graph(self.anatomy.full).blocks}

    @property
    def _branches(self) -> frozenset[str]:
        """Outputs of all branches of the full network."""
        graph = self.cost.graph(self.anatomy.full)
        return graph.outputs(graph.blocks)

    def kept_numbers(self, arch: Arch) -> dict[str, int]:
        """Of each branch and layer, how many its output has for one sample."""
        net, x = skeleton(self.anatomy, arch).to("meta"), torch.empty((1, *self.state_shape), device="meta")
        t, told = torch.zeros(1, dtype=torch.long, device="meta"), self.anatomy.some_condition(1, "meta")
        with torch.inference_mode():
            _, kept = run(net, x, t, keep=self.cost.graph(arch).names("layers"), condition=told)
        return {name: value.numel() for name, value in kept.items()}

    def outline(self) -> dict[str, float]:
        smallest = self.subnets(self.options).flat(0)
        activations = 0
        for arch in (smallest, self.anatomy.full):
            net, shape = (
                skeleton(self.anatomy, arch).to("meta"),
                (1, self.anatomy.config["in_channels"], *self.anatomy.sample_size),
            )
            sizes: list[int] = []
            for module in net.modules():
                module.register_forward_hook(lambda _, __, output, sizes=sizes: sizes.append(_numbers(output)))
            x = torch.empty(shape, device="meta")
            told = self.anatomy.some_condition(1, "meta")
            with torch.inference_mode():
                handed = predict(net, x, torch.zeros(1, dtype=torch.long, device="meta"), told).shape
            if handed[0] != 1 or handed[2:] != shape[2:]:
                raise UserError(f"the subnet {arch} makes {tuple(handed)} of an input of {shape}; check sample_size")
            activations = sum(sizes)
        numbers = self.kept_numbers(self.anatomy.full)
        kept = sum(numbers[name] for name in self._branches)
        cost, distinct = self.cost(self.anatomy.full), self.cost.distinct_params(self.anatomy.full)
        return {
            "params": cost.params,
            "macs": cost.macs,
            "attention_macs": cost.attention_macs,
            "activations": activations,
            "kept_numbers": kept,
            **({"distinct_params": distinct} if distinct != cost.params else {}),
            **({"decoder_macs": decoder} if (decoder := self.codec.decoder_macs(self.state_shape)) else {}),
            **({"codec_training_macs": spent} if (spent := self.codec.training_macs(self.state_shape)) else {}),
        }

    def initial(self, seed: int, device: str = "cpu", folder: Path | None = None) -> LoadedElastic:
        """Freshly initialised weights, as the stock class draws them, or the pretrained ones. `folder`: where the codec finds what it has
        made, and keeps what it makes."""
        if self.pretrained is not None:
            full = skeleton(self.anatomy, self.anatomy.full).train()
            config = {"_class_name": self._stock.__name__, **self.anatomy.config}
            weights = read_weights(Path(self.pretrained), config)
            for lora in self.loras:
                weights = fused(weights, Path(lora))
            full.load_state_dict(weights, assign=True)  # or memory would hold them twice
            self.anatomy.check_copies(full)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                full = self._stock(**self.anatomy.config)
                self.anatomy.initialise(full)
        full = self.anatomy.tie(full)
        return LoadedElastic(self, full.to(device), self.codec.load(folder, device), text=self._text(folder, device))

    def _text(self, folder: Path | None, device: str) -> LoadedText | None:
        return None if self.text is None else self.text.load(folder, device)

    def digest(self, folder: Path) -> str:
        own, codec = tensors_digest(_weights(folder)), self.codec.digest(folder)
        return digest_of([own, codec]) if codec else own

    def former_digest(self, folder: Path) -> str:
        """By the bytes of the file, as ledgers were once written."""
        return file_digest(_weights(folder))[:16]

    def load(self, folder: Path, device: str) -> LoadedElastic:
        loaded = self.read(_weights(folder), device)
        if tuple(loaded.experts) != self.expert_names:
            raise UserError(
                f"{_weights(folder)} holds the experts {tuple(loaded.experts)}, the supernet has {self.expert_names}; train it with "
                "`Experts` among its stages"
            )
        return loaded

    def read(self, path: Path, device: str) -> LoadedElastic:
        """Weights of a file, with whatever experts are in it. Raises UserError where it cannot be read as such."""
        try:
            copies: dict[str, dict[str, torch.Tensor]] = {}
            for name, tensor in load_file(path, device=device).items():
                expert, _, parameter = name.rpartition("/")
                copies.setdefault(expert, {})[parameter] = tensor
            full = self._full(copies.get("", {}), device, path)
            experts = {name: self._full(copies[name], device, path) for name in self.expert_names if name in copies}
        except SafetensorError as error:
            raise UserError(f"{path} is damaged ({first_line(error)}); move it away to train again") from error
        codec, text = self.codec.load(path.parent, device), self._text(path.parent, device)
        return LoadedElastic(self, full, codec, experts, text=text)

    def _full(self, tensors: Mapping[str, torch.Tensor], device: str, path: Path) -> StockNet:
        full = self.anatomy.tie(unset(skeleton(self.anatomy, self.anatomy.full), device))
        held = dict(full.named_parameters())
        odd = sorted(held.keys() ^ tensors.keys()) or [n for n, p in held.items() if p.shape != tensors[n].shape]
        if odd:
            raise UserError(
                f"{path} holds the weights of another supernet ({odd[0]} is not in both, or not of one shape, and {len(odd) - 1} more); restore "
                "the study, or use another --out"
            )
        with torch.no_grad():
            for name, parameter in held.items():
                parameter.copy_(tensors[name])
        return full

    @property
    def _stock(self) -> type[StockNet]:
        return self.anatomy.stock_class(self.anatomy.full)

    def __getstate__(self) -> dict[str, Any]:
        """Fields alone: what is derived from them is derived again where the recipe lands."""
        return {name: self.__dict__[name] for name in self.__dataclass_fields__}


ElasticUNet = Elastic
"""What study files called it while all networks were UNets."""


def _numbers(output: Any) -> int:
    """How many a module hands out."""
    if isinstance(output, torch.Tensor):
        return output.numel()
    return sum(map(_numbers, output)) if isinstance(output, tuple | list) else 0


def _by_block(branches: Mapping[str, Cost]) -> dict[str, int]:
    """MACs of the branches of each block together."""
    found: dict[str, int] = {}
    for branch, cost in branches.items():
        block = branch.partition(".")[0]
        found[block] = found.get(block, 0) + cost.macs
    return found


def _weights(folder: Path) -> Path:
    path = folder / WEIGHTS
    if not path.exists():
        raise UserError(f"{path} does not exist; `nas run` trains it")
    return path
