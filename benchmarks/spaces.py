"""What does each part of the search space give? Width, width per level, depth, order by importance, clustered intervals, experts.

On digits (8x8, 10 DDIM steps, five intervals, two residual blocks per level). Each variant adds one part to the one before and
trains its own supernet with the same multiply-adds, for each of three training seeds; the same exact searcher spends the same number of
evaluations; what it finds within 30 to 60 % of the MACs is judged at 4,096 fresh samples, other ones for each training seed, frozen and
after an equal short fine-tune, beside the first variant with an interval for each step, and a statically pruned network (Diff-Pruning)
with its fine-tune. Losses are paired differences to the
full net of the same supernet, equally fine-tuned.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy.stats import t as student

from benchmarks.common import Benchmark, Target, borrow
from benchmarks.digits import images
from evaluators.frechet import Frechet
from evaluators.proxies import TeacherSimilarity
from nas.contracts import Schedule, Score, Step, derive_seed, jackknife_error
from nas.engine.session import open_session
from nas.results.trials import best_within
from nas.searchers.knapsack import Knapsack
from nas.study import Study
from search_spaces.intervals import bounded, dissimilarity, equal, merged, per_step, segments
from search_spaces.loaded import LoadedElastic
from search_spaces.networks.slices import Arch
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.training import Experts, FineTune, Sandwich, Stage, Stages
from search_spaces.training.importance import Criterion, Order, pruned
from search_spaces.training.similarity import GradientSimilarity
from studies.digits import UNET, steps

BUDGETS = (0.3, 0.4, 0.5, 0.6)
INTERVALS = 5
STATIC_RATIO = 0.3
CRITERIA: tuple[Criterion, ...] = ("gradient", "magnitude", "random")
WIDE: tuple[Literal["width", "depth"], ...] = ("width",)
VARIANTS = (
    "width alone",
    "+ width per level",
    "+ depth",
    "+ order by importance",
    "+ clustered intervals",
    "+ experts",
)
STEPWISE = "width alone, an interval for each step"
"""Beside the row of variants, on the weights of the first: ten intervals instead of five."""

CONFIG = {**UNET, "layers_per_block": 2}
WIDTHS = (0.25, 0.5, 0.75, 1.0)

Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """One variant of one training seed. `elastic` are steps of the sandwich rule; where experts are trained, the last
    `experts` of them are theirs."""

    variant: str
    seed: int
    folder: Path
    boundaries: tuple[int, ...]
    quick: bool

    @property
    def has(self) -> set[str]:
        """The parts: this variant's and those before it."""
        if self.variant == STEPWISE:
            return {VARIANTS[0]}
        return set(VARIANTS[: VARIANTS.index(self.variant) + 1])

    @property
    def net(self) -> Elastic:
        deep = "+ depth" in self.has
        return Elastic(
            CONFIG,
            WIDTHS,
            depths=(1, 2) if deep else (),
            per_level=("width", "depth") if deep else WIDE if "+ width per level" in self.has else (),
            experts=self.boundaries if "+ experts" in self.has else (),
        )

    @property
    def training(self) -> Stages:
        whole, elastic, experts = (30, 40, 10) if self.quick else (800, 1200, 300)
        batch = 32 if self.quick else 64
        order = Order(stride=20, batch=64) if "+ order by importance" in self.has else None
        first = Sandwich(whole, batch, full_only=True)
        stages: list[Stage | None]
        if "+ experts" not in self.has:
            stages = [first, order, Sandwich(elastic, batch, learning_rate=1e-3)]
        else:
            each = Sandwich(experts // (len(self.boundaries) + 1), batch, learning_rate=3e-4, warmup=10, ema=0.99)
            stages = [first, order, Sandwich(elastic - experts, batch, learning_rate=1e-3), Experts(each)]
        return Stages(tuple(stage for stage in stages if stage is not None))

    @property
    def study(self) -> Study:
        intervals = equal(steps, INTERVALS)
        if "+ clustered intervals" in self.has:
            intervals = bounded(steps, self.boundaries)
        elif self.variant == STEPWISE:
            intervals = per_step(steps)
        return Study(
            name="spaces",
            space=Stepwise(self.net, steps, intervals),
            supernet=self.net,
            images=images,
            training=self.training,
            evaluator=Frechet(images, rungs=(32, 64) if self.quick else (512, 2048)),
            searchers={"knapsack": Knapsack(around="both", options=4)},
            limits={"macs_share": 0.6},
            trials=40 if self.quick else 120,
            verified=6 if self.quick else 16,
            seed=self.seed,
        )

    @property
    def tune(self) -> FineTune:
        return FineTune(steps=10 if self.quick else 250, learning_rate=2e-4, distillation=0.5)

    @property
    def samples(self) -> int:
        return 64 if self.quick else 4096


def train(setting: Setting) -> Row:
    """Trains what the variant lacks; multiply-adds of each stage."""
    with open_session(setting.study, setting.folder) as session:
        for _ in session.prepare(threads=1):
            pass
    return trained_for(setting.folder)


def trained_for(folder: Path) -> Row:
    """Multiply-adds of each stage that the run folder's network was trained in."""
    spent = json.loads((folder / "supernet" / "training.json").read_text())
    return {"training_macs": sum(stage["macs"] for stage in spent), "stages": [stage["macs"] for stage in spent]}


def cluster(setting: Setting) -> Row:
    """Boundaries of as many intervals as the equal ones, from the similarity of the trained net's gradients."""
    torch.set_num_threads(1)
    loaded = setting.net.load(setting.folder / "supernet", "cpu")
    grid = [int(t) for t in np.linspace(0, 999, 8 if setting.quick else 32).round()]
    similarity = GradientSimilarity(loaded, images.load(), setting.seed, batch=32 if setting.quick else 256)
    for _ in similarity.measure(grid):
        pass
    cuts, _ = segments(dissimilarity(similarity.affinity), INTERVALS)[-1]
    boundaries = merged(steps, tuple((grid[cut - 1] + grid[cut] + 1) // 2 for cut in cuts))
    return {"boundaries": boundaries, "intervals": bounded(steps, boundaries)}


def search(setting: Setting) -> Row:
    """The genome of the best verified schedule within each budget."""
    with open_session(setting.study, setting.folder) as session:
        conductor = session.conductor("knapsack")
        session.run(conductor)
        trials = conductor.ledger.trials
    found = {f"{budget:g}": best_within(trials, "macs_share", budget, "fd") for budget in BUDGETS}
    return {
        "evaluations": len(trials),
        "schedules": {budget: trial.genome for budget, trial in found.items()},
    }


def judge(setting: Setting, schedule: Schedule, tuned: bool) -> Row:
    """FD at fresh samples, with replicates; SSIM to the frozen full net's samples, where the net is frozen."""
    torch.set_num_threads(1)
    loaded = setting.net.load(setting.folder / "supernet", "cpu")
    return measured(loaded, setting, schedule, tuned)


def measured(loaded: LoadedElastic, setting: Setting, schedule: Schedule, tuned: bool) -> Row:
    compared = min(512, setting.samples)
    similarity = TeacherSimilarity(images, rungs=(compared,))
    unlike = None
    if tuned:
        for _ in setting.tune.fit(loaded, schedule, images.load(), seed=0):
            pass
    else:
        unlike = similarity.load(loaded, setting.folder)(schedule, compared, 0).values["teacher_dissimilarity"]
    evaluate = Frechet(images, rungs=(setting.samples,)).load(loaded, setting.folder)
    score = evaluate(schedule, setting.samples, derive_seed(setting.seed, "spaces benchmark"))
    macs = sum(loaded.macs(step) for step in schedule.steps)
    return {
        "fd": score.values["fd"],
        "replicates": score.replicates["fd"],
        "macs_share": macs / (len(steps) * loaded.macs(Step(0, loaded.full_arch))),
        "ssim": None if unlike is None else 1 - unlike,
    }


def full_net(setting: Setting) -> tuple[Elastic, Path]:
    """The full net alone, without anything elastic, and its run folder."""
    folder = setting.folder.parent / f"full-{setting.seed}"
    return replace(setting.net, widths=(1.0,), depths=(), per_level=(), experts=()), folder


def train_full(setting: Setting) -> Row:
    """Trains it as long as the others' first stage, and its judge."""
    torch.set_num_threads(1)
    whole, folder = full_net(setting)
    for _ in Stages(setting.training.stages[:1]).run(whole, images, folder / "supernet", setting.seed, "cpu"):
        pass
    for _ in setting.study.evaluator.prepare(folder, setting.seed, "cpu"):
        pass
    [stage] = json.loads((folder / "supernet" / "training.json").read_text())
    return {"training_macs": stage["macs"]}


def one_shot(setting: Setting, criterion: Criterion, tuned: bool) -> Row:
    """Diff-Pruning's static network: the trained full net's channels in order, then pruned, with no elastic training. Its fine-tune
    takes as long as the elastic training and the fine-tune of the others."""
    torch.set_num_threads(1)
    whole, folder = full_net(setting)
    alone = replace(setting, folder=folder)
    loaded = whole.load(alone.folder / "supernet", "cpu")
    for _ in Order(criterion, stride=20, batch=64).fit(loaded, images.load(), setting.seed):
        pass
    schedule = everywhere(pruned(whole.anatomy, STATIC_RATIO))
    if tuned:
        elastic = sum(stage.steps for stage in setting.training.stages if isinstance(stage, Sandwich)) - (
            setting.training.stages[0].steps  # type: ignore[attr-defined]
        )
        longer = replace(setting.tune, steps=setting.tune.steps + elastic, learning_rate=1e-3)
        for _ in longer.fit(loaded, schedule, images.load(), seed=0):
            pass
    return measured(loaded, alone, schedule, tuned=False)


def everywhere(arch: Arch) -> Schedule:
    return Schedule(tuple(Step(t, arch) for t in steps))


def loss(rows: Sequence[Row], full: Sequence[Row]) -> Row:
    """Over training seeds: FD, its loss against the full net with the error of sampling and the spread of training."""
    each: list[float] = []
    errors: list[float] = []
    for row, whole in zip(rows, full, strict=True):
        mine, theirs = (Score({"fd": r["fd"]}, {"fd": tuple(r["replicates"])}) for r in (row, whole))
        difference, error = mine.difference(theirs, "fd")
        each.append(difference)
        errors.append(error)
    mean, error = float(np.mean(each)), math.hypot(*errors) / len(errors)
    spread = jackknife_error([(sum(each) - x) / (len(each) - 1) for x in each])
    full_fd = float(np.mean([row["fd"] for row in full]))
    similar = [row["ssim"] for row in rows if row["ssim"] is not None]
    return {
        "macs_share": float(np.mean([row["macs_share"] for row in rows])),
        "fd": float(np.mean([row["fd"] for row in rows])),
        "full_fd": full_fd,
        "loss": mean,
        "loss_error": error,
        "spread_over_training_seeds": spread,
        "upper_bound_share": (mean + max(1.96 * error, student.ppf(0.975, len(each) - 1) * spread)) / full_fd,
        "ssim": float(np.mean(similar)) if similar else None,
    }


def main() -> None:
    bench = Benchmark("spaces", __doc__ or "", ("search_spaces",))
    seeds = (0, 1) if bench.quick else (0, 1, 2)

    def setting(variant: str, seed: int, boundaries: tuple[int, ...] = (500,)) -> Setting:
        folder = bench.folder / variant.strip("+ ").replace(",", "").replace(" ", "-") / f"seed-{seed}"
        lent = {"+ clustered intervals": "order-by-importance", STEPWISE: "width-alone"}
        if variant in lent:  # another space on the same weights
            borrow(bench.folder / lent[variant] / f"seed-{seed}", folder)
        return Setting(variant, seed, folder, boundaries, bench.quick)

    early = [setting(variant, seed) for seed in seeds for variant in VARIANTS[:4]]
    bench.rows({f"training: {each.variant}, seed {each.seed}": (train, each) for each in early})
    jobs = {f"clusters, seed {seed}": (cluster, setting(VARIANTS[3], seed)) for seed in seeds}
    found = {key: tuple(row["boundaries"]) for key, row in bench.rows(jobs).items()}
    late = [setting(variant, seed, found[f"clusters, seed {seed}"]) for seed in seeds for variant in VARIANTS[4:]]
    experts = [each for each in late if each.variant == "+ experts"]
    bench.rows({f"training: {each.variant}, seed {each.seed}": (train, each) for each in experts})
    settings = [*early, *late, *(setting(STEPWISE, seed) for seed in seeds)]
    searches = bench.rows({f"search: {each.variant}, seed {each.seed}": (search, each) for each in settings})

    wanted: dict[str, tuple[Any, ...]] = {}
    known: dict[tuple[Any, ...], str] = {}
    same: dict[str, str] = {}  # what is the same schedule of the same weights, within two budgets say, is judged once
    for each in settings:
        picked: Mapping[str, Sequence[int]] = searches[f"search: {each.variant}, seed {each.seed}"]["schedules"]
        schedules = {budget: each.study.space.decode(tuple(genome)) for budget, genome in picked.items()}
        schedules["full"] = everywhere(each.net.anatomy.full)
        if "+ experts" in each.has:  # the full net of the table is the one with experts
            genome = tuple(len(choice.options) - 1 for choice in each.study.space.choices)
            schedules["full"] = each.study.space.decode(genome)
        for budget, schedule in schedules.items():
            for tuned in (False, True):
                key = f"{each.variant}, seed {each.seed}, {budget}, {'fine-tuned' if tuned else 'frozen'}"
                same[key] = known.setdefault(((each.folder / "supernet").resolve(), schedule, tuned), key)
                wanted[same[key]] = wanted.get(same[key], (judge, each, schedule, tuned))
    for seed in seeds:
        for criterion in CRITERIA:
            for tuned in (False, True) if criterion == "gradient" else (False,):
                key = f"static {criterion}, seed {seed}, {'fine-tuned' if tuned else 'one shot'}"
                wanted[key] = (one_shot, setting(VARIANTS[0], seed), criterion, tuned)
    whole = [setting(VARIANTS[0], seed) for seed in seeds]
    bench.rows({f"training: full net alone, seed {each.seed}": (train_full, each) for each in whole})
    frozen_first = sorted(
        wanted.items(), key=lambda job: (job[0].endswith("fine-tuned"), not job[0].startswith(STEPWISE))
    )
    judged = bench.rows(dict(frozen_first))
    judged |= {key: judged[first] for key, first in same.items()}

    least: dict[bool, float] = {}
    for tuned in (False, True):
        state = "fine-tuned" if tuned else "frozen"
        for variant in (*VARIANTS, STEPWISE):
            full = [judged[f"{variant}, seed {seed}, full, {state}"] for seed in seeds]
            for budget in map("{:g}".format, BUDGETS):
                rows = [judged[f"{variant}, seed {seed}, {budget}, {state}"] for seed in seeds]
                row = bench.row(f"{state}: {variant}, within {budget}", lambda rows=rows, full=full: loss(rows, full))  # type: ignore[misc]
                if row["upper_bound_share"] <= 0.05:
                    least[tuned] = min(least.get(tuned, 1.0), row["macs_share"])
    for criterion, state in (("gradient", "fine-tuned"), *((criterion, "one shot") for criterion in CRITERIA)):
        rows = [judged[f"static {criterion}, seed {seed}, {state}"] for seed in seeds]
        full = [
            judged[f"{VARIANTS[0]}, seed {seed}, full, {'fine-tuned' if state == 'fine-tuned' else 'frozen'}"]
            for seed in seeds
        ]
        bench.row(f"static net by {criterion}, {state}", lambda rows=rows, full=full: loss(rows, full))  # type: ignore[misc]
    bench.finish(
        [
            Target(
                "least_share_at_no_loss",
                "least share of the MACs, of the budgets searched, at which a fine-tuned schedule loses nothing against the full net equally fine-tuned; None where none does",
                0.40,
                least.get(True),
            )
        ]
    )


if __name__ == "__main__":
    main()
