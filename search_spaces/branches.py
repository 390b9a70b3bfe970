"""Which branches of a transformer run at which step, a bit for each: 2^(branches x steps) schedules, whose costs add up to the last multiply-add.

Each branch adds to the hidden state by itself, so that every set of them may run, and what one saves does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from nas.contracts import WITHOUT_ATTENTION, Choice, Genome, Guidance, Price, Schedule, Step, UserError, frozen
from nas.recipes import recipe
from search_spaces.intervals import Timesteps, free
from search_spaces.networks.slices import Arch
from search_spaces.patterns import ALL, Pattern, check_listed
from search_spaces.shipped.graph import AROUND, Graph
from search_spaces.supernet import Elastic

REUSED, RUNS = "reused", "runs"


@recipe
class Branches:
    """The full network at each of the timesteps, the first one whole. `whole`: so many steps apart run whole, as each second one does in
    Learning-to-Cache (Ma et al. 2024); 0 for the first alone. `guidance`: of every step, a scale, or a `Guidance` by another subnet, or none.

    Raises UserError for a network whose branches read each other, as those of UNets do, and where no step is left to choose for.
    """

    net: Elastic
    timesteps: Annotated[Timesteps, Field(min_length=1)]
    guidance: Annotated[float, Field(gt=0, le=1000)] | Guidance | None = None
    whole: Annotated[int, Field(ge=0, le=4096)] = 0

    def __post_init__(self) -> None:
        if not self.net.cost.graph(self.net.anatomy.full).predicts_anew:
            raise UserError(
                "the branches of a UNet read each other, so that not each set of them may run; use Stepwise(patterns=legal(levels))"
            )
        if self.net.experts:
            raise UserError("experts do not reuse what another has computed; use Stepwise")
        free(*self.timesteps)
        if self.timesteps[0] >= self.net.noise.timesteps:
            raise UserError(f"timestep {self.timesteps[0]} is past the supernet's last, {self.net.noise.timesteps - 1}")
        if self._guide is not None and not self.net.conditional:
            raise UserError("guidance needs a network that takes conditions; leave it out")
        self.net.check_guidance(self._guide)
        if not self._open:
            raise UserError(
                f"all of the {len(self.timesteps)} steps run whole; give more timesteps, or whole=0 for the first alone"
            )

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        names = [f"step{place:03d}.{branch}" for place in self._open for branch in self._branches]
        return tuple(Choice(name, (REUSED, RUNS), k) for k, name in enumerate(names))

    def decode(self, genome: Genome) -> Schedule:
        if len(genome) != len(self.choices) or not {*genome} <= {0, 1}:
            raise ValueError(f"genome {genome} must hold {len(self.choices)} bits")
        bits = iter(genome)
        steps = []
        for place, timestep in enumerate(self.timesteps):
            off = [name for name in self._branches if not next(bits)] if place in self._open else []
            steps.append(Step(timestep, self._arch, self._graph.collapse(off), self._guide))
        return Schedule(tuple(steps))

    def genome(self, made: Schedule | Pattern) -> Genome:
        """Of a schedule, or of a pattern of the whole trajectory, that was made elsewhere; of steps that run whole anyway the pattern is not read. Raises
        UserError for one of other steps or of another network."""
        if isinstance(made, Schedule):
            return self._genome_of(made)
        computed = made.steps(len(self.timesteps))
        check_listed(made, self._graph)
        if idle := [place for place in self._open if not computed[place]]:
            raise UserError(
                f"{made.label} leaves out step {idle[0]}, or holds what it predicts, and all run here; say (AROUND,), or use Stepwise"
            )
        named = {name for one in computed if one and one != ALL for name in one} - {AROUND}
        unknown = sorted(name for name in named if not self._graph.expand([name]))
        if unknown:
            raise UserError(
                f"{made.label} names {', '.join(unknown)}; the network's branches are {', '.join(self._branches)}"
            )
        runs = [self._branches if one == ALL else self._graph.expand(one or ()) for one in computed]
        return tuple(int(branch in runs[place]) for place in self._open for branch in self._branches)

    def _genome_of(self, schedule: Schedule) -> Genome:
        reused = {step.timestep: self._graph.expand(step.reuse) for step in schedule.steps}
        if tuple(reused) == self.timesteps:
            genome = tuple(
                int(branch not in reused[self.timesteps[p]]) for p in self._open for branch in self._branches
            )
            if self.decode(genome) == schedule:
                return genome
        raise UserError(
            f"the schedule {schedule.digest} is none of this space: it has other timesteps, subnets or guidance, or reuses where steps run whole"
        )

    @property
    def tracks(self) -> tuple[tuple[int, ...], ...]:
        """Of each branch, its bits' places among the choices, noisy to clean."""
        count = len(self._branches)
        return tuple(tuple(range(branch, len(self.choices), count)) for branch in range(count))

    def gates(self, names: Sequence[str]) -> list[tuple[int, int]]:
        """Of each choice, which step but the first and which of these branches it is a bit for."""
        place = {name: number for number, name in enumerate(names)}
        return [(step - 1, place[branch]) for step in self._open for branch in self._branches]

    def cost(self, genome: Genome) -> dict[str, float]:
        steps = self.decode(genome).steps
        macs = sum(map(self.net.macs, steps))
        attention = sum(map(self.net.attention_macs, steps))
        full = Step(0, self._arch, (), Guidance(1.0) if self._guide else None)
        whole, whole_attention = (len(steps) * each(full) for each in (self.net.macs, self.net.attention_macs))
        archs = {Arch(*arch) for step in steps for arch in step.archs}
        return {
            "macs": macs,
            "macs_share": macs / whole,
            "params": sum(self.net.cost(arch).params for arch in archs),
            WITHOUT_ATTENTION: (macs - attention) / (whole - whole_attention),
        }

    def interval_costs(self, price: Price | None = None) -> tuple[npt.NDArray[np.int64], ...]:
        if price is not None:
            raise UserError(
                "what a branch takes is known in multiply-adds alone: limit macs_share, or use Stepwise, whose patterns are timed whole"
            )
        return self._tables

    def describe(self) -> dict[str, Any]:
        return {
            "class": "Branches",
            "timesteps": self.timesteps,
            "whole": self.whole,
            "guidance": self._guide,
        }

    @cached_property
    def _tables(self) -> tuple[npt.NDArray[np.int64], ...]:
        least = sum(map(self.net.macs, self.decode((0,) * len(self.choices)).steps))
        whole = self.net.macs(Step(0, self._arch, (), self._guide))
        saved = [whole - self.net.macs(Step(0, self._arch, (branch,), self._guide)) for branch in self._branches]
        tables = [np.array([0, macs], dtype=np.int64) for _ in self._open for macs in saved]
        tables[0] += least  # what runs whatever is chosen
        return tuple(tables)

    @property
    def _arch(self) -> Arch:
        return self.net.anatomy.full

    @property
    def _graph(self) -> Graph:
        return self.net.cost.graph(self._arch)

    @cached_property
    def _branches(self) -> tuple[str, ...]:
        return self._graph.names(True)

    @cached_property
    def _open(self) -> tuple[int, ...]:
        """Places of the steps that there is something to choose for."""
        every = self.whole or len(self.timesteps)
        return tuple(place for place in range(len(self.timesteps)) if place % every)

    @property
    def _guide(self) -> Guidance | None:
        given = Guidance(self.guidance) if isinstance(self.guidance, int | float) else self.guidance
        return self.net.guided_by(given and Guidance(float(given.scale), frozen(given.arch)), self._arch)
