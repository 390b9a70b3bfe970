"""How long a study would take on this device: the study itself, cut down to seconds, is prepared and scored in a folder that is thrown away."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from nas.contracts import (
    DONE,
    Genome,
    Images,
    ImageSet,
    LoadedSupernet,
    Problem,
    Progress,
    Schedule,
    Score,
    Signal,
    Trial,
    UserError,
    derive_seed,
    spread,
)
from nas.engine.ladder import Ladder
from nas.engine.session import torch_threads
from nas.genomes.genetics import LATENCY, cheapest, dearest, random_genome, uniform_genomes
from nas.searchers.random import Random
from nas.study import Study

FEW = 6
"""Steps of each training that are timed, behind one that warms up; each training's own number, so that its ticks tell which it is."""

IMAGES = 512
SECONDS = 6.0
"""For scoring, and the longest that one step may be reckoned to take."""

SLOW = 2e10
"""Multiply-adds a second that every device reaches: what would take long even so is not tried."""


@dataclass(frozen=True)
class Some:
    """A few of some images, from all over, and of those that are held out of them, which alone are read where others need not be; the last class is among them."""

    images: Images
    count: int = IMAGES

    def load(self) -> ImageSet:
        return _read(self.images, self.count)


@lru_cache(maxsize=1)
def _read(images: Images, count: int) -> ImageSet:
    """Once, as several parts ask for them."""
    some: Callable[[int], ImageSet] | None = getattr(images, "some", None)
    return some(count) if callable(some) else _some(images.load(), count)


def _some(images: ImageSet, count: int) -> ImageSet:
    if len(images) <= count:
        return images
    chosen = spread(len(images), count, images.labels)
    return ImageSet(
        images.pixels[chosen],
        None if images.labels is None else images.labels[chosen],
        f"{images.digest}, {count}",
        None if images.held_out is None else _some(images.held_out, count),
        None if images.captions is None else tuple(images.captions[place] for place in chosen),
        images.source and f"{images.source}, {count}",
    )


@dataclass(frozen=True)
class Forecast:
    """Seconds on this device by what takes them, and of each searcher's search; `words` say what is not among them. `rate`: multiply-adds a second while
    scoring, features and all."""

    preparing: dict[str, float]
    baseline: float
    searches: dict[str, float]
    confirming: float
    rate: float
    words: tuple[str, ...] = ()

    def seconds(self, searchers: Sequence[str]) -> float:
        """From nothing to the end of these."""
        told = sum(self.searches[name] for name in searchers)
        return sum(self.preparing.values()) + self.baseline + told + self.confirming

    def to_json(self, searchers: Sequence[str], price: float | None = None) -> dict[str, Any]:
        seconds = self.seconds(searchers)
        return {
            "seconds": {
                **self.preparing,
                "the same network at every step": self.baseline,
                **{f"search by {name}": self.searches[name] for name in searchers},
                "scoring the chosen once more": self.confirming,
            },
            "hours": seconds / 3600,
            "macs_per_second": self.rate,
            **({} if price is None else {"price": seconds / 3600 * price}),
            "words": list(self.words),
        }


def forecast(study: Study, searchers: Sequence[str], device: str = "cpu", threads: int = 0, seeds: int = 1) -> Forecast:
    """`seeds`: of each search. Reads a few images, or all where their source gives no others, trains everything for a few steps, and scores a few schedules. Raises UserError where one step takes too long to try."""
    largest = dearest(study.space)
    macs = study.space.cost(largest)["macs"] / len(study.space.decode(largest).steps)
    if device == "cpu" and macs / SLOW > SECONDS:
        raise UserError(
            f"a step of the dearest schedule is {macs / 1e9:.4g} G multiply-adds, which takes too long to try here; give --device, or --throughput to "
            "reckon with another's"
        )
    shrunk, steps = _shrunk(study)
    source = getattr(study.images, "source", None)  # of images that take long to read, how many there are
    real = (told := source()).shape[0] - told.held_out if callable(source) else len(study.images.load())
    Some(study.images).load()  # before anything is timed
    with tempfile.TemporaryDirectory(prefix="nas-dry-run-") as where:
        folder = Path(where)
        with torch_threads(threads):
            preparing = _timed(shrunk.prepare(folder, device), steps, real)
        with torch_threads(1):  # as scores are computed
            evaluator = shrunk.load(folder, device)
            rate = _rate(shrunk, evaluator)
            net = evaluator.supernet
            costs = _Costs(net)
            found = {name: _searched(study, name, study.trials, costs) for name in searchers}
    first, last = study.evaluator.rungs[0], study.evaluator.rungs[-1]
    ladder = Ladder(tuple(study.evaluator.rungs), study.objectives, study.trials, study.verified)
    climbing = sum(count * samples for count, samples in ladder.planned()[1:])
    means = [costs.of(study.space.decode(genome)) for genome in uniform_genomes(study.space)]
    baseline = sum(means) * sum(study.evaluator.rungs) / rate
    searches = {}
    confirming = 0.0
    for name, (shared, leading) in found.items():
        searches[name] = seeds * (shared * first + climbing * leading) / rate
        confirming += seeds * CONFIRMED * leading * last / rate
    words = ["calls are timed when the run begins, which is not reckoned"] if study.limits_time else []
    words += getattr(study.evaluator, "not_reckoned", ())
    words += [
        f"{name} learns first, which is not reckoned"
        for name in searchers
        if getattr(study.searcher(name), "learns", False)
    ]
    return Forecast(preparing, baseline, searches, confirming, rate, tuple(words))


CONFIRMED = 4
"""Schedules of a searcher's front that are chosen for a budget, and scored on a third noise; about so many, the one to take and the full network among them."""


def _shrunk(study: Study) -> tuple[Study, dict[int, int]]:
    """The study with a few images and a few steps of each training, and how many steps these have indeed, by how many they have now."""
    steps: dict[int, int] = {}
    images = Some(study.images)
    known: list[tuple[Any, Any]] = []

    def smaller(value: Any) -> Any:
        if value == study.images and not isinstance(value, tuple | str | int):
            return images
        if isinstance(value, tuple):
            found = tuple(map(smaller, value))
            return found if any(a is not b for a, b in zip(found, value, strict=True)) else value
        if not is_dataclass(value) or isinstance(value, type):
            return value
        for mine, made in known:  # several parts may have the same classifier
            if type(mine) is type(value) and mine == value:
                return made
        changed: dict[str, Any] = {}
        for one in fields(value):
            mine = getattr(value, one.name)
            if one.name == "steps" and type(mine) is int and one.init:
                now = FEW + len(steps)
                if mine > now:
                    steps[now] = mine
                    changed["steps"] = now
            elif one.init and (new := smaller(mine)) is not mine:
                changed[one.name] = new
        made = replace(value, **changed) if changed else value
        known.append((value, made))
        return made

    parts = {name: smaller(getattr(study, name)) for name in ("supernet", "training", "evaluator", "space")}
    return replace(study, images=images, proxies={}, **parts), steps


def _timed(ticks: Iterator[Progress], steps: dict[int, int], images: int) -> dict[str, float]:
    """Seconds that each stage would take, by what its ticks call it. Those of a few steps are multiplied; of images, by how many there are."""
    found: dict[str, float] = {}
    began = before = time.perf_counter()
    stage: tuple[str, int] | None = None
    for tick in ticks:
        now = time.perf_counter()
        if (tick.what, tick.total) != stage:
            stage, began, first = (tick.what, tick.total), now, tick.done
            found[tick.what] = found.get(tick.what, 0.0) + (now - before)  # the first tick, with what goes before it
            base = found[tick.what]
        elif tick.done > first:
            total = steps.get(tick.total, tick.total)
            if tick.total == IMAGES and tick.what != "reading images":
                total = images
            each = (now - began) / (tick.done - first)
            found[tick.what] = base + each * (total - first)
        before = now
    return {name: seconds for name, seconds in found.items() if seconds > 0}


def _rate(study: Study, evaluator: Any) -> float:
    """Multiply-adds a second of scoring schedules as a search meets them, with features, statistics and all."""
    rng = np.random.default_rng(derive_seed(study.seed, "forecast"))
    genomes = [cheapest(study.space), *(random_genome(_problem(study), rng) for _ in range(64))]
    rung = study.evaluator.rungs[0]
    count = min(rung, 32)
    evaluator(study.space.decode(genomes[0]), count, 0)  # warms up
    macs = seconds = 0.0
    until = time.perf_counter() + SECONDS
    for genome in genomes[1:]:
        score: Score = evaluator(study.space.decode(genome), count, 1)
        took = score.spent.get("seconds", 0.0)
        macs, seconds = macs + score.spent.get("macs", 0.0), seconds + took
        if time.perf_counter() > until:
            break
        if count < rung and took < SECONDS / 16:  # the fixed part counts less on more samples
            count, macs, seconds = min(rung, 4 * count), 0.0, 0.0
    if not macs:
        raise UserError(
            f"{type(study.evaluator).__name__} counts no multiply-adds, by which a search is reckoned; run without --dry-run"
        )
    return macs / seconds


class _Costs:
    """Multiply-adds of schedules, as they run."""

    def __init__(self, net: LoadedSupernet) -> None:
        self._net = net
        self._known: dict[Any, int] = {}

    def step(self, step: Any) -> int:
        key = (step.arch, step.reuse, step.guidance)
        if key not in self._known:
            self._known[key] = self._net.macs(step)
        return self._known[key]

    def of(self, schedule: Schedule) -> float:
        return float(sum(map(self.step, schedule.steps)))


def _searched(study: Study, name: str, count: int, costs: _Costs) -> tuple[float, float]:
    """Multiply-adds of one sample of all schedules that a searcher would propose, beginnings that earlier ones ran taken off, and the mean of what would
    be verified. It is told that a schedule is the better the more it runs, the last steps most, which is what scores mostly say."""
    searcher = study.searcher(name)
    if getattr(searcher, "learns", False) or _asks_others(searcher):
        searcher = Random()
    search = searcher.start(_problem(study), study.seed)
    ran: set[tuple[Any, ...]] = set()
    macs, kept = 0.0, []
    for number in range(count):
        asked = search.ask(())
        if isinstance(asked, Signal):
            if asked is DONE:
                break
            continue
        schedule = study.space.decode(asked.genome)
        macs += _new(schedule, ran, costs)
        whole = costs.of(schedule)
        kept.append(whole)
        search.tell(_told(number, asked.genome, study, whole, schedule, costs))
    leading = float(np.mean(sorted(kept)[len(kept) // 2 :])) if kept else 0.0
    return macs, leading


def _asks_others(recipe: Any) -> bool:
    """Whether it asks an endpoint, which a dry run leaves alone."""
    if not is_dataclass(recipe):
        return False
    return hasattr(recipe, "url") or any(_asks_others(getattr(recipe, one.name)) for one in fields(recipe))


def _problem(study: Study) -> Problem:
    """Without a limit on time, which nothing is known of yet."""
    return replace(study.problem, limits={name: limit for name, limit in study.limits.items() if name != LATENCY})


def _new(schedule: Schedule, ran: set[tuple[Any, ...]], costs: _Costs) -> float:
    """Of the steps that no earlier schedule began with."""
    macs = 0.0
    key: tuple[Any, ...] = ()
    for step in schedule.steps:
        key = (*key, (step.timestep, step.arch, step.reuse, step.guidance))
        if key not in ran:
            ran.add(key)
            macs += costs.step(step)
    return macs


def _told(number: int, genome: Genome, study: Study, whole: float, schedule: Schedule, costs: _Costs) -> Trial:
    """A trial as one is that was scored."""
    late = sum(place * costs.step(step) for place, step in enumerate(schedule.steps, 1)) / max(1, len(schedule.steps))
    value = 1.0 / (1.0 + whole + late)
    names = study.evaluator.metrics
    score = Score(dict.fromkeys(names, value), dict.fromkeys(names, (value, value)))
    rung = study.evaluator.rungs[0]
    return Trial(number, genome, schedule.digest, rung, "pruned", score, study.space.cost(genome))
