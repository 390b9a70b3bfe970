"""Is a found schedule better than a uniform network of the same cost, and does sharing weights cost quality?

On digits (8x8, 10 DDIM steps, one interval per step): supernets and nets trained alone for as many steps, three training
seeds; a search on the first supernet; and FD at 4,096 fresh samples, three sampling seeds, of everything that a found
schedule has to be compared with, frozen and after an equal short fine-tune.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Benchmark, Target
from evaluators.frechet import Frechet, LoadedFrechet
from evaluators.sampling import DDIM
from nas.contracts import Schedule, Score, Step, derive_seed
from nas.report import best_within
from nas.session import open_session
from nas.study import Study
from search_spaces.intervals import uniform
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import ElasticUNet
from search_spaces.training import FineTune, Sandwich
from studies.digits import images, net
from studies.digits import study as digits

BUDGETS = (0.4, 0.51, 0.6)
FEWER_STEPS = (4, 5, 6)


def training(quick: bool) -> Sandwich:
    return Sandwich(steps=60 if quick else 5000)


def supernet_study(seed: int, quick: bool) -> Study:
    """The digits study with a longer training and a deeper search."""
    rungs = (64, 128) if quick else (512, 2048, 4096)
    evaluator = Frechet(images, rungs=rungs)
    return replace(
        digits,
        training=training(quick),
        evaluator=evaluator,
        seed=seed,
        trials=12 if quick else 240,
        verified=4 if quick else 20,
    )


def alone_net() -> ElasticUNet:
    """The full net without smaller widths: nothing shares its weights."""
    return replace(net, widths=(1.0,))


def train(job: tuple[str, int, str, bool]) -> int:
    """Trains one network in its folder, or finds it trained; returns the optimiser steps."""
    kind, seed, folder, quick = job
    torch.set_num_threads(1)
    recipe = net if kind == "supernet" else alone_net()
    for _ in training(quick).run(recipe, images, Path(folder) / "supernet", seed, "cpu"):
        pass
    return training(quick).steps


def measure(evaluator: LoadedFrechet, schedule: Schedule, samples: int, sampling_seed: int) -> dict[str, Any]:
    score = evaluator(schedule, samples, derive_seed(sampling_seed, "quality benchmark"))
    full_macs = 10 * net.cost(net.uniform(1.0)).macs
    share = score.spent["macs"] / samples / full_macs
    return {
        "fd": score.values["fd"],
        "error": score.error("fd"),
        "macs_share": share,
        "label": score.labels["fd"],
        "replicates": score.replicates["fd"],
    }


def paired(rows: Sequence[dict[str, Any]], full: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Mean over sampling seeds of the paired difference to the full net, and its standard error."""
    differences = [
        Score({"fd": a["fd"]}, {"fd": tuple(a["replicates"])}).difference(
            Score({"fd": b["fd"]}, {"fd": tuple(b["replicates"])}), "fd"
        )
        for a, b in zip(rows, full, strict=True)
    ]
    return sum(d for d, _ in differences) / len(differences), math.sqrt(sum(e**2 for _, e in differences)) / len(
        differences
    )


def mean(rows: Sequence[dict[str, Any]]) -> float:
    return float(sum(row["fd"] for row in rows) / len(rows))


def main() -> None:
    bench = Benchmark("quality", __doc__ or "")
    samples = 128 if bench.quick else 4096
    training_seeds, sampling_seeds = (0, 1) if bench.quick else (0, 1, 2), (0, 1) if bench.quick else (0, 1, 2)
    folders = {
        (kind, seed): bench.folder / f"{kind}-{seed}" for seed in training_seeds for kind in ("supernet", "alone")
    }

    jobs = [(kind, seed, str(folder), bench.quick) for (kind, seed), folder in folders.items()]
    with ProcessPoolExecutor(bench.processes, mp_context=get_context("spawn")) as pool:
        for job, trained in zip(jobs, pool.map(train, jobs), strict=True):
            bench.row(f"training {job[0]} {job[1]}", partial(dict, steps=trained))

    torch.set_num_threads(1)
    # One extractor judges all: the first supernet's.
    with open_session(supernet_study(0, bench.quick), folders["supernet", 0]) as session:
        for _ in session.prepare(threads=1):
            pass

        def search() -> dict[str, Any]:
            conductor = session.conductor("evolution")
            session.run(conductor)
            trials = conductor.ledger.trials
            found = {f"{budget:g}": best_within(trials, "macs_share", budget, "fd").genome for budget in BUDGETS}
            return {"trials": len(trials), "found": found}

        found: dict[str, Any] = bench.row("search", search)["found"]
    judge = Frechet(images, rungs=(samples,), sampler=DDIM())

    def evaluator(kind: str, seed: int) -> LoadedFrechet:
        recipe = net if kind == "supernet" else alone_net()
        return judge.load(recipe.load(folders[kind, seed] / "supernet", "cpu"), folders["supernet", 0])

    def scores(name: str, schedule: Schedule, loaded: LoadedFrechet) -> list[dict[str, Any]]:
        return [
            bench.row(f"{name}, sampling seed {s}", partial(measure, loaded, schedule, samples, s))
            for s in sampling_seeds
        ]

    # Weight sharing.
    space = digits.space
    assert isinstance(space, Stepwise)
    genes = len(space.choices)
    full = space.decode((len(net.widths) - 1,) * genes)
    ratios = []
    for seed in training_seeds:
        shared = mean(scores(f"supernet at full width, training seed {seed}", full, evaluator("supernet", seed)))
        alone = mean(scores(f"net trained alone, training seed {seed}", full, evaluator("alone", seed)))
        ratios.append((shared, alone))

    # Schedules, frozen.
    frozen = evaluator("supernet", 0)
    full_rows = scores("supernet at full width, training seed 0", full, frozen)
    candidates = {f"found within {float(b):.0%}": space.decode(tuple(genome)) for b, genome in found.items()}
    candidates |= {f"uniform width {width:g}": space.decode((i,) * genes) for i, width in enumerate(net.widths[:-1])}
    candidates |= {
        f"full net, {n} steps": Schedule(tuple(Step(t, net.uniform(1.0)) for t in uniform(n))) for n in FEWER_STEPS
    }
    losses = {}
    for name, schedule in candidates.items():
        rows = scores(name, schedule, frozen)
        loss, error = losses[name] = paired(rows, full_rows)
        bench.row(f"{name}: against the full net", partial(_summary, rows, loss, error))

    # The same after an equal short fine-tune.
    tune = FineTune(steps=20 if bench.quick else 500)
    chosen = f"found within {BUDGETS[1]:.0%}"
    tuned_rows = {}
    for name, schedule in (
        ("full net", full),
        ("uniform width 0.75", candidates["uniform width 0.75"]),
        (chosen, candidates[chosen]),
    ):
        loaded = evaluator("supernet", 0)
        wanted = [f"{name} fine-tuned, sampling seed {s}" for s in sampling_seeds]
        if not all(bench.has(key) for key in wanted):
            for _ in tune.fit(loaded.supernet, schedule, images.load(), seed=0):  # type: ignore[arg-type]
                pass
        tuned_rows[name] = scores(f"{name} fine-tuned", schedule, loaded)
    for name in ("uniform width 0.75", chosen):
        loss, error = losses[f"{name} fine-tuned"] = paired(tuned_rows[name], tuned_rows["full net"])
        bench.row(
            f"{name} fine-tuned: against the full net fine-tuned",
            partial(_summary, tuned_rows[name], loss, error),
        )

    ratio_frozen = losses[chosen][0] / losses["uniform width 0.75"][0]
    ratio_tuned = losses[f"{chosen} fine-tuned"][0] / losses["uniform width 0.75 fine-tuned"][0]
    bench.row("loss ratios", lambda: {"frozen": ratio_frozen, "fine_tuned": ratio_tuned})
    bench.finish(
        [
            Target(
                "loss_ratio_vs_uniform",
                "FD lost by the schedule found within 51 % of the MACs / by the uniform 0.75 net, the larger of frozen and fine-tuned",
                0.33,
                max(ratio_frozen, ratio_tuned),
            ),
            Target(
                "supernet_vs_alone",
                "FD of the supernet at full width / of a net trained alone as long, means of 3 training seeds",
                1.10,
                sum(shared for shared, _ in ratios) / sum(alone for _, alone in ratios),
            ),
        ]
    )


def _summary(rows: Sequence[dict[str, Any]], loss: float, error: float) -> dict[str, Any]:
    return {"fd": mean(rows), "macs_share": rows[0]["macs_share"], "difference": loss, "difference_error": error}


if __name__ == "__main__":
    main()
