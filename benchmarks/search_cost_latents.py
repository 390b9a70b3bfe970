"""What does a search cost until it is as good as the published one, on Fashion-MNIST's latents and fourteen million schedules, live?

Arms, seeds, goal and settings stand in `protocols/search-cost-latents.json`, written down before any row. It takes the network that
`benchmarks.latent` left, or trains it; some twenty hours of one core, of which the published search takes eight.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import latent
from benchmarks.charged import Charged, Kept, silent
from benchmarks.common import RUNS, Benchmark, Target, borrow
from benchmarks.digits_table import replayed, verified_of
from benchmarks.fitted_table import Fitted, Size, Told
from benchmarks.protocol import committed
from evaluators.features import SmallClassifier
from evaluators.frechet import Frechet
from evaluators.images import HeldOutHalf
from nas.contracts import Genome, LoadedEvaluator, Searcher, Trial, derive_seed, jackknife_error
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
FILES = (
    "benchmarks/charged.py",
    "benchmarks/fitted_table.py",
    "nas/searchers/knapsack.py",
    "nas/searchers/evolution.py",
    "nas/genomes/allocation.py",
)
RESTED_ON = (
    "run/supernet/*.*",
    "run/supernet/autoencoder/*",
    "run/features/*",
    "scores/*",
)
"""Of the benchmark's folder the network, the judge and the scores that searches were told."""
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
            "random + rungs": (Random(), self.rungs),
            "knapsack, equal images": (Knapsack(), (self.images,)),
            "random, equal images": (Random(), (self.images,)),
        }

    @property
    def looks(self) -> range:
        """Numbers of candidates after which the literal search is looked at."""
        often = 2 if self.quick else int(SETTINGS["literal"]["looked_at_every"])
        return range(often, self.candidates + 1, often)

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
    """One whole search on the network itself; what it had found after so many trials, at its end where none are named. It begins anew after a stop, and runs
    no schedule again that it, or one of its `name` with fewer trials, was told of."""
    torch.set_num_threads(1)
    study = replace(setting.study(searcher, rungs, trials), seed=seed)
    own = setting.folder / "searches" / f"{name}-{trials}-{seed}"
    shutil.rmtree(own, ignore_errors=True)
    folder = borrow(setting.prepared, own)
    with open_session(study, folder) as session:
        conductor = session.conductor("search", seed=seed)
        loaded: Any = study.load(folder, "cpu")
        evaluate = Charged(loaded, silent(loaded), Kept(setting.folder / "scores" / f"{name}-{seed}.jsonl"))
        fresh = lambda schedule, rung, noise: evaluate(schedule, rung, derive_seed(noise, schedule.digest))  # noqa: E731
        run_here(conductor, lambda: evaluate if shared else fresh)
        found = list(conductor.ledger.trials)
    shutil.rmtree(own)
    return {
        "trials": len(found),
        **after(found, ends),
        "scores": [(trial.genome, trial.rung, trial.score.values["fd"]) for trial in found if trial.score],
    }


def after(found: Sequence[Trial], ends: Sequence[int]) -> Row:
    """Multiply-adds charged, and the fronts after so many trials, at the end where none are named."""
    charged = np.cumsum([trial.score.spent["macs"] if trial.score else 0.0 for trial in found])
    told = [end for end in ends if end <= len(found)] or [len(found)]
    return {
        "macs": float(charged[-1]),
        "fronts": [{"trials": end, "macs": float(charged[end - 1]), "genomes": _front(found[:end])} for end in told],
    }


def _front(trials: Sequence[Trial]) -> list[Genome]:
    return [trial.genome for trial in verified_front(trials, OBJECTIVES)]


# ------------------------------------------------------------------------------------------------------------------ judging


@lru_cache(maxsize=1)
def _judge(setting: Setting) -> tuple[Study, LoadedEvaluator]:
    """One for all that a process judges: schedules share their noise, and so their beginnings."""
    torch.set_num_threads(1)
    study = setting.study(Random(), (setting.images,), 1, half="second")
    return study, study.load(setting.prepared, "cpu")


def judged(setting: Setting, genome: Genome) -> Row:
    study, evaluate = _judge(setting)
    score = evaluate(study.space.decode(genome), setting.images, derive_seed(0, "judge's noise"))
    return {
        "fd": score.values["fd"],
        "fd_error": score.error("fd"),
        "macs_share": study.space.cost(genome)["macs_share"],
        "replicates": list(score.replicates["fd"]),
    }


@dataclass(frozen=True)
class Volume:
    """Hypervolume of a front as the judge sees it, and its delete-a-block replicates, which all fronts have of the same noises."""

    value: float
    replicates: tuple[float, ...]


def judgements(bench: Benchmark, setting: Setting, genomes: Iterable[Sequence[int]]) -> dict[Genome, Row]:
    """Neighbours after each other, which share the most: each process begins at its own place among them."""
    every = sorted({tuple(one) for one in genomes})
    share = -(-len(every) // bench.processes)
    turns = [every[place::share] for place in range(share)]
    names = {genome: f"judged {''.join(map(str, genome))}" for turn in turns for genome in turn}
    rows = bench.rows({name: (judged, setting, genome) for genome, name in names.items()})
    return {genome: rows[name] for genome, name in names.items()}


def volumes(bench: Benchmark, setting: Setting, fronts: Sequence[Sequence[Sequence[int]]]) -> list[Volume]:
    narrowest = (0,) * SETTINGS["intervals"]
    rows = judgements(bench, setting, [narrowest, *(genome for genomes in fronts for genome in genomes)])

    def volume(genomes: Sequence[Sequence[int]], fd: Callable[[Row], float]) -> float:
        points = [rows[tuple(genome)] for genome in genomes]
        worst = fd(rows[narrowest])
        return float(hypervolume([(fd(point), point["macs_share"]) for point in points], (worst, 1.0001)))

    blocks = range(len(rows[narrowest]["replicates"]))
    return [
        Volume(
            volume(genomes, itemgetter("fd")),
            tuple(volume(genomes, lambda row, block=block: float(row["replicates"][block])) for block in blocks),  # type: ignore[misc]
        )
        for genomes in fronts
    ]


def share_of(mine: Sequence[Volume], theirs: Sequence[Volume]) -> tuple[float, float]:
    """Mean hypervolume over seeds as a share of the others', and its error: that of the judge's noises, which both have in common."""

    def share(values: Callable[[Volume], float]) -> float:
        return float(np.mean([values(one) for one in mine]) / np.mean([values(one) for one in theirs]))

    blocks = range(len(mine[0].replicates))
    each = [share(lambda one, block=block: one.replicates[block]) for block in blocks]  # type: ignore[misc]
    return share(lambda one: one.value), jackknife_error(each)


# --------------------------------------------------------------------------------------------------------------- comparison


@dataclass(frozen=True)
class Literal:
    """The published search: of each seed its end, as the judge sees it, and the multiply-adds until its own goal."""

    ends: tuple[Volume, ...]
    until: tuple[float, ...]
    scores: tuple[list[Any], ...]


def literal_searcher(bench: Benchmark, setting: Setting) -> DDSM:
    """Its MACs weigh against the distance as published: those of the full network 1.6 times as much as its distance."""
    fd = bench.row("the full network, as the literal search sees it", lambda: full_network(setting))["fd"]
    return DDSM(macs_weight=round(1.6 * fd, 3), mutation="released", population=setting.population)


def full_network(setting: Setting) -> Row:
    """Its distance to the half of the images that searches are scored against, on a noise of its own."""
    torch.set_num_threads(1)
    study = setting.study(Random(), (setting.images,), 1)
    full = study.space.decode((2,) * SETTINGS["intervals"])
    score = study.load(setting.prepared, "cpu")(full, setting.images, derive_seed(0, "weight of the literal search"))
    return {"fd": score.values["fd"]}


def goal_of(
    setting: Setting, looks: Iterable[int], volumes_of: Callable[[Sequence[int]], Sequence[float]]
) -> tuple[int, int, int]:
    """Of the published search's looks, by their numbers of candidates: the last, the first generation that is as good but for the margin, and within it the
    first look that is. What comes behind them is not looked at."""
    every = list(looks)
    generations = [end for end in every if end % setting.population == 0]
    [whole] = volumes_of(generations[-1:])

    def first_of(ends: Iterable[int]) -> int:
        return next(end for end in ends if volumes_of([end])[0] >= (1 - PROTOCOL.margin) * whole)

    reached = first_of(generations)
    within = [end for end in every if reached - setting.population < end <= reached]
    return generations[-1], reached, first_of(within)


def literal(bench: Benchmark, setting: Setting, searcher: DDSM, seeds: Sequence[int]) -> Literal:
    """Looked at after each generation, and within the one that reached its own goal, after every few candidates."""
    rows = bench.rows(
        {
            f"literal search, seed {s}": (
                searched,
                setting,
                searcher,
                (setting.images,),
                setting.candidates,
                s,
                "literal",
                setting.looks,
                False,
            )
            for s in seeds
        }
    )
    ends, until, scores = [], [], []
    for seed in seeds:
        row = rows[f"literal search, seed {seed}"]
        fronts = {front["trials"]: front for front in row["fronts"]}

        def seen(some: Sequence[int], fronts: Mapping[int, Row] = fronts) -> list[Volume]:
            return volumes(bench, setting, [fronts[end]["genomes"] for end in some])

        last, reached, first = goal_of(setting, fronts, lambda some, seen=seen: [one.value for one in seen(some)])  # type: ignore[misc]
        ends += seen([last])
        until.append(fronts[first]["macs"])
        scores.append(row["scores"])
        bench.reckon(
            f"literal search, seed {seed}, looked at",
            {
                "hypervolume": ends[-1].value,
                "macs": row["macs"],
                "trials_until": first,
                "macs_until": until[-1],
                "macs_until_generation": fronts[reached]["macs"],
            },
        )
    return Literal(tuple(ends), tuple(until), tuple(scores))


def until(look: Callable[[int], Row], numbers: Sequence[int], largest_first: bool = False, every: bool = False) -> Row:
    """The smallest number of trials that gets there, else the most. `largest_first`: where that does not get there, no smaller one is run. `every`: all are
    looked at, and whether the goal holds from there on is told."""
    if largest_first and not (last := look(numbers[-1]))["reached"]:
        return last
    looked: list[Row] = []
    for trials in numbers:
        looked.append(look(trials))
        if looked[-1]["reached"] and not every:
            break
    first = next((place for place, one in enumerate(looked) if one["reached"]), len(looked) - 1)
    holds = {"holds_from_there_on": all(one["reached"] for one in looked[first:])} if every else {}
    return {**looked[first], **holds}


def live(bench: Benchmark, setting: Setting, name: str, published: Literal, seeds: Sequence[int]) -> Row:
    """Until the goal, on the network itself."""
    searcher, rungs = setting.arms()[name]
    whole = setting.prefixes if len(rungs) == 1 else ()

    def ran(trials: int) -> list[Row]:
        most = whole[-1] if whole else trials
        jobs = {
            f"{name}, {most} trials, seed {s}": (
                searched,
                setting,
                searcher,
                rungs,
                most,
                s,
                name.replace(",", "").replace(" ", "-"),
                whole,
            )
            for s in seeds
        }
        return list(bench.rows(jobs).values())

    if whole:  # all of its fronts are looked at: together, so that neighbours are judged after each other
        fronts = [front for row in ran(whole[-1]) for front in row["fronts"]]
        judgements(bench, setting, (genome for front in fronts for genome in front["genomes"]))

    def look(trials: int) -> Row:
        ends = [
            next((front for front in row["fronts"] if front["trials"] == trials), row["fronts"][-1])
            for row in ran(trials)
        ]
        found = volumes(bench, setting, [end["genomes"] for end in ends])
        share, error = share_of(found, published.ends)
        return {
            "trials": trials,
            "hypervolumes": [one.value for one in found],
            "share_of_literal": share,
            "share_error": error,
            "macs": [end["macs"] for end in ends],
            "reached": share >= 1 - PROTOCOL.margin,
        }

    return until(look, whole or setting.trials, name.startswith("random") and not whole, bool(whole))


# ------------------------------------------------------------------------------------------------------- on a fitted table


def fitted_to(setting: Setting, told: Told) -> Fitted:
    return Fitted(Size(setting.study(Random(), (setting.images,), 1).space, setting.images), told)  # type: ignore[arg-type]


def literal_on_table(setting: Setting, told: Told, searcher: DDSM, seeds: Sequence[int]) -> Row:
    """The published search, judged by what the table holds for true: of each seed its end, and the multiply-adds until its own goal."""
    torch.set_num_threads(1)
    table = fitted_to(setting, told)
    ends: list[float] = []
    spent = []
    for seed in seeds:
        found = replayed(table, searcher, (setting.images,), setting.candidates, seed, shared=False)
        fronts = {front["trials"]: front for front in after(found, setting.looks)["fronts"]}

        def seen(some: Sequence[int], fronts: Mapping[int, Row] = fronts) -> list[float]:
            return [table.volume(fronts[end]["genomes"]) for end in some]

        last, _, first = goal_of(setting, fronts, seen)
        ends += seen([last])
        spent.append(fronts[first]["macs"])
    return {"hypervolumes": ends, "macs_until": spent}


def arm_on_table(setting: Setting, told: Told, published: Row, name: str, seeds: Sequence[int]) -> Row:
    """Until the published search's goal there."""
    torch.set_num_threads(1)
    table, (searcher, rungs) = fitted_to(setting, told), setting.arms()[name]
    goal = (1 - PROTOCOL.margin) * float(np.mean(published["hypervolumes"]))

    def look(trials: int) -> Row:
        fronts = [after(replayed(table, searcher, rungs, trials, seed), ())["fronts"][-1] for seed in seeds]
        values = [table.volume(front["genomes"]) for front in fronts]
        macs = [front["macs"] for front in fronts]
        return {
            "trials": trials,
            "hypervolumes": values,
            "macs": macs,
            "reached": float(np.mean(values)) >= goal,
            "ratio": float(np.mean(macs) / np.mean(published["macs_until"])),
        }

    counts = setting.prefixes if len(rungs) == 1 else setting.trials
    return until(look, counts, largest_first=name.startswith("random") and len(rungs) > 1)


def on_a_table(bench: Benchmark, setting: Setting, searcher: DDSM, published: Literal) -> None:
    """Further seeds, on a fit to what the first live seed's searches were told, which is checked against the other's."""
    arms = setting.arms()

    def told_by(place: int) -> list[Any]:
        rows = [
            bench.kept(f"{name}, {most} trials, seed {PROTOCOL.seeds[place]}")
            for name, (_, rungs) in arms.items()
            for most in (setting.prefixes[-1:] if len(rungs) == 1 else setting.trials)
            if bench.has(f"{name}, {most} trials, seed {PROTOCOL.seeds[place]}")
        ]
        told = [*published.scores[place], *(one for row in rows for one in row["scores"])]
        # A search of more trials begins with those of one of fewer.
        return list({(tuple(genome), rung, fd): (genome, rung, fd) for genome, rung, fd in told}.values())

    first, second = (told_by(place) for place in (0, 1))
    checked = fitted_to(setting, first).checked(second)
    bench.reckon("the table, against the other live seed", checked)
    if checked[str(setting.images)]["tau"] < SETTINGS["table_tau"] and not bench.quick:
        return
    seeds = SETTINGS["table_seeds"][: 2 if bench.quick else None]
    first_of_all = "on the table: literal search"
    published_there = bench.rows({first_of_all: (literal_on_table, setting, first, searcher, seeds)})[first_of_all]
    bench.rows({f"on the table: {name}": (arm_on_table, setting, first, published_there, name, seeds) for name in arms})


def main() -> None:
    bench = Benchmark("search_cost_latents", __doc__ or "", FILES, PROTOCOL, RESTED_ON)
    setting = Setting(bench.folder, bench.quick)
    latent.lend(setting.trained, setting.prepared)
    with open_session(setting.study(Random(), setting.rungs, setting.trials[0]), setting.prepared) as session:
        for _ in session.prepare(threads=1):
            pass
    study = setting.study(Random(), setting.rungs, setting.trials[0])
    bench.rest_on(
        supernet=study.supernet.digest(setting.prepared / "supernet"), judge=study.evaluator.digest(setting.prepared)
    )
    searcher = literal_searcher(bench, setting)
    published = literal(bench, setting, searcher, PROTOCOL.seeds)
    ratios: dict[str, float | None] = {}
    for name in setting.arms():
        row = live(bench, setting, name, published, PROTOCOL.seeds)
        ratio = float(np.mean(row["macs"]) / np.mean(published.until))
        bench.reckon(f"{name}, until the literal search's goal", {**row, "ratio": ratio})
        ratios[name] = ratio if row["reached"] else None
    on_a_table(bench, setting, searcher, published)
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
