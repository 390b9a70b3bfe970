"""Faster schedules for frozen models: what searched reuse loses beside published rules and beside fewer steps, at equal measured time.

Written down before any row. Question: at the same time an image, measured on one CPU core, does `nas tune`'s search (a shortest path over reuse, corrected
by real scores) lose less than the best fixed rule? And less than a searched subset of whole steps, which reuses nothing?

Models: what `benchmarks.latent`, `benchmarks.text` and `benchmarks.transformer` have trained on Fashion-MNIST, frozen; those whose run folder is not there
are left out, and the targets are of the others. Full pipelines: 20 and 50 DDIM steps, guided at 1.5, 3 and 2.5. Budgets: 0.33, 0.5 and 0.7 of their time,
decoding included. Seeds 0, 1 and 2, of search and noises.

Arms, each with eight schedules on 32 samples for each step of the full pipeline, five of them verified on 256 others:
  path       `Path`, as `nas tune` has it, three quarters of the schedules at most probes
  evolution  in the same space
  knapsack   in the same space, as many probes
  steps      evolution over which steps run whole: no reuse
Rules, of each the dearest that keeps to the budget: fewer steps, uniform and quadratic; whole every n-th step, with one of the sets of blocks between
(DeepCache's levels; FORA's and SmoothCache's sets for the transformer); guidance up to a step alone (TGATE). What has to be learned (DiP-GO's gates,
Learning-to-Cache's router) is not among the arms of this protocol.

Every arm's schedule is scored on 1,024 samples of noises and conditions that nothing was chosen on: the loss, mean squared distance of a sample to
the full pipeline's own of the same noise; reported beside it FD to held-out images, and the judge's agreement. Differences are paired, averaged over the seeds.

`tune_loss_ratio`: path's mean loss over the best rule's, median over cells of (model, steps, budget); cells in which the best rule's loss is within two errors
of 0 are ties and left out. `tune_over_steps`: the same over the arm "steps". `tune_cells_won`: share of cells in which no rule loses significantly less than
path, one-sided, 5 %, Holm-corrected over the cell's rules. `tune_cost_samples`: samples of the full pipeline that the dearest path search took.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import norm

from benchmarks import latent, text, transformer
from benchmarks.common import RUNS, Benchmark, Target, borrow
from evaluators.latency import Latency, Timed, Timer
from evaluators.proxies import TeacherDistance
from evaluators.sampling import DDIM
from evaluators.scoring import Scores
from nas.contracts import Genome, Schedule, derive_seed
from nas.engine.session import open_session
from nas.engine.timing import measure
from nas.genomes.genetics import LATENCY, dearest
from nas.genomes.paths import Steps, paths, together
from nas.searchers.evolution import Evolution
from nas.searchers.knapsack import Knapsack
from nas.searchers.path import Path as ShortestPath
from nas.study import Study
from nas.tuning.study import LOSS, sets
from nas.tuning.tune import verified, within
from search_spaces.intervals import per_step, uniform
from search_spaces.options import Options
from search_spaces.patterns import Every, Only, Pattern, Subset
from search_spaces.stepwise import Stepwise
from search_spaces.training import Stages
from studies import fashion_latent as garments

MODELS = ("latent", "text", "transformer")
STEPS = (20, 50)
BUDGETS = (0.33, 0.5, 0.7)
SEEDS = (0, 1, 2)
ARMS = ("path", "evolution", "knapsack", "steps")
SCALES = {"latent": 1.5, "text": 3.0, "transformer": 2.5}
TRIALS = 8
"""For each step."""
LEVEL = 0.05
Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One model with so many steps within a budget; `folder`: the benchmark's."""

    folder: Path
    quick: bool
    model: str
    steps: int
    budget: float
    seed: int

    @property
    def key(self) -> str:
        return f"{self.model}, {self.steps} steps, {self.budget:g} of the time, seed {self.seed}"

    @cached_property
    def trained(self) -> tuple[Any, Path]:
        """The setting of the benchmark that trained the model, and its run folder."""
        return trained(self.model, self.quick)

    @property
    def run(self) -> Path:
        return self.folder / f"{self.model}-{self.steps}"

    def study(self, whole_steps: bool, limits: dict[str, float]) -> Study:
        """`whole_steps`: the space of the arm "steps"."""
        setting, _ = self.trained
        net, grid, scale = setting.net, uniform(self.steps), SCALES[self.model]
        graph = net.cost.graph(net.anatomy.full)
        patterns: tuple[Pattern, ...] = (Every(1), Only(()))
        if not whole_steps:
            patterns = (Every(1), *(Only(one) for one in sets(graph)), Only(()))
        space = Stepwise(
            net, grid, per_step(grid), Options((1.0,)), patterns=patterns, finer=graph.predicts_anew, guidance=(scale,)
        )
        loss = TeacherDistance(
            images=setting.images if self.model != "latent" else setting.study.images,
            conditions=conditions_of(setting),
            rungs=(8, 16) if self.quick else (32, 256),
            sampler=DDIM(),
            timesteps=grid,
            guidance=scale,
        )
        trials = (5 if self.quick else TRIALS) * self.steps
        return Study(
            name=f"tune-{self.model}-{self.steps}-{round(100 * self.budget)}{'-steps' if whole_steps else ''}",
            space=space,
            supernet=net,
            images=loss.images,
            training=Stages(()),
            evaluator=Timed(Scores((loss,)), Latency(16, warmup=1, repeats=5)),
            searchers={
                "path": ShortestPath(probes=round(0.75 * trials), budgets=2),
                "evolution": Evolution(),
                "knapsack": Knapsack(around="full", probes=round(0.75 * trials)),
            },
            objectives=(LOSS,),
            limits=limits,
            trials=trials,
            verified=2 if self.quick else 5,
            seed=self.seed,
        )


def conditions_of(setting: Any) -> Any:
    """What the model's samples are asked to be."""
    if isinstance(setting, text.Setting):
        return setting.captions
    return garments.labels if isinstance(setting, latent.Setting) else setting.labels


def trained(model: str, quick: bool) -> tuple[Any, Path]:
    ending = "-quick" if quick else ""
    folder = (RUNS / f"{model}{ending}").resolve()
    if model == "latent":
        return latent.Setting(folder, quick), folder / "latent"
    if model == "text":
        return text.Setting(folder, quick), folder / "run"
    return transformer.Setting(folder, quick), folder / "run"


def there(model: str, quick: bool) -> bool:
    return (trained(model, quick)[1] / "supernet" / "weights.safetensors").exists()


def folder_of(cell: Cell, arm: str) -> Path:
    """A run folder of its own, with the weights and the times that all arms of this model and number of steps share."""
    own = borrow(cell.trained[1], cell.run / f"{cell.budget:g}-{arm}-{cell.seed}")
    for name in ("times.json", "latency.json"):
        if not (own / name).exists() and (cell.run / name).exists():
            shutil.copy(cell.run / name, own / name)
    return own


def timed(cell: Cell) -> Row:
    """Times of all calls, of the largest space, once."""
    torch.set_num_threads(1)
    borrow(cell.trained[1], cell.run)
    study = cell.study(False, {LATENCY: 1e12})
    net = study.supernet.load(cell.run / "supernet", "cpu")
    for _ in measure(study.space, study.evaluator, net, cell.run):  # type: ignore[arg-type]
        pass
    assert isinstance(study.evaluator, Timed)
    full = study.problem_in(cell.run).space.cost(dearest(study.space))[LATENCY]
    decoding = Timer(study.evaluator.latency, net, cell.run).of_decoding()
    return {"full_ms": full, "decoding_ms": decoding}


def limit(cell: Cell, times: Row) -> dict[str, float]:
    whole = times["full_ms"] + times["decoding_ms"]
    return {LATENCY: cell.budget * whole - times["decoding_ms"]}


def searched(cell: Cell, arm: str, times: Row) -> Row:
    """The schedule that an arm ends with, and what the search took."""
    torch.set_num_threads(1)
    study = cell.study(arm == "steps", limit(cell, times))
    name = "evolution" if arm == "steps" else arm
    folder = folder_of(cell, arm)
    for _ in study.evaluator.prepare(folder, cell.seed, "cpu"):
        pass
    with open_session(study, folder) as session:
        conductor = session.conductor(name, cell.seed)
        session.run(conductor)
        trials = [trial for trial in conductor.ledger.trials if trial.scored]
    best = study.space.decode(verified(study, trials))
    spent = sum(t.score.spent.get("macs", 0.0) for t in trials if t.score) / study.full["macs"]
    return {**judged(cell, best, times), "spent_samples": spent, "trials": len(trials)}


def rules(cell: Cell, times: Row) -> Iterator[tuple[str, Schedule]]:
    """Published rules, of each the dearest schedule within the budget."""
    study = cell.study(False, limit(cell, times))
    count = cell.steps
    named: dict[str, list[tuple[Pattern, int]]] = {
        f"{spacing} steps": [(Subset(n, spacing), count) for n in range(count - 1, 0, -1)]
        for spacing in ("uniform", "quadratic")
    }
    for pattern in study.space.patterns:  # type: ignore[attr-defined]
        if isinstance(pattern, Only) and pattern.computed:
            named[f"{pattern.label} between"] = [(Every(n, pattern.computed), count) for n in range(2, count + 1)]
    folder = folder_of(cell, "rules")
    for name, schedules in named.items():
        found: list[Genome] = within(study, folder, {name: schedules})
        for genome in found:
            yield name, study.space.decode(genome)
    cut = unguided(cell, study, times)
    if cut is not None:
        yield "guided at first", cut


def unguided(cell: Cell, study: Study, times: Row) -> Schedule | None:
    """The latest end of guidance that keeps to the budget, at every step whole; timed as its calls are. None where nothing does."""
    full = study.space.decode(dearest(study.space)).steps
    net = study.supernet.load(cell.run / "supernet", "cpu")
    assert isinstance(study.evaluator, Timed)
    timer = Timer(study.evaluator.latency, net, cell.run)
    most = limit(cell, times)[LATENCY]
    for stop in range(len(full) - 1, 0, -1):
        schedule = Schedule(tuple(s if place < stop else replace(s, guidance=None) for place, s in enumerate(full)))
        if timer.of_schedule(schedule)[0] <= most:
            return schedule
    return None


def ruled(cell: Cell, times: Row) -> Row:
    """All rules of a cell."""
    torch.set_num_threads(1)
    return {"rules": {name: judged(cell, schedule, times) for name, schedule in rules(cell, times)}}


def judged(cell: Cell, schedule: Schedule, times: Row) -> Row:
    """On noises and conditions that nothing was chosen on."""
    setting, run = cell.trained
    count = 32 if cell.quick else 1024
    study = cell.study(False, {LATENCY: 1e12})
    net = study.supernet.load(run / "supernet", "cpu")
    assert isinstance(study.evaluator, Timed)
    seed = derive_seed(cell.seed, "tune benchmark")
    base: Any = study.evaluator.base
    [part] = base.parts
    score = replace(part, rungs=(count,)).load(net, run)(schedule, count, seed)
    looks = latent.Setting.scores(setting, count) if cell.model == "latent" else setting.evaluator(count)
    seen = looks.load(net, setting.judged if cell.model == "latent" else run)(schedule, count, seed)
    ms = Timer(study.evaluator.latency, net, cell.run).of_schedule(schedule)[0]
    whole = times["full_ms"] + times["decoding_ms"]
    return {
        "loss": score.values[LOSS],
        "loss_error": score.error(LOSS),
        "fd": seen.values["fd"],
        "fd_error": seen.error("fd"),
        "agreement": 1 - seen.values["disagreement"],
        "time_share": (ms + times["decoding_ms"]) / whole,
        "steps": len(schedule.steps),
        "schedule": json.loads(schedule.to_json()),
        "replicates": {"loss": score.replicates[LOSS]},
    }


def compared(rows: list[tuple[Row, Row]]) -> tuple[float, float]:
    """Mean difference of losses over seeds, and its error: each seed's paired by its samples."""
    differences, errors = [], []
    for mine, theirs in rows:
        pairs = np.array(mine["replicates"]["loss"]) - np.array(theirs["replicates"]["loss"])
        count = len(pairs)
        errors.append(math.sqrt((count - 1) / count * float(((pairs - pairs.mean()) ** 2).sum())))
        differences.append(mine["loss"] - theirs["loss"])
    return float(np.mean(differences)), math.sqrt(sum(e**2 for e in errors)) / len(errors)


def exact() -> Row:
    """Seconds for the best paths of nine blocks over 50 steps, together, for 40 budgets; errors that grow with the way back, costs of nine digits."""
    rng = np.random.default_rng(0)
    count, blocks = 50, 9
    way = np.maximum(0, np.arange(count)[None, :] - np.arange(count)[:, None]).astype(float)
    problems = [
        Steps(
            rng.integers(10**8, 10**9, (count, 1)),
            np.zeros((count, 1)),
            rng.integers(10**6, 10**7, (count, 1)),
            (way ** rng.uniform(1, 2) * rng.random((1, count)))[..., None],
        )
        for _ in range(blocks)
    ]
    started = time.perf_counter()
    fronts = [paths(one) for one in problems]
    most = sum(front[-1].cost for front in fronts)
    found = together(fronts, [most * (place + 1) / 40 for place in range(40)])
    return {"seconds": time.perf_counter() - started, "solved": sum(one is not None for one in found)}


def mean(rows: list[Row]) -> float:
    """Loss over seeds."""
    return float(np.mean([row["loss"] for row in rows]))


def verdict(cells: list[Cell], bench: Benchmark) -> Row:
    """Of one (model, steps, budget), over its seeds."""
    mine = [bench.kept(f"{cell.key}: path") for cell in cells]
    steps = [bench.kept(f"{cell.key}: steps") for cell in cells]
    every = [bench.kept(f"{cell.key}: rules")["rules"] for cell in cells]
    names = [name for name in every[0] if all(name in one for one in every)]
    best = min(names, key=lambda name: mean([one[name] for one in every]))
    of_best = [one[best] for one in every]
    worse = []
    for name in names:
        difference, error = compared(list(zip(mine, [one[name] for one in every], strict=True)))
        worse.append(float(norm.sf(difference / error)) if error > 0 else (0.0 if difference > 0 else 1.0))
    tie = mean(of_best) <= 2 * math.sqrt(sum(row["loss_error"] ** 2 for row in of_best)) / len(of_best)
    others = {arm: mean([bench.kept(f"{cell.key}: {arm}") for cell in cells]) for arm in ARMS}
    return {
        "losses": others,
        "best_rule": best,
        "best_rule_loss": mean(of_best),
        "ratio": mean(mine) / mean(of_best),
        "over_steps": mean(mine) / mean(steps),
        "difference_to_rule": compared(list(zip(mine, of_best, strict=True))),
        "difference_to_steps": compared(list(zip(mine, steps, strict=True))),
        "tie": tie,
        # Holm's first step: if the smallest is none, no other is.
        "won": min(worse) > LEVEL / len(worse),
    }


def main() -> None:
    bench = Benchmark("tune", __doc__ or "", ("nas/searchers/path.py", "nas/genomes/paths.py", "nas/tuning/tune.py"))
    if bench.quick and not any(there(model, True) for model in MODELS):
        transformer.prepare(trained("transformer", True)[0])
    models = [model for model in MODELS if there(model, bench.quick)]
    if not models:
        raise SystemExit(
            "error: no model is there; run one of " + ", ".join(f"`python -m benchmarks.{m}`" for m in MODELS)
        )
    solved = bench.row("exact", exact)
    seeds = SEEDS[:1] if bench.quick else SEEDS
    grids = STEPS[:1] if bench.quick else STEPS
    budgets = BUDGETS[1:2] if bench.quick else BUDGETS
    verdicts: list[Row] = []
    spent: list[float] = []
    for steps, model in product(grids, models):
        if f"{model}-{steps}" in bench.without:
            continue
        first = Cell(bench.folder, bench.quick, model, steps, 1.0, 0)
        # On one thread, with nothing beside it that this benchmark starts.
        times = bench.row(f"{model}, {steps} steps: times", partial(timed, first))
        cells = [Cell(bench.folder, bench.quick, model, steps, b, s) for s, b in product(seeds, budgets)]
        jobs: dict[str, tuple[Any, ...]] = {}
        for cell in cells:
            jobs[f"{cell.key}: rules"] = (ruled, cell, times)
            jobs |= {f"{cell.key}: {arm}": (searched, cell, arm, times) for arm in ARMS}
        bench.rows(jobs)
        for budget in budgets:
            group = [cell for cell in cells if cell.budget == budget]
            key = f"{model}, {steps} steps, {budget:g} of the time"
            verdicts.append(bench.reckon(key, verdict(group, bench)))
            spent += [bench.kept(f"{cell.key}: path")["spent_samples"] for cell in group]
    clear = [row for row in verdicts if not row["tie"]]
    what = f"{', '.join(models)}; {len(verdicts)} cells, {len(verdicts) - len(clear)} of them ties"
    bench.finish(
        [
            Target(
                "tune_loss_ratio",
                f"loss of searched reuse over that of the best published rule at equal measured time, median ({what})",
                0.5,
                float(np.median([row["ratio"] for row in clear])) if clear else None,
            ),
            Target(
                "tune_over_steps",
                "loss of searched reuse over that of searched fewer steps, median",
                None,
                float(np.median([row["over_steps"] for row in clear])) if clear else None,
            ),
            Target(
                "tune_cells_won",
                "share of cells in which no rule is better, one-sided, Holm-corrected",
                0.9,
                sum(row["won"] for row in verdicts) / len(verdicts),
                at_most=False,
            ),
            Target("path_seconds", "seconds for nine blocks of 50 steps, 40 budgets at once", 1, solved["seconds"]),
            Target(
                "tune_cost_samples", "samples of the full pipeline that the dearest search took", 20_000, max(spent)
            ),
        ]
    )


if __name__ == "__main__":
    main()
