"""Which timesteps the sampler visits, and how they are divided into intervals that share one choice."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from nas.contracts import UserError

Timesteps = tuple[int, ...]
"""Training timesteps, noisy to clean."""

Intervals = tuple[int, ...]
"""How many of the sampler's steps each interval holds, noisy to clean."""


def uniform(steps: int, total: int = 1000) -> Timesteps:
    """Equal spacing that starts at the noisiest timestep ("trailing" in diffusers): total-1, ..., total/steps - 1."""
    _check(steps, total)
    return tuple(int(t) for t in np.round(np.arange(total, 0, -total / steps)[:steps]) - 1)


def leading(steps: int, total: int = 1000) -> Timesteps:
    """Equal spacing that ends at timestep 0 ("leading" in diffusers): ..., 2 total/steps, total/steps, 0."""
    _check(steps, total)
    return tuple(int(t) for t in (np.arange(steps) * (total // steps))[::-1])


def linspace(steps: int, first: int = 999, last: int = 0) -> Timesteps:
    """Equal spacing between two timesteps, both included."""
    return free(*np.round(np.linspace(first, last, steps)))


def quadratic(steps: int, total: int = 1000) -> Timesteps:
    """Dense at the clean end: linspace(0, sqrt(0.8 total), steps)^2 (Song et al. 2021, the CIFAR-10 setting)."""
    _check(steps, total)
    return free(*(np.linspace(0, np.sqrt(0.8 * total), steps) ** 2).astype(int)[::-1])


def free(*timesteps: float) -> Timesteps:
    """Any strictly decreasing timesteps. Raises UserError otherwise."""
    chosen = tuple(int(t) for t in timesteps)
    if not chosen or chosen[-1] < 0 or any(a <= b for a, b in pairwise(chosen)):
        raise UserError(f"timesteps {chosen} must decrease strictly to at least 0")
    return chosen


def per_step(timesteps: Timesteps) -> Intervals:
    """One interval for each sampler step."""
    return (1,) * len(timesteps)


def equal(timesteps: Timesteps, count: int) -> Intervals:
    """`count` intervals of as equal a number of steps as possible; where it does not divide, noisy ones hold more."""
    if not 1 <= count <= len(timesteps):
        raise UserError(f"{count} intervals cannot divide {len(timesteps)} steps; use 1 to {len(timesteps)}")
    return tuple(len(part) for part in np.array_split(np.arange(len(timesteps)), count))


def _check(steps: int, total: int) -> None:
    if not 1 <= steps <= total:
        raise UserError(f"{steps} sampler steps do not fit into {total} timesteps; use 1 to {total}")
