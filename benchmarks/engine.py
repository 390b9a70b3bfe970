"""What the engine costs per trial, apart from the evaluation: locally, under Ray, and with long genomes.

The evaluator sleeps one second and returns a formula; ledger, searcher, runner and Ray are the real ones.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.common import Benchmark, Target
from nas.contracts import ImageSet, Progress, Schedule, Score
from nas.searchers.evolution import Evolution
from nas.session import open_session
from nas.study import Study
from nas.testing import TableSpace, toy_score


@dataclass(frozen=True)
class Sleeper:
    """An evaluator that sleeps, and everything else that a study needs to be one."""

    seconds: float = 1.0
    rungs: tuple[int, ...] = (1,)
    metrics: tuple[str, ...] = ("fd",)

    def describe(self) -> dict[str, Any]:
        return {"class": "Sleeper"}

    def prepare(self, folder: Path, seed: int, device: str) -> Iterator[Progress]:
        yield from ()

    def run(self, supernet: Any, images: Any, folder: Path, seed: int, device: str) -> Iterator[Progress]:
        yield from ()

    def digest(self, folder: Path) -> str:
        return "none"

    def load(self, *where: Any) -> Any:
        return self

    def __call__(self, schedule: Schedule, rung: int, seed: int) -> Score:
        time.sleep(self.seconds)
        genome = tuple(gene for step in schedule.steps for gene in step.arch)
        return replace(toy_score(genome), spent={"seconds": self.seconds})

    def sample(self, schedule: Schedule, count: int, seed: int) -> Any:
        raise RuntimeError("a sleeper has no images")


class NoImages:
    def load(self) -> ImageSet:
        raise RuntimeError("a sleeper has no images")


def study(genes: int, trials: int, seconds: float) -> Study:
    part: Any = Sleeper(seconds)
    table = (tuple((j + 1) ** 2 for j in range(4)),) * genes
    return Study(
        name="engine",
        space=TableSpace(table),
        supernet=part,
        images=NoImages(),
        training=part,
        evaluator=part,
        searchers={"evolution": Evolution()},
        limits={"macs_share": 0.6},
        trials=trials,
    )


def local(folder: Path, trials: int, seconds: float) -> dict[str, float]:
    shutil.rmtree(folder, ignore_errors=True)
    with open_session(study(10, trials, seconds), folder) as session:
        conductor = session.conductor("evolution")
        started = time.perf_counter()
        session.run(conductor)
        wall = time.perf_counter() - started
    return {"trials": trials, "wall_s": wall, "overhead_ms": (wall / trials - seconds) * 1e3}


def under_ray(folder: Path, trials: int, seconds: float, workers: int) -> dict[str, float]:
    """Start-up (Ray, Tune, the workers' imports) is what lies before the first trial is settled, less its second."""
    from nas.ray_runner import Workers

    shutil.rmtree(folder, ignore_errors=True)
    settled: list[float] = []
    with open_session(study(10, trials, seconds), folder) as session:
        conductor = session.conductor("evolution", on_settled=lambda trial: settled.append(time.perf_counter()))
        started = time.perf_counter()
        session.run(conductor, workers=Workers(workers))
        ended = time.perf_counter()
    warm = max(settled[workers - 1], settled[0])
    steady = (settled[-1] - warm) / (trials - workers)
    return {
        "trials": trials,
        "workers": workers,
        "wall_s": ended - started,
        "start_up_s": warm - started - seconds,
        "shut_down_s": ended - settled[-1],
        "overhead_ms": (steady - seconds / workers) * 1e3,
    }


def long_genomes(folder: Path, trials: int) -> dict[str, float]:
    """Ask, write-ahead, close and tell at 1,000 genes; nothing is evaluated."""
    shutil.rmtree(folder, ignore_errors=True)
    with open_session(study(1000, trials, 0.0), folder) as session:
        conductor = session.conductor("evolution")
        started = time.perf_counter()
        session.run(conductor)
        wall = time.perf_counter() - started
    return {"trials": trials, "wall_s": wall, "per_trial_ms": wall / trials * 1e3}


def main() -> None:
    bench = Benchmark("engine", __doc__ or "")
    trials, seconds, genes_trials = (10, 0.2, 30) if bench.quick else (100, 1.0, 200)
    genes = bench.row("1,000 genes", lambda: long_genomes(bench.folder / "genes", genes_trials))
    here = bench.row("local", lambda: local(bench.folder / "local", trials, seconds))
    ray = bench.row("ray, 2 workers", lambda: under_ray(bench.folder / "ray", trials, seconds, 2))
    assert math.isfinite(ray["overhead_ms"])
    bench.finish(
        [
            Target(
                "local_overhead_ms", "milliseconds per trial outside the evaluator, in process", 20, here["overhead_ms"]
            ),
            Target("ray_overhead_ms", "the same under Ray with 2 workers, start-up apart", 60, ray["overhead_ms"]),
            Target("genes_1000_ms", "ask, ledger and tell at 1,000 genes", 100, genes["per_trial_ms"]),
        ]
    )


if __name__ == "__main__":
    main()
