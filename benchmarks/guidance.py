"""Where, how strongly and by which subnet should samples be guided, and what does a search of that save?

Class-conditional digits (8x8, ten DDIM steps, five intervals), a fifth of the images held out. Written down before the rows:

Question: does a schedule that is guided where a search wants it need fewer network calls than guidance everywhere at the best of three
constant strengths, and, with widths searched too, fewer multiply-adds than the full net guided everywhere, at no loss of either score?

Arms, of each of three training seeds: the full net unguided; guided everywhere at 1.5, 2 and 3; the same by the half-width subnet; a search
of the guidance alone, (none, 1.5, 2, 3) for each interval of the full net, 80 trials; a search of guidance and widths, 160 trials; both by
evolution on the study's scores. Of each search the verified schedules and the three constants are scored once more on 2,048 noises of their
own, and one is chosen: of those at most as far (FD) as the nearest constant, and at most 0.01 above its disagreement, the one of the fewest
calls, or multiply-adds, and of equal ones the nearest; where there is none, the nearest of all.

Judged: 4,096 noises and labels that nothing was chosen on, the same for all arms of a seed, by a judge of its own: a classifier trained on
the train images from another seed than the search's, FD of its features to the held-out images, and the share of samples that it puts into the class
asked for. Reference: the constant of the least FD, mean of the three seeds. A difference is the mean over training seeds of
paired differences; its 95 % interval is Student's t of three seeds with the larger of the spread over seeds and the error of sampling. A
target holds where the upper end of FD's interval is at most +5 % of the reference's and the lower end of accuracy's at least -0.02; else
its figure is none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from benchmarks.common import Benchmark, Target
from evaluators.agreement import Agreement
from evaluators.frechet import Frechet
from evaluators.scoring import Scores
from nas.contracts import Evaluator, Guidance, Schedule, Score, Step, derive_seed, jackknife_error
from nas.engine.session import open_session
from nas.searchers.evolution import Evolution
from nas.study import Study
from search_spaces.intervals import equal
from search_spaces.loaded import LoadedElastic
from search_spaces.options import Options
from search_spaces.stepwise import Stepwise
from search_spaces.training import Sandwich
from studies.digits_classes import images, labels, net, steps
from studies.digits_classes import study as classes

STRENGTHS = (1.5, 2.0, 3.0)
CHOICES = (None, *STRENGTHS)
SEEDS = (0, 1, 2)
JUDGE = 1000
"""The judge's training seed, and that of its noises."""
SLACK = 0.01
"""Of disagreement, when one schedule is chosen."""

UNGUIDED, FOUND, FOUND_WIDE = "unguided", "searched guidance", "searched guidance and widths"


def constant(strength: float) -> str:
    return f"{strength:g} everywhere"


def halved(strength: float) -> str:
    return f"{strength:g} everywhere, by the half-width subnet"


Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """One training seed. `folder`: the run folder of its study; its judge lies beside it."""

    folder: Path
    seed: int
    quick: bool

    @property
    def rungs(self) -> tuple[int, ...]:
        return (32, 64) if self.quick else (512, 2048)

    @property
    def study(self) -> Study:
        return replace(
            classes,
            training=Sandwich(steps=60 if self.quick else 3000),
            evaluator=scores(self.rungs),
            searchers={"evolution": Evolution(population=20)},
            seed=self.seed,
        )

    def search(self, widths: bool) -> Study:
        """With a space of guidance alone, or of widths as well."""
        trials = 160 if widths else 80
        return replace(
            self.study,
            name="guidance-and-widths" if widths else "guidance",
            space=Stepwise(
                net, steps, equal(steps, 5), options=None if widths else Options(widths=(1.0,)), guidance=CHOICES
            ),
            limits={"macs_share": 0.5} if widths else {},
            trials=6 if self.quick else trials,
            verified=3 if self.quick else 16,
        )

    @property
    def judged(self) -> int:
        return 64 if self.quick else 4096

    @property
    def judge(self) -> Path:
        return self.folder.parent / "judge"


def scores(rungs: tuple[int, ...]) -> Scores:
    parts: tuple[Evaluator, ...] = tuple(
        score(images, rungs=rungs, conditions=labels) for score in (Frechet, Agreement)
    )
    return Scores(parts)


def train(setting: Setting) -> Row:
    """Supernet and the search's features."""
    with open_session(setting.study, setting.folder) as session:
        for _ in session.prepare(threads=1):
            pass
    return {"judge's of the search held-out accuracy": accuracy_of(setting.folder)}


def train_judge(setting: Setting) -> Row:
    torch.set_num_threads(1)
    for _ in scores((setting.judged,)).prepare(setting.judge, JUDGE, "cpu"):
        pass
    return {"held_out_accuracy": accuracy_of(setting.judge)}


def accuracy_of(folder: Path) -> float | None:
    part = scores((2,)).parts[1]
    assert isinstance(part, Agreement)
    return part.judge.held_out_accuracy(folder)


def search(setting: Setting, widths: bool) -> Row:
    """The chosen schedule's JSON."""
    study = setting.search(widths)
    folder = setting.folder / study.name
    folder.mkdir(exist_ok=True)
    for part in ("supernet", "features"):
        if not (folder / part).exists():
            (folder / part).symlink_to(setting.folder / part)
    torch.set_num_threads(1)
    with open_session(study, folder) as session:
        conductor = session.conductor("evolution")
        session.run(conductor)
        trials = conductor.ledger.trials
    net_, seed = study.supernet.load(folder / "supernet", "cpu"), derive_seed(setting.seed, "guidance choice")
    evaluate = scores(setting.rungs).load(net_, folder)

    def score(schedule: Schedule) -> Mapping[str, float]:
        return evaluate(schedule, setting.rungs[-1], seed).values

    rivals = [score(everywhere(Guidance(strength))) for strength in STRENGTHS]
    best = min(rivals, key=lambda values: values["fd"])
    found = {}
    for trial in trials:
        if trial.status == "complete":
            schedule = study.space.decode(trial.genome)
            found[schedule] = score(schedule)
    good = [
        schedule
        for schedule, values in found.items()
        if values["fd"] <= best["fd"] and values["disagreement"] <= best["disagreement"] + SLACK
    ]

    def price(schedule: Schedule) -> tuple[float, float]:
        cost = sum(net_.macs(step) for step in schedule.steps) if widths else calls(schedule)
        return float(cost), found[schedule]["fd"]

    chosen = min(good, key=price) if good else min(found, key=lambda schedule: found[schedule]["fd"])
    return {
        "trials": len(trials),
        "candidates": len(found),
        "as good as the best constant": len(good),
        "schedule": chosen.to_json(),
        "chosen on": found[chosen],
    }


def everywhere(guidance: Guidance | None) -> Schedule:
    return Schedule(tuple(Step(t, net.anatomy.full, (), guidance) for t in steps))


def calls(schedule: Schedule) -> int:
    """Network calls for one sample."""
    return sum(1 + (step.guidance is not None) for step in schedule.steps)


def judge(setting: Setting, schedule: str) -> Row:
    torch.set_num_threads(1)
    made = Schedule.from_json(schedule)
    loaded: LoadedElastic = net.load(setting.folder / "supernet", "cpu")
    evaluate = scores((setting.judged,)).load(loaded, setting.judge)
    score = evaluate(made, setting.judged, derive_seed(JUDGE, setting.seed, "guidance benchmark"))
    return {
        "calls": calls(made),
        "macs_share": sum(map(loaded.macs, made.steps)) / sum(map(loaded.macs, everywhere(Guidance(1.5)).steps)),
        "fd": score.values["fd"],
        "accuracy": 1 - score.values["disagreement"],
        "replicates": dict(score.replicates),
    }


def difference(rows: Sequence[Row], others: Sequence[Row], name: str) -> tuple[float, float, float]:
    """Mean over training seeds of a score's paired difference, and the ends of its 95 % interval."""
    key = "fd" if name == "fd" else "disagreement"
    sign = 1 if name == "fd" else -1
    each, errors = [], []
    for row, other in zip(rows, others, strict=True):
        mine, theirs = (
            Score({key: sign * r[name] + (0 if name == "fd" else 1)}, {key: r["replicates"][key]}) for r in (row, other)
        )
        value, error = mine.difference(theirs, key)
        each.append(sign * value)
        errors.append(error)
    mean = float(np.mean(each))
    spread = jackknife_error([(sum(each) - x) / (len(each) - 1) for x in each])
    half = float(stats.t.ppf(0.975, len(each) - 1)) * max(spread, math.hypot(*errors) / len(errors))
    return mean, mean - half, mean + half


def compared(arms: Mapping[str, Sequence[Row]], arm: str, reference: str) -> Row:
    mine, theirs = arms[arm], arms[reference]
    fd, accuracy = (difference(mine, theirs, name) for name in ("fd", "accuracy"))
    level = float(np.mean([row["fd"] for row in theirs]))
    return {
        **{name: float(np.mean([row[name] for row in mine])) for name in ("calls", "macs_share", "fd", "accuracy")},
        "reference": reference,
        "fd_difference": fd,
        "fd_upper_share": fd[2] / level,
        "accuracy_difference": accuracy,
        "no_loss": fd[2] <= 0.05 * level and accuracy[1] >= -0.02,
    }


def main() -> None:
    bench = Benchmark("guidance", __doc__ or "", ("studies/digits_classes.py", "search_spaces/stepwise.py"))
    settings = [Setting(bench.folder / f"seed-{seed}", seed, bench.quick) for seed in SEEDS]
    bench.rows({"judge": (train_judge, settings[0])} | {f"train {s.seed}": (train, s) for s in settings})
    found = bench.rows(
        {
            f"{FOUND_WIDE if widths else FOUND}, seed {s.seed}": (search, s, widths)
            for s in settings
            for widths in (False, True)
        }
    )
    half = net.subnets(Options(widths=(0.5,))).flat(0)
    fixed = {
        UNGUIDED: everywhere(None),
        **{constant(strength): everywhere(Guidance(strength)) for strength in STRENGTHS},
        **{halved(strength): everywhere(Guidance(strength, half)) for strength in STRENGTHS},
    }
    jobs: dict[str, tuple[Any, ...]] = {}
    for setting in settings:
        schedules = {name: schedule.to_json() for name, schedule in fixed.items()}
        schedules |= {name: found[f"{name}, seed {setting.seed}"]["schedule"] for name in (FOUND, FOUND_WIDE)}
        jobs |= {f"judged: {name}, seed {setting.seed}": (judge, setting, text) for name, text in schedules.items()}
    rows = bench.rows(jobs)
    arms = {name: [rows[f"judged: {name}, seed {s.seed}"] for s in settings] for name in (*fixed, FOUND, FOUND_WIDE)}
    reference = min(map(constant, STRENGTHS), key=lambda name: float(np.mean([row["fd"] for row in arms[name]])))
    summary = {name: bench.reckon(name, compared(arms, name, reference)) for name in arms}
    words = "None where a difference's interval leaves +5 % of FD or -0.02 of accuracy"
    alone, wide = summary[FOUND], summary[FOUND_WIDE]
    bench.finish(
        [
            Target(
                "guided_calls_ratio",
                f"network calls of the searched guidance over those of {reference}, three training seeds; {words}",
                0.75,
                alone["calls"] / summary[reference]["calls"] if alone["no_loss"] else None,
            ),
            Target(
                "guided_macs_ratio",
                f"multiply-adds of searched guidance and widths over those of the full net guided everywhere, against the same reference; {words}",
                0.4,
                wide["macs_share"] if wide["no_loss"] else None,
            ),
        ]
    )


if __name__ == "__main__":
    main()
