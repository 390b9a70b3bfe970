"""A stock autoencoder's latents as a network knows them: scaled once, as its config says. Needs torch alone: an exported folder holds a copy of
this file.
"""

from __future__ import annotations

from typing import Any

import torch

NOTHING = -30.0
"""Log-variance of latents without a posterior."""

NUMBERS = 2**26


def scaling(config: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What latents are multiplied with after this shift was taken off, (1, channels or 1, 1, 1) each, as diffusers' pipelines do."""
    factor = float(config.scaling_factor)
    if getattr(config, "latents_mean", None) is not None and getattr(config, "latents_std", None) is not None:
        mean, std = (
            torch.tensor(config[name], device=device).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std")
        )
        return factor / std, mean
    shift = float(getattr(config, "shift_factor", None) or 0.0)
    return torch.tensor(factor, device=device).view(1, 1, 1, 1), torch.tensor(shift, device=device).view(1, 1, 1, 1)


def decoded(network: Any, states: torch.Tensor) -> torch.Tensor:
    """Images of scaled latents, (n, channels, height, width). A VQModel quantises here; one in half precision whose config says that its numbers are too large
    for that, as Stable Diffusion XL's does, runs in float32."""
    kind = network.dtype
    if kind == torch.float16 and getattr(network.config, "force_upcast", False):
        network.to(torch.float32)
        try:
            return decoded(network, states)
        finally:
            network.to(kind)
    scale, shift = scaling(network.config, states.device)
    latents = (states / scale + shift).to(kind)
    factor = 2 ** (len(network.config.block_out_channels) - 1)
    each = at_once(network, latents.shape[-2] * latents.shape[-1] * factor**2)
    return torch.cat([network.decode(part).sample for part in torch.split(latents, each)])


def at_once(network: Any, pixels: int) -> int:
    """Images of a call, so that no map of one has more than `NUMBERS` numbers: an autoencoder's are far larger than those of the network that
    a batch was chosen for."""
    widest: int = max(network.config.block_out_channels[:2])
    return max(1, NUMBERS // (pixels * widest))


def moments(network: Any, images: torch.Tensor) -> torch.Tensor:
    """Mean and log-variance of each image's posterior, (n, 2, channels, height, width), not scaled."""
    each = at_once(network, images.shape[-2] * images.shape[-1])
    return torch.cat([_moments(network, part.to(network.dtype)) for part in torch.split(images, each)])


def _moments(network: Any, images: torch.Tensor) -> torch.Tensor:
    encoded = network.encode(images)
    if hasattr(encoded, "latents"):
        return torch.stack([encoded.latents, torch.full_like(encoded.latents, NOTHING)], dim=1)
    return torch.stack([encoded.latent_dist.mean, encoded.latent_dist.logvar], dim=1)


def drawn(network: Any, kept: torch.Tensor, posterior: str, generator: torch.Generator) -> torch.Tensor:
    """Scaled latents of these moments: a "sample" of each posterior, or its "mean"."""
    mean, log_variance = kept.unbind(1)
    if posterior == "sample":
        noise = torch.randn(mean.shape, generator=generator).to(mean)
        mean = mean + (0.5 * log_variance).exp() * noise
    scale, shift = scaling(network.config, mean.device)
    return (mean - shift) * scale
