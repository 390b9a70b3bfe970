"""Which timesteps pull the network the same way: cosines of the gradients of the denoising loss (DiffPruning's interval clusters).

g_t is the gradient of E ||target - prediction(x_t, t)||^2 in all weights of the full network, kept as a random projection. The noise
of a batch inflates |g_t|, more at some timesteps than at others, and would pull cosines towards 0; two independent half-batches a
and b free both products of it: A(s, t) = (g_s^a . g_t^b) / sqrt((g_s^a . g_s^b) (g_t^a . g_t^b)).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from nas.contracts import ImageSet, Progress, UserError, derive_seed
from search_spaces.loaded import LoadedElastic
from search_spaces.training.optimiser import Batches

Array = npt.NDArray[np.float64]

RELIABLE = 0.5
"""Cosine of the two halves' gradients from which a timestep's direction counts as known. A trained network's mean gradients are small
beside their noise, and at some timesteps far smaller than at others."""
AT_ONCE = 2**18
"""Numbers of states of which the network has gradients at a time: 16 of Stable Diffusion's, or all that a half-batch has of small images."""
WIDENED = 5
"""Times that a half-batch is doubled to get there."""


@dataclass
class GradientSimilarity:
    """Affinity of a grid of training timesteps. `batch`: images of a half-batch to begin with; `dimensions` of the projection;
    `agreement`: cosine of the two halves at each timestep of the grid."""

    net: LoadedElastic
    data: ImageSet
    seed: int
    batch: int = 256
    dimensions: int = 8192
    agreement: list[float] = field(default_factory=list)

    @property
    def settings(self) -> dict[str, float]:
        """What the result depends on, beside the weights and the grid."""
        return {"batch": self.batch, "dimensions": self.dimensions, "reliable": RELIABLE, "widened": WIDENED}

    def measure(self, grid: Sequence[int]) -> Iterator[Progress]:
        """Afterwards `affinity` is the matrix over the grid, (len(grid), len(grid)), symmetric with a diagonal of 1.

        Raises UserError where the gradient at a timestep cannot be told from noise.
        """
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "gradient projection"))
        self.agreement.clear()
        self.net.full.requires_grad_(True).eval()
        projections = [_Projection(p, self.dimensions, generator) for p in self.net.full.parameters()]
        batches = Batches(self.net, self.data, self.batch, flip=False)
        halves: list[tuple[Array, Array]] = []
        try:
            for number, timestep in enumerate(grid, 1):
                halves.append(self._two_halves(timestep, batches, projections))
                yield Progress("gradients", number, len(grid))
        finally:
            self.net.full.requires_grad_(False)
            self.net.full.zero_grad(set_to_none=True)
        first, second = (np.stack(half) for half in zip(*halves, strict=True))
        products = first @ second.T
        norms = np.sqrt(np.diag(products))
        self.affinity: Array = (products + products.T) / 2 / np.outer(norms, norms)

    def _two_halves(self, timestep: int, batches: Batches, projections: Sequence[_Projection]) -> tuple[Array, Array]:
        """Projected gradients of two independent half-batches, widened until they agree on a direction."""
        sums = np.zeros((2, self.dimensions))
        done = 0
        for doubling in range(WIDENED + 1):
            for number in range(done, 2**doubling):
                for half in range(2):
                    sums[half] += self._gradient(timestep, half, number, batches, projections)
            done = 2**doubling
            agreement = sums[0] @ sums[1] / (np.linalg.norm(sums[0]) * np.linalg.norm(sums[1]))
            if agreement >= RELIABLE:
                break
        if agreement <= 0:
            raise UserError(
                f"the gradient at timestep {timestep} cannot be told from noise with {done * self.batch} images a half; train longer, "
                "or leave it out"
            )
        self.agreement.append(float(agreement))
        first, second = sums / done
        return first, second

    def _gradient(
        self, timestep: int, half: int, number: int, batches: Batches, projections: Sequence[_Projection]
    ) -> Array:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, timestep, half, number, "similarity"))
        x0, condition = batches.images(generator)
        noise = torch.randn(x0.shape, generator=generator).to(self.net.device)
        t = torch.full((self.batch,), timestep, device=self.net.device)
        x, target = batches.at(x0, t, noise), batches.target(x0, t, noise)
        self.net.full.zero_grad(set_to_none=True)
        for part in torch.split(torch.arange(self.batch, device=x.device), max(1, AT_ONCE // x[0].numel())):
            told = None if condition is None else {name: rows[part] for name, rows in condition.items()}
            prediction = self.net.forward(self.net.full_arch, x[part], t[part], told)[:, : x.shape[1]]
            loss = torch.nn.functional.mse_loss(prediction, target[part])
            torch.autograd.backward(loss * (len(part) / self.batch))
        projected = torch.zeros(self.dimensions, device=x.device)
        for parameter, projection in zip(self.net.full.parameters(), projections, strict=True):
            if parameter.grad is not None:
                projection.add(parameter.grad, projected)
        found: Array = projected.cpu().double().numpy()  # not every device has float64
        return found


class _Projection:
    """A random one of a parameter's gradient: each number goes, with a random sign, into one of the dimensions. A large network's would fill a GPU as one
    array of 64 bits."""

    def __init__(self, parameter: torch.nn.Parameter, dimensions: int, generator: torch.Generator) -> None:
        count, device = parameter.numel(), parameter.device
        self._buckets = torch.randint(dimensions, (count,), generator=generator, dtype=torch.int32).to(device)
        self._signs = (torch.randint(2, (count,), generator=generator, dtype=torch.int8) * 2 - 1).to(device)

    def add(self, gradient: torch.Tensor, to: torch.Tensor) -> None:
        to.index_add_(0, self._buckets, gradient.flatten() * self._signs)
