"""Which timesteps the sampler visits, and how they are divided into intervals that share one choice.

A partition is given by its boundaries over the training timesteps, which hold for any sampler: `bounded` turns them into intervals
of the sampler's steps. Makers of boundaries: `even`, `equal_snr`, and `segments` of any cost of keeping timesteps together, such as
`dissimilarity` of gradients (`search_spaces.training.similarity`) or the `scatter` of a measured effect of each step.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt

from nas.contracts import UserError

Timesteps = tuple[int, ...]
"""Training timesteps, noisy to clean."""

Boundaries = tuple[int, ...]
"""Training timesteps at which another interval begins, increasing: an interval holds start..next start - 1."""

Array = npt.NDArray[np.float64]

NO_SIGNAL, FAINT = 1e-11, 1e-6
"""abar where none is left, of a process that is rescaled so, and that, -60 dB, below which hardly any is; DDPM's linear process ends at -44."""

Intervals = tuple[int, ...]
"""How many of the sampler's steps each interval holds, noisy to clean."""


def uniform(steps: int, total: int = 1000) -> Timesteps:
    """Equal spacing that starts at the noisiest timestep ("trailing" in diffusers): total-1, ..., total/steps - 1."""
    _check(steps, total)
    return tuple(int(t) for t in np.round(np.arange(total, 0, -total / steps)[:steps]) - 1)


def leading(steps: int, total: int = 1000, offset: int = 0) -> Timesteps:
    """Equal spacing that ends at the offset ("leading" in diffusers, whose `steps_offset` it is; 1 in Stable Diffusion): ..., 2 total/steps +
    offset, total/steps + offset, offset."""
    _check(steps, total)
    chosen = tuple(int(t) + offset for t in (np.arange(steps) * (total // steps))[::-1])
    if offset < 0 or chosen[0] >= total:
        raise UserError(
            f"offset={offset} leads to timesteps from {chosen[-1]} to {chosen[0]}; they go from 0 to {total - 1}"
        )
    return chosen


def linspace(steps: int, first: int = 999, last: int = 0) -> Timesteps:
    """Equal spacing between two timesteps, both included."""
    return free(*np.round(np.linspace(first, last, steps)))


def quadratic(steps: int, total: int = 1000) -> Timesteps:
    """Dense at the clean end: linspace(0, sqrt(0.8 total), steps)^2 (Song et al. 2021, the CIFAR-10 setting); where that names a timestep twice, each goes to
    the next that is free."""
    _check(steps, total)
    places = (np.linspace(0, np.sqrt(0.8 * total), steps) ** 2).astype(int).tolist()
    return free(*[*accumulate(places, lambda before, place: max(place, before + 1))][::-1])


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


def bounded(timesteps: Timesteps, boundaries: Boundaries) -> Intervals:
    """The sampler's steps between boundaries. Raises UserError where an interval would hold none."""
    homes = Counter(bisect_right(boundaries, t) for t in timesteps)
    empty = [i for i in range(len(boundaries) + 1) if i not in homes]
    if list(boundaries) != sorted(set(boundaries)) or empty:
        raise UserError(
            f"boundaries {boundaries} must increase and leave a step of {timesteps} in each of the {len(boundaries) + 1} intervals"
        )
    return tuple(homes[i] for i in range(len(boundaries), -1, -1))


def merged(timesteps: Timesteps, boundaries: Boundaries) -> Boundaries:
    """Those boundaries that have a step of the sampler on both sides before the next one."""
    homes = sorted({bisect_right(boundaries, t) for t in timesteps})
    return tuple(boundaries[home - 1] for home in homes[1:])


def starts(timesteps: Timesteps, intervals: Intervals) -> Boundaries:
    """Boundaries of intervals of steps, half way between neighbouring steps."""
    ends = np.cumsum(intervals)[:-1]
    return tuple(sorted((timesteps[end - 1] + timesteps[end] + 1) // 2 for end in ends.tolist()))


def even(count: int, total: int = 1000) -> Boundaries:
    """`count` intervals of equally many training timesteps."""
    return tuple(round(total * i / count) for i in range(1, count))


def equal_snr(count: int, alphas_cumprod: Array) -> Boundaries:
    """`count` intervals of equal width in SNR(t) = 10 log10(abar_t / (1 - abar_t)) dB, between the ends of the process (TDC). Timesteps at which hardly a signal
    is left, of a process rescaled to none, fall to the noisiest interval: their decibels go to minus infinity."""
    left = alphas_cumprod if alphas_cumprod[-1] > NO_SIGNAL else alphas_cumprod[alphas_cumprod > FAINT]
    decibels = 10 * np.log10(left / (1 - left))
    levels = np.linspace(decibels[0], decibels[-1], count + 1)[1:-1]
    return tuple(int(np.searchsorted(-decibels, -level)) for level in levels)


def dissimilarity(affinity: Array) -> Array:
    """cost[l, r] of keeping grid points l..r together: (1 / size) sum of 1 - A(s, t) over all pairs of them (ANT, eq. 8)."""
    size = len(affinity)
    total = np.zeros((size + 1, size + 1))
    total[1:, 1:] = (1 - affinity).cumsum(0).cumsum(1)
    cost = np.full((size, size), np.inf)
    for left in range(size):
        for right in range(left, size):
            stop = right + 1
            inside = total[stop, stop] - total[left, stop] - total[stop, left] + total[left, left]
            cost[left, right] = inside / (stop - left)
    return cost


def scatter(effects: Array) -> Array:
    """cost[l, r] of keeping steps l..r together: squared distances of their effects, (steps, options), to their mean."""
    size = len(effects)
    cost = np.full((size, size), np.inf)
    for left in range(size):
        for right in range(left, size):
            part = effects[left : right + 1]
            cost[left, right] = ((part - part.mean(0)) ** 2).sum()
    return cost


def segments(cost: Array, most: int) -> list[tuple[tuple[int, ...], float]]:
    """For each number of contiguous segments from 1 to `most`, the first points of the best one's segments but the first, and its
    cost: exact dynamic programming, best(k, r) = min over l of best(k - 1, l - 1) + cost[l, r]."""
    size = len(cost)
    if not 1 <= most <= size:
        raise UserError(f"{most} segments cannot divide {size} points; use 1 to {size}")
    best = cost[0].copy()
    origin: list[npt.NDArray[np.int64]] = []
    found: list[tuple[tuple[int, ...], float]] = [((), float(best[-1]))]
    for _ in range(1, most):
        # candidates[l, r]: the last segment is l..r, the ones before end at l - 1
        candidates = np.full((size, size), np.inf)
        candidates[1:] = best[:-1, None] + cost[1:]
        origin.append(candidates.argmin(0))
        best = candidates.min(0)
        places: list[int] = []
        right = size - 1
        for choice in reversed(origin):
            places.append(int(choice[right]))
            right = places[-1] - 1
        found.append((tuple(sorted(places)), float(best[-1])))
    return found


def elbow(costs: list[float]) -> int:
    """The number of segments, counted from 1, where the falling curve of costs is farthest below the line between its ends."""
    if len(costs) < 3 or costs[0] == costs[-1]:
        return len(costs) if costs[0] != costs[-1] else 1
    place = np.linspace(0, 1, len(costs))
    height = (np.array(costs) - costs[-1]) / (costs[0] - costs[-1])
    return int((1 - place - height).argmax()) + 1


def linear_budgets(count: int, least: float, most_at: str = "clean") -> tuple[float, ...]:
    """TDC's rule for N groups, noisy to clean: FLOPs_g(i) = (i / N + (N - i) / N * k) F, here as shares of the full net's, with
    k = `least`. The clean end has the most, or the noisy one (`most_at`).

    Raises UserError for a share or a direction that is none.
    """
    if not 0 < least <= 1 or most_at not in ("clean", "noisy"):
        raise UserError(f"least={least} must be a share in (0, 1] and most_at={most_at!r} 'clean' or 'noisy'")
    rising = tuple(i / count + (count - i) / count * least for i in range(1, count + 1))
    return rising if most_at == "clean" else rising[::-1]


def _check(steps: int, total: int) -> None:
    if not 1 <= steps <= total:
        raise UserError(f"{steps} sampler steps do not fit into {total} timesteps; use 1 to {total}")
