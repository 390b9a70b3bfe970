"""What a distance stands on: how small it can be at all, and whether samples are images that were learned by heart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Rows = npt.NDArray[np.floating[Any]]

QUANTILES = (0.5, 0.01)
"""Of held-out images, by their distance to the nearest train image."""


def nearest(rows: Rows, among: Rows) -> npt.NDArray[np.float64]:
    """Euclidean distance of each of the rows (n, d) to the nearest of the others (m, d), (n,)."""
    x, others = torch.from_numpy(rows).double(), torch.from_numpy(among).double()
    squares = (others * others).sum(1)
    # Of equal images the difference of large squares would not be zero, so the distance to the nearest is taken once more.
    places = torch.cat([(squares - 2 * x[i : i + 256] @ others.T).argmin(1) for i in range(0, len(x), 256)])
    found: npt.NDArray[np.float64] = (x - others[places]).norm(dim=1).numpy()
    return found


def nearer_than_held_out(
    samples: Rows, train: Rows, held_out: Rows, quantiles: Sequence[float] = QUANTILES
) -> Mapping[float, float]:
    """For each quantile q the share of samples that are nearer to a train image than a share q of real held-out images is: about q
    where samples are as new as those, more where train images are repeated. Quantiles that so few held-out images do not reach are left out."""
    theirs, mine = nearest(held_out, train), nearest(samples, train)
    # Weibull's: a new image is below the quantile q of m others with probability q, while q lies between 1 / (m + 1) and m / (m + 1).
    reached = [q for q in quantiles if 1 <= q * (len(theirs) + 1) <= len(theirs)]
    return {q: float((mine < np.quantile(theirs, q, method="weibull")).mean()) for q in reached}
