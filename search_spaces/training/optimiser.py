"""What every training shares: noised batches, Adam with a moving average of the weights, a frozen teacher, checkpoints."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.optim.swa_utils import get_ema_multi_avg_fn

from nas.base.files import first_line, written
from nas.contracts import Condition, ImageSet, UserError
from search_spaces.loaded import LoadedElastic
from search_spaces.networks.anatomy import predict
from search_spaces.training.team import Team


class Settings(Protocol):
    """What the optimiser needs to know of a training."""

    @property
    def learning_rate(self) -> float: ...
    @property
    def warmup(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def ema(self) -> float: ...
    @property
    def clip(self) -> float: ...


class Trainable(Protocol):
    """Whose weights are trained. `trained_macs` counts what that takes."""

    trained_macs: int

    @property
    def device(self) -> torch.device: ...
    def weights(self, expert: str) -> torch.nn.Module: ...
    def forget(self) -> None:
        """Drops what was made of the weights as they were."""


class Batches:
    """Images of a batch with their conditions, where the network takes any, and their noised versions, drawn from the generator of the step.

    `drop`: share of the conditions that say nothing instead, so that the network can guide itself. `snr_cap`: of min-SNR weighting, None for none.
    """

    def __init__(
        self,
        net: LoadedElastic,
        data: ImageSet,
        size: int,
        flip: bool,
        drop: float = 0.0,
        snr_cap: float | None = None,
    ) -> None:
        self._device = net.device
        self._size = size
        self._flip = flip
        self._prediction = net.recipe.noise.prediction
        self._net = net
        self._drop = drop
        self._snr_cap = snr_cap
        self._count = len(data)
        self._states = net.codec.states(data)
        self._conditions = net.conditions_of(data)
        self._signal = torch.from_numpy(np.sqrt(net.alphas_cumprod)).float().to(net.device)
        self._noise = torch.from_numpy(np.sqrt(1 - net.alphas_cumprod)).float().to(net.device)
        self._abar, self._abar_before, self._log_small = (
            torch.from_numpy(table).float().to(net.device) for table in _step_tables(net.alphas_cumprod)
        )

    def images(self, generator: torch.Generator) -> tuple[torch.Tensor, Condition | None]:
        """x_0, (batch, channels, height, width), and the condition of each."""
        chosen = torch.randint(self._count, (self._size,), generator=generator)
        mirrored = torch.rand(self._size, generator=generator) < 0.5 if self._flip else None
        x0 = self._states.draw(chosen, mirrored, generator)
        if self._conditions is None:
            return x0, None
        condition = self._conditions(chosen)
        dropped = torch.rand(self._size, generator=generator).to(self._device) < self._drop
        null = self._net.null_condition(condition)
        return x0, {name: _where(dropped, rows, condition[name]) for name, rows in null.items()}

    def noised(
        self, x0: torch.Tensor, generator: torch.Generator, served: tuple[int, int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Uniform timesteps (batch,), of all or of start..stop-1, x_t, and what the network is to predict of it."""
        start, stop = served or (0, len(self._signal))
        t = torch.randint(start, stop, (len(x0),), generator=generator).to(self._device)
        noise = torch.randn(x0.shape, generator=generator).to(self._device)
        return t, self.at(x0, t, noise), self.target(x0, t, noise)

    def target(self, x0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The noise, the image, or v = sqrt(abar_t) noise - sqrt(1 - abar_t) x_0, as the network predicts."""
        if self._prediction == "epsilon":
            return noise
        if self._prediction == "sample":
            return x0
        return self._signal[t, None, None, None] * noise - self._noise[t, None, None, None] * x0

    def loss(
        self, prediction: torch.Tensor, target: torch.Tensor, x0: torch.Tensor, x: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        """Mean squared error to the target, weighted by timestep where there is a cap. Where the network says where the variance lies, plus a thousandth of the variational bound,
        summed over all timesteps, in which only the variance is learned (Nichol & Dhariwal 2021, eq. 16): in bits a number, the divergence
        of the model's step from the true one, D(q(x_t-1 | x_t, x_0) || p(x_t-1 | x_t)). The step to the image itself counts with the
        variance of the one before it, as that of the published code."""
        channels = x.shape[1]
        error = torch.nn.functional.mse_loss(prediction[:, :channels], target)
        if self._snr_cap is not None:
            squared = (prediction[:, :channels] - target).square().mean((1, 2, 3))
            error = (self._weights(t, self._snr_cap) * squared).mean()
        if prediction.shape[1] == channels:
            return error
        abar, before = (table[t, None, None, None] for table in (self._abar, self._abar_before))
        beta = 1 - abar / before
        log_small = self._log_small[t, None, None, None]
        share = (prediction[:, channels:] + 1) / 2
        log_variance = share * beta.log() + (1 - share) * log_small
        # The means differ by what the predicted image is off, times its share in the step's mean.
        off = before.sqrt() * beta / (1 - abar) * (x0 - self._image(prediction[:, :channels].detach(), x, abar))
        divergence = -1 + log_variance - log_small + (log_small - log_variance).exp() + off**2 * (-log_variance).exp()
        return error + divergence.mean() * len(self._abar) / (2000 * math.log(2))

    def _weights(self, t: torch.Tensor, cap: float) -> torch.Tensor:
        """Of each sample's error, min(SNR, cap) as one of the predicted image, divided by what an error of this prediction is then (Hang et al. 2023)."""
        abar = self._abar[t]
        snr = abar / (1 - abar)
        each = {"sample": torch.ones_like(snr), "epsilon": snr, "v_prediction": snr + 1}[self._prediction]
        return snr.clamp(max=cap) / each

    def _image(self, prediction: torch.Tensor, x: torch.Tensor, abar: torch.Tensor) -> torch.Tensor:
        if self._prediction == "sample":
            return prediction
        if self._prediction == "epsilon":
            return (x - (1 - abar).sqrt() * prediction) / abar.sqrt()
        return abar.sqrt() * x - (1 - abar).sqrt() * prediction

    def at(self, x0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise."""
        return self._signal[t, None, None, None] * x0 + self._noise[t, None, None, None] * noise


def _where(rows: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Whole rows of the first, where that is said, else of the second."""
    return torch.where(rows.reshape(-1, *[1] * (first.ndim - 1)), first, second)


def _step_tables(abar: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], ...]:
    """Of every timestep: abar, abar of the one before, and the log of the posterior variance; the first, 0, takes the second's."""
    before = np.concatenate([[1.0], abar[:-1]])
    small = (1 - before) / (1 - abar) * (1 - abar / before)
    return abar, before, np.log(np.concatenate([small[1:2], small[1:]]))


class Teacher:
    """The full network as it was, frozen; of an `expert`, that copy of it. Nothing where its share is 0."""

    def __init__(self, net: LoadedElastic, share: float, expert: str = "") -> None:
        self._net = net
        self._share = share
        self._full = copy.deepcopy(net.weights(expert)).requires_grad_(False).eval() if share else None

    def target(
        self, x: torch.Tensor, t: torch.Tensor, truth: torch.Tensor, condition: Condition | None = None
    ) -> torch.Tensor:
        """What to predict: squared errors to the truth and to the teacher, mixed by the share, have the gradient of one squared
        error to their mixture."""
        if self._full is None:
            return truth
        with torch.inference_mode():
            prediction = predict(self._full, x, t, condition)
        self._net.trained_macs += len(x) * self._net.recipe.cost.macs(self._net.full_arch)
        return truth.lerp(prediction[:, : x.shape[1]].to(truth, copy=True), self._share)


class Optimiser:
    """Weights, their average, Adam's moments and the step: all that a checkpoint keeps.

    `experts`: which copies of the weights are trained, "" for the shared one.
    """

    def __init__(self, settings: Settings, net: Trainable, digest: str = "", experts: Sequence[str] = ("",)):
        self.net = net
        self.step = 0
        self._settings = settings
        self._digest = digest
        self._trained = {name: net.weights(name) for name in experts}
        for full in self._trained.values():
            full.train().requires_grad_(True)
            for name in getattr(net, "frozen", ()):
                full.get_parameter(name).requires_grad_(False)
        self._named = {
            _prefix(expert) + name: parameter
            for expert, full in self._trained.items()
            for name, parameter in full.named_parameters()
            if parameter.requires_grad
        }
        self._average = {name: p.detach().clone() for name, p in self._named.items()}
        # On a CPU Adam's own default is a loop over the weights, of some ten operations each.
        fused = True if net.device.type == "cpu" else None
        self._adam = torch.optim.Adam(self._named.values(), lr=settings.learning_rate, fused=fused)

    def update(self, mates: Team | None = None) -> None:
        """`mates`: processes, each of which has gradients of its share."""
        settings = self._settings
        if mates is not None and mates.size > 1:
            for parameter in self._named.values():
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            mates.sum([parameter.grad for parameter in self._named.values() if parameter.grad is not None])
        torch.nn.utils.clip_grad_norm_(self._named.values(), settings.clip)
        share = warm_cosine(self.step, settings.steps, settings.warmup)
        self._adam.param_groups[0]["lr"] = share * settings.learning_rate
        self._adam.step()
        self._adam.zero_grad()
        decay = min(settings.ema, (1 + self.step) / (10 + self.step))
        averaged = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        averaged(list(self._average.values()), list(self._named.values()), self.step)
        self.step += 1
        self.net.forget()

    def adopt_average(self) -> None:
        """Ends the training: the supernet holds the averaged weights."""
        with torch.no_grad():
            for name, parameter in self._named.items():
                parameter.copy_(self._average[name])
        for full in self._trained.values():
            full.requires_grad_(False).eval()
        self.net.forget()

    def save(self, path: Path) -> None:
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self._named.items():
            moments = self._adam.state.get(parameter, {})  # none of a weight that no output depends on
            tensors |= {
                f"weight:{name}": parameter.detach(),
                f"average:{name}": self._average[name],
                f"first:{name}": moments.get("exp_avg", torch.zeros_like(parameter)),
                f"second:{name}": moments.get("exp_avg_sq", torch.zeros_like(parameter)),
            }
        facts = {"step": self.step, "macs": self.net.trained_macs, "threads": torch.get_num_threads()}
        write_tensors(
            tensors, path, {"recipe": self._digest, **{name: json.dumps(fact) for name, fact in facts.items()}}
        )

    def restore(self, path: Path) -> None:
        metadata = check_recipe(path, self._digest)
        with safe_open(path, "pt", device=str(self.net.device)) as file, torch.no_grad():
            for name, parameter in self._named.items():
                parameter.copy_(file.get_tensor(f"weight:{name}"))
                self._average[name].copy_(file.get_tensor(f"average:{name}"))
                self._adam.state[parameter] = {
                    "step": torch.tensor(float(metadata["step"])),
                    "exp_avg": file.get_tensor(f"first:{name}"),
                    "exp_avg_sq": file.get_tensor(f"second:{name}"),
                }
        self.net.forget()
        self.step = int(metadata["step"])
        self.net.trained_macs = int(metadata["macs"])


def warm_cosine(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate: linear warm-up, cosine to zero."""
    return min(1.0, (step + 1) / max(warmup, 1)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def gather(net: LoadedElastic) -> dict[str, torch.Tensor]:
    """All weights of a supernet, those of its experts among them, by the names that they have in a file."""
    return {
        _prefix(expert) + name: parameter.detach()
        for expert in ("", *net.experts)
        for name, parameter in net.weights(expert).named_parameters()
    }


def _prefix(expert: str) -> str:
    return f"{expert}/" if expert else ""


def metadata_of(path: Path) -> dict[str, str]:
    """Of a weights or checkpoint file; `recipe` says what was trained. Raises UserError where it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise UserError(
            f"{path} is damaged ({first_line(error)}); delete it, and the same command trains again"
        ) from error


def check_recipe(path: Path, digest: str) -> dict[str, str]:
    """Metadata of a weights or checkpoint file. Raises UserError where it is damaged or of another recipe."""
    metadata = metadata_of(path)
    if metadata.get("recipe") != digest:
        raise UserError(
            f"{path} was trained with another network, training, seed or images; use another --out, or delete it to train again"
        )
    return metadata


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Whole or not at all: a crash leaves the old file."""
    partial = path.with_suffix(".partial")
    with written(path):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
    os.replace(partial, path)
