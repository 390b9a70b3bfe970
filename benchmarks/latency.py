"""Is the sum of its steps' measured calls the time of a schedule?

Ten schedules of the digits study, random widths at each of ten steps, batch 256, one thread: predicted from calls timed alone, and measured as
whole trajectories, in turn.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import Benchmark, Target
from benchmarks.digits import digits_run
from evaluators.latency import Latency, Timer
from evaluators.sampling import DDIM, trajectory
from nas.contracts import LoadedSupernet, Schedule
from nas.genomes.genetics import uniform_genomes

Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    schedules: int
    repeats: int
    batch: int


def compare(net: LoadedSupernet, schedules: dict[str, Schedule], sizes: Sizes) -> dict[str, Row]:
    """Milliseconds for an image, in rounds: calls timed alone, then whole trajectories, so that a busy machine is busy for both. The medians
    over the rounds, and the median ratio of a round."""
    settings = Latency(batch=sizes.batch, warmup=1, repeats=3)
    predicted: dict[str, list[float]] = {name: [] for name in schedules}
    measured: dict[str, list[float]] = {name: [] for name in schedules}
    for _ in range(sizes.repeats):
        with tempfile.TemporaryDirectory() as folder:
            timer = Timer(settings, net, Path(folder))
            for name, schedule in schedules.items():
                predicted[name].append(timer.of_schedule(schedule)[0])
        for name, schedule in schedules.items():
            states = trajectory(net, schedule, DDIM(), 0, 0, sizes.batch)
            next(states)  # the noise is drawn before the clock runs
            started = time.perf_counter()
            for _ in states:
                pass
            measured[name].append(1e3 * (time.perf_counter() - started) / sizes.batch)
    return {
        name: {
            "predicted_ms": float(np.median(predicted[name])),
            "measured_ms": float(np.median(measured[name])),
            "quartiles_apart_ms": float(np.subtract(*np.percentile(measured[name], [75, 25]))),
            "error": abs(float(np.median(np.divide(predicted[name], measured[name]))) - 1),
        }
        for name in schedules
    }


def main() -> None:
    bench = Benchmark("latency", __doc__ or "", ("evaluators/latency.py",))
    torch.set_num_threads(1)
    study, folder = digits_run(bench.quick)
    net = study.supernet.load(folder / "supernet", "cpu")
    sizes = Sizes(3, 3, 32) if bench.quick else Sizes(10, 15, 256)
    rng = np.random.default_rng(0)
    genomes = [uniform_genomes(study.space)[-1]]
    genomes += [
        tuple(int(rng.integers(len(c.options))) for c in study.space.choices) for _ in range(sizes.schedules - 1)
    ]
    schedules = {f"schedule {i}": study.space.decode(genome) for i, genome in enumerate(genomes)}
    rows = {} if all(map(bench.has, schedules)) else compare(net, schedules, sizes)
    for name in schedules:
        bench.row(name, lambda name=name: rows[name])  # type: ignore[misc]
    errors = [bench.kept(name)["error"] for name in schedules]
    bench.finish(
        [
            Target(
                "latency_error",
                "relative error of the predicted time of a schedule, median of ten",
                0.05,
                float(np.median(errors)),
            )
        ]
    )


if __name__ == "__main__":
    main()
