"""All schedules of five intervals of the digits study, sampled once: their features, and searches replayed on them.

What a search is told is a distance on some of a schedule's samples; what it returns is judged on others. The engine's own runner
replays it, so that a search of minutes takes seconds and may be repeated with many seeds.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import optuna
import torch

from benchmarks.common import RUNS, Benchmark
from benchmarks.digits import digits, images
from evaluators.frechet import Frechet, Gaussian, Moments, frechet_with_replicates
from evaluators.images import load_once
from nas.contracts import Genome, Problem, Schedule, Score, Searcher, Trial, derive_seed
from nas.engine.ladder import Ladder
from nas.engine.ledger import Ledger
from nas.engine.runner import Conductor, run_here
from nas.genomes.genetics import feasible_genomes
from nas.genomes.pareto import hypervolume
from nas.study import LedgerInfo
from search_spaces.intervals import equal
from search_spaces.stepwise import Stepwise
from studies.digits import net, steps

SEED = derive_seed(0, "search cost benchmark")

Row = dict[str, Any]
Features = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TableSize:
    """Of each schedule's samples the first half is for searching, the second half judges."""

    intervals: int
    samples: int

    @property
    def half(self) -> int:
        return self.samples // 2

    @property
    def space(self) -> Stepwise:
        return Stepwise(net, steps, equal(steps, self.intervals))


FULL_TABLE = TableSize(5, 8192)
QUICK_TABLE = TableSize(3, 256)


def sample_part(folder: Path, size: TableSize, first: int, into: Path) -> Row:
    """Features of every schedule whose first gene is `first`, (schedules, samples, d), into an .npy file, unless it is there already."""
    facts = into.with_suffix(".json")
    if facts.exists():
        made: Row = json.loads(facts.read_text())
        return made
    torch.set_num_threads(1)
    space = size.space
    evaluate = replace(digits, evaluator=Frechet(images, rungs=(size.samples,))).load(folder, "cpu")
    started = time.perf_counter()
    genomes = [genome for genome in sorted(feasible_genomes(Problem(space, ("macs",)))) if genome[0] == first]
    rows = [evaluate.rows_of(space.decode(genome), size.samples, SEED) for genome in genomes]  # type: ignore[attr-defined]
    np.save(into, np.stack(rows))
    meter = evaluate.trajectories.meter  # type: ignore[attr-defined]
    saved = meter.cached_macs / (meter.cached_macs + meter.macs)
    found = {"schedules": len(genomes), "seconds": time.perf_counter() - started, "saved": saved}
    partial = facts.with_suffix(".partial")
    partial.write_text(json.dumps(found))
    os.replace(partial, facts)
    return found


@dataclass(frozen=True)
class Table:
    """Features of all schedules, and distances of any of their samples to the reference."""

    size: TableSize
    files: tuple[Path, ...]
    reference: Gaussian

    @cached_property
    def features(self) -> dict[Genome, Features]:
        genomes = sorted(feasible_genomes(Problem(self.size.space, ("macs",))))
        rows = (row for file in self.files for row in np.load(file, mmap_mode="r"))
        return dict(zip(genomes, rows, strict=True))

    def genome_of(self, schedule: Schedule) -> Genome:
        return self._by_digest[schedule.digest]

    @cached_property
    def _by_digest(self) -> dict[str, Genome]:
        return {self.size.space.decode(genome).digest: genome for genome in self.features}

    @cached_property
    def _known(self) -> dict[Any, tuple[float, tuple[float, ...]]]:
        return {}

    def distance(
        self, genome: Genome, start: int, stop: int, seed: int | None = None
    ) -> tuple[float, tuple[float, ...]]:
        """`seed`: of an order of the search's half, so that searches of other seeds see other samples."""
        key = genome, start, stop, seed
        if key not in self._known:
            rows = self.features[genome]
            if seed is None:
                rows = rows[start:stop]
            else:
                order = np.random.default_rng(derive_seed(seed, "order of samples")).permutation(self.size.half)
                rows = rows[order[start:stop]]
            self._known[key] = frechet_with_replicates(rows, self.reference)
        return self._known[key]

    def fresh(self, genome: Genome, rng: np.random.Generator) -> tuple[float, tuple[float, ...]]:
        """With noise of its own: as many samples drawn with replacement as a half holds."""
        half = self.size.half
        return frechet_with_replicates(self.features[genome][rng.integers(half, size=half)], self.reference)

    def judge(self, genome: Genome) -> float:
        return self.distance(genome, self.size.half, self.size.samples)[0]


class SpaceSize(Protocol):
    """`half`: the most images of a candidate."""

    @property
    def space(self) -> Stepwise: ...

    @property
    def half(self) -> int: ...


class Lookup(Protocol):
    """What a replay asks: distances on samples from start up to stop, or on fresh ones, with replicates."""

    @property
    def size(self) -> SpaceSize: ...

    def genome_of(self, schedule: Schedule) -> Genome: ...

    def distance(
        self, genome: Genome, start: int, stop: int, seed: int | None = None
    ) -> tuple[float, tuple[float, ...]]: ...

    def fresh(self, genome: Genome, rng: np.random.Generator) -> tuple[float, tuple[float, ...]]: ...


class Replay:
    """An evaluator that looks up features instead of sampling, and charges what sampling would have taken.

    `shared`: shared noise and beginnings, each interval charged for the samples that no schedule with the same beginning has
    run; else fresh noise for every candidate, all of it charged. `seed`: of the noise, or of the order in which the shared samples
    are seen, None for the order in which they were made.
    """

    def __init__(self, table: Lookup, rungs: Sequence[int], shared: bool, seed: int | None) -> None:
        self._table = table
        self._rungs = rungs
        self._shared = shared
        self._seed = seed
        self._calls = 0
        self._run: dict[Any, int] = {}
        self._costs = table.size.space.interval_costs()

    def __call__(self, schedule: Schedule, rung: int, seed: int) -> Score:
        genome = self._table.genome_of(schedule)
        self._calls += 1
        if not self._shared:
            rng = np.random.default_rng(derive_seed(self._seed or 0, self._calls, "fresh noise"))
            value, replicates = self._table.fresh(genome, rng)
            macs = rung * sum(int(row[gene]) for row, gene in zip(self._costs, genome, strict=True))
        else:
            verifying = rung == self._rungs[-1] and len(self._rungs) > 1
            start = self._table.size.half - rung if verifying else 0
            value, replicates = self._table.distance(genome, start, start + rung, self._seed)
            macs = sum(self._interval(genome, k, rung, verifying) for k in range(len(genome)))
        return Score({"fd": value}, {"fd": replicates}, {"macs": float(macs)}, {"fd": f"fd@{rung}"})

    def _interval(self, genome: Genome, k: int, rung: int, verifying: bool) -> int:
        key = verifying, genome[: k + 1]
        new = max(0, rung - self._run.get(key, 0))
        self._run[key] = max(rung, self._run.get(key, 0))
        return new * int(self._costs[k][genome[k]])


def replayed(
    table: Lookup,
    searcher: Searcher,
    rungs: tuple[int, ...],
    trials: int,
    seed: int,
    shared: bool = True,
    limits: Mapping[str, float] | None = None,
) -> list[Trial]:
    """Trials of one whole search by the engine's runner."""
    problem = Problem(table.size.space, ("fd", "macs"), limits or {})
    info = LedgerInfo("digits-table", "searcher", seed, problem.objectives, rungs, dict(problem.limits), {})
    ledger = Ledger(optuna.storages.InMemoryStorage(), info, problem)
    ladder = Ladder(rungs, problem.objectives, trials, verified_of(trials))
    run_here(
        Conductor(ledger, searcher.start(problem, seed), problem, ladder, seed),
        lambda: Replay(table, rungs, shared, seed),
    )
    return ledger.trials


def judged_volume(table: Table, returned: Sequence[Trial]) -> float:
    """Of the returned schedules, by the judge's scores."""
    return genomes_volume(table, [trial.genome for trial in returned])


def verified_of(trials: int) -> int:
    """How many of a search's trials reach its last rung."""
    return max(4, min(24, trials // 3))


def genomes_volume(table: Table, genomes: Sequence[Genome]) -> float:
    """Hypervolume by the judge's scores, against the cheapest net's distance and all MACs."""
    space = table.size.space
    worst = table.judge((0,) * table.size.intervals)
    return hypervolume([(table.judge(g), space.cost(g)["macs_share"]) for g in genomes], (worst, 1.0001))


def build_table(bench: Benchmark, size: TableSize, trained: Path) -> Table:
    """Samples what is missing; benchmarks share it."""
    folder = RUNS.resolve() / ("digits-table-quick" if bench.quick else "digits-table")
    folder.mkdir(parents=True, exist_ok=True)
    files = tuple(folder / f"features-{first}.npy" for first in range(len(net.widths)))
    bench.rows(
        {
            f"samples of schedules {first}...": (sample_part, trained, size, first, file)
            for first, file in enumerate(files)
        }
    )
    features = digits.evaluator.features.load(trained, torch.device("cpu"))  # type: ignore[attr-defined]
    real = features(torch.from_numpy(load_once(images).pixels)).numpy()
    return Table(size, files, Moments.of(real).gaussian())
