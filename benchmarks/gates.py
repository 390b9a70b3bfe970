"""Does reusing blocks add anything to leaving out steps, and learning which by gradients anything to searching?

Digits at 16x16 on a UNet of four levels, frozen weights, 20 DDIM steps. At equal MACs: gates learned by the published pruner and by
plain logits, through the trajectory and step by step; evolution over legal sets of blocks, over subsets of steps alone, and over legal
sets where no step may be left out; a fixed pattern as DeepCache has; uniform and quadratic fewer steps; random legal sets. What each finds
with three search seeds is judged at 4,096 fresh samples, others for each seed: FD, and distance to the full model's samples.

Then steps, reuse and width together against each alone, in five intervals at equal search; memory and time of a gradient step; and
the measured speed of a reuse schedule of a quarter of the MACs.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import Benchmark, borrow
from benchmarks.digits import digits_reuse
from benchmarks.digits import images16 as images
from evaluators.frechet import Frechet
from evaluators.proxies import TeacherDistance, TeacherSimilarity
from evaluators.sampling import DDIM, initial_noise, sample
from nas.contracts import Problem, Progress, Schedule, Score, Searcher, Snapshot, Step, derive_seed, jackknife_error
from nas.engine.learning import learned_macs
from nas.engine.session import open_session
from nas.genomes.genetics import dearest, random_genome
from nas.searchers.evolution import Evolution
from nas.searchers.gates import Gates
from nas.searchers.pruner import Pruner, learn_gates
from nas.study import Study
from search_spaces.intervals import equal, linspace, per_step
from search_spaces.networks.slices import Arch
from search_spaces.options import Options
from search_spaces.patterns import ALL, Every, Only, Pattern, Subset, legal
from search_spaces.stepwise import Stepwise
from search_spaces.training import Sandwich
from studies.digits_reuse import net, steps

BUDGETS = (0.2, 0.35, 0.5, 0.7)
INTERVALS = 5
FULL = Options((1.0,))
LEGAL = legal(levels=4)
OUTER = (("d0", "u3"), ("d0", "d1", "u2", "u3"))
"""Sets of blocks that run between whole steps, the shallowest first."""

LAST = ("u3.1",)
"""What DeepCache runs between whole steps: the last branch going up, which reads the input convolution."""

RANDOM = "random legal sets"

Row = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """A way to find a schedule for each budget: a searcher in a space."""

    name: str
    space: Stepwise
    searcher: Searcher
    trials: int = 100


def per_step_space(*patterns: Pattern) -> Stepwise:
    return Stepwise(net, steps, per_step(steps), FULL, patterns=patterns)


def in_intervals(options: Options, *patterns: Pattern) -> Stepwise:
    return Stepwise(net, steps, equal(steps, INTERVALS), options, patterns=patterns)


EVOLUTION = Evolution(population=20)
SKIPS: tuple[Pattern, ...] = (Only(()), *(Every(period) for period in (2, 3, 4)))
REUSES: tuple[Pattern, ...] = (Only(OUTER[0]), *(Every(period, computed) for period in (2, 3, 4) for computed in OUTER))
SEARCHED = (
    Arm("gates, scored by a network", per_step_space(*LEGAL), Gates(), 48),
    Arm("gates, plain logits", per_step_space(*LEGAL), Gates(Pruner(scores="plain", learning_rate=25.0)), 48),
    Arm("gates, step by step", per_step_space(*LEGAL), Gates(Pruner(scope="step")), 48),
    Arm("evolution over reuse", per_step_space(*LEGAL), EVOLUTION),
    Arm("evolution over reuse, no step left out", per_step_space(*LEGAL[1:]), EVOLUTION),
    Arm("evolution over subsets of steps", per_step_space(Only(ALL), Only(())), EVOLUTION),
)
JOINT = (
    Arm("intervals: steps alone", in_intervals(FULL, Every(1), *SKIPS), EVOLUTION),
    Arm("intervals: reuse alone", in_intervals(FULL, Every(1), *REUSES), EVOLUTION),
    Arm("intervals: width alone", in_intervals(Options(net.widths)), EVOLUTION),
    Arm("intervals: steps and reuse", in_intervals(FULL, Every(1), *SKIPS, *REUSES), EVOLUTION),
    Arm("intervals: steps, reuse and width", in_intervals(Options(net.widths), Every(1), *SKIPS, *REUSES), EVOLUTION),
)


@dataclass(frozen=True)
class Size:
    folder: Path
    quick: bool

    def study(self, arm: Arm) -> Study:
        searcher, trials = arm.searcher, arm.trials
        if self.quick:
            trials = 14
            searcher = replace(searcher, population=6) if isinstance(searcher, Evolution) else searcher
            searcher = Gates(replace(searcher.pruner, steps=3)) if isinstance(searcher, Gates) else searcher
        return replace(
            digits_reuse,
            space=arm.space,
            searchers={"searcher": searcher},
            training=Sandwich(steps=60, batch=32) if self.quick else digits_reuse.training,
            evaluator=Frechet(images, rungs=(32, 64) if self.quick else (256, 512)),
            trials=trials,
            verified=1,
        )

    @property
    def samples(self) -> int:
        return 64 if self.quick else 4096

    @property
    def trained(self) -> Path:
        return self.folder / "trained"


def train(size: Size) -> Row:
    torch.set_num_threads(1)
    with open_session(size.study(SEARCHED[0]), size.trained) as session:
        for _ in session.prepare(threads=1):
            pass
    return {"full_macs": net.cost(net.anatomy.full).macs}


def search(size: Size, arm: Arm, seed: int) -> Row:
    """What it finds for each budget by the scores of its search, and what that took."""
    torch.set_num_threads(1)
    study, name = size.study(arm), "".join(c if c.isalnum() else "-" for c in arm.name)
    folder = borrow(size.trained, size.folder / f"{name}-{seed}")
    started = time.perf_counter()
    with open_session(study, folder) as session:
        for _ in session.learn("searcher", seed):
            pass
        learning = time.perf_counter() - started
        conductor = session.conductor("searcher", seed)
        session.run(conductor)
        trials = [t for t in conductor.ledger.trials if t.rung == study.evaluator.rungs[0] and t.score is not None]
        learned = learned_macs(folder, study.ledger_info(folder, "searcher", seed))
    found = {}
    for budget in BUDGETS:
        within = [t for t in trials if t.cost["macs_share"] <= budget]
        if within:
            best = min(within, key=lambda t: (t.score.values["fd"], t.number))  # type: ignore[union-attr]
            found[f"{budget:g}"] = {"schedule": study.space.decode(best.genome).to_json(), "origin": dict(best.origin)}
    spent = [t.score.charged_in_full().spent["macs"] for t in trials if t.score is not None]
    return {
        "schedules": found,
        "evaluations": len(trials),
        "learning_macs": learned,
        "search_macs": learned + sum(spent),
        "learning_seconds": learning,
        "seconds": time.perf_counter() - started,
    }


def fixed(budget: float) -> dict[str, Schedule]:
    """Schedules that nobody searches for."""
    count = math.floor(budget * len(steps) + 1e-9)
    found = {f"{kind} fewer steps": everywhere(Subset(count, kind)) for kind in ("uniform", "quadratic")}
    for period in range(1, len(steps)):
        schedule = everywhere(Every(period, LAST))
        if share_of(schedule) <= budget:
            return {**found, "fixed pattern (DeepCache)": schedule}
    return found


def at_random(budget: float, seed: int) -> Schedule:
    """Legal sets that nobody chose, as dear as the budget allows: the dearest of some draws."""
    space = per_step_space(*LEGAL)
    problem = Problem(space, ("macs",), {"macs_share": budget})
    rng = np.random.default_rng(derive_seed(seed, f"random legal sets within {budget:g}"))
    genomes = [random_genome(problem, rng) for _ in range(20)]
    return space.decode(max(genomes, key=lambda genome: space.cost(genome)["macs"]))


def everywhere(pattern: Pattern) -> Schedule:
    return Stepwise(net, steps, (len(steps),), FULL, patterns=(pattern,), finer=True).decode((0,))


def share_of(schedule: Schedule) -> float:
    """MACs of the full net's on all steps."""
    macs = sum(net.cost.macs(Arch(*step.arch), step.reuse) for step in schedule.steps)
    return macs / (len(steps) * net.cost(net.anatomy.full).macs)


def judge(size: Size, schedule: Schedule, seed: int) -> Row:
    """At fresh samples: FD with replicates, and distances to the full model on all steps from the same noise."""
    torch.set_num_threads(1)
    loaded = net.load(size.trained / "supernet", "cpu")
    fresh = derive_seed(seed, "gates benchmark")
    score = Frechet(images, rungs=(size.samples,)).load(loaded, size.trained)(schedule, size.samples, fresh)
    near = min(512, size.samples)
    moved = TeacherDistance(images, rungs=(near,), timesteps=steps).load(loaded, size.trained)(schedule, near, fresh)
    unlike = TeacherSimilarity(images, rungs=(near,), timesteps=steps).load(loaded, size.trained)(schedule, near, fresh)
    return {
        "fd": score.values["fd"],
        "replicates": score.replicates["fd"],
        "macs_share": share_of(schedule),
        "distance_to_full": moved.values["teacher_mse"],
        "ssim_with_full": 1 - unlike.values["teacher_dissimilarity"],
    }


def summary(rows: Sequence[Row], other: Sequence[Row]) -> Row:
    """Mean over seeds, and the paired difference in FD to the other rows, with the error of sampling and the spread over seeds."""
    differences, errors = [], []
    for mine, theirs in zip(rows, other, strict=True):
        one, two = (Score({"fd": r["fd"]}, {"fd": tuple(r["replicates"])}) for r in (mine, theirs))
        difference, error = one.difference(two, "fd")
        differences.append(difference)
        errors.append(error)
    spread = jackknife_error([(sum(differences) - x) / (len(differences) - 1) for x in differences])
    return {
        "fd": float(np.mean([r["fd"] for r in rows])),
        "macs_share": float(np.mean([r["macs_share"] for r in rows])),
        "distance_to_full": float(np.mean([r["distance_to_full"] for r in rows])),
        "ssim_with_full": float(np.mean([r["ssim_with_full"] for r in rows])),
        "difference": float(np.mean(differences)),
        "error": max(math.hypot(*errors) / len(errors), spread),
    }


# ------------------------------------------------------------------------------------------------------ gradient steps


def gradient_step(size: Size, count: int, checkpointing: bool, scope: Any) -> Row:
    """In a process of its own: seconds of one gradient step at a batch of 16, and what it adds to the peak of memory."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
        return alone.submit(_gradient_step, size, count, checkpointing, scope).result()


def _gradient_step(size: Size, count: int, checkpointing: bool, scope: Any) -> Row:
    torch.set_num_threads(1)
    loaded = net.load(size.trained / "supernet", "cpu")
    full = Schedule(tuple(Step(t, loaded.full_arch) for t in linspace(count, first=999, last=10)))
    sample(loaded, full, DDIM(), 0, 0, 16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pruner = Pruner(scores="plain", steps=3, batch=16, checkpointing=checkpointing, scope=scope)
    ticks: list[float] = [time.perf_counter()]
    for tick in learn_gates(pruner, loaded, full, 0):
        if isinstance(tick, Progress) and not isinstance(tick, Snapshot):
            ticks.append(time.perf_counter())
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": float(np.median(np.diff(ticks))), "mebibytes": grown / 1024}


# --------------------------------------------------------------------------------------------------------------- speed


def speed(size: Size, batch: int, repeats: int) -> Row:
    """Time of the full schedule over that of a reuse schedule and of a subset of steps, in turn, with their MACs' ratios; and the bytes
    that caches hold between two steps."""
    torch.set_num_threads(1)
    loaded = net.load(size.trained / "supernet", "cpu")
    reusing = Every(6, LAST)
    schedules = {pattern.label: everywhere(pattern) for pattern in (Every(1), reusing, Subset(5))}
    seconds: dict[str, list[float]] = {label: [] for label in schedules}
    for _ in range(repeats):
        for label, schedule in schedules.items():
            started = time.perf_counter()
            sample(loaded, schedule, DDIM(), 0, 0, batch)
            seconds[label].append(time.perf_counter() - started)
    x = initial_noise(0, 0, batch, loaded.state_shape)
    step = schedules[reusing.label].steps[1]
    with torch.inference_mode():
        _, cache = loaded.denoiser(Step(steps[0], loaded.full_arch), step.reuse)(x, steps[0])
    row: Row = {"batch": batch, "cache_bytes_per_image": sum(t.nbytes for t in cache.values()) / batch}
    for label, schedule in schedules.items():
        share = share_of(schedule)
        ratio = float(np.median([a / b for a, b in zip(seconds["whole"], seconds[label], strict=True)]))
        row[label] = {"macs_ratio": 1 / share, "speed_ratio": ratio, "speed_over_macs": ratio * share}
    return row


def main() -> None:
    bench = Benchmark("gates", __doc__ or "", ("nas/searchers/pruner.py", "search_spaces/shipped/reuse.py"))
    size = Size(bench.folder, bench.quick)
    seeds = (0, 1) if bench.quick else (0, 1, 2)
    bench.row("training", lambda: train(size))
    arms = (*SEARCHED, *JOINT)
    searches = bench.rows({f"search: {arm.name}, seed {s}": (search, size, arm, s) for arm in arms for s in seeds})

    wanted: dict[str, tuple[Any, ...]] = {}
    full = digits_reuse.space.decode(dearest(digits_reuse.space))
    for seed in seeds:
        wanted[f"full, seed {seed}"] = (judge, size, full, seed)
        for budget in BUDGETS:
            for name, schedule in {**fixed(budget), RANDOM: at_random(budget, seed)}.items():
                wanted[f"{name}, within {budget:g}, seed {seed}"] = (judge, size, schedule, seed)
        for arm in arms:
            for within, found in searches[f"search: {arm.name}, seed {seed}"]["schedules"].items():
                schedule = Schedule.from_json(found["schedule"])
                wanted[f"{arm.name}, within {within}, seed {seed}"] = (judge, size, schedule, seed)
    judged = bench.rows(wanted)

    names = [arm.name for arm in SEARCHED] + [*fixed(BUDGETS[-1]), RANDOM] + [arm.name for arm in JOINT]
    for budget in BUDGETS:
        for name in names:
            keys = [f"{name}, within {budget:g}, seed {seed}" for seed in seeds]
            rival = "intervals: steps alone" if name.startswith("intervals") else "evolution over subsets of steps"
            others = [f"{rival}, within {budget:g}, seed {seed}" for seed in seeds]
            if all(key in judged for key in (*keys, *others)):  # not every space has a schedule within every budget
                rivals = [judged[other] for other in others]
                rows = [judged[key] for key in keys]
                bench.row(f"{name}, within {budget:g}", lambda rows=rows, rivals=rivals: summary(rows, rivals))  # type: ignore[misc]
    bench.row(
        "full", lambda: summary([judged[f"full, seed {s}"] for s in seeds], [judged[f"full, seed {s}"] for s in seeds])
    )

    for count in (10, 20) if bench.quick else (10, 20, 50):
        for kind, checkpointing, scope in (
            ("kept whole", False, "trajectory"),
            ("checkpointed", True, "trajectory"),
            ("step by step", False, "step"),
        ):
            bench.row(
                f"gradient step: {count} steps, {kind}",
                lambda count=count, checkpointing=checkpointing, scope=scope: gradient_step(  # type: ignore[misc]
                    size, count, checkpointing, scope
                ),
            )
    bench.row("speed", lambda: speed(size, 16 if bench.quick else 128, 3 if bench.quick else 15))
    bench.finish([])


if __name__ == "__main__":
    main()
