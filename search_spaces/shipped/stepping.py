"""How samplers go from one timestep to the next, of any subset of them. Needs torch alone: an exported folder holds a copy of this file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

FAINTEST, LEAST = 1e-11, 2**-24
"""Below the first, abar means that no signal is left; diffusers' multistep solvers, which step in log-SNR, take the second for it."""


def update(
    sampler: Mapping[str, Any],
    x: torch.Tensor,
    prediction: torch.Tensor,
    a: float,
    b: float,
    drawn: torch.Tensor | None,
    memory: Any,
    learned: torch.Tensor,
) -> tuple[torch.Tensor, Any]:
    """The state at abar = b after that at a, by the predicted noise, and what the next update needs to know of this one. `drawn`: fresh noise,
    None in the last step. `learned`: what the network says of the variance, between -1 and 1; no channels where it says nothing."""
    # In float32 at least, as multistep solvers take differences of images.
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    prediction = prediction.to(torch.promote_types(prediction.dtype, x.dtype))
    image = (x - (1 - a) ** 0.5 * prediction) / a**0.5
    image = image.clamp(-1, 1) if sampler["clip"] else image
    if sampler["class"] == "DDIM":
        variance = sampler.get("eta", 0.0) ** 2 * (1 - b) / (1 - a) * (1 - a / b) if drawn is not None else 0.0
        after = b**0.5 * image + (1 - b - variance) ** 0.5 * prediction
        return after + variance**0.5 * drawn if variance else after, None
    if sampler["class"] == "DDPM":
        beta = 1 - a / b
        after = b**0.5 * beta / (1 - a) * image + (a / b) ** 0.5 * (1 - b) / (1 - a) * x
        if drawn is None:
            return after, None
        small = (1 - b) / (1 - a) * beta
        if sampler["variance"] == "learned_range":
            share = (learned + 1) / 2
            return after + torch.exp((share * math.log(beta) + (1 - share) * math.log(small)) / 2) * drawn, None
        return after + (beta if sampler["variance"] == "fixed_large" else small) ** 0.5 * drawn, None
    if b >= 1:
        return image, None
    here, there = (0.5 * (math.log(alpha) - math.log1p(-alpha)) for alpha in (a if a > FAINTEST else LEAST, b))
    ahead = image
    if memory is not None:
        before, place = memory
        ahead = image + (image - before) * (there - here) / (2 * (here - place))
    return ((1 - b) / (1 - a)) ** 0.5 * x - b**0.5 * math.expm1(here - there) * ahead, (image, here)
