"""How much cheaper is a candidate here than in the published loop, and what of that is the shared beginnings' doing?

On the digits study's supernet, one CPU thread. The candidates of a real evolution run with five intervals are scored by the
engine and by a port of DDSM's evaluation loop (benchmarks/ddsm_loop.py): same network, timesteps, extractor and sample count.
Where a GPU is at hand, the same there for 32x32 RGB images and the DDPM CIFAR-10 architecture, with untrained weights.

And how near to the processor's matrix rate do networks of each width run, what a search waits for? The rate is that of `torch.mm`, of two matrices of
1,024 rows, one thread, same process, in turns with the networks; beside it that of the fastest convolution, which on some processors is the
faster of the two by far.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from safetensors.torch import save_file

from benchmarks import ddsm_loop
from benchmarks.common import Benchmark, Target, borrow
from benchmarks.cost import DDPM_CIFAR10
from benchmarks.digits import digits_run, images
from evaluators.device import Execution
from evaluators.frechet import Frechet, Moments
from evaluators.images import PhotoPatches, load_once
from evaluators.sampling import Precision
from nas.base.memory import KEPT, set_thresholds
from nas.contracts import Genome, Images, LoadedEvaluator, Progress, Schedule, Score, Step, derive_seed
from nas.engine.cluster import Workers
from nas.engine.session import open_session
from nas.genomes.genetics import feasible_genomes
from nas.results.audit import Agreement
from nas.searchers.evolution import Evolution
from nas.study import Study
from search_spaces.intervals import equal
from search_spaces.networks.slices import Arch
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import WEIGHTS, Elastic
from studies.digits import UNET, net, steps

SEED = derive_seed(0, "evaluation benchmark")
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
ENGINE_BATCH = Execution().batch
WIDTHS = (0.25, 0.5, 1.0)
BY_DEFAULT = 2**25, 2**26
"""Thresholds of memory that glibc arrives at by itself in a process that frees large blocks: the published loop sets none."""
Row = dict[str, Any]


def study_with(study: Study, intervals: int, samples: int, quick: bool) -> Study:
    """The digits study without verification, so that everything that runs is a candidate of the search."""
    return replace(
        study,
        space=Stepwise(net, steps, equal(steps, intervals)),
        evaluator=Frechet(images, rungs=(samples,)),
        trials=20 if quick else 200,
    )


@dataclass(frozen=True)
class Place:
    """The trained run folder that every measurement here loads from."""

    folder: Path
    device: str = "cpu"

    def load(self, study: Study) -> LoadedEvaluator:
        return study.load(self.folder, self.device)

    def evolve(self, study: Study, into: Path, workers: Workers | None) -> list[Any]:
        """Trials of an evolution run, in order of completion, in a run folder of their own that borrows the weights."""
        with open_session(study, borrow(self.folder, into), device=self.device) as session:
            conductor = session.conductor("evolution")
            session.run(conductor, workers=workers)
            return conductor.ledger.finished


def ratios(timed: Row, precision: Precision, batch: int) -> Row:
    """Seconds of the published loop over those of the engine, all candidates."""
    loop = f"published loop, batches of {batch}"
    sampling = timed[f"{loop}, sampling_s"]
    return {
        "candidates_per_second": (sampling + timed[f"{loop}, distance_s"]) / timed[f"{precision}_s"],
        "sampling_alone": sampling / timed[f"{precision}, sampling_s"],
    }


def share_saved(trials: Sequence[Any]) -> Row:
    """Of the network MACs that the trials would take one by one, how much did not run."""
    spent = [trial.score.spent for trial in trials if trial.score]
    ran, kept = (sum(s[name] for s in spent) for name in ("macs", "cached_macs"))
    return {"trials": len(spent), "saved": kept / (ran + kept), "hits": sum(s["cache_hits"] for s in spent)}


def score_all(place: Place, study: Study, genomes: Sequence[Genome], samples: int, every: int) -> Row:
    """Seconds for all candidates in the order of the search, cold at the start, and for a part of them, spread over the MACs, by
    the published loop. All of it in turns, so that whatever else the machine does meets everyone alike.

    "sampling" is without features and distance. The published loop's seconds are scaled to all candidates by their MACs.
    """
    scorers = {precision: place.load(_with_precision(study, precision)) for precision in PRECISIONS}
    samplers = {precision: place.load(_with_precision(study, precision)) for precision in PRECISIONS}
    loop = Literal(place, study, samples)
    order = sorted(range(len(genomes)), key=lambda i: study.space.cost(genomes[i])["macs"])
    chosen = set(order[every // 2 :: every])
    seconds: dict[str, float] = defaultdict(float)
    scores: dict[str, list[Score]] = defaultdict(list)
    for i, genome in enumerate(genomes):
        schedule = study.space.decode(genome)
        for precision in PRECISIONS:
            with _timed(seconds, precision):
                scores[precision].append(scorers[precision](schedule, samples, SEED))
            with _timed(seconds, f"{precision}, sampling"):
                samplers[precision].sample(schedule, samples, SEED)
        if i in chosen:
            set_thresholds(*BY_DEFAULT)
            for batch in (ddsm_loop.SAMPLING_BATCH, ENGINE_BATCH):
                name = f"published loop, batches of {batch}"
                with _timed(seconds, f"{name}, sampling"):
                    drawn = loop.sample(schedule, batch)
                with _timed(seconds, f"{name}, distance"):
                    loop.distance(drawn)
            set_thresholds(KEPT, KEPT)
    macs = [study.space.cost(genome)["macs"] for genome in genomes]
    scale = sum(macs) / sum(macs[i] for i in chosen)
    published = {name: value * scale for name, value in seconds.items() if name.startswith("published")}
    pairs = list(zip(*(scores[precision] for precision in PRECISIONS), strict=True))
    exact, rough = (np.array([score.values["fd"] for score in scores[precision]]) for precision in PRECISIONS)
    return {
        "candidates": len(genomes),
        "samples": samples,
        "candidates_of_the_published_loop": len(chosen),
        **{f"{name}_s": value for name, value in {**seconds, **published}.items()},
        "bfloat16_tau_with_float32": float(Agreement(exact, rough).tau(np.ones((1, len(genomes))))[0]),
        "bfloat16_largest_difference": float(np.abs(exact - rough).max()),
        "bfloat16_largest_difference_in_standard_errors": max(
            abs(a.values["fd"] - b.values["fd"]) / a.error("fd") for a, b in pairs
        ),
    }


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    _finish_device_work()
    started = time.perf_counter()
    yield
    _finish_device_work()
    seconds[name] += time.perf_counter() - started


def _finish_device_work() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _with_precision(study: Study, precision: Precision) -> Study:
    return replace(study, evaluator=replace(study.evaluator, precision=precision))  # type: ignore[type-var]


class Literal:
    """The published loop on the same network, timesteps, extractor and reference."""

    def __init__(self, place: Place, study: Study, samples: int) -> None:
        supernet = place.load(study).supernet
        self._device = supernet.device
        self._model = ddsm_loop.slimmable(supernet.extract(supernet.full_arch).to(self._device))
        self._abar = supernet.alphas_cumprod
        self._samples = samples
        self._folder = place.folder
        self._statistics = place.folder / "statistics.npz"
        self._features = study.evaluator.features  # type: ignore[attr-defined]
        extractor = self._features.load(place.folder, self._device)
        pixels = torch.from_numpy(load_once(study.images).pixels).to(self._device)
        reference = Moments.of(extractor(pixels).cpu().numpy()).gaussian()
        np.savez(self._statistics, mu=reference.mean, sigma=reference.covariance)

    def sample(self, schedule: Schedule, batch: int) -> torch.Tensor:
        widths = [Arch(*step.arch).widths[0] for step in schedule.steps]
        return ddsm_loop.sample(self._model, widths, schedule.timesteps, self._samples, self._abar, batch)

    def distance(self, drawn: torch.Tensor) -> float:
        return ddsm_loop.distance(drawn, self._features, self._folder, self._statistics, self._device)


@dataclass(frozen=True)
class Untrained:
    """Initial weights: enough where only speed is measured."""

    def describe(self) -> Mapping[str, Any]:
        return {"class": "Untrained"}

    def macs(self, supernet: Any) -> float:
        return 0.0

    def run(self, supernet: Any, images: Images, folder: Path, seed: int, device: str) -> Iterator[Progress]:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / WEIGHTS).exists():
            save_file(supernet.initial(seed).full.state_dict(), folder / WEIGHTS)
        yield from ()


def elsewhere(
    bench: Benchmark, device: str, config: Mapping[str, Any], pictures: Images, samples: int, trials: int
) -> Row:
    """The comparison for another network on another device."""
    big = Elastic(config)
    study = Study(
        name="elsewhere",
        space=Stepwise(big, steps, equal(steps, 5)),
        supernet=big,
        images=pictures,
        training=Untrained(),
        evaluator=Frechet(pictures, rungs=(64,)),
        searchers={"evolution": Evolution()},
        trials=trials,
        verified=1,
    )
    place = Place(bench.folder / "elsewhere", device)
    with open_session(study, place.folder, device=device) as session:
        for _ in session.prepare():
            pass
    genomes = [trial.genome for trial in place.evolve(study, bench.folder / "searches" / "elsewhere", None)]
    larger = replace(study, evaluator=Frechet(pictures, rungs=(samples,)))
    return score_all(place, larger, genomes, samples, every=8)


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
    genomes = sorted(feasible_genomes(replace(study.problem, limits={})))
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


def matrix_shares(config: Mapping[str, Any], batch: int, repeats: int) -> Row:
    """Multiply-adds a second of one call at each width, over those of the matrix product and of a large convolution."""
    elastic = Elastic(config, widths=WIDTHS)
    loaded = elastic.initial(0)
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    large = torch.nn.Conv2d(256, 256, 3, padding=1).eval()
    plane = torch.randn(16, 256, 32, 32)
    x = torch.randn(batch, *loaded.state_shape)
    timed: dict[str, tuple[int, Callable[[], Any]]] = {
        "mm": (1024**3, lambda: a @ b),
        "convolution": (16 * 32 * 32 * 256 * 256 * 9, lambda: large(plane)),
    }
    for width in WIDTHS:
        arch = elastic.uniform(width)
        denoiser = loaded.denoiser(Step(500, arch))
        timed[f"width {width:g}"] = (batch * elastic.cost(arch).macs, partial(denoiser, x, 500))
    rates: dict[str, float] = {}
    with torch.inference_mode():
        for _ in range(repeats):
            for name, (macs, call) in timed.items():
                rates[name] = max(rates.get(name, 0.0), macs / _least(lambda call=call: call() is None, 2)[0])  # type: ignore[misc]
    shares = {name: rate / rates["mm"] for name, rate in rates.items() if name.startswith("width")}
    best = max(rates["mm"], rates["convolution"])
    return {
        "batch": batch,
        "macs_per_second": rates,
        "share_of_mm": shares,
        "mean_share_of_mm": float(np.mean([*shares.values()])),
        "share_of_the_faster": {name: rate / best for name, rate in rates.items() if name.startswith("width")},
    }


def convolution_rates(batch: int, repeats: int) -> Row:
    """Multiply-adds a second of one 3x3 convolution, as memory lies by default and with channels last."""
    found = {}
    for channels in (16, 24, 32, 48, 64):
        for side in (8, 4):
            layer, x = (
                torch.nn.Conv2d(channels, channels, 3, padding=1).eval(),
                torch.randn(batch, channels, side, side),
            )
            for words, form in (("", torch.contiguous_format), ("channels last", torch.channels_last)):
                layer, x = layer.to(memory_format=form), x.contiguous(memory_format=form)  # type: ignore[call-overload]
                with torch.inference_mode():
                    seconds, _ = _least(lambda layer=layer, x=x: layer(x) is None, repeats)  # type: ignore[misc]
                found[f"{channels} channels, {side}x{side} {words}".strip()] = (
                    batch * side**2 * channels**2 * 9 / seconds
                )
    return {"macs_per_second": found}


def kept_memory(config: Mapping[str, Any], batch: int, repeats: int) -> Row:
    """Seconds of one call with glibc's own thresholds over those with freed memory kept, in turns."""
    elastic = Elastic(config, widths=WIDTHS)
    loaded = elastic.initial(0)
    x, ratios = torch.randn(batch, *loaded.state_shape), {}
    for width in WIDTHS[:2]:
        denoiser = loaded.denoiser(Step(500, elastic.uniform(width)))
        seconds: dict[tuple[int, int], float] = {}
        with torch.inference_mode():
            for _ in range(repeats):
                for thresholds in (BY_DEFAULT, (KEPT, KEPT)):
                    set_thresholds(*thresholds)
                    denoiser(x, 500)
                    least, _ = _least(lambda denoiser=denoiser: denoiser(x, 500) is None, 2)  # type: ignore[misc]
                    seconds[thresholds] = min(least, seconds.get(thresholds, least))
        ratios[f"width {width:g}"] = seconds[BY_DEFAULT] / seconds[KEPT, KEPT]
    return {"batch": batch, "faster": ratios}


def _least(call: Callable[[], float], repeats: int) -> tuple[float, float]:
    seconds, value = [], 0.0
    for _ in range(repeats):
        started = time.perf_counter()
        value = call()
        seconds.append(time.perf_counter() - started)
    return min(seconds), value


def main() -> None:
    bench = Benchmark("evaluation", __doc__ or "", ("evaluators",))
    torch.set_num_threads(1)
    quick = bench.quick
    study, folder = digits_run(quick)
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
    timed = bench.row("candidates of that run", lambda: score_all(place, five, genomes, samples, 4 if quick else 8))

    best = {}
    for precision in PRECISIONS:
        for batch in (ddsm_loop.SAMPLING_BATCH, ENGINE_BATCH):
            row = bench.row(f"ratios, {precision} against batches of {batch}", partial(ratios, timed, precision, batch))
            best[precision, batch] = row["candidates_per_second"]
    bench.row(
        "evolution, 5 intervals, 2 workers",
        lambda: share_saved(place.evolve(few_of(five), runs / "five-two", Workers(2))),
    )
    bench.row("evolution, 10 intervals, 1 worker", lambda: share_saved(place.evolve(few_of(ten), runs / "ten", None)))
    whole = bench.row("whole space, 5 intervals", lambda: enumeration(place, few_of(five), few))
    equal_bits = bench.row("with and without the cache", lambda: bit_equal(place, few_of(five), genomes[:40], few))
    few_calls = 1 if quick else 5
    cifar = bench.row("matrix rate, DDPM CIFAR-10", lambda: matrix_shares(DDPM_CIFAR10, 2 if quick else 16, few_calls))
    bench.row("matrix rate, digits", lambda: matrix_shares(UNET, ENGINE_BATCH, few_calls))
    bench.row("convolutions", lambda: convolution_rates(2 if quick else 256, few_calls))
    bench.row("memory kept, digits", lambda: kept_memory(UNET, ENGINE_BATCH, few_calls))
    bench.row(
        "memory kept, DDPM CIFAR-10", lambda: kept_memory(DDPM_CIFAR10, 2 if quick else ENGINE_BATCH, 1 if quick else 2)
    )
    distance = bench.row("Frechet distance", lambda: frechet(256 if quick else 2048))
    on_gpu = []
    if torch.cuda.is_available():
        there = bench.row("on the GPU", lambda: elsewhere(bench, "cuda", DDPM_CIFAR10, PhotoPatches(), 2048, 200))
        ratio = ratios(there, "float32", ddsm_loop.SAMPLING_BATCH)["candidates_per_second"]
        what = "the same on this GPU, 32x32 RGB and the DDPM CIFAR-10 architecture"
        on_gpu.append(Target("candidates_per_second_ratio_gpu", what, 8, ratio, at_most=False))
    bench.finish(
        [
            *on_gpu,
            Target(
                "candidates_per_second_ratio",
                "candidates per second / those of DDSM's published loop, same network, images, precision and core",
                3.5,
                best["float32", ddsm_loop.SAMPLING_BATCH],
                at_most=False,
            ),
            Target(
                "gemm_share",
                "multiply-adds a second of the DDPM CIFAR-10 network over torch.mm's, mean of widths 1, 0.5 and 0.25, one thread",
                0.7,
                cifar["mean_share_of_mm"],
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
