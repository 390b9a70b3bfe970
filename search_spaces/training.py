"""Training of the supernet by the sandwich rule, resumable with the same call and bit-identical at one thread count."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nas.contracts import Images, ImageSet, Progress, Schedule, UserError, derive_seed, digest_of
from search_spaces.supernet import WEIGHTS, ElasticUNet, LoadedElasticUNet
from search_spaces.unet import Arch

CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class Sandwich:
    """Each step trains the largest, the smallest and `between` random subnets on one batch (Yu & Huang 2019).

    Every subnet draws its own timesteps and noises and minimises the plain noise-prediction error; the gradients are
    added with weight `full_weight` for the full net and 1 for the others, clipped to norm `clip`, and applied by one
    Adam step. Learning rate: linear warm-up, then cosine to zero. The weights that are kept are their exponential
    moving average with decay min(`ema`, (1 + step) / (10 + step)).
    """

    steps: int
    batch: int = 64
    learning_rate: float = 2e-3
    warmup: int = 100
    between: int = 1
    full_weight: float = 1.0
    ema: float = 0.999
    clip: float = 1.0
    flip: bool = False
    checkpoint_every: int = 250

    def describe(self) -> dict[str, Any]:
        settings = asdict(self)
        del settings["checkpoint_every"]
        return {"class": "Sandwich", **settings}

    def run(self, supernet: ElasticUNet, images: Images, folder: Path, seed: int, device: str) -> Iterator[Progress]:
        """Trains what is missing in `folder` and leaves `weights.safetensors` there. Yields after every step.

        Raises UserError where the folder holds a damaged checkpoint or weights of another recipe.
        """
        data = images.load()
        _check_trainable(supernet, data)
        digest = digest_of(
            {"supernet": supernet.describe(), "training": self.describe(), "seed": seed, "images": data.digest}
        )
        if (folder / WEIGHTS).exists():
            _check_recipe(folder / WEIGHTS, digest)
            return
        folder.mkdir(parents=True, exist_ok=True)
        state = _State(self, supernet.initial(derive_seed(seed, "supernet", "weights"), device), digest)
        if (folder / CHECKPOINT).exists():
            state.restore(folder / CHECKPOINT)
        yield from self._steps(state, data, folder, seed)
        state.save_average(folder / WEIGHTS)
        (folder / CHECKPOINT).unlink(missing_ok=True)

    def fit(self, net: LoadedElasticUNet, data: ImageSet, seed: int) -> Iterator[Progress]:
        """Trains a loaded supernet in place, without files; afterwards it holds the averaged weights."""
        state = _State(self, net, "")
        yield from self._steps(state, data, None, seed)
        state.adopt_average()

    def _steps(self, state: _State, data: ImageSet, folder: Path | None, seed: int) -> Iterator[Progress]:
        net = state.net
        batches = _Batches(net, data, self.batch, self.flip)
        while state.step < self.steps:
            generator = torch.Generator().manual_seed(derive_seed(seed, state.step, "sandwich"))
            x0 = batches.images(generator)
            losses: dict[str, float] = {}
            for arch in self._members(net.recipe, generator):
                t, x, noise = batches.noised(x0, generator)
                loss = torch.nn.functional.mse_loss(net.forward(arch, x, t), noise)
                weight = self.full_weight if arch == net.recipe.anatomy.full else 1.0
                torch.autograd.backward(weight * loss)
                losses[_name(arch)] = loss.item()
            state.update(self._learning_rate(state.step))
            if folder and (state.step % self.checkpoint_every == 0 or state.step == self.steps):
                state.save(folder / CHECKPOINT)
            yield Progress("supernet", state.step, self.steps, losses)

    def _members(self, recipe: ElasticUNet, generator: torch.Generator) -> list[Arch]:
        subnets = recipe.subnets(recipe.options)
        last = len(subnets) - 1
        drawn = torch.randperm(max(last - 1, 0), generator=generator)[: self.between].tolist()
        return list(dict.fromkeys(subnets.flat(i) for i in (last, 0, *(i + 1 for i in drawn))))

    def _learning_rate(self, step: int) -> float:
        return _warm_cosine(step, self.steps, self.warmup) * self.learning_rate


@dataclass(frozen=True)
class FineTune:
    """A short training of a supernet for one schedule: each timestep trains the subnet that serves it.

    A sampler step serves the timesteps from its own down to the next step's, the last one down to 0 and the first one
    all above it. Settings mean what they mean for `Sandwich`.
    """

    steps: int
    batch: int = 64
    learning_rate: float = 5e-4
    warmup: int = 50
    ema: float = 0.995
    clip: float = 1.0
    flip: bool = False

    def fit(self, net: LoadedElasticUNet, schedule: Schedule, data: ImageSet, seed: int) -> Iterator[Progress]:
        """Trains in place; afterwards the supernet holds the averaged weights, and its materialised subnets are new."""
        state = _State(self, net, "")
        batches = _Batches(net, data, self.batch, self.flip)
        served = torch.tensor(schedule.timesteps[1:], dtype=torch.long).flip(0)
        while state.step < self.steps:
            generator = torch.Generator().manual_seed(derive_seed(seed, state.step, "fine-tune"))
            t, x, noise = batches.noised(batches.images(generator), generator)
            position = len(schedule.steps) - 1 - torch.bucketize(t.cpu(), served)
            total = 0.0
            for arch in schedule.archs:
                mine = torch.tensor([schedule.steps[p].arch == arch for p in position.tolist()], device=net.device)
                if mine.any():
                    loss = (net.forward(arch, x[mine], t[mine]) - noise[mine]).square().mean() * mine.float().mean()
                    torch.autograd.backward(loss)
                    total += loss.item()
            state.update(_warm_cosine(state.step, self.steps, self.warmup) * self.learning_rate)
            yield Progress("fine-tune", state.step, self.steps, {"loss": total})
        state.adopt_average()


class _Batches:
    """Images of a batch and their noised versions, drawn from the generator of the step."""

    def __init__(self, net: LoadedElasticUNet, data: ImageSet, size: int, flip: bool) -> None:
        self._device = net.device
        self._size = size
        self._flip = flip
        self._pixels = torch.from_numpy(data.pixels).to(net.device)
        self._signal = torch.from_numpy(np.sqrt(net.alphas_cumprod)).float().to(net.device)
        self._noise = torch.from_numpy(np.sqrt(1 - net.alphas_cumprod)).float().to(net.device)

    def images(self, generator: torch.Generator) -> torch.Tensor:
        """x_0, (batch, channels, height, width)."""
        x0 = self._pixels[torch.randint(len(self._pixels), (self._size,), generator=generator).to(self._device)]
        if self._flip:
            mirrored = torch.rand(self._size, generator=generator).to(self._device) < 0.5
            x0 = torch.where(mirrored[:, None, None, None], x0.flip(-1), x0)
        return x0

    def noised(self, x0: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Uniform timesteps (batch,), x_t and the noise in it."""
        t = torch.randint(len(self._signal), (len(x0),), generator=generator).to(self._device)
        noise = torch.randn(x0.shape, generator=generator).to(self._device)
        return t, self._signal[t, None, None, None] * x0 + self._noise[t, None, None, None] * noise, noise


def _warm_cosine(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate: linear warm-up, cosine to zero."""
    return min(1.0, (step + 1) / max(warmup, 1)) * 0.5 * (1 + math.cos(math.pi * step / steps))


class _State:
    """Weights, their average, Adam's moments and the step: all that a checkpoint keeps."""

    def __init__(self, settings: Sandwich | FineTune, net: LoadedElasticUNet, digest: str) -> None:
        self.net = net
        self.step = 0
        self._settings = settings
        self._digest = digest
        self._named = dict(net.full.train().requires_grad_(True).named_parameters())
        self._average = {name: p.detach().clone() for name, p in self._named.items()}
        self._adam = torch.optim.Adam(self._named.values(), lr=settings.learning_rate)

    def update(self, learning_rate: float) -> None:
        torch.nn.utils.clip_grad_norm_(self._named.values(), self._settings.clip)
        self._adam.param_groups[0]["lr"] = learning_rate
        self._adam.step()
        self._adam.zero_grad()
        decay = min(self._settings.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, parameter in self._named.items():
                self._average[name].lerp_(parameter, 1 - decay)
        self.step += 1

    def adopt_average(self) -> None:
        self.net.full.load_state_dict(self._average)
        self.net.full.requires_grad_(False).eval()
        self.net.forget()

    def save(self, path: Path) -> None:
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self._named.items():
            moments = self._adam.state[parameter]
            tensors |= {
                f"weight/{name}": parameter.detach(),
                f"average/{name}": self._average[name],
                f"first/{name}": moments["exp_avg"],
                f"second/{name}": moments["exp_avg_sq"],
            }
        _save(tensors, path, self._metadata())

    def save_average(self, path: Path) -> None:
        _save(self._average, path, self._metadata())

    def restore(self, path: Path) -> None:
        metadata = _check_recipe(path, self._digest)
        with safe_open(path, "pt", device=str(self.net.device)) as file, torch.no_grad():
            for name, parameter in self._named.items():
                parameter.copy_(file.get_tensor(f"weight/{name}"))
                self._average[name].copy_(file.get_tensor(f"average/{name}"))
                self._adam.state[parameter] = {
                    "step": torch.tensor(float(metadata["step"])),
                    "exp_avg": file.get_tensor(f"first/{name}"),
                    "exp_avg_sq": file.get_tensor(f"second/{name}"),
                }
        self.step = int(metadata["step"])

    def _metadata(self) -> dict[str, str]:
        return {"recipe": self._digest, "step": json.dumps(self.step), "threads": json.dumps(torch.get_num_threads())}


def _check_trainable(supernet: ElasticUNet, data: ImageSet) -> None:
    config = supernet.anatomy.config
    shape = (config["in_channels"], *supernet.anatomy.sample_size)
    if data.pixels.shape[1:] != shape:
        theirs, ours = ("x".join(map(str, s)) for s in (data.pixels.shape[1:], shape))
        raise UserError(
            f"the images are {theirs} (channels x height x width), the network takes {ours}; change one of them"
        )
    if config["in_channels"] != config["out_channels"]:
        raise UserError(
            f"out_channels={config['out_channels']} must equal in_channels={config['in_channels']}: the network predicts noise"
        )
    if config["class_embed_type"] is not None or config["num_class_embeds"] is not None:
        raise UserError("training is unconditional; leave class_embed_type and num_class_embeds out of the UNet config")
    if config["dropout"]:
        raise UserError(
            f"dropout={config['dropout']} would make training depend on where it was interrupted; set it to 0"
        )


def _check_recipe(path: Path, digest: str) -> dict[str, str]:
    """Metadata of a weights or checkpoint file. Raises UserError where it is damaged or of another recipe."""
    try:
        with safe_open(path, "pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); delete it, and the same command trains again") from error
    if metadata.get("recipe") != digest:
        raise UserError(
            f"{path} was trained with another network, training, seed or images; use another --out, or delete it to train again"
        )
    return metadata


def _save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Whole or not at all: a crash leaves the old file."""
    partial = path.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
    os.replace(partial, path)


def _name(arch: Arch) -> str:
    """Short label for progress bars: one share where all levels have the same."""
    shares = arch.widths[:1] if len(set(arch.widths)) == 1 else arch.widths
    depths = f" depth {'/'.join(map(str, arch.depths))}" if arch.depths else ""
    without = sum(not kept for kept in arch.attention)
    return "/".join(f"{share:g}" for share in shares) + depths + (f" less {without} attention" if without else "")
