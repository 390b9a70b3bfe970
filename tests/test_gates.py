"""Gates learned through the sampler, and the schedules that are made of them."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evaluators.frechet import Frechet
from evaluators.images import Digits
from evaluators.sampling import DDIM, sample
from nas.contracts import Problem, Proposal, Schedule, Snapshot, Step, UserError
from nas.engine.enqueued import Enqueued
from nas.engine.learning import learn_once, learned_file
from nas.engine.ledger import read_ledgers
from nas.engine.session import open_session
from nas.engine.storage import open_storage
from nas.genomes.genetics import dearest, exact_cost
from nas.genomes.timed import TimedSpace, calls, key
from nas.searchers.choosers import Chooser
from nas.searchers.gates import Gates
from nas.searchers.pruner import Pruner, Scorer, dissimilarity, gammas, kept_share, learn_gates, straight_through
from nas.study import Study
from nas.testing import closed, toy_score
from search_spaces.intervals import per_step, uniform
from search_spaces.noise import NoiseSchedule
from search_spaces.options import Options
from search_spaces.patterns import Every, Subset, legal
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.training import Sandwich
from tests.conftest import TINY
from tests.test_cli import ROOT
from tests.test_reuse import DEEP_NET
from tests.test_supernet import randomised

STEPS = uniform(5)
SPACE = Stepwise(DEEP_NET, STEPS, per_step(STEPS), Options((1.0,)), patterns=legal(4))
FULL = SPACE.decode(dearest(SPACE))
QUICK = Pruner(steps=3, batch=2, dimension=8)


def finished(learning: Generator[Any, None, Any]) -> tuple[Any, list[Any]]:
    ticks = []
    while True:
        try:
            ticks.append(next(learning))
        except StopIteration as end:
            return end.value, ticks


@pytest.mark.parametrize("scores", ["network", "plain"])
def test_every_gate_starts_open_at_the_published_probability(scores: Any) -> None:
    logits = Scorer(replace(QUICK, scores=scores), 4, 9, 0)()
    assert logits.shape == (4, 9, 2)
    assert torch.allclose(logits.softmax(-1)[..., 1], torch.tensor(0.7311), atol=1e-4)
    assert (straight_through(logits) == 1).all()


def test_straight_through_gates_are_hard_with_the_gradient_of_the_probability() -> None:
    logits = torch.tensor([[[0.0, 2.0], [1.0, -1.0]]], requires_grad=True)
    gates = straight_through(logits)
    assert gates.tolist() == [[1.0, 0.0]]
    [gradient] = torch.autograd.grad(gates.sum(), logits)
    [expected] = torch.autograd.grad(logits.softmax(-1)[..., 1].sum(), logits)
    assert torch.equal(gradient, expected)


def test_gamma_counts_the_blocks_that_vanish_with_a_block() -> None:
    loaded, arch = DEEP_NET.initial(0), DEEP_NET.uniform(1.0)
    gamma = dict(zip(loaded.blocks(arch), gammas(loaded, arch, False).tolist(), strict=True))
    share = {name: 1 - loaded.macs(Step(0, arch, (name,))) / loaded.macs(Step(0, arch)) for name in gamma}
    assert gamma["u3"] == 1.0  # without it nothing runs at all
    assert gamma["d0"] == pytest.approx(share["d0"])  # everything that reads it can read its old output
    assert gamma["u0"] == pytest.approx(share["u0"] + share["mid"] + share["d3"])
    assert list(gamma.values())[4:] == sorted(list(gamma.values())[4:])


def test_closing_gates_changes_the_trajectory_as_reuse_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The distance that is learned from equals that of the schedule which the gates stand for."""
    loaded, arch = randomised(DEEP_NET), DEEP_NET.uniform(1.0)
    names = loaded.blocks(arch)
    open_gates = [{"d0", "u3"}, {*names}, {"d0", "d1", "u2", "u3"}, {*names}]
    gates = torch.tensor([[float(name in row) for name in names] for row in open_gates])
    reuse = [(), *(loaded.reused(arch, sorted(row)) for row in open_gates)]
    schedule = Schedule(tuple(Step(t, arch, tuple(r)) for t, r in zip(STEPS, reuse, strict=True)))
    from nas.searchers import pruner

    noise = torch.stack(
        [torch.from_numpy(np.random.default_rng((3, i, 0)).standard_normal((1, 8, 8), np.float32)) for i in range(4)]
    )
    with torch.no_grad():
        [distance] = pruner._distances(QUICK, loaded, FULL, names, gates, noise)
    expected = dissimilarity(sample(loaded, schedule, DDIM(), 3, 0, 4), sample(loaded, FULL, DDIM(), 3, 0, 4))
    assert float(distance) == pytest.approx(float(expected), abs=1e-5)
    macs = sum(loaded.macs(step) for step in schedule.steps)
    assert kept_share(loaded, FULL, names, gates, False) == pytest.approx(macs / (5 * loaded.macs(Step(0, arch))))


@pytest.mark.parametrize("scope", ["trajectory", "step"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_learning_is_charged_and_resumes_to_the_same_gates(
    scope: Any, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nas.searchers.pruner.EVERY", 2)
    settings = replace(QUICK, scope=scope, checkpointing=checkpointing, learning_rate=5.0)
    loaded = randomised(DEEP_NET)
    (keep, spent), ticks = finished(learn_gates(settings, loaded, FULL, 1))
    assert keep.shape == (4, 9)
    assert (keep != keep[0, 0]).any()
    runs = 4 if checkpointing and scope == "trajectory" else 3
    assert spent == 3 * 2 * 5 * (1 + runs) * loaded.macs(Step(0, FULL.archs[0]))
    [snapshot] = [tick for tick in ticks if isinstance(tick, Snapshot)]
    (again, also), _ = finished(learn_gates(settings, randomised(DEEP_NET), FULL, 1, snapshot))
    assert torch.equal(again, keep)
    assert also == spent


@pytest.mark.long
def test_a_gate_that_matters_outlives_one_that_does_not() -> None:
    """A block whose weights make its output a constant can be reused for nothing; the others cannot."""
    loaded = randomised(
        Elastic(
            {
                **TINY,
                "block_out_channels": (8, 8),
                "down_block_types": ("DownBlock2D",) * 2,
                "up_block_types": ("UpBlock2D",) * 2,
                "add_attention": False,
            },
            (0.5, 1.0),
        )
    )
    with torch.no_grad():
        for name, parameter in loaded.full.named_parameters():
            if name.startswith("up_blocks.0.upsamplers.0.conv.weight"):
                parameter.zero_()
            else:
                parameter *= 1.5
    steps = uniform(4)
    full = Schedule(tuple(Step(t, loaded.full_arch) for t in steps))
    settings = Pruner(scores="plain", steps=100, batch=4, learning_rate=40.0, sparsity=1.0, floor=0.0)
    (keep, _), _ = finished(learn_gates(settings, loaded, full, 0))
    by_name = dict(zip(loaded.blocks(loaded.full_arch), keep.mean(0).tolist(), strict=True))
    assert by_name["mid"] < 0.5
    assert by_name["u0"] < 0.5
    assert by_name["u1"] > max(by_name["mid"], by_name["u0"]) + 0.2


def chooser(seed: int, space: Stepwise = SPACE, limit: float = 1.0) -> tuple[Chooser, torch.Tensor]:
    problem = Problem(space, ("fd", "macs"), {"macs_share": limit})
    keep = torch.rand((4, 9), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    loaded = DEEP_NET.initial(0)
    from nas.searchers.choosers import meanings

    told = meanings(problem, loaded, space.decode(dearest(space)), False)
    return Chooser(problem, {"keep": keep, **told}), keep


@pytest.mark.parametrize("way", ["bisection", "greedy", "knapsack"])
def test_a_schedule_keeps_the_budget_and_uses_it(way: Any) -> None:
    made, _ = chooser(0)
    full = SPACE.cost(dearest(SPACE))["macs"]
    shares = []
    for share in (0.25, 0.4, 0.6, 0.8, 1.0):
        genome = made.genome(way, share * full)
        shares.append(SPACE.cost(genome)["macs_share"])
        assert shares[-1] <= share
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert shares[2] > 0.4


def test_the_threshold_is_the_lowest_that_keeps_the_budget() -> None:
    """Against a scan over all thresholds, each with the cascade that reuse itself has."""
    made, keep = chooser(1)
    arch, graph = DEEP_NET.uniform(1.0), DEEP_NET.cost.graph(DEEP_NET.uniform(1.0))
    full = SPACE.cost(dearest(SPACE))["macs"]

    def macs(threshold: float) -> int:
        total = DEEP_NET.cost.macs(arch)
        for row in keep.tolist():
            wanted = [name for name, value in zip(graph.blocks, row, strict=True) if value >= threshold]
            total += DEEP_NET.cost.macs(arch, graph.collapse(graph.expand(graph.blocks) - graph.live(wanted)))
        return total

    for share in (0.3, 0.5, 0.7):
        expected = max(m for m in map(macs, [*keep.flatten().tolist(), 2.0]) if m <= share * full)
        assert SPACE.cost(made.genome("bisection", share * full))["macs"] == expected


def test_the_knapsack_is_exact() -> None:
    steps = uniform(3)
    space = Stepwise(DEEP_NET, steps, per_step(steps), Options((1.0,)), patterns=legal(4))
    problem = Problem(space, ("fd", "macs"), {})
    loaded = DEEP_NET.initial(0)
    from nas.searchers.choosers import meanings

    told = meanings(problem, loaded, space.decode(dearest(space)), False)
    keep = torch.rand((2, 9), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    made = Chooser(problem, {"keep": keep, **told})
    budget = 0.6 * space.cost(dearest(space))["macs"]

    def regret(genome: Any) -> float:
        total = 0.0
        steps_run = {step.timestep: step for step in space.decode(genome).steps}
        for t, row in zip(steps[1:], keep.tolist(), strict=True):
            step = steps_run.get(t)
            reused = loaded.expanded(step.arch, step.reuse) if step else loaded.blocks(loaded.full_arch)
            for name, probability in zip(loaded.blocks(loaded.full_arch), row, strict=True):
                total -= np.log(1 - probability) if name in reused else 0.0
        return total

    whole = len(space.choices[0].options) - 1
    every = ((whole, a, b) for a, b in itertools.product(range(47), repeat=2))
    best = min(regret(genome) for genome in every if space.cost(genome)["macs"] <= budget)
    assert regret(made.genome("knapsack", budget)) == pytest.approx(best)


def test_choosers_reckon_in_the_time_that_is_limited() -> None:
    from nas.searchers.choosers import meanings

    rng = np.random.default_rng(0)
    timed = TimedSpace(SPACE, {key(step): 1.0 + float(rng.random()) for step in calls(SPACE)})
    full = exact_cost(timed, dearest(timed))
    problem = Problem(timed, ("fd",), {"latency_ms": 0.7 * full / 1e6})
    told = meanings(problem, DEEP_NET.initial(0), timed.decode(dearest(timed)), False)
    made = Chooser(problem, {"keep": torch.rand((4, 9), dtype=torch.float64), **told})
    assert made.budgets[1] == pytest.approx(0.7 * full)
    for share in (0.4, 0.5, 0.6):
        genome = made.genome("bisection", share * full)
        assert made.budgets[0] <= exact_cost(timed, genome) <= share * full


@pytest.mark.parametrize("told", [True, False])
def test_what_is_enqueued_takes_no_turn_of_its_own(told: bool) -> None:
    """Each way begins with the whole budget, where what it learned is worth most, whether the enqueued ones are scored by then or still run."""
    from nas.searchers.choosers import meanings

    problem = Problem(SPACE, ("fd", "macs"), {"macs_share": 0.8})
    meaning = meanings(problem, DEEP_NET.initial(0), FULL, False)
    learned = {"keep": torch.rand((4, 9), generator=torch.Generator().manual_seed(0), dtype=torch.float64), **meaning}
    own = [tuple(46 if place == gene else 0 for place in range(5)) for gene in range(4)]
    search = Enqueued(Gates(QUICK).start(problem, 0, learned), own, problem)
    asked: list[Proposal] = []
    for number in range(len(own) + 3):
        proposal = search.ask([] if told else [one.genome for one in asked])
        assert isinstance(proposal, Proposal)
        asked.append(proposal)
        if told:
            search.tell(closed(problem, number, proposal, toy_score(proposal.genome)))
    assert [one.genome for one in asked[:4]] == own
    assert len({one.origin["budget"] for one in asked[4:]}) == 1
    assert asked[4].origin["budget"] == pytest.approx(0.8 * SPACE.cost(dearest(SPACE))["macs"])


def test_patterns_and_widths_too_and_within_limits() -> None:
    patterns = (Every(1), Every(2), Every(2, ("d0", "u3")), Subset(1))
    space = Stepwise(DEEP_NET, STEPS, (3, 2), patterns=patterns)
    made, _ = chooser(2, space, limit=0.7)
    assert made.budgets[1] == pytest.approx(0.7 * space.cost(dearest(space))["macs"])
    for way in ("bisection", "greedy", "knapsack"):
        schedule = space.decode(made.genome(way, made.budgets[1]))
        assert schedule.archs == (DEEP_NET.uniform(1.0),)


def test_ssim_window_fits_small_images() -> None:
    x = torch.rand(2, 1, 8, 8) * 2 - 1
    assert float(dissimilarity(x, x)) == pytest.approx(0, abs=1e-6)
    assert float(dissimilarity(x, -x)) > 0.5


def gated() -> Study:
    """The tiny study with reuse instead of widths."""
    net, images, steps = Elastic(TINY, widths=(0.25, 0.5, 1.0)), Digits(), uniform(4)
    return Study(
        name="tiny",
        space=Stepwise(net, steps, per_step(steps), Options((1.0,)), patterns=legal(2)),
        supernet=net,
        images=images,
        training=Sandwich(steps=20, batch=16, warmup=5, checkpoint_every=10),
        evaluator=Frechet(images, rungs=(32, 64)),
        searchers={"gates": Gates(Pruner(steps=4, batch=2, dimension=8))},
        limits={"macs_share": 0.6},
        trials=10,
        verified=3,
    )


def test_a_run_learns_once_and_proposes_within_the_limit(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gated_study = gated()
    monkeypatch.setattr("nas.searchers.pruner.EVERY", 2)
    (tmp_path / "supernet").symlink_to(tiny_run / "supernet")
    (tmp_path / "features").symlink_to(tiny_run / "features")
    with open_session(gated_study, tmp_path) as session:
        for _ in session.prepare(threads=1):
            pass
        learning: Any = learn_once(gated_study, tmp_path, "cpu", "gates", 0)
        for _, tick in zip(range(3), learning, strict=False):
            assert tick.done
        learning.close()
        info = gated_study.ledger_info(tmp_path, "gates", 0)
        file = learned_file(tmp_path, info)
        assert not file.exists()
        assert file.with_suffix(".snapshot").exists()
        with pytest.raises(UserError, match="gates learns before it searches, and has not"):
            session.conductor("gates")
        ticks = list(session.learn("gates", 0))
        assert [tick.done for tick in ticks] == [3, 4]  # goes on where the snapshot was taken
        assert not file.with_suffix(".snapshot").exists()
        assert list(session.learn("gates", 0)) == []
        session.run(session.conductor("gates"))
        trials = [t for t in session.conductor("gates").ledger.trials if t.rung == 32]
    assert len(trials) == 10
    operators = {str(trial.origin["operator"]) for trial in trials}
    assert {"bisection", "greedy", "knapsack"} & operators
    assert all(trial.cost["macs_share"] <= 0.6 for trial in trials)


def test_what_is_learned_serves_every_budget_and_nothing_else(tiny_run: Path, tmp_path: Path) -> None:
    for part in ("supernet", "features"):
        (tmp_path / part).symlink_to(tiny_run / part)

    def of(study: Study, seed: int = 0) -> tuple[Path, bool]:
        """The file that serves it, and whether it had to be learned."""
        learned = bool(list(learn_once(study, tmp_path, "cpu", "gates", seed)))
        file = learned_file(tmp_path, study.ledger_info(tmp_path, "gates", seed))
        assert file.exists()
        return file, learned

    def tighter(study: Study) -> Study:
        return replace(study, limits={"macs_share": 0.4})

    first = gated()
    other = replace(first, searchers={"gates": Gates(Pruner(steps=4, batch=2, dimension=8), ("greedy",))})
    every = [of(first), of(other), of(first, seed=1)]
    files = [file for file, _ in every]
    assert len(set(files)) == 3
    assert all(learned for _, learned in every)
    assert [of(tighter(first)), of(tighter(other)), of(tighter(first), seed=1)] == [(file, False) for file in files]
    assert of(tighter(replace(first, searchers={"gates": Gates(Pruner(steps=2, batch=2))})))[1]
    elsewhere = replace(first, space=replace(first.space, intervals=(2, 2)))  # type: ignore[type-var]
    assert of(elsewhere)[1]
    files[0].unlink()
    assert of(first) == (files[0], True)
    with open_session(tighter(first), tmp_path) as session:
        session.run(session.conductor("gates"))
        trials = session.conductor("gates").ledger.trials
    assert all(trial.cost["macs_share"] <= 0.4 for trial in trials)
    assert "random, nothing learned" not in {trial.origin.get("operator") for trial in trials}


KILLED = """
import os, signal, sys
from pathlib import Path
import nas.engine.learning
from nas.engine.session import open_session
from nas.study import load_study
study = load_study(sys.argv[1])
after = int(sys.argv[3])
def note(*_):
    global after
    after -= 1
    if not after:
        os.kill(os.getpid(), signal.SIGKILL)
with open_session(study, Path(sys.argv[2])) as session:
    for _ in session.learn("gates"):
        note()
    session.run(session.conductor("gates", on_settled=note))
"""

STUDY = """
from dataclasses import replace
import nas.searchers.pruner
from tests.test_gates import gated
nas.searchers.pruner.EVERY = 2
study = gated()
"""


@pytest.mark.long
def test_killed_while_it_learns_and_while_it_searches_it_ends_alike(tiny_run: Path, tmp_path: Path) -> None:
    study = tmp_path / "study.py"
    study.write_text(STUDY)
    found = []
    for name, kills in (("killed", (3, 3, 2, 4, 0)), ("whole", (0,))):
        folder = tmp_path / name
        folder.mkdir()
        for part in ("supernet", "features"):
            (folder / part).symlink_to(tiny_run / part)
        for after in kills:
            done = subprocess.run([sys.executable, "-c", KILLED, study, folder, str(after)], cwd=ROOT, check=False)
            assert done.returncode == (-signal.SIGKILL if after else 0)
        [(_, trials)] = [(info, t) for info, t in read_ledgers(open_storage(folder)) if info.searcher == "gates"]
        found.append([(t.genome, t.rung, t.status, t.origin) for t in trials])
    assert found[0] == found[1]
    assert len(found[0]) > 10


def test_a_space_that_gates_cannot_serve_is_refused_before_anything_is_learned() -> None:
    for patterns in ((Every(2), Every(3)), (Subset(3), Subset(3, "quadratic"))):
        space = Stepwise(DEEP_NET, STEPS, (5,), Options((1.0,)), patterns=patterns)
        learning = Gates(QUICK).learn(Problem(space, ("fd", "macs"), {}), DEEP_NET.initial(0), Digits().load(), 0)
        with pytest.raises(UserError, match=r"give the space a pattern that runs all steps"):
            next(learning)
    with pytest.raises(UserError, match="dimension=30"):
        Pruner(dimension=30)


def test_a_space_without_reuse_is_refused(tiny_study: Study, tiny_run: Path, tiny_net: Elastic) -> None:
    learning = Gates(QUICK).learn(tiny_study.problem, tiny_net.load(tiny_run / "supernet", "cpu"), Digits().load(), 0)
    with pytest.raises(UserError, match="offers no blocks to reuse"):
        finished(learning)


@pytest.mark.parametrize("scope", ["trajectory", "step"])
def test_gates_of_what_predicts_the_image_are_learned(scope: Any) -> None:
    """Where hardly any signal is left the noise follows in float64."""
    loaded = randomised(replace(DEEP_NET, noise=NoiseSchedule(prediction="v_prediction")))
    (keep, spent), _ = finished(learn_gates(replace(QUICK, scope=scope), loaded, FULL, 1))
    assert keep.isfinite().all()
    assert spent > 0
