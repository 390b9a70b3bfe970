"""The search space: for each interval of timesteps, which width of the supernet runs there."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from nas.contracts import Choice, Genome, Schedule, Step, UserError
from search_spaces.intervals import Intervals, Timesteps, free
from search_spaces.supernet import ElasticUNet


@dataclass(frozen=True)
class Stepwise:
    """One gene per interval: an index into `net.widths`, noisy to clean.

    `intervals[k]` is how many of the `timesteps` interval k holds. Raises UserError where they do not add up or leave
    the supernet's range.
    """

    net: ElasticUNet
    timesteps: Timesteps
    intervals: Intervals

    def __post_init__(self) -> None:
        free(*self.timesteps)
        if sum(self.intervals) != len(self.timesteps) or min(self.intervals, default=0) < 1:
            raise UserError(
                f"intervals of {self.intervals} steps do not add up to the sampler's {len(self.timesteps)} steps"
            )
        if self.timesteps[0] >= self.net.noise.timesteps:
            raise UserError(f"timestep {self.timesteps[0]} is past the supernet's last, {self.net.noise.timesteps - 1}")

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        return tuple(Choice(f"interval{k:02d}.width", self.net.widths, k) for k in range(len(self.intervals)))

    def decode(self, genome: Genome) -> Schedule:
        self._check(genome)
        shares = [
            self.net.widths[gene] for gene, steps in zip(genome, self.intervals, strict=True) for _ in range(steps)
        ]
        return Schedule(
            tuple(Step(t, self.net.uniform(share)) for t, share in zip(self.timesteps, shares, strict=True))
        )

    def cost(self, genome: Genome) -> dict[str, float]:
        self._check(genome)
        macs = sum(int(row[gene]) for row, gene in zip(self._table, genome, strict=True))
        params = sum(self._params[gene] for gene in set(genome))
        return {"macs": macs, "macs_share": macs / self._full_macs, "params": params}

    def interval_costs(self) -> tuple[npt.NDArray[np.int64], ...]:
        return self._table

    def describe(self) -> dict[str, Any]:
        return {
            "class": "Stepwise",
            "timesteps": self.timesteps,
            "intervals": self.intervals,
            "widths": self.net.widths,
        }

    def _check(self, genome: Genome) -> None:
        if len(genome) != len(self.intervals) or not all(0 <= gene < len(self.net.widths) for gene in genome):
            raise ValueError(
                f"genome {genome} must hold {len(self.intervals)} option indices below {len(self.net.widths)}"
            )

    @cached_property
    def _table(self) -> tuple[npt.NDArray[np.int64], ...]:
        per_call = np.array([self.net.cost(self.net.uniform(share)).macs for share in self.net.widths])
        return tuple(steps * per_call for steps in self.intervals)

    @cached_property
    def _params(self) -> tuple[int, ...]:
        return tuple(self.net.cost(self.net.uniform(share)).params for share in self.net.widths)

    @cached_property
    def _full_macs(self) -> int:
        return len(self.timesteps) * self.net.cost(self.net.uniform(1.0)).macs
