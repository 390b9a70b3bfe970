"""The elastic UNet: one set of weights whose slices are ordinary `diffusers.UNet2DModel`s of smaller widths.

The architecture is an argument of every call. In training a subnet is `functional_call` on a weightless skeleton with
slices of the shared weights, so gradients reach them; in evaluation it is a materialised copy kept in a small cache.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from diffusers import DDPMScheduler, UNet2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.func import functional_call

from nas.contracts import Denoiser, Step, UserError
from search_spaces.cost import CostModel
from search_spaces.unet import Anatomy, Arch, Groups, skeleton, take

WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class NoiseSchedule:
    """The forward process q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I); the network predicts the noise.

    Named as in diffusers, whose schedulers compute it.
    """

    timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"

    @property
    def scheduler(self) -> dict[str, Any]:
        """Arguments of any diffusers scheduler for the same process."""
        return {
            "num_train_timesteps": self.timesteps,
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
            "beta_schedule": self.beta_schedule,
            "prediction_type": "epsilon",
        }

    @property
    def alphas_cumprod(self) -> npt.NDArray[np.float64]:
        """abar_t for t = 0..timesteps-1."""
        abar: npt.NDArray[np.float64] = DDPMScheduler(**self.scheduler).alphas_cumprod.double().numpy()
        return abar


@dataclass(frozen=True)
class ElasticUNet:
    """Recipe of the supernet.

    `config`: arguments of `diffusers.UNet2DModel`, block types Down/Up/AttnDown/AttnUpBlock2D.
    `widths`: shares of each level's channels that the study may use, 1.0 among them.
    `groups`: GroupNorm keeps its group *count* at every width (any widths), or its group *size* (one share for the
    whole net; trains a little better). Raises UserError where a width does not give a stock model.
    """

    config: Mapping[str, Any]
    widths: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    groups: Groups = "count"
    noise: NoiseSchedule = field(default_factory=NoiseSchedule)

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(sorted(float(width) for width in self.widths)))
        if self.widths[-1] != 1.0 or len(set(self.widths)) != len(self.widths):
            raise UserError(f"widths {self.widths} must be distinct and include 1.0, the full network")
        for width in self.widths:
            self.anatomy.subconfig(self.uniform(width))

    @cached_property
    def anatomy(self) -> Anatomy:
        return Anatomy(self.config, self.groups)

    @cached_property
    def cost(self) -> CostModel:
        """MACs and parameters of an arch: `net.cost(arch).macs`."""
        return CostModel(self.anatomy)

    def uniform(self, width: float) -> Arch:
        """The same share at every level."""
        return (width,) * self.anatomy.levels

    def describe(self) -> dict[str, Any]:
        return {
            "class": "ElasticUNet",
            "config": self.anatomy.config,
            "widths": self.widths,
            "groups": self.groups,
            "noise": self.noise.scheduler,
        }

    def initial(self, seed: int, device: str = "cpu") -> LoadedElasticUNet:
        """Freshly initialised weights, as the stock class draws them."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            full = UNet2DModel(**self.anatomy.config)
        return LoadedElasticUNet(self, full.to(device))

    def digest(self, folder: Path) -> str:
        return hashlib.sha256(_weights(folder).read_bytes()).hexdigest()[:16]

    def load(self, folder: Path, device: str) -> LoadedElasticUNet:
        path = _weights(folder)
        full = skeleton(self.anatomy, self.anatomy.full).to_empty(device=device)
        try:
            full.load_state_dict(load_file(path, device=device))
        except (SafetensorError, RuntimeError) as error:
            raise UserError(
                f"{path} cannot be read as weights of this supernet ({_first_line(error)}); delete it to train again"
            ) from error
        return LoadedElasticUNet(self, full)

    def __getstate__(self) -> dict[str, Any]:
        """Fields alone: what is derived from them is derived again where the recipe lands."""
        return {name: self.__dict__[name] for name in self.__dataclass_fields__}


class LoadedElasticUNet:
    """The supernet with its weights. `full` is a stock model and holds all of them.

    `cache_size` materialised subnets are kept, least recently used first out.
    """

    def __init__(self, recipe: ElasticUNet, full: UNet2DModel, cache_size: int = 16) -> None:
        self.recipe = recipe
        self.full = full
        self.device = next(full.parameters()).device
        self.alphas_cumprod = recipe.noise.alphas_cumprod
        self.scheduler = recipe.noise.scheduler
        self.image_shape = (recipe.anatomy.config["in_channels"], *recipe.anatomy.sample_size)
        self.full_arch = recipe.uniform(recipe.widths[-1])
        self.smallest_arch = recipe.uniform(recipe.widths[0])
        self.version = 0
        self._cache_size = cache_size
        self._subnets: OrderedDict[Arch, Any] = OrderedDict()
        self._form = (False, False)
        self._skeletons: dict[Arch, UNet2DModel] = {}

    def forward(
        self, arch: Arch, x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The subnet's prediction, differentiable in the shared weights. x: (batch, channels, h, w); t: (batch,)."""
        if arch not in self._skeletons:
            self._skeletons[arch] = skeleton(self.recipe.anatomy, arch)
        net = self._skeletons[arch].train(self.full.training)
        prediction: torch.Tensor = functional_call(net, self._slices(arch), (x, t, condition, False))[0]
        return prediction

    def denoiser(self, step: Step) -> Denoiser:
        """Inference with a materialised copy of the step's subnet, as the weights were at its first use."""
        if step.reuse:
            raise UserError(
                f"this supernet reuses no blocks, but the step at timestep {step.timestep} asks for {step.reuse}"
            )
        net = self._materialised(step.arch)

        def call(
            x: torch.Tensor, t: int, cache: Any = None, condition: torch.Tensor | None = None
        ) -> tuple[torch.Tensor, Any]:
            return net(x, t, condition, return_dict=False)[0], cache

        return call

    def to_images(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def extract(self, arch: Arch) -> UNet2DModel:
        return self._copy(arch, torch.device("cpu"))

    def macs(self, arch: Arch) -> int:
        return self.recipe.cost(arch).macs

    def forget(self) -> None:
        """Drops the materialised subnets and starts a new version; for whoever has changed the weights."""
        self._subnets.clear()
        self.version += 1

    def run_as(self, channels_last: bool, compiled: bool) -> None:
        if (channels_last, compiled) != self._form:
            self._form = (channels_last, compiled)
            self._subnets.clear()
        if compiled:
            # All subnets are of one class, and torch counts what it compiles for it in one place.
            torch._dynamo.config.recompile_limit = max(256, torch._dynamo.config.recompile_limit)

    def _materialised(self, arch: Arch) -> Any:
        if arch in self._subnets:
            self._subnets.move_to_end(arch)
        else:
            channels_last, compiled = self._form
            net = self._copy(arch, self.device)
            net = net.to(memory_format=torch.channels_last) if channels_last else net
            self._subnets[arch] = torch.compile(net) if compiled else net
            if len(self._subnets) > self._cache_size:
                self._subnets.popitem(last=False)
        return self._subnets[arch]

    def _copy(self, arch: Arch, device: torch.device) -> UNet2DModel:
        net = skeleton(self.recipe.anatomy, arch).to_empty(device=device)
        with torch.no_grad():
            slices = self._slices(arch)
            for name, parameter in net.named_parameters():
                parameter.copy_(slices[name])
        return net.requires_grad_(False)

    def _slices(self, arch: Arch) -> dict[str, torch.Tensor]:
        segments = self.recipe.anatomy.segments(arch)
        return {name: take(tensor, segments[name]) for name, tensor in self.full.named_parameters()}


def _weights(folder: Path) -> Path:
    path = folder / WEIGHTS
    if not path.exists():
        raise UserError(f"{path} does not exist; `nas run` trains it")
    return path


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
