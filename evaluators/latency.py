"""Measured time of a schedule beside its score, as one more objective: milliseconds for an image on this device.

A call of each distinct subnet, with the blocks that it reuses, is timed once for each device and kept in <run>/latency.json; a schedule's time
is the sum over its steps. Sampling itself, next to the calls, is left out.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import filelock
import numpy as np
import torch
from pydantic import Field

from evaluators.device import fingerprint, wait
from evaluators.sampling import Precision, predict
from evaluators.scoring import AroundAnother, LoadedAroundAnother
from nas.contracts import (
    Evaluator,
    LoadedEvaluator,
    LoadedSupernet,
    Schedule,
    Score,
    Step,
    UserError,
    digest_of,
    some_condition,
)
from nas.recipes import Batch, Few, recipe

FILE = "latency.json"
DECODING = "decoding"
"""What the file calls it, where steps stand as JSON."""


@recipe
class Latency:
    """How calls are timed: `batch` images each, the median of `repeats` after `warmup`; compiled or in channels-last form where asked."""

    batch: Batch = 64
    precision: Precision = "float32"
    compiled: bool = False
    channels_last: bool = False
    warmup: Annotated[int, Field(ge=0, le=4096)] = 3
    repeats: Few = 15

    def describe(self) -> dict[str, Any]:
        return {"class": "Latency", **self.__dict__}


class Timer:
    """Times of calls on one device, kept in the run folder. One process measures at a time."""

    def __init__(self, settings: Latency, net: LoadedSupernet, folder: Path) -> None:
        self._settings = settings
        self._net = net
        self._path = folder / FILE
        self._known: dict[str, list[float]] = {}
        threads = f", {torch.get_num_threads()} threads" if net.device.type == "cpu" else ""
        self.device = f"{fingerprint(net.device)}{threads}, {digest_of(settings.describe())}"

    def of_step(self, step: Step) -> list[float]:
        """Milliseconds for an image, of each repeat; 0 where nothing runs. Raises UserError for a compiled step that reuses blocks."""
        self._check(step)
        if not self._net.macs(step):
            return [0.0] * self._settings.repeats
        key = json.dumps([step.arch, step.reuse, *([step.guidance] if step.guidance else [])])
        return self._kept(key, lambda: self._measure(step))

    def of_decoding(self) -> float:
        """Median milliseconds that make an image of its state; 0 in pixel space."""
        if getattr(self._net, "in_pixels", True):
            return 0.0
        x = torch.zeros((self._settings.batch, *self._net.state_shape), device=self._net.device)
        return float(np.median(self._kept(DECODING, lambda: self._timed(lambda: self._net.to_images(x)))))

    def _kept(self, key: str, measure: Callable[[], list[float]]) -> list[float]:
        if key not in self._known:
            self._known[key] = self._in_file(key, measure)
        return self._known[key]

    def _in_file(self, key: str, measure: Callable[[], list[float]]) -> list[float]:
        with filelock.FileLock(self._path.with_suffix(".lock")):
            known: dict[str, dict[str, list[float]]] = json.loads(self._path.read_text()) if self._path.exists() else {}
            times = known.setdefault(self.device, {})
            if key not in times:
                times[key] = measure()
                partial = self._path.with_suffix(".partial")
                partial.write_text(json.dumps(known, indent=1) + "\n")
                os.replace(partial, self._path)
            return times[key]

    def of_schedule(self, schedule: Schedule) -> tuple[float, tuple[float, ...]]:
        """The sum of the steps' medians, and as many replicates as there are repeats, whose spread is the error of the means."""
        for step in schedule.steps:
            self._check(step)
        times = np.array([self.of_step(step) for step in schedule.steps])
        value = float(np.median(times, axis=1).sum())
        total = times.sum(axis=0)
        if len(total) < 2:
            return value, ()
        left_out = (total.sum() - total) / (len(total) - 1)
        return value, tuple((value + left_out - total.mean()).tolist())

    def _check(self, step: Step) -> None:
        if self._settings.compiled and step.reuse:
            raise UserError("steps that reuse blocks are not compiled; time them with Latency(compiled=False)")

    def _measure(self, step: Step) -> list[float]:
        settings, net = self._settings, self._net
        before = net.run_as(settings.channels_last, settings.compiled)
        x = torch.zeros((settings.batch, *net.state_shape), device=net.device)
        condition = {
            name: rows.to(net.device) for name, rows in (some_condition(net, settings.batch) or {}).items()
        } or None
        try:
            cache = None
            if step.reuse:
                whole = replace(step, reuse=())
                _, cache = predict(net, whole, x, None, settings.precision, step.reuse, condition)
            return self._timed(lambda: predict(net, step, x, cache, settings.precision, step.reuse, condition))
        finally:
            net.run_as(*before)

    def _timed(self, call: Callable[[], object]) -> list[float]:
        """Milliseconds for an image of a batch, of each repeat."""
        found = []
        for number in range(self._settings.warmup + self._settings.repeats):
            wait(self._net.device)
            started = time.perf_counter()
            call()
            wait(self._net.device)
            if number >= self._settings.warmup:
                found.append((time.perf_counter() - started) * 1e3 / self._settings.batch)
        return found


@recipe
class Timed(AroundAnother):
    """An evaluator whose scores carry "latency_ms" too, an objective like any other: `objectives=("fd", "latency_ms")`. A limit,
    `limits={"latency_ms": 40}`, is kept by what each call of the space takes, measured before the search begins.

    Times are of the device that a worker has, which their label names: give all workers the same one, and go on with a run on the same.
    They are measured once for each device and run folder; on a busy machine they say more about the machine.
    """

    base: Evaluator
    latency: Latency = Latency()

    @property
    def metrics(self) -> tuple[str, ...]:
        return (*self.base.metrics, "latency_ms")

    def describe(self) -> Mapping[str, Any]:
        return {"class": "Timed", "base": self.base.describe(), "latency": self.latency.describe()}

    def timed_on(self, net: LoadedSupernet) -> str:
        """The device and the settings that times depend on, in words."""
        return Timer(self.latency, net, Path()).device

    def milliseconds(self, step: Step, net: LoadedSupernet, folder: Path) -> float:
        """Of one call, for an image; the median."""
        return float(np.median(Timer(self.latency, net, folder).of_step(step)))

    def digest(self, folder: Path) -> str:
        return self._digest(self.base.digest(folder))

    def former_digest(self, folder: Path) -> str:
        """With the base's own former digest."""
        return self._digest(getattr(self.base, "former_digest", self.base.digest)(folder))

    def _digest(self, base: str) -> str:
        return digest_of({"base": base, "latency": self.latency.describe()})

    def load(self, supernet: LoadedSupernet, folder: Path) -> LoadedTimed:
        return LoadedTimed(self.base.load(supernet, folder), Timer(self.latency, supernet, folder), self.latency)


class LoadedTimed(LoadedAroundAnother):
    def __init__(self, base: LoadedEvaluator, timer: Timer, settings: Latency) -> None:
        super().__init__(base)
        self._timer = timer
        self._settings = settings

    def __call__(self, schedule: Schedule, rung: int, seed: int) -> Score:
        value, replicates = self._timer.of_schedule(schedule)
        score = self.base(schedule, rung, seed)
        decoding = self._timer.of_decoding()
        apart = f", and {decoding:.3g} ms to decode it" if decoding else ""
        label = f"ms an image{apart}, batch {self._settings.batch}, on {self._timer.device}, beside a score@{rung}"
        return Score(
            {**score.values, "latency_ms": value},
            {**score.replicates, "latency_ms": replicates},
            score.spent,
            {**score.labels, "latency_ms": label},
        )
