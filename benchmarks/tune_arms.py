"""What `benchmarks.tune` compares: searches in one space of reuse, rules, and what is learned first, each within one budget of measured time."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import latent, text, transformer
from benchmarks.charged import Charged, Kept, Silent
from benchmarks.common import RUNS, borrow, copied, processor
from evaluators.latency import Latency, Timed, Timer
from evaluators.proxies import TeacherDistance
from evaluators.sampling import DDIM, DPMSolver
from evaluators.scoring import Scores
from nas.base.files import write_text
from nas.contracts import Genome, Guidance, Schedule, Step, UserError, derive_seed
from nas.engine.learning import learned_macs, learned_tensors
from nas.engine.runner import run_here
from nas.engine.session import open_session
from nas.engine.timing import measure
from nas.genomes.genetics import LATENCY, dearest
from nas.searchers.evolution import Evolution
from nas.searchers.gates import Gates
from nas.searchers.knapsack import Knapsack
from nas.searchers.path import Path as ShortestPath
from nas.searchers.pruner import Pruner
from nas.searchers.router import Router
from nas.study import Study
from nas.tuning.study import LOSS, sets
from nas.tuning.tune import verified, within
from search_spaces.branches import Branches
from search_spaces.intervals import linspace, per_step, uniform
from search_spaces.options import Options
from search_spaces.patterns import Every, Only, Pattern, Subset
from search_spaces.stepwise import Stepwise
from search_spaces.training import Stages

TIMES = ("times.json", "latency.json")
"""Of a run folder, what its calls take."""
PARTS = {
    "latent": ("latent/supernet", "judge/features"),
    "transformer": ("run/supernet", "run/features"),
    "text": ("run/supernet", "run/features", "run/texts", "encoder"),
}
"""Of a model's folder, its network and its judge."""
SEARCHED = ("path", "evolution", "knapsack", "gates", "steps")
NETWORKS = tuple(
    f"networks/{files}"
    for files in (
        "*/*/supernet/*.*",
        "*/*/supernet/autoencoder/*",
        "*/*/features/*",
        "text/run/texts/*/*",
        "text/encoder/*/*",
    )
)
"""Files of a model, in the benchmark's folder, that the rows of all its seeds rest on."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One model with so many steps and one seed, within each of the budgets. `folder`: the benchmark's; `settings`: its protocol's, where `as_tuned` says
    that searches begin with the rules, and the path and the searched steps choose which steps are guided, as `nas tune` does."""

    folder: Path
    settings: Mapping[str, Any]
    quick: bool
    model: str
    steps: int
    seed: int

    @property
    def key(self) -> str:
        return f"{self.model}, {self.steps} steps, seed {self.seed}"

    @property
    def budgets(self) -> tuple[float, ...]:
        return tuple(self.settings["budgets"][1:2] if self.quick else self.settings["budgets"])

    @property
    def scale(self) -> float:
        return float(self.settings["guidance"][self.model])

    @cached_property
    def trained(self) -> tuple[Any, Path]:
        """The setting of the benchmark that trains the model, and its run folder within this benchmark's."""
        return trained(self.folder, self.model, self.quick)

    @property
    def as_tuned(self) -> bool:
        return bool(self.settings.get("as_tuned", False))

    def schedules(self, arm: str, budget: float) -> int:
        """That the arm's search scores within this budget."""
        if not self.quick and "schedules" in self.settings:
            told = self.settings["schedules"][arm]
            return int(told[f"{budget:g}"] if isinstance(told, Mapping) else told)
        every = (5 if self.quick else int(self.settings["schedules_for_each_step"])) * self.steps
        return every // 2 if arm == "gates" else every

    def gradients(self, learner: str) -> int:
        """Gradient steps that "gates" or the "router" learn for."""
        if self.quick:
            return 2
        return int(self.settings.get("gradients", {}).get(learner) or {"gates": 8, "router": 64}[learner] * self.steps)

    @property
    def run(self) -> Path:
        return self.folder / f"{self.model}-{self.steps}" / f"seed-{self.seed}"

    @property
    def loss(self) -> TeacherDistance:
        setting, _ = self.trained
        return TeacherDistance(
            images=setting.images if self.model != "latent" else setting.study.images,
            conditions=conditions_of(setting),
            rungs=(8, 16) if self.quick else tuple(self.settings["samples"]),
            sampler=DDIM(),
            timesteps=uniform(self.steps),
            guidance=self.scale,
        )

    def study(self, limits: Mapping[str, float], arm: str = "path", budget: float = 0.5) -> Study:
        """Of what this arm chooses from. `budget`: which says how many schedules it scores."""
        setting, _ = self.trained
        net, grid, loss = setting.net, uniform(self.steps), self.loss
        graph = net.cost.graph(net.anatomy.full)
        patterns: tuple[Pattern, ...] = (Every(1), Only(()))
        if arm != "steps":
            patterns = (Every(1), *(Only(one) for one in sets(graph)), Only(()))
        # What an interval costs follows from the interval alone, as evolution and the knapsack want it, only where all are guided alike.
        guides = (None, self.scale) if self.as_tuned and arm in ("path", "steps") else (self.scale,)
        space = Stepwise(
            net,
            grid,
            per_step(grid),
            Options((1.0,)),
            patterns=patterns,
            finer=graph.predicts_anew,
            guidance=guides,
        )
        trials = self.schedules(arm, budget)
        probes = round(0.75 * trials)
        pruner = Pruner(steps=self.gradients("gates"), batch=2, clip=False, finer=graph.predicts_anew)
        return Study(
            name=f"tune-{self.model}-{self.steps}-{arm}",
            space=space,
            supernet=net,
            images=loss.images,
            training=Stages(()),
            evaluator=Timed(Scores((loss,)), Latency(16, warmup=1, repeats=5)),
            searchers={
                "path": ShortestPath(probes=probes, budgets=2, options=max(8, len(patterns) * len(guides))),
                "evolution": Evolution(),
                "knapsack": Knapsack(around="full", probes=probes),
                "gates": Gates(pruner),
                "steps": Evolution(),
            },
            objectives=(LOSS,),
            limits=dict(limits),
            trials=trials,
            verified=2 if self.quick else int(self.settings["verified"]),
            seed=self.seed,
        )


def conditions_of(setting: Any) -> Any:
    """What the model's samples are asked to be."""
    if isinstance(setting, text.Setting):
        return setting.captions
    if isinstance(setting, latent.Setting):
        return setting.study.evaluator.parts[0].conditions  # type: ignore[attr-defined]
    return setting.labels


def trained(folder: Path, model: str, quick: bool) -> tuple[Any, Path]:
    """`folder`: the benchmark's, where the network goes where its rows go."""
    return _of(model, folder / "networks" / model, quick)


def _of(model: str, folder: Path, quick: bool) -> tuple[Any, Path]:
    if model == "latent":
        return latent.Setting(folder, quick), folder / "latent"
    if model == "text":
        return text.Setting(folder, quick), folder / "run"
    return transformer.Setting(folder, quick), folder / "run"


def _lender(model: str, quick: bool) -> Path:
    """The folder of the benchmark that trains the model."""
    return (RUNS / f"{model}{'-quick' if quick else ''}").resolve()


def _whole(folder: Path, model: str) -> bool:
    network, judge, *_ = PARTS[model]
    return (folder / network / "weights.safetensors").exists() and (folder / judge).exists()


def there(folder: Path, model: str, quick: bool) -> bool:
    """Whether its network is trained, and who judges it."""
    return _whole(folder / "networks" / model, model) or _whole(_lender(model, quick), model)


def lend(folder: Path, model: str, quick: bool) -> None:
    """Copies a model's network and judge into the benchmark's folder, unless they are there; where there are none, they are trained first: half an hour of
    two cores."""
    own, lender = folder / "networks" / model, _lender(model, quick)
    if _whole(own, model):
        return
    if not _whole(lender, model):
        print(f"training the network of benchmarks.{model} in {lender}", file=sys.stderr, flush=True)
        setting, _ = _of(model, lender, quick)
        {"latent": latent, "text": text, "transformer": transformer}[model].prepare(setting)
        if model == "latent":
            latent.prepare_judge(setting)
    for part in PARTS[model]:
        if not (own / part).exists():
            copied(lender / part, own / part)


# ----------------------------------------------------------------------------------------------------------------- time


def timed(cell: Cell) -> Row:
    """Times of all calls of the cell's space, once."""
    torch.set_num_threads(1)
    borrow(cell.trained[1], cell.run)
    study = cell.study({LATENCY: 1e12})
    net = study.supernet.load(cell.run / "supernet", "cpu")
    for _ in measure(study.space, study.evaluator, net, cell.run):  # type: ignore[arg-type]
        pass
    full = study.problem_in(cell.run).space.cost(dearest(study.space))[LATENCY]
    own = timer(cell)
    own.of_step(Step(0, net.full_arch))  # not guided, as a rule may be where the space never is
    files = {file: (cell.run / file).read_text() for file in TIMES if (cell.run / file).exists()}
    # By which it shows whether something else ran beside it, and on which machine.
    beside = {"load": os.getloadavg()[0], "processor": processor()}
    return {"full_ms": full, "decoding_ms": own.of_decoding(), **beside, "files": files}


def restored(cell: Cell, times: Row) -> None:
    """The files of times where they are gone, so that no call is timed anew."""
    borrow(cell.trained[1], cell.run)
    for file, text_ in times.get("files", {}).items():
        if not (cell.run / file).exists():
            write_text(cell.run / file, text_)


def timer(cell: Cell) -> Timer:
    study = cell.study({LATENCY: 1e12})
    assert isinstance(study.evaluator, Timed)
    return Timer(study.evaluator.latency, study.supernet.load(cell.trained[1] / "supernet", "cpu"), cell.run)


def limit(budget: float, times: Row) -> dict[str, float]:
    """Of the calls' time: decoding is in the budget."""
    whole = times["full_ms"] + times["decoding_ms"]
    return {LATENCY: budget * whole - times["decoding_ms"]}


def folder_of(cell: Cell, name: str) -> Path:
    """A run folder of its own, with the weights and the times that all arms of the cell share."""
    own = borrow(cell.trained[1], cell.run / name)
    for file in TIMES:
        if not (own / file).exists() and (cell.run / file).exists():
            write_text(own / file, (cell.run / file).read_text())
    return own


# ----------------------------------------------------------------------------------------------------------------- arms


def searched(cell: Cell, arm: str, times: Row) -> Row:
    """The schedules that an arm ends with, and what its searches took."""
    torch.set_num_threads(1)
    judge = judge_of(cell, times)
    return {"of": {f"{budget:g}": _searched(cell, arm, budget, times, judge) for budget in cell.budgets}}


def _searched(cell: Cell, arm: str, budget: float, times: Row, judge: Judge) -> Row:
    study = cell.study(limit(budget, times), arm, budget)
    if cell.as_tuned and arm != "gates":
        study = replace(study, enqueue=first_tries(cell, study, budget, times))
    # Begun anew after a stop, whose scores are kept for all arms and budgets of the cell: what a search takes does not depend on it.
    shutil.rmtree(cell.run / f"{budget:g}-{arm}", ignore_errors=True)
    folder = folder_of(cell, f"{budget:g}-{arm}")
    here = folder / "learned"
    if arm == "gates" and not here.is_symlink():  # the same whatever the budget, one of which follows another
        (cell.run / "learned").mkdir(exist_ok=True)
        here.symlink_to(cell.run / "learned")
    for _ in study.evaluator.prepare(folder, cell.seed, "cpu"):
        pass
    with open_session(study, folder) as session:
        for _ in session.learn(arm, cell.seed):
            pass
        conductor = session.conductor(arm, cell.seed)
        run_here(conductor, partial(charged, cell, study, folder))
        trials = [trial for trial in conductor.ledger.trials if trial.scored]
    best = study.space.decode(verified(study, trials))
    learned = learned_macs(folder, study.ledger_info(folder, arm, cell.seed))
    spent = (learned + sum(t.score.spent.get("macs", 0.0) for t in trials if t.score)) / study.full["macs"]
    return {**judge(best), "spent_samples": spent, "trials": len(trials)}


def charged(cell: Cell, study: Study, folder: Path) -> Charged:
    """The study's evaluator, which makes no score again that the cell has, and charges it as though it did."""
    loaded: Any = study.load(folder, "cpu")
    silent = study.evaluator.base.load(Silent(loaded.supernet), folder)  # type: ignore[attr-defined]
    return Charged(loaded, silent, Kept(cell.run / "scores.jsonl"))


def first_tries(cell: Cell, study: Study, budget: float, times: Row) -> tuple[Genome, ...]:
    """The rules that the study's space has schedules of: one without reuse, or guided throughout, has some alone."""
    found: dict[Genome, None] = {}
    for _, schedule in rules(cell, budget, times):
        with contextlib.suppress(UserError):
            found[study.space.genome(schedule)] = None  # type: ignore[attr-defined]
    return tuple(found)


def ruled(cell: Cell, times: Row) -> Row:
    """All rules within each budget, and the full pipeline; where searches are those of `nas tune`, another sampler's fewer steps beside them."""
    torch.set_num_threads(1)
    judge = judge_of(cell, times)
    rivals = {budget: rival(cell, budget, times) for budget in cell.budgets} if cell.as_tuned else {}
    return {
        "full": judge(full_pipeline(cell)),
        "of": {
            f"{budget:g}": {name: judge(schedule) for name, schedule in rules(cell, budget, times)}
            for budget in cell.budgets
        },
        **({"another_sampler": {f"{budget:g}": judge(one) for budget, one in rivals.items()}} if rivals else {}),
    }


def rival(cell: Cell, budget: float, times: Row) -> Schedule:
    """As many whole steps of DPM-Solver++ as keep to the budget, spaced as its stock scheduler does."""
    count = int(limit(budget, times)[LATENCY] / times["full_ms"] * cell.steps)
    full, guide = cell.trained[0].net.anatomy.full, Guidance(cell.scale)
    return Schedule(tuple(Step(t, full, (), guide) for t in linspace(count + 1)[:-1]), DPMSolver().name)


def rules(cell: Cell, budget: float, times: Row) -> Iterator[tuple[str, Schedule]]:
    """Published rules, of each the dearest schedule within the budget."""
    study = cell.study(limit(budget, times))
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
    cut = unguided(cell, study, limit(budget, times)[LATENCY])
    if cut is not None:
        yield "guided at first", cut


def unguided(cell: Cell, study: Study, most: float) -> Schedule | None:
    """The latest end of guidance that keeps to so many milliseconds, at every step whole. None where nothing does."""
    full = study.space.decode(dearest(study.space)).steps
    own = timer(cell)
    for stop in range(len(full) - 1, 0, -1):
        schedule = Schedule(tuple(s if place < stop else replace(s, guidance=None) for place, s in enumerate(full)))
        if own.of_schedule(schedule)[0] <= most:
            return schedule
    return None


def learned_routes(cell: Cell) -> Row:
    """Learning-to-Cache's scores of branches, kept in the cell's folder."""
    torch.set_num_threads(1)
    study, folder = _routed(cell)
    with open_session(study, folder) as session:
        for _ in session.learn("router", cell.seed):
            pass
    return {"spent_samples": learned_macs(folder, study.ledger_info(folder, "router", cell.seed)) / study.full["macs"]}


def routed(cell: Cell, times: Row) -> Row:
    """Of the branches with the highest scores as many as keep to each budget, by the time of the calls that this makes."""
    torch.set_num_threads(1)
    judge = judge_of(cell, times)
    found = {budget: _within(cell, limit(budget, times)[LATENCY]) for budget in cell.budgets}
    return {"of": {f"{budget:g}": judge(schedule) for budget, schedule in found.items() if schedule is not None}}


def _within(cell: Cell, most: float) -> Schedule | None:
    study, folder = _routed(cell)
    assert isinstance(study.space, Branches)
    told = learned_tensors(folder, study.ledger_info(folder, "router", cell.seed))
    assert told is not None
    places, blocks = told["bits"].numpy().T
    scores = told["keep"].double().numpy()[places, blocks]
    order = (-scores).argsort(kind="stable")
    own = timer(cell)

    def of(count: int) -> Schedule:
        kept = set(order[:count].tolist())
        return study.space.decode(tuple(int(place in kept) for place in range(len(scores))))

    fits, fails = -1, len(scores) + 1
    while fails - fits > 1:
        middle = (fits + fails) // 2
        fits, fails = (middle, fails) if own.of_schedule(of(middle))[0] <= most else (fits, middle)
    return None if fits < 0 else of(fits)


def _routed(cell: Cell) -> tuple[Study, Path]:
    study = cell.study({})
    router = Router(steps=cell.gradients("router"), batch=16, learning_rate=0.01)
    if "sparsity" in cell.settings:
        router = replace(router, sparsity=cell.settings["sparsity"])
    searcher = Gates(router, ("threshold",))
    space = Branches(cell.trained[0].net, uniform(cell.steps), guidance=cell.scale, whole=2)
    study = replace(study, name=f"tune-router-{cell.steps}", space=space, searchers={"router": searcher})
    return replace(study, evaluator=Scores((cell.loss,))), folder_of(cell, "router")


# -------------------------------------------------------------------------------------------------------------- judging


_JUDGES: dict[Path, Judge] = {}
"""Of this process the latest, by the cell that it judges: it keeps the full pipeline's samples."""


def judge_of(cell: Cell, times: Row) -> Judge:
    if cell.run not in _JUDGES:
        _JUDGES.clear()
        _JUDGES[cell.run] = Judge(cell, times)
    return _JUDGES[cell.run]


class Judge:
    """Scores schedules on noises and conditions that nothing was chosen on."""

    def __init__(self, cell: Cell, times: Row) -> None:
        setting, run = cell.trained
        self._count = 32 if cell.quick else int(cell.settings["judged"])
        self._seed = derive_seed(cell.seed, "tune benchmark")
        self._timer = timer(cell)
        self._times = times
        of_latents = isinstance(setting, latent.Setting)
        looks = setting.scores(self._count) if of_latents else setting.evaluator(self._count)
        # One sampling for all: FD and agreement look at the samples whose distance is the loss. The first sampler is that of all schedules but a rival's.
        every = (replace(cell.loss, rungs=(self._count,)), *looks.parts)
        parts = tuple(replace(one, batch=256, sampler=(DDIM(), DPMSolver())) for one in every)
        net = setting.net.load(run / "supernet", "cpu")
        self._score = Scores(parts).load(net, setting.judged if of_latents else run)
        self._kept = Kept(cell.run / "judged.jsonl")

    def __call__(self, schedule: Schedule) -> Row:
        score = self._kept.get(schedule.digest)
        if score is None:
            self._kept.put(schedule.digest, score := self._score(schedule, self._count, self._seed))
        ms = self._timer.of_schedule(schedule)[0]
        whole = self._times["full_ms"] + self._times["decoding_ms"]
        return {
            "loss": score.values[LOSS],
            "loss_error": score.error(LOSS),
            "fd": score.values["fd"],
            "fd_error": score.error("fd"),
            "agreement": 1 - score.values["disagreement"],
            "time_share": (ms + self._times["decoding_ms"]) / whole,
            "steps": len(schedule.steps),
            "reusing": sum(bool(step.reuse) for step in schedule.steps),
            "schedule": json.loads(schedule.to_json()),
            "replicates": list(score.replicates[LOSS]),
        }


def full_pipeline(cell: Cell) -> Schedule:
    guide = Guidance(cell.scale)
    return Schedule(tuple(Step(t, cell.trained[0].net.anatomy.full, (), guide) for t in uniform(cell.steps)))
