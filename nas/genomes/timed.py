"""A limit on time. The calls that a space may make are measured once for a run folder; a search then keeps to a budget of nanoseconds as
otherwise to one of MACs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from nas.base.files import read_json
from nas.contracts import (
    Choice,
    Genome,
    LoadedSupernet,
    Price,
    Schedule,
    SearchSpace,
    Step,
    UserError,
    digest_of,
)
from nas.genomes.genetics import LATENCY, NANOSECONDS

FILE = "times.json"


@runtime_checkable
class Timing(Protocol):
    """What an evaluator has that measures time."""

    def timed_on(self, net: LoadedSupernet) -> str:
        """The device and the settings that times depend on, in words."""

    def milliseconds(self, step: Step, net: LoadedSupernet, folder: Path) -> float:
        """Of one call, for an image."""


class TimedSpace:
    """A space that also costs `latency_ms`, milliseconds for an image, and whose intervals are priced in nanoseconds. `times`:
    milliseconds of each of its `calls`, by `key`. Raises UserError where some are missing."""

    def __init__(self, space: SearchSpace, times: Mapping[str, float]) -> None:
        self._space = space
        steps = calls(space)
        needed = {key(one) for step in steps for one in (step, replace(step, reuse=()))}
        # Others that the folder has times of, as of another search that was refused, are nothing to this space.
        self._digest = digest_of({name: taken for name, taken in times.items() if name in needed})
        self._former = digest_of(dict(times))
        missing = sum(key(step) not in times for step in steps)
        if missing:
            raise UserError(f"{missing} of {len(steps)} calls were not timed; `nas run` goes on with it")
        # Where a step that reuses blocks seems slower than one that computes them, that is noise.
        self._nanoseconds = {
            key(step): round(min(times[key(step)], times[key(replace(step, reuse=()))]) * NANOSECONDS) for step in steps
        }

    @property
    def untimed(self) -> SearchSpace:
        """The same in multiply-adds alone."""
        return self._space

    @property
    def choices(self) -> Sequence[Choice]:
        return self._space.choices

    def decode(self, genome: Genome) -> Schedule:
        return self._space.decode(genome)

    def cost(self, genome: Genome) -> dict[str, float]:
        nanoseconds = sum(self._price(step) for step in self.decode(genome).steps)
        return {**self._space.cost(genome), LATENCY: nanoseconds / NANOSECONDS}

    def interval_costs(self, price: Price | None = None) -> Sequence[npt.NDArray[np.int64]]:
        return self._tables if price is None else self._space.interval_costs(price)

    def describe(self) -> dict[str, Any]:
        return {"class": "TimedSpace", "space": self._space.describe(), "times": self._digest}

    def former(self) -> dict[str, Any]:
        """As ledgers were once written, with all times of the folder."""
        return {**self.describe(), "times": self._former}

    @cached_property
    def _tables(self) -> Sequence[npt.NDArray[np.int64]]:
        return self._space.interval_costs(self._price)

    def _price(self, step: Step) -> int:
        return self._nanoseconds[key(step)]


def key(step: Step) -> str:
    """What the time of a step depends on."""
    return json.dumps([step.arch, step.reuse, *([step.guidance] if step.guidance else [])])


def calls(space: SearchSpace) -> list[Step]:
    """One step for each call that schedules of the space may make."""
    found: dict[str, Step] = {}

    def note(step: Step) -> int:
        found.setdefault(key(step), step)
        return 0

    space.interval_costs(note)
    return list(found.values())


def timed(space: SearchSpace, folder: Path) -> TimedSpace:
    """The space with the folder's times. Raises UserError where they were not measured."""
    path = folder / FILE
    if not path.exists():
        raise UserError(f"{path} does not exist: `nas run` measures what calls take, for the limit on {LATENCY}")
    return TimedSpace(space, read_times(path)["milliseconds"])


def read_times(path: Path) -> dict[str, Any]:
    """What a folder's file holds: "device", in words, and "milliseconds" of calls, by `key`. Raises UserError where the file is damaged."""
    again = "delete it, and calls are timed again"
    told = read_json(path, again)
    if not isinstance(told.get("device"), str) or not isinstance(told.get("milliseconds"), dict):
        raise UserError(f"{path} holds no times of a device; {again}")
    return told
