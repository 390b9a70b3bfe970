"""The elastic UNet: one set of weights whose slices are ordinary diffusers UNets, narrower, shallower, with less attention.

The architecture is an argument of every call. In training a subnet is `functional_call` on a weightless skeleton with
slices of the shared weights, so gradients reach them; in evaluation it is a materialised copy kept in a small cache.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, field
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.func import functional_call

from nas.base.files import file_digest, first_line, tensors_digest
from nas.contracts import Condition, Denoiser, Finer, Gated, Guidance, ImageSet, Step, UserError, digest_of
from nas.recipes import Count, recipe
from search_spaces.codec import Autoencoder, Codec, LoadedCodec, Pixels
from search_spaces.lora import fused, lora_digest
from search_spaces.networks.cost import Cost, CostModel
from search_spaces.networks.slices import Arch, Groups, take
from search_spaces.networks.text_unet import Heads, TextUNet, anatomy_of
from search_spaces.networks.unet import Anatomy, StockUNet, predict, skeleton
from search_spaces.noise import NoiseSchedule
from search_spaces.options import Options, PerLevel, Subnets
from search_spaces.pretrained import find, read_weights, weights_digest
from search_spaces.shipped.reuse import arguments, as_noise, first_rows, guided, null_of, run
from search_spaces.text import LoadedText, Text, TextEncoder

WEIGHTS = "weights.safetensors"


@recipe
class ElasticUNet:
    """Recipe of the supernet.

    `config`: arguments of `diffusers.UNet2DModel`, block types Down/Up/AttnDown/AttnUpBlock2D; or, where there is a `cross_attention_dim` among
    them, of `UNet2DConditionModel`, which reads a text of `tokens`, block types Down/Up/CrossAttnDown/CrossAttnUpBlock2D.
    `widths` or `channels`, `depths`, `per_level`, `attention`, `layers`, `middle`: what its subnets may differ in, see `Options`; the full network is among them.
    `groups`: GroupNorm keeps its group *count* at every width (any widths), or its group *size* (one share for the
    whole net; trains a little better). `heads`: of a narrower attention that reads a text, fewer "whole" ones or as many "slim" ones. `experts`: training timesteps at which another copy of the weights takes over.
    `pretrained`: a diffusers UNet2DModel or UNet2DConditionModel folder whose weights it starts from; `loras`: safetensors files of low-rank changes
    that are added to them first.
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
    tokens: Count = 77
    loras: tuple[str, ...] = ()

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
    def from_pretrained(cls, path: str | Path, **settings: Any) -> ElasticUNet:
        """The elastic network of a trained diffusers model: the folder of a UNet2DModel or UNet2DConditionModel, or of a pipeline with one (DDPM,
        DDIM, LDM, Stable Diffusion and XL), whose scheduler says which noise process it was trained on, and whose autoencoder and text encoders
        are taken as they stand there. `settings` as for the class. Reads the folder alone, no hub.

        Raises UserError where the folder holds no such model, its weights are not that network's, or its process cannot be kept.
        """
        found = find(path, settings.pop("noise", None))
        if found.autoencoder is not None and "codec" not in settings:
            settings["codec"] = Autoencoder(str(found.autoencoder))
        if found.text is not None and "text" not in settings:
            side = found.config["sample_size"]
            shape = (found.config["in_channels"], *((side, side) if isinstance(side, int) else side))
            height, width = settings.get("codec", Pixels()).image_shape(shape)[1:]
            settings["text"] = TextEncoder(str(found.text), size=(height, width))
        return cls(found.config, pretrained=str(found.folder), noise=found.noise or NoiseSchedule(), **settings)

    @cached_property
    def anatomy(self) -> Anatomy:
        return anatomy_of(self.config, self.groups, self.heads, self.tokens)

    @cached_property
    def cost(self) -> CostModel:
        """MACs and parameters of an arch: `net.cost(arch).macs`."""
        return CostModel(self.anatomy)

    def macs(self, step: Step) -> int:
        """Exact multiply-adds of a step on one sample. One that reuses everything holds a prediction and calls nothing, whoever guided it."""
        return self._of_step(step, self.cost.macs)

    def attention_macs(self, step: Step) -> int:
        """Those among them of the products of attention, which some papers leave out."""
        return self._of_step(step, self.cost.attention_macs)

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
        """What these are: "labels" or "texts"; empty where it takes none."""
        return ("texts" if isinstance(self.anatomy, TextUNet) else "labels") if self.conditional else ""

    @property
    def in_pixels(self) -> bool:
        """Whether a state is an image."""
        return isinstance(self.codec, Pixels)

    @property
    def learned_variance(self) -> bool:
        """Whether it has twice as many output as input channels, and so says where a step's variance lies (Nichol & Dhariwal 2021)."""
        return bool(self.anatomy.config["out_channels"] == 2 * self.anatomy.config["in_channels"])

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
            "class": "ElasticUNet",
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
            **self._of_text(),
            **({} if self.in_pixels else {"codec": self.codec.describe()}),
        }

    def _of_text(self) -> dict[str, Any]:
        if not isinstance(self.anatomy, TextUNet):
            return {}
        text = None if self.text is None else self.text.describe()
        told = {"layers": self.layers, "middle": self.middle, "heads": self.heads, "tokens": self.tokens}
        return {**told, **({"text": text} if text else {})}

    def profile(self, step: Step) -> dict[str, float]:
        arch = Arch(*step.arch)
        graph = self.cost.graph(arch)
        reused = graph.expand(step.reuse)
        whole = _by_block(self.cost.layers(self.anatomy.full))
        mine = _by_block({name: cost for name, cost in self.cost.layers(arch).items() if name not in reused})

        def share(block: str) -> float:
            layers = graph.expand([block])
            return -1.0 if layers and layers <= reused else mine.get(block, 0) / whole[block]

        return {block: share(block) for block in self.cost.graph(self.anatomy.full).blocks}

    def outline(self) -> dict[str, float]:
        smallest = self.subnets(self.options).flat(0)
        activations = 0
        for arch in (smallest, self.anatomy.full):
            net, shape = (
                skeleton(self.anatomy, arch),
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
        cost = self.cost(self.anatomy.full)
        return {
            "params": cost.params,
            "macs": cost.macs,
            "attention_macs": cost.attention_macs,
            "activations": activations,
            **({"decoder_macs": decoder} if (decoder := self.codec.decoder_macs(self.state_shape)) else {}),
            **({"codec_training_macs": spent} if (spent := self.codec.training_macs(self.state_shape)) else {}),
        }

    def initial(self, seed: int, device: str = "cpu", folder: Path | None = None) -> LoadedElasticUNet:
        """Freshly initialised weights, as the stock class draws them, or the pretrained ones. `folder`: where the codec finds what it has
        made, and keeps what it makes."""
        if self.pretrained is not None:
            with torch.device("meta"):
                empty = self._stock(**self.anatomy.config)
            full = empty.to_empty(device="cpu").train()
            config = {"_class_name": self._stock.__name__, **self.anatomy.config}
            weights = read_weights(Path(self.pretrained), config)
            for lora in self.loras:
                weights = fused(weights, Path(lora))
            full.load_state_dict(weights)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                full = self._stock(**self.anatomy.config)
        return LoadedElasticUNet(
            self, full.to(device), self.codec.load(folder, device), text=self._text(folder, device)
        )

    def _text(self, folder: Path | None, device: str) -> LoadedText | None:
        return None if self.text is None else self.text.load(folder, device)

    def digest(self, folder: Path) -> str:
        own, codec = tensors_digest(_weights(folder)), self.codec.digest(folder)
        return digest_of([own, codec]) if codec else own

    def former_digest(self, folder: Path) -> str:
        """By the bytes of the file, as ledgers were once written."""
        return file_digest(_weights(folder))[:16]

    def load(self, folder: Path, device: str) -> LoadedElasticUNet:
        loaded = self.read(_weights(folder), device)
        if tuple(loaded.experts) != self.expert_names:
            raise UserError(
                f"{_weights(folder)} holds the experts {tuple(loaded.experts)}, the supernet has {self.expert_names}; train it with "
                "`Experts` among its stages"
            )
        return loaded

    def read(self, path: Path, device: str) -> LoadedElasticUNet:
        """Weights of a file, with whatever experts are in it. Raises UserError where it cannot be read as such."""
        try:
            copies: dict[str, dict[str, torch.Tensor]] = {}
            for name, tensor in load_file(path, device=device).items():
                expert, _, parameter = name.rpartition("/")
                copies.setdefault(expert, {})[parameter] = tensor
            full = self._full(copies.get("", {}), device)
            experts = {name: self._full(copies[name], device) for name in self.expert_names if name in copies}
        except SafetensorError as error:
            raise UserError(f"{path} is damaged ({first_line(error)}); move it away to train again") from error
        except RuntimeError as error:
            # Only what does not fit is the file's fault: memory that is short says nothing about it.
            if "state_dict" not in str(error):
                raise
            raise UserError(
                f"{path} holds the weights of another supernet ({' '.join(str(error).split())[:200]}); restore the study, or use another --out"
            ) from error
        codec, text = self.codec.load(path.parent, device), self._text(path.parent, device)
        return LoadedElasticUNet(self, full, codec, experts, text=text)

    def _full(self, tensors: Mapping[str, torch.Tensor], device: str) -> StockUNet:
        full = skeleton(self.anatomy, self.anatomy.full).to_empty(device=device)
        full.load_state_dict(tensors)
        return full

    @property
    def _stock(self) -> type[StockUNet]:
        return self.anatomy.stock_class(self.anatomy.full)

    def __getstate__(self) -> dict[str, Any]:
        """Fields alone: what is derived from them is derived again where the recipe lands."""
        return {name: self.__dict__[name] for name in self.__dataclass_fields__}


class LoadedElasticUNet:
    """The supernet with its weights. `full` is a stock model and holds all of them, `experts` further copies by name.

    `trained_macs` counts the multiply-adds of `forward`, thrice where gradients are wanted: forward and backward.
    `cache_size` materialised subnets are kept, least recently used first out.
    """

    def __init__(
        self,
        recipe: ElasticUNet,
        full: StockUNet,
        codec: LoadedCodec,
        experts: Mapping[str, StockUNet] = MappingProxyType({}),
        cache_size: int = 32,
        text: LoadedText | None = None,
    ) -> None:
        self.recipe = recipe
        self.full = full
        self.codec = codec
        self.text = text
        self.experts = dict(experts)
        self.device = next(full.parameters()).device
        self.alphas_cumprod = recipe.noise.alphas_cumprod
        self.final_alpha = recipe.noise.end
        self.scheduler = recipe.noise.scheduler
        self.state_shape, self.image_shape = recipe.state_shape, recipe.image_shape
        self.in_pixels = codec.in_pixels
        self.learned_variance = recipe.learned_variance
        self.full_arch = recipe.anatomy.full
        self.smallest_arch = recipe.subnets(recipe.options).flat(0)
        self.version = 0
        self.trained_macs = 0
        self._cache_size = cache_size
        self._subnets: OrderedDict[Arch, Any] = OrderedDict()
        self._adopted: dict[Arch, torch.nn.Module] = {}
        self._form = (False, False)
        self._skeletons: OrderedDict[Arch, Any] = OrderedDict()

    def forward(self, arch: Arch, x: torch.Tensor, t: torch.Tensor, condition: Condition | None = None) -> torch.Tensor:
        """The subnet's prediction, whatever it predicts, differentiable in the shared weights. x: (batch, channels, h, w); t: (batch,)."""
        net = self._skeleton(arch).train(self.full.training)
        inputs = arguments(net, x, t, condition)
        self.trained_macs += (3 if torch.is_grad_enabled() else 1) * len(x) * self.recipe.cost.macs(arch)
        prediction: torch.Tensor = functional_call(net, self._slices(arch), inputs, {"return_dict": False})[0]
        return prediction

    @contextmanager
    def lent(
        self, arch: Arch, checkpointing: bool = False
    ) -> Iterator[Callable[[torch.Tensor, torch.Tensor, Condition | None], torch.Tensor]]:
        """`forward`, of one subnet, for calls and their backward passes. With `checkpointing` its slices stay in place meanwhile, so that a backward
        pass may run blocks again, of which only the inputs are kept."""
        net = self._skeleton(arch).train(self.full.training)
        if not checkpointing:
            yield partial(self.forward, arch)
            return
        slices = self._slices(arch)
        # Leaves, so that several backward passes add up in them before the sum goes back through the slices, once.
        leaves = {name: tensor.detach().requires_grad_(tensor.requires_grad) for name, tensor in slices.items()}
        empty = {}
        for name, leaf in leaves.items():
            parameters, last = _owner(net, name)
            empty[name] = parameters[last]
            parameters[last] = leaf

        def call(x: torch.Tensor, t: torch.Tensor, condition: Condition | None = None) -> torch.Tensor:
            self.trained_macs += 4 * len(x) * self.recipe.cost.macs(arch)
            return predict(net, x, t, condition)

        net.enable_gradient_checkpointing()
        try:
            yield call
        finally:
            net.disable_gradient_checkpointing()
            for name, parameter in empty.items():
                parameters, last = _owner(net, name)
                parameters[last] = parameter
        found = [(slices[name], leaf.grad) for name, leaf in leaves.items() if leaf.grad is not None]
        if found:
            torch.autograd.backward([tensor for tensor, _ in found], [gradient for _, gradient in found])

    def weights(self, expert: str) -> StockUNet:
        """The full network of an expert, or the shared one where the name is empty. Raises UserError for a name it lacks."""
        if expert and expert not in self.experts:
            raise UserError(f"no expert is called {expert!r}; there are {', '.join(self.experts) or 'none'}")
        return self.experts[expert] if expert else self.full

    def denoiser(self, step: Step, keep: Sequence[str] = ()) -> Denoiser:
        """Inference with a materialised copy of the step's subnet, as the weights were at its first use. Compiled only where nothing is
        reused or kept."""
        net, guidance = self._materialised(Arch(*step.arch)), step.guidance
        stock = getattr(net, "_orig_mod", net)
        other = self._materialised(Arch(*step.archs[1])) if len(step.archs) > 1 else None
        held = bool(step.reuse) and not self.recipe.macs(step)

        def call(
            x: torch.Tensor, t: int, cache: Any = None, condition: Condition | None = None
        ) -> tuple[torch.Tensor, Any]:
            def own(x: torch.Tensor, cache: Any, condition: Condition | None) -> tuple[torch.Tensor, Any]:
                answer = partial(self._answer, x=x, t=t)
                if step.reuse or keep:
                    return run(stock, x, t, step.reuse, keep, cache, condition, answer=answer)
                return answer(predict(net, x, t, condition)), None

            def plain(x: torch.Tensor, null: Condition) -> torch.Tensor:
                return self._answer(predict(other, x, t, null), x, t)

            if held:  # the prediction as it was guided; what is handed on keeps all its rows
                return own(x, cache, condition)
            if guidance is None:
                return own(x, first_rows(cache, len(x)), condition)
            if condition is None:
                raise ValueError("a guided step needs the samples' conditions")
            null = self.null_condition(condition)
            return guided(own, plain if other is not None else None, x, guidance.scale, cache, condition, null)

        return call

    def gated(self, arch: Arch) -> Gated:
        net = self._materialised(Arch(*arch))
        stock = getattr(net, "_orig_mod", net)

        def call(
            x: torch.Tensor,
            t: int,
            gates: Mapping[str, torch.Tensor],
            cache: Any = None,
            condition: Condition | None = None,
            guidance: Guidance | None = None,
        ) -> tuple[torch.Tensor, Any]:
            def own(x: torch.Tensor, cache: Any, condition: Condition | None) -> tuple[torch.Tensor, Any]:
                answer = partial(self.noise_in, x=x, t=t)
                return run(stock, x, t, cache=cache, condition=condition, gates=gates, answer=answer)

            if guidance is None:
                return own(x, first_rows(cache, len(x)), condition)
            if condition is None:
                raise ValueError("a guided step needs the samples' conditions")
            other = self._materialised(Arch(*guidance.arch)) if guidance.arch else None

            def plain(x: torch.Tensor, null: Condition) -> torch.Tensor:
                return self.noise_in(predict(other, x, t, null), x, t)

            null = self.null_condition(condition)
            return guided(own, None if other is None else plain, x, guidance.scale, cache, condition, null)

        return call

    def noise_by(self, model: Any, x: torch.Tensor, t: int, condition: Condition | None = None) -> torch.Tensor:
        return self.noise_in(predict(model, x, t, condition), x, t)

    def noise_in(self, prediction: torch.Tensor, x: torch.Tensor, t: int) -> torch.Tensor:
        """What the output of a stock subnet says of the noise in x."""
        return self._answer(prediction[:, : x.shape[1]], x, t)

    def _answer(self, prediction: torch.Tensor, x: torch.Tensor, t: int) -> torch.Tensor:
        """The noise, and behind it what the network says of the variance."""
        return as_noise(prediction, x, float(self.alphas_cumprod[t]), self.recipe.noise.prediction)

    def blocks(self, arch: Arch, finer: Finer = False) -> tuple[str, ...]:
        return self.recipe.cost.graph(Arch(*arch)).names(finer)

    def expanded(self, arch: Arch, names: Sequence[str], finer: Finer = False) -> tuple[str, ...]:
        graph = self.recipe.cost.graph(Arch(*arch))
        branches = graph.expand(names)
        return tuple(name for name in graph.names(finer) if graph.expand([name]) <= branches)

    def reused(self, arch: Arch, wanted: Sequence[str], finer: Finer = False) -> tuple[str, ...]:
        graph = self.recipe.cost.graph(Arch(*arch))
        return graph.collapse(graph.expand(graph.blocks) - graph.live(wanted, finer), finer)

    @property
    def autoencoder(self) -> torch.nn.Module | None:
        return self.codec.network

    @property
    def posterior(self) -> str:
        return str(getattr(self.codec, "posterior", ""))

    def to_images(self, x: torch.Tensor) -> torch.Tensor:
        return self.codec.decode(x)

    def to_states(self, images: torch.Tensor) -> torch.Tensor:
        return self.codec.encode(images)

    def null_condition(self, condition: Condition) -> Condition:
        return null_of(condition, self.recipe.anatomy.null_label)

    def conditions_of(self, data: ImageSet) -> Callable[[torch.Tensor], Condition] | None:
        wanted = self.recipe.anatomy.some_condition(1)
        sources: list[Callable[[torch.Tensor], Condition]] = []
        if "class_labels" in wanted:
            if data.labels is None:
                raise UserError("the network takes class labels, but the images have none; use images with labels")
            labels = torch.from_numpy(data.labels)
            sources.append(lambda chosen: {"class_labels": labels[chosen]})
        if "encoder_hidden_states" in wanted:
            if self.text is None:
                raise UserError('the network reads texts; give it text=TextEncoder("folder of a pipeline")')
            if data.texts is None:
                raise UserError("the network reads captions, but the images have none; use images with captions")
            sources.append(self.text.rows(data.texts))

        def draw(chosen: torch.Tensor) -> Condition:
            found = [source(chosen.cpu()).items() for source in sources]
            return {name: rows.to(self.device) for items in found for name, rows in items}

        return draw if sources else None

    @property
    def text_components(self) -> Mapping[str, Any]:
        return {} if self.text is None else self.text.components

    @property
    def text_shape(self) -> dict[str, Any] | None:
        anatomy = self.recipe.anatomy
        if not isinstance(anatomy, TextUNet):
            return None
        size = getattr(self.recipe.text, "size", self.image_shape[1:])
        return {"tokens": anatomy.tokens, "size": list(size)}

    def some_condition(self, count: int) -> Condition | None:
        return self.recipe.anatomy.some_condition(count) or None

    def extract(self, arch: Arch) -> StockUNet:
        return self._copy(Arch(*arch), torch.device("cpu"))

    def macs(self, step: Step) -> int:
        return self.recipe.macs(step)

    @property
    def pipeline_files(self) -> tuple[Path, ...]:
        here = Path(__file__).parent / "shipped"
        return tuple(here / f"{name}.py" for name in ("pipeline", "reuse", "latents", "texts", "train_diffusers"))

    @property
    def training_settings(self) -> dict[str, Any]:
        from search_spaces.shipped.train_diffusers import Settings

        return asdict(Settings())

    def adopt(self, arch: Arch, model: torch.nn.Module) -> None:
        self._adopted[Arch(*arch)] = model.to(self.device).eval().requires_grad_(False)
        self.forget()

    def forget(self) -> None:
        """Drops the materialised subnets and starts a new version; for whoever has changed the weights."""
        self._subnets.clear()
        self.version += 1

    def run_as(self, channels_last: bool, compiled: bool) -> tuple[bool, bool]:
        before = self._form
        if (channels_last, compiled) != self._form:
            self._form = (channels_last, compiled)
            self._subnets.clear()
        if compiled:
            # All subnets are of one class, and torch counts what it compiles for it in one place.
            torch._dynamo.config.recompile_limit = max(256, torch._dynamo.config.recompile_limit)
        return before

    def _skeleton(self, arch: Arch) -> Any:
        key = arch.replace(expert="")
        if key not in self._skeletons:
            self._skeletons[key] = skeleton(self.recipe.anatomy, key)
            if len(self._skeletons) > 4 * self._cache_size:
                self._skeletons.popitem(last=False)
        return self._skeletons[key]

    def _materialised(self, arch: Arch) -> Any:
        if arch in self._subnets:
            self._subnets.move_to_end(arch)
        else:
            channels_last, compiled = self._form
            net: Any = self._adopted.get(arch) or self._copy(arch, self.device)
            net = net.to(memory_format=torch.channels_last) if channels_last else net
            self._subnets[arch] = torch.compile(net) if compiled else net
            if len(self._subnets) > self._cache_size:
                self._subnets.popitem(last=False)
        return self._subnets[arch]

    def _copy(self, arch: Arch, device: torch.device) -> StockUNet:
        # Copies may be asked for while inference is on, and are used with gradients later.
        with torch.inference_mode(False), torch.no_grad():
            net = skeleton(self.recipe.anatomy, arch).to_empty(device=device)
            slices = self._slices(arch)
            for name, parameter in net.named_parameters():
                parameter.copy_(slices[name])
        return net.requires_grad_(False)

    def _slices(self, arch: Arch) -> dict[str, torch.Tensor]:
        full = dict(self.weights(arch.expert).named_parameters())
        return {name: take(full, source) for name, source in self.recipe.anatomy.segments(arch).items()}


def _owner(net: Any, name: str) -> tuple[Any, str]:
    """The parameters of the module that has this one, and what it calls it."""
    module, _, last = name.rpartition(".")
    return net.get_submodule(module)._parameters, last


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
