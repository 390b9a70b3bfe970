"""The search space: for each interval of timesteps, which subnet of the supernet runs there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from nas.contracts import Choice, Genome, Schedule, Step, UserError
from search_spaces.intervals import Intervals, Timesteps, free
from search_spaces.options import Options, Subnets
from search_spaces.supernet import ElasticUNet


@dataclass(frozen=True)
class Stepwise:
    """For each interval, noisy to clean, one gene for each decision: width, and what else the options leave open.

    `intervals[k]` is how many of the `timesteps` interval k holds. `options`: what interval k may choose, one for each, or one
    for all; by default whatever the supernet was made for. `budgets`: upper limits of what interval k's subnet costs, as shares of
    the full net's MACs, such as `linear_budgets`; none by default. Raises UserError where they do not add up, leave the supernet's
    range, or ask for subnets that it is not trained for.
    """

    net: ElasticUNet
    timesteps: Timesteps
    intervals: Intervals
    options: Options | tuple[Options, ...] | None = None
    budgets: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        free(*self.timesteps)
        if sum(self.intervals) != len(self.timesteps) or min(self.intervals, default=0) < 1:
            raise UserError(
                f"intervals of {self.intervals} steps do not add up to the sampler's {len(self.timesteps)} steps"
            )
        if self.timesteps[0] >= self.net.noise.timesteps:
            raise UserError(f"timestep {self.timesteps[0]} is past the supernet's last, {self.net.noise.timesteps - 1}")
        for name, given in (("options", self.options), ("budgets", self.budgets or None)):
            if isinstance(given, tuple) and len(given) != len(self.intervals):
                raise UserError(
                    f"{len(given)} {name} for {len(self.intervals)} intervals; give one for each, or one for all"
                )
        for k, subnets in enumerate(self.subnets):
            if not subnets.options.within(self.net.options):
                raise UserError(
                    f"interval {k} asks for {subnets.options}, but the supernet is trained for {self.net.options}; choose among those"
                )

    @cached_property
    def subnets(self) -> tuple[Subnets, ...]:
        """What each interval may run."""
        options = self.options or self.net.options
        each = (options,) * len(self.intervals) if isinstance(options, Options) else options
        budgets = self.budgets or (1.0,) * len(self.intervals)
        return tuple(self.net.subnets(one, share) for one, share in zip(each, budgets, strict=True))

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        return tuple(
            Choice(f"interval{k:02d}.{gene.name}", gene.options, k)
            for k, subnets in enumerate(self.subnets)
            for gene in subnets.genes
        )

    def decode(self, genome: Genome) -> Schedule:
        archs = [subnets.arch(option) for subnets, option in zip(self.subnets, self._split(genome), strict=True)]
        per_step = [arch for arch, count in zip(archs, self.intervals, strict=True) for _ in range(count)]
        return Schedule(
            tuple(
                Step(t, arch._replace(expert=self.net.expert_at(t)))
                for t, arch in zip(self.timesteps, per_step, strict=True)
            )
        )

    def cost(self, genome: Genome) -> dict[str, float]:
        """`params` counts a subnet again for each expert that runs it."""
        macs = sum(int(table[option]) for table, option in zip(self._tables, self._split(genome), strict=True))
        stored = {}
        steps = iter(self.timesteps)
        for subnets, option, count in zip(self.subnets, self._split(genome), self.intervals, strict=True):
            arch = subnets.arch(option)
            for _ in range(count):
                stored[arch, self.net.expert_at(next(steps))] = arch
        params = sum(self.net.cost(arch).params for arch in stored.values())
        return {"macs": macs, "macs_share": macs / self._full_macs, "params": params}

    def interval_costs(self) -> tuple[npt.NDArray[np.int64], ...]:
        return self._tables

    def describe(self) -> dict[str, Any]:
        return {
            "class": "Stepwise",
            "timesteps": self.timesteps,
            "intervals": self.intervals,
            "options": [asdict(subnets.options) for subnets in self.subnets],
            "budgets": self.budgets,
            "experts": self.net.experts,
        }

    def _split(self, genome: Genome) -> list[Genome]:
        """The genes of each interval. Raises ValueError for a genome that is not of this space."""
        sizes = [size for subnets in self.subnets for size in subnets.shape]
        if len(genome) != len(sizes) or not all(0 <= gene < size for gene, size in zip(genome, sizes, strict=True)):
            raise ValueError(f"genome {genome} must hold {len(sizes)} option indices below {sizes}")
        return list(_parts(genome, [len(subnets.shape) for subnets in self.subnets]))

    @cached_property
    def _tables(self) -> tuple[npt.NDArray[np.int64], ...]:
        return tuple(steps * subnets.macs for subnets, steps in zip(self.subnets, self.intervals, strict=True))

    @cached_property
    def _full_macs(self) -> int:
        return len(self.timesteps) * self.net.cost(self.net.anatomy.full).macs


def _parts(genome: Genome, lengths: Sequence[int]) -> Iterator[Genome]:
    start = 0
    for length in lengths:
        yield genome[start : start + length]
        start += length
