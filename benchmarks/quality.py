"""Is a found schedule better than a uniform network of the same cost, and does sharing weights cost quality?

On digits (8x8, 10 DDIM steps, one interval per step): supernets and nets trained alone for as many steps, three training
seeds; a search on the first supernet; and FD at 4,096 fresh samples, three sampling seeds, of everything that a found
schedule has to be compared with, frozen and after an equal short fine-tune.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
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
from nas.session import Session, open_session
from nas.study import Study
from search_spaces.intervals import uniform
from search_spaces.supernet import ElasticUNet, LoadedElasticUNet
from search_spaces.training import FineTune, Sandwich
from studies.digits import images, net
from studies.digits import study as digits

BUDGETS = (0.4, 0.5, 0.51, 0.6)
FOUND, RIVAL = "found within 51%", "uniform width 0.75"
FEWER_STEPS = (4, 5, 6)


Row = dict[str, Any]


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


def find(session: Session) -> dict[str, Any]:
    """Evolution on the first supernet, verified; the genome of the best schedule within each budget."""
    conductor = session.conductor("evolution")
    session.run(conductor)
    trials = conductor.ledger.trials
    found = {f"{budget:g}": best_within(trials, "macs_share", budget, "fd").genome for budget in BUDGETS}
    return {"trials": len(trials), "found": found}


@dataclass(frozen=True)
class Judge:
    """Scores at fresh samples. One extractor judges all: the first supernet's."""

    bench: Benchmark
    samples: int
    sampling_seeds: tuple[int, ...]

    def folder(self, kind: str, seed: int) -> Path:
        return self.bench.folder / f"{kind}-{seed}"

    def load(self, kind: str, seed: int) -> LoadedFrechet:
        recipe = net if kind == "supernet" else alone_net()
        judge = Frechet(images, rungs=(self.samples,), sampler=DDIM())
        return judge.load(recipe.load(self.folder(kind, seed) / "supernet", "cpu"), self.folder("supernet", 0))

    def scores(self, name: str, schedule: Schedule, loaded: LoadedFrechet) -> list[Row]:
        """One row for each sampling seed."""
        return [
            self.bench.row(f"{name}, sampling seed {s}", partial(self._measure, loaded, schedule, s))
            for s in self.sampling_seeds
        ]

    def against(self, name: str, rows: Sequence[Row], full: Sequence[Row]) -> float:
        """FD lost against the full net: mean over sampling seeds of the paired difference. Keeps it as a row."""
        differences = [_score(a).difference(_score(b), "fd") for a, b in zip(rows, full, strict=True)]
        loss = sum(d for d, _ in differences) / len(differences)
        error = math.sqrt(sum(e**2 for _, e in differences)) / len(differences)
        summary = {"fd": mean(rows), "macs_share": rows[0]["macs_share"], "difference": loss, "difference_error": error}
        return float(self.bench.row(name, partial(dict, summary))["difference"])

    def _measure(self, loaded: LoadedFrechet, schedule: Schedule, sampling_seed: int) -> Row:
        score = loaded(schedule, self.samples, derive_seed(sampling_seed, "quality benchmark"))
        share = score.spent["macs"] / self.samples / (10 * net.cost(net.uniform(1.0)).macs)
        facts = {"fd": score.values["fd"], "error": score.error("fd"), "macs_share": share, "label": score.labels["fd"]}
        return {**facts, "replicates": score.replicates["fd"]}


def mean(rows: Sequence[Row]) -> float:
    return float(sum(row["fd"] for row in rows) / len(rows))


def _score(row: Row) -> Score:
    return Score({"fd": row["fd"]}, {"fd": tuple(row["replicates"])})


def weight_sharing(judge: Judge, training_seeds: Sequence[int], full: Schedule) -> float:
    """FD of supernets at full width over FD of nets trained alone, means over training seeds."""
    kinds = {"supernet": "supernet at full width", "alone": "net trained alone"}
    total = {
        kind: sum(
            mean(judge.scores(f"{name}, training seed {seed}", full, judge.load(kind, seed))) for seed in training_seeds
        )
        for kind, name in kinds.items()
    }
    return total["supernet"] / total["alone"]


def frozen_ratio(judge: Judge, candidates: dict[str, Schedule], full: Schedule) -> float:
    """Everything scored with the supernet's weights as they are."""
    loaded = judge.load("supernet", 0)
    reference = judge.scores("supernet at full width, training seed 0", full, loaded)
    losses = {
        name: judge.against(f"{name}: against the full net", judge.scores(name, schedule, loaded), reference)
        for name, schedule in candidates.items()
    }
    return losses[FOUND] / losses[RIVAL]


def tuned_ratio(judge: Judge, candidates: dict[str, Schedule], full: Schedule, tune: FineTune) -> float:
    """The found schedule, its rival and the full net, each after the same short fine-tune of its own."""
    rows = {}
    for name, schedule in {"full net": full, RIVAL: candidates[RIVAL], FOUND: candidates[FOUND]}.items():
        loaded = judge.load("supernet", 0)
        wanted = [f"{name} fine-tuned, sampling seed {s}" for s in judge.sampling_seeds]
        if not all(judge.bench.has(key) for key in wanted):
            assert isinstance(loaded.supernet, LoadedElasticUNet)
            for _ in tune.fit(loaded.supernet, schedule, images.load(), seed=0):
                pass
        rows[name] = judge.scores(f"{name} fine-tuned", schedule, loaded)
    losses = {
        name: judge.against(f"{name} fine-tuned: against the full net fine-tuned", rows[name], rows["full net"])
        for name in (RIVAL, FOUND)
    }
    return losses[FOUND] / losses[RIVAL]


def main() -> None:
    bench = Benchmark("quality", __doc__ or "")
    training_seeds = (0, 1) if bench.quick else (0, 1, 2)
    judge = Judge(bench, 128 if bench.quick else 4096, (0, 1) if bench.quick else (0, 1, 2))
    jobs = [
        (kind, seed, str(judge.folder(kind, seed)), bench.quick)
        for seed in training_seeds
        for kind in ("supernet", "alone")
    ]
    with ProcessPoolExecutor(bench.processes, mp_context=get_context("spawn")) as pool:
        for job, trained in zip(jobs, pool.map(train, jobs), strict=True):
            bench.row(f"training {job[0]} {job[1]}", partial(dict, steps=trained))
    torch.set_num_threads(1)
    with open_session(supernet_study(0, bench.quick), judge.folder("supernet", 0)) as session:
        for _ in session.prepare(threads=1):
            pass
        found: dict[str, Any] = bench.row("search", partial(find, session))["found"]

    space = digits.space
    genes = len(space.choices)
    full = space.decode((len(net.widths) - 1,) * genes)
    candidates = {f"found within {float(budget):.0%}": space.decode(tuple(genome)) for budget, genome in found.items()}
    candidates |= {f"uniform width {width:g}": space.decode((i,) * genes) for i, width in enumerate(net.widths[:-1])}
    candidates |= {
        f"full net, {n} steps": Schedule(tuple(Step(t, net.uniform(1.0)) for t in uniform(n))) for n in FEWER_STEPS
    }
    shared = weight_sharing(judge, training_seeds, full)
    frozen = frozen_ratio(judge, candidates, full)
    tuned = tuned_ratio(judge, candidates, full, FineTune(steps=20 if bench.quick else 500))
    bench.row("loss ratios", partial(dict, frozen=frozen, fine_tuned=tuned))
    bench.finish(
        [
            Target(
                "loss_ratio_vs_uniform",
                "FD lost by the schedule found within 51 % of the MACs / by the uniform 0.75 net, the larger of frozen and fine-tuned",
                0.33,
                max(frozen, tuned),
            ),
            Target(
                "supernet_vs_alone",
                "FD of the supernet at full width / of a net trained alone as long, means of 3 training seeds",
                1.10,
                shared,
            ),
        ]
    )


if __name__ == "__main__":
    main()
