"""Is a found schedule better than a uniform network of the same cost, and does sharing weights cost quality?

On digits (8x8, 10 DDIM steps, one interval per step). Weight sharing: supernets and nets trained alone for 5,000 steps,
three training seeds. Schedules: a search on the supernet of the digits study (1,500 steps), and FD at 4,096 fresh samples,
three sampling seeds, of everything that a found schedule has to be compared with, frozen and after an equal short
fine-tune.
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
from nas.session import open_session
from nas.study import Study
from search_spaces.intervals import linspace
from search_spaces.supernet import ElasticUNet, LoadedElasticUNet
from search_spaces.training import FineTune, Sandwich
from studies.digits import images, net
from studies.digits import study as digits

BUDGETS = (0.4, 0.5, 0.51, 0.6)
FOUND, RIVAL, FULL = "found within 51%", "uniform width 0.75", "uniform width 1"
FEWER_STEPS = (4, 5, 6)


Row = dict[str, Any]


def training(kind: str, quick: bool) -> Sandwich:
    """Kinds of network: "study", the digits study's own supernet; "supernet" and "alone", trained longer."""
    if quick:
        return Sandwich(steps=30 if kind == "study" else 60)
    return digits.training if kind == "study" and isinstance(digits.training, Sandwich) else Sandwich(steps=5000)


def searched_study(quick: bool) -> Study:
    """The digits study with a deeper search."""
    evaluator = Frechet(images, rungs=(64, 128) if quick else (512, 2048, 4096))
    trials, verified = (12, 4) if quick else (240, 20)
    return replace(digits, training=training("study", quick), evaluator=evaluator, trials=trials, verified=verified)


def alone_net() -> ElasticUNet:
    """The full net without smaller widths: nothing shares its weights."""
    return replace(net, widths=(1.0,))


def train(job: tuple[str, int, str, bool]) -> int:
    """Trains one network in its folder, or finds it trained; returns the optimiser steps."""
    kind, seed, folder, quick = job
    torch.set_num_threads(1)
    recipe = alone_net() if kind == "alone" else net
    for _ in training(kind, quick).run(recipe, images, Path(folder) / "supernet", seed, "cpu"):
        pass
    return training(kind, quick).steps


def find(study: Study, folder: Path) -> Row:
    """Evolution, verified; the genome of the best schedule within each budget."""
    with open_session(study, folder) as session:
        for _ in session.prepare(threads=1):
            pass
        conductor = session.conductor("evolution")
        session.run(conductor)
        trials = conductor.ledger.trials
    found = {f"{budget:g}": best_within(trials, "macs_share", budget, "fd").genome for budget in BUDGETS}
    return {"trials": len(trials), "found": found}


@dataclass(frozen=True)
class Judge:
    """Scores at fresh samples. One extractor judges all: the digits study's."""

    bench: Benchmark
    samples: int
    sampling_seeds: tuple[int, ...]

    def folder(self, kind: str, seed: int) -> Path:
        return self.bench.folder / f"{kind}-{seed}"

    def load(self, kind: str, seed: int) -> LoadedFrechet:
        recipe = alone_net() if kind == "alone" else net
        judge = Frechet(images, rungs=(self.samples,), sampler=DDIM())
        return judge.load(recipe.load(self.folder(kind, seed) / "supernet", "cpu"), self.folder("study", 0))

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


def candidates_of(judge: Judge) -> dict[str, Schedule]:
    """What the search found, and what it has to be compared with."""
    space, genes = digits.space, len(digits.space.choices)
    found = judge.bench.row("search", partial(find, searched_study(judge.bench.quick), judge.folder("study", 0)))[
        "found"
    ]
    schedules = {f"found within {float(budget):.0%}": space.decode(tuple(genome)) for budget, genome in found.items()}
    schedules |= {f"uniform width {width:g}": space.decode((i,) * genes) for i, width in enumerate(net.widths)}
    return schedules | {
        f"full net, {n} steps": Schedule(tuple(Step(t, net.uniform(1.0)) for t in linspace(n, 999, 20)))
        for n in FEWER_STEPS
    }


def frozen_losses(judge: Judge, candidates: dict[str, Schedule]) -> dict[str, float]:
    """FD lost against the full net, everything scored with the supernet's weights as they are."""
    loaded = judge.load("study", 0)
    rows = {name: judge.scores(name, schedule, loaded) for name, schedule in candidates.items()}
    return {
        name: judge.against(f"{name}: against the full net", rows[name], rows[FULL])
        for name in candidates
        if name != FULL
    }


def tuned_losses(judge: Judge, candidates: dict[str, Schedule], tune: FineTune) -> dict[str, float]:
    """The same for the found schedule and its rival, after one short fine-tune each, and the full net's own."""
    rows = {}
    for name in (FULL, RIVAL, FOUND):
        loaded = judge.load("study", 0)
        if not all(judge.bench.has(f"{name} fine-tuned, sampling seed {s}") for s in judge.sampling_seeds):
            assert isinstance(loaded.supernet, LoadedElasticUNet)
            for _ in tune.fit(loaded.supernet, candidates[name], images.load(), seed=0):
                pass
        rows[name] = judge.scores(f"{name} fine-tuned", candidates[name], loaded)
    return {
        name: judge.against(f"{name} fine-tuned: against the full net fine-tuned", rows[name], rows[FULL])
        for name in (RIVAL, FOUND)
    }


def _ratio(losses: dict[str, float]) -> float:
    """Infinite where the rival loses nothing: then there is nothing to win."""
    return losses[FOUND] / losses[RIVAL] if losses[RIVAL] > 0 else math.inf


def main() -> None:
    bench = Benchmark("quality", __doc__ or "")
    training_seeds = (0, 1) if bench.quick else (0, 1, 2)
    judge = Judge(bench, 128 if bench.quick else 4096, (0, 1) if bench.quick else (0, 1, 2))
    wanted = [("study", 0), *((kind, seed) for seed in training_seeds for kind in ("supernet", "alone"))]
    jobs = [(kind, seed, str(judge.folder(kind, seed)), bench.quick) for kind, seed in wanted]
    with ProcessPoolExecutor(bench.processes, mp_context=get_context("spawn")) as pool:
        for job, trained in zip(jobs, pool.map(train, jobs), strict=True):
            bench.row(f"training {job[0]} {job[1]}", partial(dict, steps=trained))
    torch.set_num_threads(1)

    candidates = candidates_of(judge)
    frozen = frozen_losses(judge, candidates)
    tuned = tuned_losses(judge, candidates, FineTune(steps=20 if bench.quick else 500))
    ratios = {name: _ratio(losses) for name, losses in (("frozen", frozen), ("fine_tuned", tuned))}
    bench.row("loss ratios", partial(dict, ratios))
    shared = weight_sharing(judge, training_seeds, candidates[FULL])
    bench.finish(
        [
            Target(
                "loss_ratio_vs_uniform",
                "FD lost by the schedule found within 51 % of the MACs / by the uniform 0.75 net, the larger of frozen and fine-tuned",
                0.33,
                max(ratios.values()),
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
