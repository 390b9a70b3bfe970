"""What does a search cost until it is as good as the published one?

On the digits study's supernet with five intervals, every schedule is sampled once and its features are kept; searches are then
replayed on that table by the engine's own runner. The literal search is DDSM's: 500 candidates, 4,096 images each, noise of its
own for every candidate, nothing shared. The engine's searches see shared noise, share beginnings, climb rungs, and are charged for
probes, rungs and verification. What each returns is judged on samples that none of them saw.

Then, live: one seed of each of these searches on the network itself, the literal one with fresh noise for every candidate; and with
one interval for each of ten steps a schedule within 51 % of the MACs against the full net.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.common import Benchmark, Target, borrow
from benchmarks.digits import digits_run, images
from benchmarks.digits_table import (
    FULL_TABLE,
    QUICK_TABLE,
    Row,
    Table,
    TableSize,
    build_table,
    genomes_volume,
    judged_volume,
    replayed,
    verified_of,
)
from evaluators.frechet import Frechet
from nas.contracts import Searcher, derive_seed
from nas.engine.runner import run_here
from nas.engine.session import open_session
from nas.genomes.allocation import allocate
from nas.genomes.pareto import front
from nas.results.trials import best_within, verified_front
from nas.searchers.ddsm import DDSM
from nas.searchers.evolution import Evolution
from nas.searchers.knapsack import Knapsack
from nas.searchers.random import Random
from nas.study import Study
from studies.digits import net

WITHIN = 0.99
"""Share of the literal search's hypervolume at which another search is as good."""


@dataclass(frozen=True)
class Scale(TableSize):
    """Sizes. Of the half for searching, the engine's rungs take samples from its start and verification from its end; the literal
    search takes all of it."""

    rungs: tuple[int, ...]
    literal: int
    trials: tuple[int, ...]
    seeds: int


FULL = Scale(
    FULL_TABLE.intervals,
    FULL_TABLE.samples,
    (256, 1024, 2048),
    500,
    (20, 36, 40, 44, 48, 56, 64, 80, 100, 150, 200, 300, 500),
    5,
)
QUICK = Scale(QUICK_TABLE.intervals, QUICK_TABLE.samples, (16, 32, 64), 40, (10, 22, 30), 2)


@dataclass(frozen=True)
class ScaledTable(Table):
    """With the sizes of this benchmark."""

    scale: Scale


def search(table: ScaledTable, searcher: Searcher, rungs: tuple[int, ...], trials: int, seed: int) -> Row:
    """One whole search of the engine's; MACs charged, hypervolume of what it returns as the judge sees it."""
    found = replayed(table, searcher, rungs, trials, seed)
    charged = sum(trial.score.spent["macs"] for trial in found if trial.score)
    returned = verified_front(found, ("fd", "macs"))
    return {
        "trials": trials,
        "macs": charged,
        "hypervolume": judged_volume(table, returned),
        "front": len(returned),
    }


def literal_search(table: ScaledTable, searcher: DDSM, seed: int) -> Row:
    """The published search, and when it had reached the goal itself, looked at after each generation."""
    scale = table.scale
    found = replayed(table, searcher, (scale.half,), scale.literal, seed, shared=False)
    charged = np.cumsum([trial.score.spent["macs"] for trial in found if trial.score])
    ends = range(searcher.population, len(charged) + 1, searcher.population)
    volumes = {end: judged_volume(table, verified_front(found[:end], ("fd", "macs"))) for end in ends}
    final = volumes[max(volumes)]
    reached = next(end for end, volume in volumes.items() if volume >= WITHIN * final)
    return {
        "trials": len(charged),
        "macs": float(charged[-1]),
        "hypervolume": final,
        "trials_until_its_own_goal": reached,
        "macs_until_its_own_goal": float(charged[reached - 1]),
    }


def exhaustive(table: ScaledTable) -> Row:
    """What nobody can do better but by luck: every schedule scored on as many images as the literal search's, its front judged."""
    half, space = table.scale.half, table.scale.space
    scored = [(table.distance(genome, 0, half)[0], space.cost(genome)["macs_share"]) for genome in table.features]
    genomes = list(table.features)
    return {"hypervolume": genomes_volume(table, [genomes[i] for i in front(scored)])}


def searches(scale: Scale) -> dict[str, tuple[Searcher, tuple[int, ...]]]:
    """What is compared with the literal search: a searcher and its rungs."""
    return {
        "knapsack + rungs": (Knapsack(), scale.rungs),
        "evolution + rungs": (Evolution(), scale.rungs),
        "evolution": (Evolution(), scale.rungs[-2:]),
        "random": (Random(), scale.rungs[-2:]),
        "knapsack, as many images as the literal": (Knapsack(), (scale.half,)),
        "evolution, as many images as the literal": (Evolution(), (scale.half,)),
    }


def until(bench: Benchmark, table: ScaledTable, name: str, goal: float) -> Row | None:
    """The smallest of the trial budgets with which the search reaches the goal in the mean over its seeds, verification included;
    None where none does."""
    scale = table.scale
    searcher, rungs = searches(scale)[name]
    for trials in scale.trials:
        rows = [
            bench.row(f"{name}, {trials} trials, seed {seed}", partial(search, table, searcher, rungs, trials, seed))
            for seed in range(scale.seeds)
        ]
        means: Row = {key: float(np.mean([row[key] for row in rows])) for key in ("macs", "hypervolume")}
        if means["hypervolume"] >= goal:
            return {"trials": trials, **means, "hypervolumes": [row["hypervolume"] for row in rows]}
    return None


def live(
    base: Study, folder: Path, scale: Scale, searcher: Searcher, rungs: tuple[int, ...], trials: int, shared: bool
) -> Row:
    """One whole search on the network itself, its MACs as metered; `shared` as for `Replay`. Its ledger goes on after a stop."""
    study = replace(
        base,
        space=scale.space,
        searchers={"search": searcher},
        evaluator=Frechet(images, rungs=rungs),
        proxies={},
        limits={},
        trials=trials,
        verified=verified_of(trials),
    )
    torch.set_num_threads(1)
    with open_session(study, folder) as session:
        conductor = session.conductor("search")
        evaluate = study.load(folder, "cpu")
        fresh = lambda schedule, rung, seed: evaluate(schedule, rung, derive_seed(seed, schedule.digest))  # noqa: E731
        run_here(conductor, lambda: evaluate if shared else fresh)
        found = conductor.ledger.trials
    spent = [trial.score.spent for trial in found if trial.score]
    return {
        "trials": trials,
        "macs": sum(s["macs"] for s in spent),
        "seconds": sum(s["seconds"] for s in spent),
        "front": [trial.genome for trial in verified_front(found, ("fd", "macs"))],
    }


def regret(table: ScaledTable, seed: int) -> Row:
    """At ten budgets, how much worse the judge finds what a search picks than the best of all, as a share of that."""
    scale, space = table.scale, table.scale.space
    every = {genome: (table.judge(genome), space.cost(genome)["macs_share"]) for genome in table.features}
    found: Row = {}
    for name, searcher, trials in (
        ("knapsack", Knapsack(), scale.trials[4 % len(scale.trials)]),
        ("evolution 50", Evolution(), 50),
        ("evolution 200", Evolution(), min(200, len(every))),
    ):
        scored = replayed(table, searcher, scale.rungs, trials, seed)
        lost = []
        for budget in np.linspace(0.15, 0.9, 10):
            best = min(fd for fd, share in every.values() if share <= budget)
            lost.append(table.judge(best_within(scored, "macs_share", budget, "fd").genome) / best - 1)
        found[name] = {"evaluations": len(scored), "regret": float(np.mean(lost))}
    return found


def knapsack_seconds(instances: int) -> Row:
    """Sixteen intervals of 64 architectures, eight budgets, three solutions each: the longest of some instances."""
    longest = 0.0
    for seed in range(instances):
        rng = np.random.default_rng(seed)
        costs = np.sort(rng.integers(10**6, 10**9, size=(16, 64)), axis=1)
        errors = -np.sort(-rng.exponential(size=(16, 64)), axis=1)
        budgets = np.linspace(costs.min(1).sum(), costs.max(1).sum(), 9)[1:].tolist()
        started = time.perf_counter()
        allocate(costs.tolist(), errors.tolist(), budgets, top=3)
        longest = max(longest, time.perf_counter() - started)
    return {"instances": instances, "longest_s": longest}


def half_of_the_macs(study: Study, folder: Path, samples: int) -> Row:
    """Live, one interval for each step: the best verified schedule within 51 % against the full net, noises of three fresh seeds, one training."""
    with open_session(study, folder) as session:
        conductor = session.conductor("knapsack")
        session.run(conductor)
        chosen = best_within(conductor.ledger.trials, "macs_share", 0.51, "fd")
    evaluate = replace(study, evaluator=Frechet(images, rungs=(samples,))).load(folder, "cpu")
    full = study.space.decode((len(net.widths) - 1,) * len(study.space.choices))
    pairs = [
        [
            evaluate(schedule, samples, derive_seed(seed, "no loss"))
            for schedule in (study.space.decode(chosen.genome), full)
        ]
        for seed in range(3)
    ]
    differences = [found.difference(whole, "fd") for found, whole in pairs]
    loss, error = np.mean([d for d, _ in differences]), math.hypot(*(e for _, e in differences)) / 3
    whole = np.mean([score.values["fd"] for _, score in pairs])
    return {
        "genome": chosen.genome,
        "macs_share": chosen.cost["macs_share"],
        "fd": float(np.mean([score.values["fd"] for score, _ in pairs])),
        "full_fd": float(whole),
        "loss": float(loss),
        "loss_error": error,
        "upper_bound_share": float((loss + 1.96 * error) / whole),
    }


def literal_searcher(table: ScaledTable, mutation: Literal["released", "intended"]) -> DDSM:
    """Its MACs weigh against the distance as published: those of the full net 1.6 times as much as its distance."""
    full = table.judge((len(net.widths) - 1,) * table.scale.intervals)
    return DDSM(macs_weight=round(1.6 * full, 3), mutation=mutation, population=table.scale.literal // 10)


def compare(bench: Benchmark, table: ScaledTable) -> Mapping[str, float]:
    """Every search against the literal one, for each mutation: MACs, mean over seeds, until the mean hypervolume of the literal
    search's seeds. A single seed's is no goal: fresh noise makes it better or worse by more than the 1 % that are allowed.
    The mean ratio for each search, infinite where it does not get there."""
    scale = table.scale
    bench.row("every schedule", lambda: exhaustive(table))
    ratios: dict[str, list[float]] = {name: [] for name in searches(scale)}
    mutations: tuple[Literal["released", "intended"], ...] = ("released", "intended")
    for mutation in mutations:
        searcher = literal_searcher(table, mutation)
        literal = [
            bench.row(
                f"literal search, mutation as {mutation}, seed {seed}",
                lambda searcher=searcher, seed=seed: literal_search(table, searcher, seed),  # type: ignore[misc]
            )
            for seed in range(scale.seeds)
        ]
        mean: Row = {
            key: float(np.mean([row[key] for row in literal]))
            for key in ("macs", "hypervolume", "macs_until_its_own_goal")
        }
        for name in ratios:
            found = until(bench, table, name, WITHIN * mean["hypervolume"])
            ratios[name].append(found["macs"] / mean["macs"] if found else math.inf)
            row: Row = {"reached": found is not None, "goal": WITHIN * mean["hypervolume"], **(found or {})}
            if found:
                row |= {
                    "ratio": found["macs"] / mean["macs"],
                    "ratio_to_its_own_goal": found["macs"] / mean["macs_until_its_own_goal"],
                }
            bench.row(f"{name}, until the literal search as {mutation}", lambda row=row: row)  # type: ignore[misc]
    return {name: float(np.mean(values)) for name, values in ratios.items()}


def compare_live(bench: Benchmark, table: ScaledTable, base: Study, trained: Path) -> None:
    """The searches of seed 0 again on the network itself, as long as they took on the table."""
    scale = table.scale
    literal = literal_searcher(table, "released")
    jobs: dict[str, tuple[Any, ...]] = {"literal search": (literal, (scale.half,), scale.literal, False)}
    for name, (searcher, rungs) in searches(scale).items():
        if rungs != (scale.half,):
            row = bench.kept(f"{name}, until the literal search as released")
            jobs[name] = searcher, rungs, row.get("trials", scale.trials[-1]), True
    calls: dict[str, tuple[Any, ...]] = {}
    for name, job in jobs.items():
        folder = borrow(trained, bench.folder / f"live-{name.replace(' ', '')}")
        calls[f"live: {name}, seed 0"] = live, base, folder, scale, *job
    found = bench.rows(calls)
    rows = {name: found[f"live: {name}, seed 0"] for name in jobs}
    goal = genomes_volume(table, [tuple(g) for g in rows["literal search"]["front"]])
    for name, row in list(rows.items())[1:]:
        volume = genomes_volume(table, [tuple(g) for g in row["front"]])
        part = {"hypervolume_ratio": volume / goal, "macs_ratio": row["macs"] / rows["literal search"]["macs"]}
        bench.row(f"live: {name} against the literal search, seed 0", lambda part=part: part)  # type: ignore[misc]


WHAT = (
    "MACs of knapsack + rungs + shared beginnings until the literal DDSM search's hypervolume / all that search's MACs, mean of 5 seeds and 2 mutations "
    "(4.9 % of its MACs until 99 % of its end; 5.3 % with as many images)"
)


def main() -> None:
    bench = Benchmark("search_cost", __doc__ or "", ("nas/searchers/knapsack.py", "nas/genomes/allocation.py"))
    torch.set_num_threads(1)
    base, trained = digits_run(bench.quick)
    scale = QUICK if bench.quick else FULL
    built = build_table(bench, scale, trained)
    table = ScaledTable(built.size, built.files, built.reference, scale)
    ratios = compare(bench, table)
    compare_live(bench, table, base, trained)
    for seed in range(scale.seeds):
        bench.row(f"regret, seed {seed}", lambda seed=seed: regret(table, seed))  # type: ignore[misc]
    solver = bench.row("knapsack solver", lambda: knapsack_seconds(2 if bench.quick else 20))
    study = replace(
        base,
        searchers={"knapsack": Knapsack()},
        evaluator=Frechet(images, rungs=(16, 32, 64) if bench.quick else (512, 2048, 4096)),
        trials=70 if bench.quick else 140,
        verified=4 if bench.quick else 16,
    )
    half = bench.row(
        "live, one interval for each step, within 51%",
        lambda: half_of_the_macs(study, borrow(trained, bench.folder / "run"), 64 if bench.quick else 4096),
    )
    bench.row("ratios", lambda: {name: value if math.isfinite(value) else None for name, value in ratios.items()})
    best = ratios["knapsack + rungs"]
    bench.finish(
        [
            Target(
                "macs_ratio_to_literal",
                WHAT,
                0.05,
                best if math.isfinite(best) else None,
            ),
            Target(
                "fd_loss_at_half",
                "upper 95 % bound of the FD lost within 51 % of the MACs, as a share of the full net's, no fine-tuning",
                0.05,
                half["upper_bound_share"],
            ),
            Target(
                "knapsack_seconds",
                "longest exact solution of 16 intervals x 64 architectures for 8 budgets, seconds",
                1,
                solver["longest_s"],
            ),
        ]
    )


if __name__ == "__main__":
    main()
