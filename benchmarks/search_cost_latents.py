"""What does a search cost until it is as good as the published one, on Fashion-MNIST's latents and fourteen million schedules, live?

Arms, seeds, goal and settings stand in `protocols/search-cost-latents.json`, written down before any row. It takes the network that
`benchmarks.latent` left; some twelve hours of one core.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import latent
from benchmarks.common import RUNS, Benchmark, Target, borrow
from benchmarks.digits_table import verified_of
from benchmarks.protocol import committed
from evaluators.features import SmallClassifier
from evaluators.frechet import Frechet
from evaluators.images import HeldOutHalf
from nas.contracts import Genome, Searcher, Trial, derive_seed
from nas.engine.runner import run_here
from nas.engine.session import open_session
from nas.genomes.pareto import hypervolume
from nas.results.trials import verified_front
from nas.searchers.ddsm import DDSM
from nas.searchers.evolution import Evolution
from nas.searchers.knapsack import Knapsack
from nas.searchers.random import Random
from nas.study import Study
from search_spaces.intervals import per_step, uniform
from search_spaces.stepwise import Stepwise

PROTOCOL = committed("search-cost-latents")
SETTINGS = PROTOCOL.settings
OBJECTIVES = ("fd", "macs")
Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """`folder`: the benchmark's."""

    folder: Path
    quick: bool

    @property
    def trained(self) -> latent.Setting:
        return latent.Setting((RUNS / f"latent{'-quick' if self.quick else ''}").resolve(), self.quick)

    @property
    def candidates(self) -> int:
        return 12 if self.quick else int(SETTINGS["literal"]["candidates"])

    @property
    def population(self) -> int:
        return 4 if self.quick else int(SETTINGS["literal"]["population"])

    @property
    def images(self) -> int:
        """Of a candidate of the literal search, and of the judge's scores."""
        return 64 if self.quick else int(SETTINGS["literal"]["images"])

    @property
    def rungs(self) -> tuple[int, ...]:
        return (16, 32, 64) if self.quick else tuple(SETTINGS["rungs"])

    @property
    def trials(self) -> tuple[int, ...]:
        return (64, 66) if self.quick else tuple(SETTINGS["trials"])

    @property
    def prefixes(self) -> tuple[int, ...]:
        """Numbers of trials of an arm of one rung."""
        return (64, 66) if self.quick else tuple(SETTINGS["equal_images_trials"])

    def study(self, searcher: Searcher, rungs: Sequence[int], trials: int, half: str = "first") -> Study:
        """Unguided, on this half of the held-out images."""
        net, grid = self.trained.net, uniform(SETTINGS["steps"])
        images = HeldOutHalf(self.trained.study.images, half)  # type: ignore[arg-type]
        judge = SmallClassifier(steps=40 if self.quick else 4000, cells=4, decay=True)
        conditions = self.trained.study.evaluator.parts[0].conditions  # type: ignore[attr-defined]
        return Study(
            name="search-cost-latents",
            space=Stepwise(net, grid, per_step(grid)),
            supernet=net,
            images=self.trained.study.images,
            training=self.trained.study.training,
            evaluator=Frechet(images, judge, rungs=tuple(rungs), conditions=conditions),
            searchers={"search": searcher},
            objectives=OBJECTIVES,
            limits={},
            trials=trials,
            verified=verified_of(trials),
        )

    def arms(self) -> dict[str, tuple[Searcher, tuple[int, ...]]]:
        return {
            "knapsack + rungs": (Knapsack(), self.rungs),
            "evolution + rungs": (Evolution(), self.rungs),
            "random": (Random(), self.rungs[1:]),
            "knapsack, equal images": (Knapsack(), (self.images,)),
            "random, equal images": (Random(), (self.images,)),
        }

    @property
    def prepared(self) -> Path:
        """The run folder whose network and features all searches borrow."""
        return self.folder / "run"


def searched(
    setting: Setting,
    searcher: Searcher,
    rungs: tuple[int, ...],
    trials: int,
    seed: int,
    name: str,
    ends: Sequence[int] = (),
    shared: bool = True,
) -> Row:
    """One whole search on the network itself; what it had found after so many trials, at its end where none are named. Its ledger goes on after a stop."""
    torch.set_num_threads(1)
    study = replace(setting.study(searcher, rungs, trials), seed=seed)
    folder = borrow(setting.prepared, setting.folder / "searches" / name)
    with open_session(study, folder) as session:
        conductor = session.conductor("search", seed=seed)
        evaluate = study.load(folder, "cpu")
        fresh = lambda schedule, rung, noise: evaluate(schedule, rung, derive_seed(noise, schedule.digest))  # noqa: E731
        run_here(conductor, evaluate if shared else fresh)
        found = list(conductor.ledger.trials)
    charged = np.cumsum([trial.score.spent["macs"] if trial.score else 0.0 for trial in found])
    told = [end for end in ends if end <= len(found)] or [len(found)]
    return {
        "trials": len(found),
        "macs": float(charged[-1]),
        "fronts": [{"trials": end, "macs": float(charged[end - 1]), "genomes": _front(found[:end])} for end in told],
    }


def _front(trials: Sequence[Trial]) -> list[Genome]:
    return [trial.genome for trial in verified_front(trials, OBJECTIVES)]


def judged(setting: Setting, genome: Genome) -> Row:
    torch.set_num_threads(1)
    study = setting.study(Random(), (setting.images,), 1, half="second")
    score = study.load(setting.prepared, "cpu")(
        study.space.decode(genome), setting.images, derive_seed(0, "judge's noise")
    )
    return {"fd": score.values["fd"], "macs_share": study.space.cost(genome)["macs_share"]}


def volumes(bench: Benchmark, setting: Setting, fronts: Sequence[Sequence[Sequence[int]]]) -> list[float]:
    """Of each front, as the judge sees it."""
    narrowest = (0,) * SETTINGS["intervals"]
    wanted = {tuple(genome) for genomes in fronts for genome in genomes} | {narrowest}
    names = {genome: f"judged {''.join(map(str, genome))}" for genome in sorted(wanted)}
    rows = bench.rows({name: (judged, setting, genome) for genome, name in names.items()})
    worst = rows[names[narrowest]]["fd"]

    def volume(genomes: Sequence[Sequence[int]]) -> float:
        points = [rows[names[tuple(genome)]] for genome in genomes]
        return float(hypervolume([(point["fd"], point["macs_share"]) for point in points], (worst, 1.0001)))

    return [volume(genomes) for genomes in fronts]


def literal(bench: Benchmark, setting: Setting, seeds: Sequence[int]) -> Row:
    """Mean hypervolume at its end, and mean MACs until its own front was as good but for the margin."""
    full = bench.rows({"judged full": (judged, setting, (2,) * SETTINGS["intervals"])})["judged full"]["fd"]
    # Its MACs weigh against the distance as published: those of the full network 1.6 times as much as its distance.
    searcher = DDSM(macs_weight=round(1.6 * full, 3), mutation="released", population=setting.population)
    rows = bench.rows(
        {
            f"literal search, seed {s}": (
                searched,
                setting,
                searcher,
                (setting.images,),
                setting.candidates,
                s,
                f"literal-{s}",
                range(setting.population, setting.candidates + 1, setting.population),
                False,
            )
            for s in seeds
        }
    )
    ends, until = [], []
    for seed in seeds:
        fronts = rows[f"literal search, seed {seed}"]["fronts"]
        found = volumes(bench, setting, [front["genomes"] for front in fronts])
        ends.append(found[-1])
        until.append(
            next(
                front["macs"]
                for front, volume in zip(fronts, found, strict=True)
                if volume >= (1 - PROTOCOL.margin) * found[-1]
            )
        )
    return bench.reckon(
        "literal search",
        {"hypervolumes": ends, "macs": [rows[f"literal search, seed {s}"]["macs"] for s in seeds], "macs_until": until},
    )


def until(bench: Benchmark, setting: Setting, name: str, goal: float, seeds: Sequence[int]) -> Row:
    """With the smallest number of trials that gets there, else with the most."""
    searcher, rungs = setting.arms()[name]
    found: Row = {}
    whole = setting.prefixes if len(rungs) == 1 else ()
    for trials in whole or setting.trials:
        most = whole[-1] if whole else trials
        rows = bench.rows(
            {
                f"{name}, {most} trials, seed {s}": (
                    searched,
                    setting,
                    searcher,
                    rungs,
                    most,
                    s,
                    f"{name.replace(' ', '-')}-{most}-{s}",
                    whole,
                )
                for s in seeds
            }
        )
        ends = [
            next((front for front in row["fronts"] if front["trials"] == trials), row["fronts"][-1])
            for row in rows.values()
        ]
        told = volumes(bench, setting, [end["genomes"] for end in ends])
        found = {"trials": trials, "hypervolumes": told, "macs": [end["macs"] for end in ends]}
        found["reached"] = float(np.mean(told)) >= goal
        if found["reached"]:
            break
    return found


def main() -> None:
    bench = Benchmark(
        "search_cost_latents", __doc__ or "", ("nas/searchers/knapsack.py", "nas/genomes/allocation.py"), PROTOCOL
    )
    setting = Setting(bench.folder, bench.quick)
    latent.lend(setting.trained, setting.prepared)
    with open_session(setting.study(Random(), setting.rungs, setting.trials[0]), setting.prepared) as session:
        for _ in session.prepare(threads=1):
            pass
    study = setting.study(Random(), setting.rungs, setting.trials[0])
    bench.rest_on(
        supernet=study.supernet.digest(setting.prepared / "supernet"), judge=study.evaluator.digest(setting.prepared)
    )
    published = literal(bench, setting, PROTOCOL.seeds)
    goal = (1 - PROTOCOL.margin) * float(np.mean(published["hypervolumes"]))
    ratios: dict[str, float | None] = {}
    for name in setting.arms():
        row = until(bench, setting, name, goal, PROTOCOL.seeds)
        ratio = float(np.mean(row["macs"]) / np.mean(published["macs_until"]))
        bench.reckon(f"{name}, until the literal search's goal", {**row, "ratio": ratio})
        ratios[name] = ratio if row["reached"] else None
    bench.finish(
        [
            Target(
                "fashion_macs_ratio_to_literal",
                "MACs of knapsack + rungs + shared beginnings until 99 % of the literal search's hypervolume / that search's until its own, Fashion-MNIST latents, two live seeds; None where it does not get there",
                0.05,
                ratios["knapsack + rungs"],
            ),
            Target(
                "fashion_ratio_equal_images",
                "the same with as many images for each candidate as the literal search takes",
                0.1,
                ratios["knapsack, equal images"],
            ),
        ]
    )


if __name__ == "__main__":
    main()
