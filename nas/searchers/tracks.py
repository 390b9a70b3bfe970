"""A space as a shortest path sees it: what each interval may compute and what it may reuse, for each part of the network that has a path of its own, and
which schedules tell what reuse loses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from nas.contracts import Genome, Schedule, SearchSpace
from nas.genomes.genetics import IntervalCosts, exact_cost
from nas.genomes.paths import ReusePath

Option = tuple[int, ...]
"""An option index for each gene of an interval."""

WINDOWS = 4
"""Parts of the trajectory at whose bounds guidance may begin or end."""


@dataclass(frozen=True)
class Track:
    """One part of the network through the trajectory. `intervals`: in order of the steps. `computing[i]`, `reusing[i]`: options of its i-th interval, the
    full network's first among those that compute. `labels`: what the options that reuse are called, the same thing at all intervals. `unguided[i]`: options
    of steps that are not guided where the full network is."""

    intervals: tuple[int, ...]
    computing: tuple[tuple[Option, ...], ...]
    reusing: tuple[dict[str, Option], ...]
    labels: tuple[str, ...]
    unguided: tuple[frozenset[Option], ...]

    @property
    def windows(self) -> list[tuple[int, int]]:
        """Places from which and up to which steps are guided: all, or a part without the noisiest, without the cleanest, or without both; or none."""
        count = len(self.intervals)
        if not any(self.unguided):
            return [(0, count)]
        starts, stops = (
            [round(share * count / WINDOWS) for share in shares] for shares in ((0, 1), range(WINDOWS, 0, -1))
        )
        return [*((start, stop) for start in starts for stop in stops if start < stop), (0, 0)]


class Run(NamedTuple):
    """A probe: in this track, `length` intervals from the place `start` on reuse, called `label`; or the one at `start` takes a computing `option`."""

    track: int
    start: int
    length: int
    label: str
    option: int = 0


class Tracks:
    """`options`: of an interval, how many are known, spread over their costs. `reach`: the longest run that is probed. `probes`: upper limit of their number."""

    def __init__(self, space: SearchSpace, options: int, reach: int, probes: int) -> None:
        self._space = space
        self._options = options
        self._reach = reach
        self._most_probes = probes
        self.costs = IntervalCosts(space)
        self.full = self.costs.dearest()

    @cached_property
    def each(self) -> tuple[Track, ...]:
        tracks = getattr(self._space, "tracks", None) or (tuple(range(len(self.costs.tables))),)
        full = self._space.decode(self.full)
        found = []
        for intervals in tracks:
            each = [self._sorted(k, full) for k in intervals]
            labels = dict.fromkeys(label for _, reusing, _ in each for label in reusing)
            computing, reusing, unguided = (tuple(column) for column in zip(*each, strict=True))
            found.append(Track(tuple(intervals), computing, reusing, tuple(labels), unguided))
        return tuple(found)

    def _sorted(self, k: int, full: Schedule) -> tuple[tuple[Option, ...], dict[str, Option], frozenset[Option]]:
        """Options of interval k that compute, the full network's first, or that choose another sampler alone, those that reuse, because the first step at which they
        differ from the full network takes something from the step before or is left out, and those among them whose step is not guided though the full network's is."""
        table, own = self.costs.tables[k], self.full[self.costs.genes[k]]
        whole = {step.timestep: step for step in full.steps}
        every = sorted(np.ndindex(*table.shape), key=lambda option: (int(table[option]), option))
        places = np.linspace(0, len(every) - 1, min(len(every), self._options)).round().astype(int)
        computing, reusing, unguided, known = [own], {}, [], set()
        for option in (every[place] for place in places):
            schedule = self._space.decode(self.costs.changed(self.full, {k: option}))
            steps = {step.timestep: step for step in schedule.steps}
            first = next((t for t in whole if steps.get(t) != whole[t]), None)
            if schedule == full or schedule in known:
                continue
            known.add(schedule)
            if first is None:
                computing.append(option)
                continue
            if first not in steps or steps[first].reuse:
                reusing["/".join(map(str, option))] = option
            else:
                computing.append(option)
            if first in steps and steps[first].guidance is None and whole[first].guidance is not None:
                unguided.append(option)
        return tuple(computing), reusing, frozenset(unguided)

    @cached_property
    def prices(self) -> tuple[dict[Option, int], ...]:
        """Of each interval's options, what they cost in the full network's place, to the last unit: a step that reuses has all that it needs there."""
        space, full = self._space, exact_cost(self._space, self.full)
        found: list[dict[Option, int]] = [{} for _ in self.costs.tables]
        for track in self.each:
            for place, k in enumerate(track.intervals):
                own = self.costs.of(k, self.full[self.costs.genes[k]])
                for option in (*track.computing[place], *track.reusing[place].values()):
                    found[k][option] = own + exact_cost(space, self.costs.changed(self.full, {k: option})) - full
        return tuple(found)

    @cached_property
    def probes(self) -> dict[Genome, str]:
        """What is scored before anything is solved, in order, and what it is."""
        found = {self.full: "full"}
        for run in self.runs:
            found.setdefault(self.genome_of(run), self._words(run))
        return found

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """Those that are probed; of too many, every so many."""
        every = [
            Run(number, place, 1, "", option)
            for number, track in enumerate(self.each)
            for place, options in enumerate(track.computing)
            for option in range(1, len(options))
        ]
        for length in self._lengths:
            for number, track in enumerate(self.each):
                for label in track.labels:
                    starts = [
                        start for start in range(len(track.intervals)) if self._reusable(track, start, length, label)
                    ]
                    every += [Run(number, start, length, label) for start in starts]
        kept = min(len(every), max(1, self._most_probes - 1))
        return (
            tuple(every[place] for place in np.linspace(0, len(every) - 1, kept).round().astype(int)) if every else ()
        )

    @cached_property
    def _lengths(self) -> tuple[int, ...]:
        return tuple(2**power for power in range(self._reach.bit_length()))

    def _reusable(self, track: Track, start: int, length: int, label: str) -> bool:
        return all(label in options for options in track.reusing[start : start + length]) and start + length <= len(
            track.intervals
        )

    def genome_of(self, run: Run) -> Genome:
        track = self.each[run.track]
        places = range(run.start, run.start + run.length)
        if run.option:
            return self.costs.changed(
                self.full, {track.intervals[place]: track.computing[place][run.option] for place in places}
            )
        return self.costs.changed(
            self.full, {track.intervals[place]: track.reusing[place][run.label] for place in places}
        )

    def _words(self, run: Run) -> str:
        track = self.each[run.track]
        what = track.computing[run.start][run.option] if run.option else track.reusing[run.start][run.label]
        choice = self._space.choices[self.costs.genes[track.intervals[run.start]].start]
        return f"{choice.name}: {run.length} of option {'/'.join(map(str, what))}"

    def decoded(self, chosen: Sequence[ReusePath]) -> Genome:
        options: dict[int, Option] = {}
        for track, path in zip(self.each, chosen, strict=True):
            most = max(map(len, track.computing))
            for place, way in enumerate(path.ways[1:]):
                own = track.computing[place][way] if way < most else track.reusing[place][track.labels[way - most]]
                options[track.intervals[place]] = own
        return self.costs.changed(self.full, options)
