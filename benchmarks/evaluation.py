"""How much cheaper is a candidate here than in the published loop, and what of that is the shared beginnings' doing?

On the digits study's supernet, one CPU thread. The candidates of a real evolution run with five intervals are scored by the
engine and by a port of DDSM's evaluation loop (benchmarks/ddsm_loop.py): same network, timesteps, extractor and sample count.
Where a GPU is at hand, the same for 32x32 RGB images and the DDPM CIFAR-10 architecture with untrained weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch

from benchmarks import ddsm_loop
from benchmarks.common import Benchmark, Target, borrow, digits_run
from evaluators.frechet import Frechet, Moments
from evaluators.images import load_once
from nas.contracts import Genome, LoadedEvaluator, Schedule, derive_seed
from nas.genetics import feasible_genomes
from nas.ray_runner import Workers
from nas.session import open_session
from nas.study import Study
from search_spaces.intervals import equal, per_step
from search_spaces.stepwise import Stepwise
from studies.digits import images, net, steps
from studies.digits import study as digits

SEED = derive_seed(0, "evaluation benchmark")
Row = dict[str, Any]


def study_with(study: Study, intervals: int, samples: int, quick: bool) -> Study:
    """The digits study without verification, so that everything that runs is a candidate of the search."""
    partition = per_step(steps) if intervals == len(steps) else equal(steps, intervals)
    return replace(
        study,
        space=Stepwise(net, steps, partition),
        evaluator=Frechet(images, rungs=(samples,)),
        trials=20 if quick else 200,
    )


@dataclass(frozen=True)
class Place:
    """The trained run folder that every measurement here loads from."""

    folder: Path

    def load(self, study: Study) -> LoadedEvaluator:
        return study.load(self.folder, "cpu")

    def evolve(self, study: Study, into: Path, workers: Workers | None) -> list[Any]:
        """Trials of an evolution run, in order of completion, in a run folder of their own that borrows the weights."""
        with open_session(study, borrow(self.folder, into)) as session:
            conductor = session.conductor("evolution")
            session.run(conductor, workers)
            return conductor.ledger.finished


def share_saved(trials: Sequence[Any]) -> Row:
    """Of the network MACs that the trials would take one by one, how much did not run."""
    spent = [trial.score.spent for trial in trials if trial.score]
    ran, kept = (sum(s[name] for s in spent) for name in ("macs", "cached_macs"))
    return {"trials": len(spent), "saved": kept / (ran + kept), "hits": sum(s["cache_hits"] for s in spent)}


def score_all(place: Place, study: Study, genomes: Sequence[Genome], samples: int) -> Row:
    """Seconds for all candidates in order, by the engine, cold at the start; `sampling_s` without features and distance."""
    evaluate = place.load(study)
    started = time.perf_counter()
    for genome in genomes:
        evaluate(study.space.decode(genome), samples, SEED)
    whole = time.perf_counter() - started
    sampler = place.load(study)
    started = time.perf_counter()
    for genome in genomes:
        sampler.sample(study.space.decode(genome), samples, SEED)
    return {"candidates": len(genomes), "whole_s": whole, "sampling_s": time.perf_counter() - started}


def literal(place: Place, study: Study, genomes: Sequence[Genome], samples: int) -> Row:
    """The same by the published loop."""
    loaded = place.load(study)
    supernet = loaded.supernet
    model = ddsm_loop.slimmable(supernet.extract(supernet.full_arch))
    statistics = place.folder / "statistics.npz"
    features = digits.evaluator.features  # type: ignore[attr-defined]
    rows = features.load(place.folder, torch.device("cpu"))(torch.from_numpy(load_once(images).pixels)).numpy()
    reference = Moments.of(rows).gaussian()
    np.savez(statistics, mu=reference.mean, sigma=reference.covariance)
    sampling = 0.0
    begun = time.perf_counter()
    for genome in genomes:
        schedule = study.space.decode(genome)
        started = time.perf_counter()
        drawn = ddsm_loop.sample(model, _widths(schedule), schedule.timesteps, samples, supernet.alphas_cumprod)
        sampling += time.perf_counter() - started
        ddsm_loop.distance(drawn, features, place.folder, statistics)
    return {"candidates": len(genomes), "whole_s": time.perf_counter() - begun, "sampling_s": sampling}


def _widths(schedule: Schedule) -> list[float]:
    return [step.arch[0] for step in schedule.steps]


def bit_equal(place: Place, study: Study, genomes: Sequence[Genome], samples: int) -> Row:
    """Scores with the cache, in the order of a search, against scores without it."""
    bare = replace(study, evaluator=replace(study.evaluator, cache_bytes=0))  # type: ignore[type-var]
    shared, alone = place.load(study), place.load(bare)
    pairs = [
        [evaluate(study.space.decode(genome), samples, SEED) for evaluate in (shared, alone)] for genome in genomes
    ]
    same = sum(a.values == b.values and a.replicates == b.replicates for a, b in pairs)
    return {"schedules": len(pairs), "equal": same, "hits": sum(a.spent["cache_hits"] for a, _ in pairs)}


def enumeration(place: Place, study: Study, samples: int) -> Row:
    """The whole space in lexicographic order."""
    evaluate = place.load(study)
    genomes = sorted(feasible_genomes(study.unlimited()))
    scores = [evaluate(study.space.decode(genome), samples, SEED) for genome in genomes]
    ran, kept = (sum(score.spent[name] for score in scores) for name in ("macs", "cached_macs"))
    return {"schedules": len(genomes), "saved": kept / (ran + kept)}


def frechet(dimensions: int) -> Row:
    """One distance at so many dimensions, the reference's root kept, against scipy's general root of the product."""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((dimensions, dimensions)) / dimensions**0.5
    a, b = (Moments.of(rng.standard_normal((2 * dimensions, dimensions)) @ mixing).gaussian() for _ in range(2))
    a.distance(b)
    ours, value = _least(lambda: a.distance(b), 3)

    def published() -> float:
        root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
        shift = a.mean - b.mean
        return float(shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.trace(np.real(root)))

    theirs, expected = _least(published, 1)
    return {
        "dimensions": dimensions,
        "ours_s": ours,
        "scipy_s": theirs,
        "relative_difference": abs(value / expected - 1),
    }


def _least(call: Callable[[], float], repeats: int) -> tuple[float, float]:
    seconds, value = [], 0.0
    for _ in range(repeats):
        started = time.perf_counter()
        value = call()
        seconds.append(time.perf_counter() - started)
    return min(seconds), value


def main() -> None:
    bench = Benchmark("evaluation", __doc__ or "")
    torch.set_num_threads(1)
    quick = bench.quick
    study, folder = digits_run(digits, quick)
    place = Place(folder)
    samples, few = (64, 16) if quick else (2048, 64)
    five, ten = (study_with(study, count, samples, quick) for count in (5, 10))
    runs = bench.folder / "searches"

    def few_of(larger: Study) -> Study:
        return replace(larger, evaluator=Frechet(images, rungs=(few,)))

    search = bench.row(
        "evolution, 5 intervals, 1 worker",
        lambda: {
            **share_saved(found := place.evolve(few_of(five), runs / "five", None)),
            "genomes": [trial.genome for trial in found],
        },
    )
    genomes = [tuple(genome) for genome in search["genomes"]]
    every = 4 if quick else 8
    timed = bench.row(
        "candidates of that run",
        lambda: {
            "engine": score_all(place, five, genomes, samples),
            f"published loop, every {every}th": literal(place, five, genomes[::every], samples),
        },
    )
    ours, theirs = timed["engine"], timed[f"published loop, every {every}th"]

    def ratio(what: str) -> float:
        """Seconds per candidate there over seconds per candidate here."""
        return float(theirs[what] / theirs["candidates"] / (ours[what] / ours["candidates"]))

    bench.row(
        "ratios",
        lambda: {"candidates_per_second": ratio("whole_s"), "sampling_alone": ratio("sampling_s")},
    )
    bench.row(
        "evolution, 5 intervals, 2 workers",
        lambda: share_saved(place.evolve(few_of(five), runs / "five-two", Workers(2))),
    )
    bench.row("evolution, 10 intervals, 1 worker", lambda: share_saved(place.evolve(few_of(ten), runs / "ten", None)))
    whole = bench.row("whole space, 5 intervals", lambda: enumeration(place, few_of(five), few))
    equal_bits = bench.row("with and without the cache", lambda: bit_equal(place, few_of(five), genomes[:40], few))
    distance = bench.row("Frechet distance", lambda: frechet(256 if quick else 2048))
    bench.finish(
        [
            Target(
                "candidates_per_second_ratio",
                "candidates per second / those of DDSM's published loop, same network, images and core",
                2.5,
                ratio("whole_s"),
                at_most=False,
            ),
            Target(
                "prefix_saved_evolution",
                "share of network MACs that shared beginnings save, evolution of 200 with 5 intervals, one worker",
                0.5,
                search["saved"],
                at_most=False,
            ),
            Target(
                "prefix_saved_enumeration",
                "the same in a full enumeration of 5 intervals",
                0.7,
                whole["saved"],
                at_most=False,
            ),
            Target(
                "cached_scores_that_differ",
                "scores that the cache changes by any bit, of 40",
                0,
                equal_bits["schedules"] - equal_bits["equal"],
            ),
            Target(
                "frechet_2048_ratio",
                "seconds of scipy's Frechet distance / of this one, 2,048 dimensions, reference's root kept",
                5,
                distance["scipy_s"] / distance["ours_s"],
                at_most=False,
            ),
        ]
    )


if __name__ == "__main__":
    main()
