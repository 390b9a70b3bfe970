"""The published evaluation loop of DDSM, ported to a current torch: what a candidate costs without anything shared.

Kept as its released code has it: candidates strictly one after another; fresh unseeded noise for each; at every step a walk over
all modules to set the width as an attribute, every weight sliced to a view, its leading channels, in every call; a new feature
network read from disk for each candidate, images taken one by one, batches of 50; numpy's covariance, the reference read from a
file, scipy's general matrix root. Left out, in its favour: the prints, the timing files, the two threads of DataParallel.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg
import torch
from torch.nn import functional

from evaluators.features import Features

SAMPLING_BATCH = 2048
FEATURE_BATCH = 50
CPU = torch.device("cpu")


def slimmable(model: Any) -> Any:
    """The UNet2DModel with layers that keep the first share `width` of their outputs, and as many inputs as come in."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear | torch.nn.GroupNorm):
            forward = types.MethodType(_FORWARD[type(module)], module)
            vars(module).update(width=1.0, fixed=name == "conv_out", forward=forward)
        elif hasattr(module, "channels"):
            vars(module).update(width=1.0, full_channels=module.channels)
    return model


def set_width(model: Any, width: float) -> None:
    """A walk over all modules, as before every step."""
    for module in model.modules():
        if hasattr(module, "width"):
            module.width = width
            if hasattr(module, "full_channels"):
                module.channels = round(module.full_channels * width)


def _outputs(layer: Any, full: int) -> int:
    return full if layer.fixed else round(full * layer.width)


def _conv(self: Any, x: torch.Tensor) -> torch.Tensor:
    out = _outputs(self, self.out_channels)
    bias = None if self.bias is None else self.bias[:out]
    return functional.conv2d(x, self.weight[:out, : x.shape[1]], bias, self.stride, self.padding)


def _linear(self: Any, x: torch.Tensor) -> torch.Tensor:
    out = _outputs(self, self.out_features)
    bias = None if self.bias is None else self.bias[:out]
    return functional.linear(x, self.weight[:out, : x.shape[-1]], bias)


def _norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    count = x.shape[1]
    return functional.group_norm(x, self.num_groups, self.weight[:count], self.bias[:count], self.eps)


_FORWARD: dict[type, Any] = {torch.nn.Conv2d: _conv, torch.nn.Linear: _linear, torch.nn.GroupNorm: _norm}


def sample(
    model: Any,
    widths: Sequence[float],
    timesteps: Sequence[int],
    count: int,
    abar: npt.NDArray[np.float64],
    batch: int = SAMPLING_BATCH,
) -> torch.Tensor:
    """Deterministic DDIM, one width for each step, fresh noise; coefficients gathered from float64 buffers at every step."""
    shape = (model.config["in_channels"], model.config["sample_size"], model.config["sample_size"])
    device = next(model.parameters()).device
    buffer = torch.from_numpy(np.append(abar, 1.0)).to(device)
    parts = []
    for start in range(0, count, batch):
        size = min(batch, count - start)
        x = torch.randn(size, *shape, device=device)
        for t, after, width in zip(timesteps, [*timesteps[1:], -1], widths, strict=True):
            set_width(model, width)
            with torch.inference_mode():
                noise = model(x, torch.full((size,), t, device=device)).sample
            now, later = (
                buffer.gather(0, torch.full((size,), index % len(buffer), device=device))[:, None, None, None].float()
                for index in (t, after)
            )
            image = ((x - (1 - now).sqrt() * noise) / now.sqrt()).clamp(-1, 1)
            x = later.sqrt() * image + (1 - later).sqrt() * noise
        parts.append(x.clamp(-1, 1).cpu())
    return torch.cat(parts)


def distance(
    images: torch.Tensor, features: Features, folder: Path, statistics: Path, device: torch.device = CPU
) -> float:
    """Frechet distance of the images' features to the statistics in an `.npz` file, everything made anew."""
    extractor = features.load(folder, device)
    rows = []
    for start in range(0, len(images), FEATURE_BATCH):
        one_by_one = [images[i] for i in range(start, min(start + FEATURE_BATCH, len(images)))]
        rows.append(extractor(torch.stack(one_by_one).to(device)).cpu().numpy())
    found = np.concatenate(rows)
    mean, covariance = found.mean(0), np.cov(found, rowvar=False)
    with np.load(statistics) as file:
        mu, sigma = file["mu"], file["sigma"]
    root = scipy.linalg.sqrtm(covariance @ sigma)
    return float(((mean - mu) ** 2).sum() + np.trace(covariance) + np.trace(sigma) - 2 * np.trace(np.real(root)))
