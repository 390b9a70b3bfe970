"""Is a found schedule better than a uniform network of the same cost, and does sharing weights cost quality?

On digits (8x8, 10 DDIM steps, one interval per step). For each of three training seeds: a supernet and a net trained alone
for 5,000 steps, a search on the supernet, and FD at 4,096 fresh samples, three sampling seeds, of everything that a found
schedule has to be compared with, frozen and after an equal short fine-tune. Losses are paired differences to the full net of
the same training seed, and averaged over training seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.common import Benchmark, Target
from benchmarks.digits import digits, images
from evaluators.frechet import Frechet
from nas.contracts import Schedule, Score, Step, Trial, derive_seed, jackknife_error
from nas.engine.session import open_session
from nas.results.trials import best_within
from nas.searchers.knapsack import Knapsack
from nas.study import Study
from search_spaces.intervals import linspace
from search_spaces.loaded import LoadedElastic
from search_spaces.supernet import Elastic
from search_spaces.training import FineTune, Sandwich
from studies.digits import net

BUDGETS = (0.4, 0.5, 0.51, 0.6)
FOUND, RIVAL, FULL = "found within 51%", "uniform width 0.75", "uniform width 1"
FEWER_STEPS = (4, 5, 6)
BY_HAND, BY_HAND_GENOME = "by hand: small early, full late", (0, 0, 0, 1, 2, 3, 3, 3, 3, 0)
"""51 % of the MACs, chosen without a search: what a search on frozen weights has to beat once everything is fine-tuned."""
TUNED = (FULL, RIVAL, BY_HAND, FOUND)

Row = dict[str, Any]
Kind = Literal["supernet", "alone"]


@dataclass(frozen=True)
class Setting:
    """One training seed's part of the benchmark. `folder` is the run folder of its study."""

    folder: Path
    seed: int
    quick: bool

    @property
    def study(self) -> Study:
        """The digits study with a longer training and a deeper search."""
        return replace(
            digits,
            training=Sandwich(steps=60 if self.quick else 5000),
            evaluator=Frechet(images, rungs=(64, 128) if self.quick else (512, 2048, 4096)),
            searchers={"knapsack": Knapsack()},
            trials=70 if self.quick else 140,
            verified=4 if self.quick else 20,
            seed=self.seed,
        )

    @property
    def samples(self) -> int:
        return 128 if self.quick else 4096

    @property
    def sampling_seeds(self) -> tuple[int, ...]:
        return (0, 1) if self.quick else (0, 1, 2)

    @property
    def tune(self) -> FineTune:
        return FineTune(steps=20 if self.quick else 500)

    def net(self, kind: Kind) -> Elastic:
        """A net trained alone has no smaller widths: nothing shares its weights."""
        return net if kind == "supernet" else replace(net, widths=(1.0,))

    def weights(self, kind: Kind) -> Path:
        return self.folder / ("supernet" if kind == "supernet" else "alone")


def train(setting: Setting, kind: Kind) -> Row:
    """Trains one network in its folder, or finds it trained."""
    torch.set_num_threads(1)
    training = setting.study.training
    for _ in training.run(setting.net(kind), images, setting.weights(kind), setting.seed, "cpu"):
        pass
    return dict(training.describe())


def find(setting: Setting) -> Row:
    """The exact search, verified; the genome of the best schedule within each budget."""
    torch.set_num_threads(1)
    with open_session(setting.study, setting.folder) as session:
        for _ in session.prepare(threads=1):
            pass
        conductor = session.conductor("knapsack")
        session.run(conductor)
        trials = conductor.ledger.trials
    return {"trials": len(trials), "found": {f"{budget:g}": _pick(trials, budget).genome for budget in BUDGETS}}


def _pick(trials: Sequence[Trial], budget: float) -> Trial:
    """Of the verified schedules within the budget that cannot be told apart from the best, the dearest: it has most to gain
    from a fine-tune."""
    best = best_within(trials, "macs_share", budget, "fd")
    tied = [best]
    for trial in trials:
        if trial.status == "complete" and trial.score and best.score and trial.cost["macs_share"] <= budget:
            difference, error = trial.score.difference(best.score, "fd")
            tied += [trial] if difference <= 2 * error else []
    return max(tied, key=lambda trial: trial.cost["macs"])


def measure(setting: Setting, kind: Kind, schedule: Schedule, tuned: bool) -> Row:
    """FD of one schedule at fresh samples, with its jackknife replicates, for each sampling seed."""
    torch.set_num_threads(1)
    loaded = setting.net(kind).load(setting.weights(kind), "cpu")
    if tuned:
        assert isinstance(loaded, LoadedElastic)
        for _ in setting.tune.fit(loaded, schedule, images.load(), seed=0):
            pass
    evaluate = Frechet(images, rungs=(setting.samples,)).load(loaded, setting.folder)
    scores = [evaluate(schedule, setting.samples, derive_seed(s, "quality benchmark")) for s in setting.sampling_seeds]
    macs = sum(net.cost(step.arch).macs for step in schedule.steps)
    return {
        "fd": [score.values["fd"] for score in scores],
        "errors": [score.error("fd") for score in scores],
        "macs_share": macs / (len(digits.space.choices) * net.cost(net.uniform(1.0)).macs),
        "label": scores[0].labels["fd"],
        "replicates": [score.replicates["fd"] for score in scores],
    }


def candidates(found: Mapping[str, Sequence[int]]) -> dict[str, Schedule]:
    """What a search found, and what it has to be compared with."""
    space, genes = digits.space, len(digits.space.choices)
    schedules = {f"found within {float(budget):.0%}": space.decode(tuple(genome)) for budget, genome in found.items()}
    schedules[BY_HAND] = space.decode(BY_HAND_GENOME)
    schedules |= {f"uniform width {width:g}": space.decode((i,) * genes) for i, width in enumerate(net.widths)}
    return schedules | {
        f"full net, {n} steps": Schedule(tuple(Step(t, net.uniform(1.0)) for t in linspace(n, 999, 20)))
        for n in FEWER_STEPS
    }


def loss(row: Row, full: Row) -> tuple[float, float]:
    """FD lost against the full net, and its standard error: mean over sampling seeds of the paired difference."""
    differences = [
        Score({"fd": a}, {"fd": tuple(mine)}).difference(Score({"fd": b}, {"fd": tuple(theirs)}), "fd")
        for a, mine, b, theirs in zip(row["fd"], row["replicates"], full["fd"], full["replicates"], strict=True)
    ]
    return float(np.mean([d for d, _ in differences])), math.hypot(*(e for _, e in differences)) / len(differences)


def summary(rows: Sequence[Row], full: Sequence[Row]) -> Row:
    """Over training seeds: mean FD, mean loss with the error from sampling alone, and the loss of each seed."""
    losses = [loss(row, whole) for row, whole in zip(rows, full, strict=True)]
    each = [value for value, _ in losses]
    return {
        "fd": float(np.mean([row["fd"] for row in rows])),
        "macs_share": float(np.mean([row["macs_share"] for row in rows])),
        "loss": float(np.mean(each)),
        "loss_error": math.hypot(*(error for _, error in losses)) / len(losses),
        "loss_of_each_training_seed": each,
        "spread_over_training_seeds": jackknife_error([(sum(each) - x) / (len(each) - 1) for x in each]),
    }


def main() -> None:
    bench = Benchmark("quality", __doc__ or "", ("search_spaces/training", "studies/digits.py"))
    seeds = (0, 1) if bench.quick else (0, 1, 2)
    settings = {seed: Setting(bench.folder / f"seed-{seed}", seed, bench.quick) for seed in seeds}
    kinds: tuple[Kind, ...] = ("supernet", "alone")
    bench.rows({f"training of {kind} {seed}": (train, settings[seed], kind) for kind in kinds for seed in seeds})
    searches = bench.rows({f"search {seed}": (find, settings[seed]) for seed in seeds})
    schedules = {seed: candidates(searches[f"search {seed}"]["found"]) for seed in seeds}

    def key(seed: int, schedule: Schedule, tuned: bool, kind: Kind = "supernet") -> str:
        return f"{kind} {seed}, schedule {schedule.digest}" + (", fine-tuned" if tuned else "")

    wanted: list[tuple[int, Schedule, bool, Kind]] = []
    for seed in seeds:
        wanted += [(seed, schedule, False, "supernet") for schedule in schedules[seed].values()]
        wanted += [(seed, schedules[seed][name], True, "supernet") for name in TUNED]
        wanted += [(seed, schedules[seed][FULL], False, "alone")]
    measured = bench.rows(
        {
            key(seed, schedule, tuned, kind): (measure, settings[seed], kind, schedule, tuned)
            for seed, schedule, tuned, kind in wanted
        }
    )

    def over_seeds(name: str, tuned: bool) -> list[Row]:
        return [measured[key(seed, schedules[seed][name], tuned)] for seed in seeds]

    losses = {}
    for tuned, names in ((False, tuple(schedules[0])), (True, TUNED)):
        for name in names:
            row = bench.row(
                f"{name}, {'fine-tuned' if tuned else 'frozen'}",
                lambda name=name, tuned=tuned: summary(over_seeds(name, tuned), over_seeds(FULL, tuned)),  # type: ignore[misc]
            )
            losses[name, tuned] = row["loss"]
    shared = np.mean([row["fd"] for row in over_seeds(FULL, False)])
    alone = np.mean([measured[key(seed, schedules[seed][FULL], False, "alone")]["fd"] for seed in seeds])
    # Where the rival loses nothing there is nothing to win, and no ratio.
    worth = all(losses[RIVAL, tuned] > 0 for tuned in (False, True))
    ratio = max(losses[FOUND, tuned] / losses[RIVAL, tuned] for tuned in (False, True)) if worth else None
    bench.finish(
        [
            Target(
                "loss_ratio_vs_uniform",
                "FD lost by the schedule found within 51 % of the MACs / by the uniform 0.75 net, means of 3 training seeds, the larger of frozen and fine-tuned; None where the uniform net loses nothing",
                0.33,
                ratio,
            ),
            Target(
                "supernet_vs_alone",
                "FD of the supernet at full width / of a net trained alone as long, means of 3 training seeds",
                1.10,
                float(shared / alone),
            ),
        ]
    )


if __name__ == "__main__":
    main()
