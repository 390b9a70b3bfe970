"""Laws that every part must keep, as functions for your own test suite.

    from nas.testing import check_searcher

    def test_my_searcher(): check_searcher(MySearcher())

Each raises AssertionError with the law that was broken.
"""

from __future__ import annotations

import json
import math
import pickle
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nas.contracts import (
    DONE,
    Choice,
    Evaluator,
    Genome,
    LoadedSupernet,
    Price,
    Problem,
    Proposal,
    Schedule,
    Score,
    Search,
    Searcher,
    SearchSpace,
    Step,
    Supernet,
    Trial,
    frozen,
    noise_by,
    some_condition,
)
from nas.genomes.genetics import LATENCY, IntervalCosts, cheapest, check_reachable, dearest, feasible_genomes
from nas.genomes.timed import TimedSpace, calls, key

SECONDS_PER_ASK = 10.0
"""An ask that takes longer on the tiny problems below is not bounded."""


@dataclass(frozen=True)
class TableSpace:
    """A space given by the MACs of each interval's options, for tests of searchers without any network.

    `table[k]` is a tuple for an interval of one choice, nested once more for each further choice.
    """

    table: tuple[tuple[Any, ...], ...]

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        return tuple(
            Choice(f"interval{k:04d}.choice{i}", tuple(range(size)), k)
            for k, costs in enumerate(self.interval_costs())
            for i, size in enumerate(costs.shape)
        )

    def describe(self) -> dict[str, Any]:
        return {"class": "TableSpace", "table": self.table}

    def decode(self, genome: Genome) -> Schedule:
        sizes = [len(choice.options) for choice in self.choices]
        if len(genome) != len(sizes) or not all(0 <= g < size for g, size in zip(genome, sizes, strict=True)):
            raise ValueError(f"genome {genome} does not fit the table")
        options = [genome[genes] for genes in IntervalCosts(self).genes]
        return Schedule(tuple(Step(len(options) - 1 - k, option) for k, option in enumerate(options)))

    def cost(self, genome: Genome) -> dict[str, float]:
        macs = self._costs.total(genome)
        options = {genome[genes] for genes in self._costs.genes}
        # As if a larger option had larger weights, kept once for all intervals that run it.
        return {"macs": macs, "macs_share": macs / self._full, "params": sum(1 + sum(option) for option in options)}

    def interval_costs(self, price: Price | None = None) -> tuple[npt.NDArray[np.int64], ...]:
        if price is None:
            return self._arrays
        found = []
        for k, costs in enumerate(self._arrays):
            prices = [price(Step(len(self._arrays) - 1 - k, option)) for option in np.ndindex(costs.shape)]
            found.append(np.array(prices, dtype=np.int64).reshape(costs.shape))
        return tuple(found)

    @cached_property
    def _costs(self) -> IntervalCosts:
        return IntervalCosts(self)

    @cached_property
    def _full(self) -> int:
        return sum(int(costs.max()) for costs in self.interval_costs())

    @cached_property
    def _arrays(self) -> tuple[npt.NDArray[np.int64], ...]:
        return tuple(np.array(costs, dtype=np.int64) for costs in self.table)


def table_problem(genes: int = 5, options: int = 4, limit: float = 0.6) -> Problem:
    """Two objectives, "fd" and "macs", under a limit on `macs_share`."""
    return Problem(
        TableSpace((tuple((j + 1) ** 2 for j in range(options)),) * genes), ("fd", "macs"), {"macs_share": limit}
    )


def joint_problem(limit: float = 0.6) -> Problem:
    """Three intervals of two choices each, whose MACs multiply: what one gene saves depends on the other."""
    options = tuple(tuple((i + 1) ** 2 * (j + 2) for j in range(3)) for i in range(4))
    return Problem(TableSpace((options,) * 3), ("fd", "macs"), {"macs_share": limit})


def timed_problem(limit: float = 2.0) -> Problem:
    """A limit on time, in which calls that take fewer MACs are not faster throughout."""
    space = TableSpace((tuple((j + 1) ** 2 for j in range(4)),) * 5)
    times = {key(step): (0.1, 0.65, 0.5, 0.7)[step.arch[0]] for step in calls(space)}
    return Problem(TimedSpace(space, times), ("fd", LATENCY), {LATENCY: limit})


def limited_problem() -> Problem:
    """Limits on two costs, one of which does not add up over intervals: three kinds of options in all are too many parameters."""
    return replace(table_problem(), limits={"macs_share": 0.6, "params": 5})


def timed_limited_problem() -> Problem:
    """Limits on time and on multiply-adds at once."""
    problem = timed_problem()
    return replace(problem, limits={**problem.limits, "macs_share": 0.3})


def toy_score(genome: Genome) -> Score:
    """Falls with every gene, late ones more; smooth, so that a searcher can make progress."""
    value = sum((i + 1) / (gene + 1) for i, gene in enumerate(genome))
    return Score({"fd": value}, {"fd": tuple(value + 0.01 * math.sin(b) for b in range(20))}, {"calls": 1.0})


def closed(problem: Problem, number: int, proposal: Proposal, score: Score | None, reason: str = "") -> Trial:
    """A finished trial of the first rung, scored or failed, as a runner would tell it."""
    return Trial(
        number=number,
        genome=proposal.genome,
        digest=problem.space.decode(proposal.genome).digest,
        rung=1,
        status="failed" if score is None else "pruned",
        score=score,
        cost=dict(problem.space.cost(proposal.genome)),
        violations=problem.violations(proposal.genome),
        origin=json.loads(json.dumps(dict(proposal.origin))),
        reason=reason,
    )


def check_searcher(searcher: Searcher, trials: int = 40) -> None:
    """All laws of a searcher: determinism, replay, feasibility, novelty, asynchrony, failures, bounded time."""
    assert pickle.loads(pickle.dumps(searcher)) == searcher, "a recipe must survive pickling"
    for problem in (table_problem(), joint_problem()):
        history = _drive(searcher.start(problem, 7), problem, trials)
        again = _drive(searcher.start(problem, 7), problem, trials)
        assert [t.genome for t in history] == [t.genome for t in again], "same seed and tells must give the same asks"
        _check_replay(searcher, problem, history)
        _check_asynchronous(searcher, problem, trials)
        _check_failures(searcher, problem, trials)
    for problem in (timed_problem(), limited_problem()):
        history = _drive(searcher.start(problem, 7), problem, trials)
        _check_replay(searcher, problem, history[: trials // 2])
    _check_exhaustion(searcher)


def _drive(search: Search, problem: Problem, trials: int) -> list[Trial]:
    history: list[Trial] = []
    seen: set[Genome] = set()
    for number in range(trials):
        proposal = _ask(search, [])
        if not isinstance(proposal, Proposal):
            break
        _check_proposal(problem, proposal, seen, [])
        seen.add(proposal.genome)
        history.append(closed(problem, number, proposal, toy_score(proposal.genome)))
        search.tell(history[-1])
    assert history, "a searcher must propose something while anything is feasible"
    return history


def _check_replay(searcher: Searcher, problem: Problem, history: Sequence[Trial]) -> None:
    old = searcher.start(problem, 7)
    for number, trial in enumerate(history):
        asked = _ask(old, [])
        old.tell(trial)
        fresh = searcher.start(problem, 7)
        for earlier in history[:number]:
            fresh.tell(earlier)
        told = _ask(fresh, [])
        assert told == asked, f"a searcher told the history must ask what the old one asked, differs at trial {number}"
        assert _ask(fresh, []) == told, "asking twice with nothing told in between must give the same answer"


def _check_asynchronous(searcher: Searcher, problem: Problem, trials: int) -> None:
    """Three workers, results out of order; and what a search was told so, a new one takes up with the same still pending."""
    search, rng = searcher.start(problem, 3), np.random.default_rng(0)
    pending: list[tuple[int, Proposal]] = []
    told: list[Trial] = []
    seen: set[Genome] = set()
    number = 0
    while number < trials:
        while len(pending) < 3 and number < trials:
            proposal = _ask(search, [p.genome for _, p in pending])
            if number % 7 == 5:
                fresh = searcher.start(problem, 3)
                for trial in told:
                    fresh.tell(trial)
                again = _ask(fresh, [p.genome for _, p in pending])
                assert again == proposal, f"a searcher told the history must ask the same with {len(pending)} pending"
            if not isinstance(proposal, Proposal):
                assert pending or proposal is DONE, "WAIT is an answer only while something is pending"
                break
            _check_proposal(problem, proposal, seen, [p.genome for _, p in pending])
            seen.add(proposal.genome)
            pending.append((number, proposal))
            number += 1
        if not pending:
            break
        done, proposal = pending.pop(int(rng.integers(len(pending))))
        told.append(closed(problem, done, proposal, toy_score(proposal.genome)))
        search.tell(told[-1])


def _check_failures(searcher: Searcher, problem: Problem, trials: int) -> None:
    """Every third trial fails, every fourth scores NaN, and the first five fail."""
    search = searcher.start(problem, 5)
    seen: set[Genome] = set()
    for number in range(trials):
        proposal = _ask(search, [])
        if not isinstance(proposal, Proposal):
            left = next((genome for genome in feasible_genomes(problem) if genome not in seen), None)
            assert left is None, f"a searcher must go on after failures: {left} was never proposed"
            return
        _check_proposal(problem, proposal, seen, [])
        seen.add(proposal.genome)
        score: Score | None = toy_score(proposal.genome)
        if number < 5 or number % 3 == 0:
            score = None
        elif number % 4 == 0:
            score = Score({"fd": math.nan})
        search.tell(closed(problem, number, proposal, score, "told to fail"))


def _check_exhaustion(searcher: Searcher) -> None:
    """All feasible genomes are found, in bounded time each, and then the searcher says DONE."""
    few = replace(table_problem(3, 3), limits={"macs_share": 0.6, "params": 3})
    for problem in (table_problem(3, 3, 0.6), table_problem(4, 4, 1 / 16), few):
        search = searcher.start(problem, 11)
        possible = set(feasible_genomes(problem))
        for number in range(10 * len(possible) + 100):
            proposal = _ask(search, [])
            if not isinstance(proposal, Proposal):
                break
            _check_proposal(problem, proposal, set(), [])
            if problem.feasible(proposal.genome):
                assert proposal.genome in possible, f"{proposal.genome} was proposed twice while new genomes were left"
                possible.discard(proposal.genome)
            search.tell(closed(problem, number, proposal, toy_score(proposal.genome)))
        assert not possible, f"{len(possible)} feasible genomes were never proposed"
        assert _ask(search, []) is DONE, "with nothing new left, the answer is DONE"


def _ask(search: Search, pending: Sequence[Genome]) -> Any:
    started = time.monotonic()
    answer = search.ask(pending)
    assert time.monotonic() - started < SECONDS_PER_ASK, "ask must take bounded time"
    return answer


def _check_proposal(problem: Problem, proposal: Proposal, seen: set[Genome], pending: Sequence[Genome]) -> None:
    assert "probe" in proposal.origin or problem.feasible(proposal.genome), (
        f"{proposal.genome} breaks the limits {dict(problem.limits)}"
    )
    assert proposal.genome not in pending, f"{proposal.genome} is pending"
    assert proposal.genome not in seen, f"{proposal.genome} was proposed before"
    json.dumps(dict(proposal.origin))


def check_space(space: SearchSpace, samples: int = 50) -> None:
    """All laws of a space: total and canonical decoding, exact additive costs, reachable budgets."""
    rng = np.random.default_rng(0)
    sizes = [len(choice.options) for choice in space.choices]
    assert len({choice.name for choice in space.choices}) == len(sizes), "choice names must differ"
    intervals = [choice.interval for choice in space.choices]
    assert intervals == sorted(intervals), "genes must stand in sampling order"
    tables = space.interval_costs()
    assert [size for table in tables for size in table.shape] == sizes, (
        "interval_costs must have an array for each interval and an axis for each of its choices"
    )
    assert all(table.dtype == np.int64 for table in tables), "MACs are integers"
    costs = IntervalCosts(space)
    assert [tables[k].ndim for k in range(len(tables))] == [genes.stop - genes.start for genes in costs.genes]
    json.dumps(space.describe(), default=list)
    digests: dict[str, Schedule] = {}
    for _ in range(samples):
        genome = tuple(int(rng.integers(size)) for size in sizes)
        schedule = space.decode(genome)
        assert Schedule.from_json(schedule.to_json()) == schedule, "a schedule must survive JSON"
        assert digests.setdefault(schedule.digest, schedule) == schedule, "one digest, one schedule"
        cost = space.cost(genome)
        assert cost["macs"] <= costs.total(genome), "interval_costs must add up to macs at least"
        assert 0 < cost["macs_share"] <= 1 + 1e-12, "macs_share is a share of the full net on all timesteps"
    for wrong in ((0,) * (len(sizes) + 1), (sizes[0], *(0,) * (len(sizes) - 1)), (-1, *(0,) * (len(sizes) - 1))):
        try:
            space.decode(wrong)
        except ValueError:
            continue
        raise AssertionError(f"decoding {wrong} must raise ValueError")
    for genome in (cheapest(space), dearest(space)):
        assert space.cost(genome)["macs"] <= costs.total(genome)
    assert space.cost(dearest(space))["macs"] == costs.total(dearest(space)), "nothing is saved at full cost"
    least = space.cost(cheapest(space))["macs_share"]
    check_reachable(Problem(space, ("macs",), {"macs_share": least}))
    sent = pickle.loads(pickle.dumps(space))
    assert sent.describe() == space.describe(), (
        "a space must survive pickling, whatever was asked of it: workers get it so"
    )
    assert sent.cost(dearest(space)) == space.cost(dearest(space)), "a worker must count what the space counts here"


def check_supernet(loaded: LoadedSupernet, space: SearchSpace, samples: int = 8) -> None:
    """All laws of a supernet: the subnet of an arch does not depend on what ran before, equals its extraction, and a
    saved and reloaded extraction, a stock model."""
    import tempfile

    import torch

    rng = np.random.default_rng(0)
    x = torch.randn((2, *loaded.state_shape), generator=torch.Generator().manual_seed(0)).to(loaded.device)
    condition = {name: rows.to(loaded.device) for name, rows in (some_condition(loaded, len(x)) or {}).items()}

    def predicted(step: Step) -> Any:
        with torch.inference_mode():
            return loaded.denoiser(step)(x, step.timestep, None, condition or None)[0]

    first: dict[Step, Any] = {}
    for _ in range(2):
        for _ in range(samples):
            genome = tuple(int(rng.integers(len(choice.options))) for choice in space.choices)
            for step in space.decode(genome).steps:
                step = replace(step, reuse=())
                prediction = predicted(step)
                assert prediction[:, : x.shape[1]].shape == x.shape, "a prediction has the shape of its input"
                known = first.setdefault(step, prediction)
                assert torch.equal(known, prediction), f"{step} gives another result after other subnets ran"
    for arch in {arch for step in first for arch in step.archs}:
        timestep = next(step.timestep for step in first if arch in step.archs)
        extracted, ours = loaded.extract(arch), predicted(Step(timestep, arch))
        with tempfile.TemporaryDirectory() as folder:
            extracted.save_pretrained(folder)  # type: ignore[operator]
            for net in (extracted, type(extracted).from_pretrained(folder, low_cpu_mem_usage=False).eval()):  # type: ignore[attr-defined]
                with torch.inference_mode():
                    alone = noise_by(loaded, net.to(loaded.device), x, timestep, condition or None)
                difference = float((alone - ours[:, : x.shape[1]]).abs().max())
                assert difference <= 1e-5, f"extracted {arch} differs from the supernet by {difference}"
        assert loaded.macs(Step(0, frozen(json.loads(json.dumps(arch))))) == loaded.macs(Step(0, arch)) > 0, (
            "an arch must survive JSON"
        )


def check_evaluator(evaluator: Evaluator, supernet: Supernet, space: SearchSpace, folder: Path) -> None:
    """All laws of an evaluator: repeatable, paired, labelled, with an error and an account of what it spent.

    `folder` is a run folder with trained (or initial) weights in `folder/supernet`.
    """
    assert pickle.loads(pickle.dumps(evaluator)).describe() == evaluator.describe(), "a recipe must survive pickling"
    rungs = list(evaluator.rungs)
    assert rungs == sorted(set(rungs)), "rungs increase"
    for _ in evaluator.prepare(folder, 0, "cpu"):
        pass
    assert not list(evaluator.prepare(folder, 0, "cpu")), "what is prepared is not prepared again"
    rng = np.random.default_rng(0)
    genomes = [tuple(int(rng.integers(len(choice.options))) for choice in space.choices) for _ in range(4)]
    schedules = [space.decode((0,) * len(space.choices)), *(space.decode(genome) for genome in genomes)]
    net = supernet.load(folder / "supernet", "cpu")
    loaded = evaluator.load(net, folder)
    schedule = schedules[0]
    for each in schedules:
        score = loaded(each, rungs[0], 1)
        fresh = evaluator.load(supernet.load(folder / "supernet", "cpu"), folder)(each, rungs[0], 1)
        assert score.values == fresh.values, "a score must not depend on what was scored before, not by one bit"
        assert score.replicates == fresh.replicates, "replicates must not depend on what was scored before"
        assert set(score.values) >= set(evaluator.metrics), "a score carries every metric it promises"
        for metric in evaluator.metrics:
            assert math.isfinite(score.values[metric]), f"{metric} must be a number"
            assert str(rungs[0]) in score.labels[metric], "a label says the sample count"
            assert score.error(metric) >= 0, f"{metric} needs a standard error"
            assert score.difference(score, metric) == (0.0, 0.0), "a schedule does not differ from itself"
        assert fresh.spent["seconds"] > 0, "seconds are counted"
        assert fresh.spent["calls"] > 0, "network calls are counted"
        assert fresh.spent["macs"] > 0, "MACs are counted"
        json.dumps(score.to_json())
    assert any(score.error(metric) > 0 for metric in evaluator.metrics), "a score needs a standard error"
    if len(rungs) > 1:
        larger, whole = loaded(schedule, rungs[1], 1), evaluator.load(supernet.load(folder / "supernet", "cpu"), folder)
        assert larger.values == whole(schedule, rungs[1], 1).values, (
            "a larger rung after a smaller one gives what it gives alone"
        )
    images, other = loaded.sample(schedule, 4, 1), loaded.sample(schedule, 4, 2)
    assert images.shape == (4, *net.image_shape), "images have the supernet's image shape"
    assert float(images.abs().max()) <= 1.0, "images are in [-1, 1]"
    assert float((images - other).abs().max()) > 0, "another seed gives other images"
    assert float((loaded.sample(schedule, 2, 1) - images[:2]).abs().max()) < 1e-5, (
        "image i does not depend on how many are drawn"
    )
