"""Every searcher against every other, by the same scores.

On the table of all schedules of five intervals of the digits study, 50 seeds each: what 60 evaluations return, as samples judge it that
no search saw. There too: the routing agent with and without recurrence, with equal shares, and learned from the supernet first; rounds with and without memory, with
fixed shares, and with TPE as the proposer on the same memory. Then real evaluations, five seeds, compared over the MACs that all have
spent; evolution against pymoo's NSGA-II on public test problems; and how long each takes to ask.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import optuna
import torch
from safetensors.torch import load_file, save_file

from benchmarks.common import Benchmark, Target, borrow, needs
from benchmarks.digits import digits_run, images
from benchmarks.digits_table import (
    FULL_TABLE,
    QUICK_TABLE,
    Row,
    Table,
    build_table,
    judged_volume,
    replayed,
)
from benchmarks.pareto_problems import PROBLEMS, on_problem
from evaluators.frechet import Frechet
from nas.contracts import Problem, Proposal, Search, Searcher
from nas.engine.session import open_session
from nas.genomes.genetics import random_genome
from nas.genomes.pareto import front, hypervolume
from nas.results.report import Run
from nas.results.trials import area, verified_front
from nas.searchers.ddsm import DDSM
from nas.searchers.enumerate import Enumerate
from nas.searchers.evolution import Evolution
from nas.searchers.knapsack import Knapsack
from nas.searchers.nevergrad import Nevergrad
from nas.searchers.optuna_sampler import OptunaSampler
from nas.searchers.proposers import Question
from nas.searchers.random import Random
from nas.searchers.relaxation import Relaxation
from nas.searchers.rounds import Rounds
from nas.searchers.routing import Routing
from nas.study import Study
from nas.testing import closed, table_problem, toy_score
from search_spaces.intervals import equal
from search_spaces.stepwise import Stepwise
from studies.digits import net, steps

Array = npt.NDArray[np.float64]

TRIALS = 60
RUNGS = (512, 2048)
LIMITS = {"macs_share": 0.6}
PAIRED = 20
"""Seeds on which a searcher is held against random search."""

OWN: dict[str, Searcher] = {
    "random": Random(),
    "ddsm": DDSM(population=20),
    "evolution": Evolution(),
    "evolution, not screened": Evolution(screened=1),
    "knapsack": Knapsack(around="full"),
    "rounds": Rounds(),
    "routing": Routing(),
    "enumerate": Enumerate(),
}
ADAPTERS: dict[str, Searcher] = {
    "nevergrad: DE": Nevergrad(),
    "nevergrad: NGOpt": Nevergrad("NGOpt"),
    "nevergrad: CMA": Nevergrad("CMA"),
    "optuna: TPE": OptunaSampler(),
    "optuna: NSGA-II": OptunaSampler("NSGAIISampler", {"population_size": 20}),
}
LEARNERS = tuple(name for name in (*OWN, *ADAPTERS) if name not in ("random", "enumerate"))


@dataclass(frozen=True)
class TPE:
    """A proposer for rounds: Optuna's TPE on what the round remembers, and nothing else."""

    def propose(self, question: Question) -> str:
        seed = int(np.random.default_rng([question.seed, len(question.refused)]).integers(2**31))
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=2))
        spread: dict[str, optuna.distributions.BaseDistribution] = {
            choice.name: optuna.distributions.IntDistribution(0, len(choice.options) - 1) for choice in question.choices
        }
        for past in question.memory:
            params = dict(zip(spread, past.option, strict=True))
            study.add_trial(optuna.create_trial(params=params, distributions=spread, value=past.score))
        drawn = study.ask(spread).params
        return json.dumps(question.values(tuple(drawn[choice.name] for choice in question.choices)))


ABLATIONS: dict[str, Searcher] = {
    "routing, flat policy": Routing(recurrent=False),
    "routing, equal shares": Routing(split="equal"),
    "rounds, without memory": Rounds(remembered=0),
    "rounds, equal shares": Rounds(split="equal"),
    "rounds, TDC's linear shares": Rounds(split="linear"),
    "rounds, TPE proposes": Rounds(proposer=TPE()),
}


# ----------------------------------------------------------------------------------------------------------------- table


def on_table(table: Table, searcher: Searcher, trials: int, rungs: tuple[int, ...], seeds: int) -> Row:
    """Hypervolume of what each seed returns, judged; the mean height of its curve on search samples over the MACs of so many full
    evaluations as half the trials; MACs charged."""
    torch.set_num_threads(1)
    full = table.size.space.cost((len(net.widths) - 1,) * table.size.intervals)["macs"]
    worst = table.distance((0,) * table.size.intervals, 0, rungs[0])[0]
    volumes, areas, charged = [], [], []
    for seed in range(seeds):
        found = replayed(table, searcher, rungs, trials, seed, limits=LIMITS)
        volumes.append(judged_volume(table, verified_front(found, ("fd", "macs"))))
        spent, points, curve = 0.0, [], []
        for trial in found:
            if trial.score is not None:
                spent += trial.score.spent["macs"]
                if trial.rung == rungs[0] and not any(excess > 0 for excess in trial.violations.values()):
                    points.append(trial.objectives(("fd", "macs_share")))
                    points = [points[i] for i in front(points)]
                curve.append((spent, hypervolume(points, (worst, 1.0001))))
        areas.append(area(curve, trials / 2 * 0.3 * rungs[0] * full))
        charged.append(spent)
    return {
        "hypervolume": float(np.mean(volumes)),
        "sd": float(np.std(volumes, ddof=1)),
        "area": float(np.mean(areas)),
        "macs": float(np.mean(charged)),
        "seeds": seeds,
        "hypervolumes": volumes,
    }


def against(row: Row, other: Row) -> Row:
    """Paired seeds: how many are better, and the mean difference with its standard error."""
    difference = np.array(row["hypervolumes"]) - np.array(other["hypervolumes"])
    return {
        "better_of_20": int((difference[:PAIRED] > 0).sum()),
        "difference": float(difference.mean()),
        "error": float(difference.std(ddof=1) / math.sqrt(len(difference))),
    }


@dataclass(frozen=True)
class Learned:
    """The routing agent with what it learned from the supernet, as a run would have kept it."""

    path: str

    def start(self, problem: Problem, seed: int) -> Search:
        return Routing(warm_start=Relaxation()).start(problem, seed, load_file(self.path))


def learn(table: Table, trained: Path, into: Path) -> Row:
    """Lets the routing agent learn from the digits supernet, once."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    problem = Problem(table.size.space, ("fd", "macs"), LIMITS)
    learning = Routing(warm_start=Relaxation()).learn(problem, net.load(trained / "supernet", "cpu"), images.load(), 0)
    while True:
        try:
            next(learning)
        except StopIteration as end:
            tensors, macs = end.value
            break
    save_file(dict(tensors), into)
    return {"macs": macs, "seconds": time.perf_counter() - started}


# ------------------------------------------------------------------------------------------------------------------ live


def live(base: Study, trained: Path, folder: Path, seeds: int, trials: int, rungs: tuple[int, ...]) -> dict[str, Row]:
    """All searchers on the network itself, in one run; a score that another one has paid for is charged in full."""
    searchers = {re.sub(r"[^A-Za-z0-9_-]+", "-", name): s for name, s in {**OWN, **ADAPTERS}.items()}
    study = replace(
        base,
        space=Stepwise(net, steps, equal(steps, 5)),
        searchers=searchers,
        evaluator=Frechet(images, rungs=rungs),
        proxies={},
        limits=LIMITS,
        trials=trials,
        verified=max(2, trials // 6),
    )
    torch.set_num_threads(1)
    with open_session(study, borrow(trained, folder)) as session:
        for name, seed in [("uniform", 0), *((name, seed) for seed in range(seeds) for name in searchers)]:
            session.run(session.conductor(name, seed))
        compared = Run.open(folder, session.storage).compare()
    rows = {row["searcher"]: row for row in compared["searchers"]}
    found: dict[str, Row] = {}
    for row in compared["over_seeds"]:
        own = [rows[row["searcher"] + (f" (seed {seed})" if seed else "")] for seed in range(seeds)]
        found[row["searcher"]] = {
            **row,
            "macs": float(np.mean([each["spent"]["macs"] for each in own])),
            "evaluations": sum(each["trials"] for each in own),
            "failed": sum(each["failed"] for each in own),
            "seconds": float(np.mean([each["spent"]["seconds"] for each in own])),
            "wall_seconds": float(np.mean([each["spent"]["wall_seconds"] for each in own])),
        }
    return found


# ------------------------------------------------------------------------------------------------------------------- ask


def ask_time(searcher: Searcher, genes: int, finished: int, asks: int) -> Row:
    """Milliseconds of ask, mean over some in a row, and of tell; after so many finished trials."""
    torch.set_num_threads(1)
    problem = table_problem(genes=genes)
    search = searcher.start(problem, 0)
    rng = np.random.default_rng(0)
    for number in range(finished):
        genome = random_genome(problem, rng)
        search.tell(closed(problem, number, Proposal(genome), toy_score(genome)))
    asking, telling = [], []
    for number in range(finished, finished + asks):
        started = time.perf_counter()
        proposal = search.ask([])
        asking.append(time.perf_counter() - started)
        assert isinstance(proposal, Proposal)
        trial = closed(problem, number, proposal, toy_score(proposal.genome))
        started = time.perf_counter()
        search.tell(trial)
        telling.append(time.perf_counter() - started)
    return {
        "ask_ms": 1e3 * float(np.mean(asking)),
        "longest_ask_ms": 1e3 * max(asking),
        "tell_ms": 1e3 * float(np.mean(telling)),
    }


def main() -> None:
    bench = Benchmark("searchers", __doc__ or "", ("nas/searchers",))
    needs("pymoo", "benchmarks")
    quick = bench.quick
    study, trained = digits_run(quick)
    table = build_table(bench, QUICK_TABLE if quick else FULL_TABLE, trained)
    trials, rungs, seeds = (12, (32, 64), 3) if quick else (TRIALS, RUNGS, 50)
    learned = bench.folder / "learned.safetensors"
    bench.row("table: what the routing agent's learning takes", lambda: learn(table, trained, learned))
    everyone = {**OWN, **ADAPTERS, **ABLATIONS, "routing, learned from the supernet first": Learned(str(learned))}
    rows = bench.rows(
        {f"table: {name}": (on_table, table, searcher, trials, rungs, seeds) for name, searcher in everyone.items()}
    )
    wins: dict[str, int] = {}
    for name in everyone:
        if name != "random":
            row = bench.row(
                f"table: {name} against random",
                lambda name=name: against(rows[f"table: {name}"], rows["table: random"]),  # type: ignore[misc]
            )
            wins[name] = row["better_of_20"]
    for name, other in (
        ("routing, flat policy", "routing"),
        ("routing, equal shares", "routing"),
        ("routing, learned from the supernet first", "routing"),
        *((name, "rounds") for name in ABLATIONS if name.startswith("rounds")),
    ):
        bench.row(
            f"table: {name} against {other}",
            lambda name=name, other=other: against(rows[f"table: {name}"], rows[f"table: {other}"]),  # type: ignore[misc]
        )
    evaluations, count = (60, 2) if quick else (500, 20)
    problems = bench.rows(
        {f"{name}: evolution and pymoo": (on_problem, name, 20, evaluations, count) for name in PROBLEMS}
    )
    slowest: Mapping[str, float] = {}
    for genes in (16,) if quick else (16, 128, 1000):
        for name, searcher in {**OWN, **ADAPTERS}.items():
            asks = 16 if name in OWN else 3
            row = bench.row(
                f"ask: {name}, {genes} genes",
                lambda searcher=searcher, genes=genes, asks=asks: ask_time(
                    searcher, genes, 50 if quick else 1000, asks
                ),  # type: ignore[misc]
            )
            if name in OWN:
                slowest = {**slowest, f"{name}, {genes} genes": row["ask_ms"]}
    measured = live(
        study, trained, bench.folder / "live", 2 if quick else 5, trials, (16, 32) if quick else (256, 1024)
    )
    for name, row in measured.items():
        bench.row(f"live: {name}", lambda row=row: row)  # type: ignore[misc]
    slow = max(slowest, key=slowest.__getitem__)
    bench.finish(
        [
            Target(
                "learners_beat_random",
                "least share of 20 paired seeds in which a searcher that learns returns more than random search, "
                f"60 evaluations on the digits table: {min(LEARNERS, key=wins.__getitem__)}",
                0.95,
                min(wins[name] for name in LEARNERS) / min(PAIRED, seeds),
                at_most=False,
            ),
            Target(
                "evolution_vs_pymoo",
                "median hypervolume of evolution / of pymoo's NSGA-II, 500 evaluations, least of ZDT1-3 and DTLZ2 with 30 levels",
                1.0,
                min(row["ratio_of_medians"] for row in problems.values()),
                at_most=False,
            ),
            Target("ask_ms", f"milliseconds of ask after 1,000 trials, our slowest: {slow}", 100, slowest[slow]),
        ]
    )


if __name__ == "__main__":
    main()
